// Threads that share the work of a kernel, and how they wait.
//
// A thread takes the next share of the work when it is done with one; shares become smaller, so that all end at once.
// While the cores are ours the threads are PyTorch's own (OpenMP), which spin between kernels and are at hand at once;
// beside them, others would share their cores. Where another process holds a core, spinning is what hurts: the core that
// waits is kept from the thread that is waited for. Then the threads are ours: nobody waits for one that has no share, and
// one that has to wait goes to sleep after some microseconds. Where there are more threads than cores OpenMP's hardly
// spin, and they stay: all of them wake for every kernel, which gives us more of a core that others use too.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

namespace dpo_kernels {

constexpr int64_t kThreads = 64;  // more do not run: what each holds is counted in the memory budget
constexpr int64_t kShares = 4;    // of what is left, divided among the threads, a thread takes so small a share

// As many as PyTorch may use.
inline int64_t threads() { return std::min<int64_t>(at::get_num_threads(), kThreads); }

// Runs work() in the calling thread and in up to helpers others at once, and returns when all of them have returned. A
// helper that is late may not run it at all. Rethrows an exception of any of them. work returns how many shares it took.
void run_together(int64_t helpers, const std::function<int64_t()>& work);

// The same, on threads of ours.
void run_on_own_threads(int64_t helpers, const std::function<int64_t()>& work);

// Whether the cores are crowded by others. It is counted in kernels: between them time passes that says nothing. A
// single wait may be the system's noise, so it is believed for a few kernels, and for twice as many each time that the next
// one follows at once. Races between callers cost a kernel at the wrong threads.
class Crowd {
 public:
  // Asked once a kernel.
  bool is_here();
  // What a kernel on PyTorch's threads was like.
  void saw(bool wait);
  // For tests: so it is from now on, until the other is said.
  void set(bool crowded);

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kLeast = 16, kMost = 1024;  // a step has 20 to 100 kernels
  static constexpr std::chrono::seconds kLongest{2};   // of large kernels
  std::atomic<int64_t> left_{0};      // kernels for which it is still believed
  std::atomic<Clock::time_point> until_{Clock::time_point::min()};
  std::atomic<int64_t> believed_{0};  // for how many, the last time
  std::atomic<int64_t> calm_{0};      // kernels without a wait since then
};

// That of this process.
extern Crowd crowd;

// For tests: how many times threads of ours were asked to help.
int64_t runs_on_own_threads();

// Runs work(first, last) over [0, count) on at most threads() threads, in shares of at least `least`; then done() once in
// each thread that took part.
template <typename Work, typename Done>
void run_tasks(int64_t count, int64_t least, const Work& work, const Done& done) {
  const int64_t workers = std::min((count + least - 1) / least, threads());
  const int64_t parts = std::max<int64_t>(workers, 1) * kShares;
  std::atomic<int64_t> next{0};
  run_together(workers - 1, [&] {
    int64_t taken = 0, first = next;
    while (first < count) {
      const int64_t last = std::min(first + std::max((count - first) / parts, least), count);
      if (next.compare_exchange_weak(first, last)) {  // else first is what another thread has left
        work(first, last);
        ++taken;
        first = next;
      }
    }
    done();
    return taken;
  });
}

template <typename Work>
void run_tasks(int64_t count, int64_t least, const Work& work) {
  run_tasks(count, least, work, [] {});
}

}  // namespace dpo_kernels
