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
#include <memory>
#include <thread>
#include <utility>
#include <vector>

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
  static constexpr int64_t kLeast = 16, kMost = 1024;  // a step has 4 to 100 kernels
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

// Calls work(first, last) with shares of what is left of [0, count), divided among parts of threads, of at least `least`
// each; returns how many it took.
template <typename Work>
int64_t take_shares(std::atomic<int64_t>& next, int64_t count, int64_t least, int64_t parts, const Work& work) {
  int64_t taken = 0, first = next;
  while (first < count) {
    const int64_t last = std::min(first + std::max((count - first) / parts, least), count);
    if (next.compare_exchange_weak(first, last)) {  // else first is what another thread has left
      work(first, last);
      ++taken;
      first = next;
    }
  }
  return taken;
}

// Runs work(first, last) over [0, count) on at most threads() threads, in shares of at least `least`; then done() once in
// each thread that took part.
template <typename Work, typename Done>
void run_tasks(int64_t count, int64_t least, const Work& work, const Done& done) {
  const int64_t workers = std::min((count + least - 1) / least, threads());
  std::atomic<int64_t> next{0};
  run_together(workers - 1, [&] {
    const int64_t taken = take_shares(next, count, least, std::max<int64_t>(workers, 1) * kShares, work);
    done();
    return taken;
  });
}

template <typename Work>
void run_tasks(int64_t count, int64_t least, const Work& work) {
  run_tasks(count, least, work, [] {});
}

// One kernel of several phases. A thread goes on to the next phase while others are at the last, and waits for nothing but
// the parts that its share is made from: one that lost its core in the middle of a share keeps few waiting. A phase may
// wait for earlier ones only, so that no two threads wait for each other.
class Phases {
 public:
  // work(first, last) over [0, count).
  void add(int64_t count, std::function<void(int64_t, int64_t)> work) {
    phases_.push_back(std::make_unique<Phase>(count, std::move(work)));
  }

  // Then done() once in each thread that took part. Rethrows an exception of any of them.
  void run(const std::function<void()>& done);

  // For tests: on so many threads of ours beside the caller.
  void run_on_own_threads(int64_t helpers, const std::function<void()>& done);

  // Inside work: until ready(). False where a thread failed, and what was waited for may never be. Gives its core to others
  // meanwhile, and sleeps where that takes long.
  template <typename Ready>
  bool wait(const Ready& ready) const {
    if (ready()) return true;
    for (const auto since = Clock::now(); !ready(); sleep(since))
      if (failed_) return false;
    return true;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds kYields{100};  // before it sleeps
  static constexpr std::chrono::microseconds kCrowded{1000};  // no share of a phase takes so long while the cores are ours
  void sleep(Clock::time_point since) const;
  int64_t take_all(int64_t workers, const std::function<void()>& done);
  struct Phase {
    Phase(int64_t count, std::function<void(int64_t, int64_t)> work) : count(count), work(std::move(work)) {}
    const int64_t count;
    const std::function<void(int64_t, int64_t)> work;
    std::atomic<int64_t> next{0};
  };
  std::vector<std::unique_ptr<Phase>> phases_;
  std::atomic<bool> failed_{false};
  mutable std::atomic<int64_t> longest_wait_{0};  // microseconds
};

// What one phase makes and a later one waits for: parts, each of some pieces.
class Parts {
 public:
  Parts(int64_t count, int64_t pieces) : left_(count), missing_(count * pieces) {
    for (auto& left : left_) left = pieces;
  }
  void made(int64_t part) {
    left_[part].fetch_sub(1, std::memory_order_release);
    missing_.fetch_sub(1, std::memory_order_release);
  }
  bool ready(int64_t part) const { return left_[part].load(std::memory_order_acquire) == 0; }
  bool all_ready() const { return missing_.load(std::memory_order_acquire) == 0; }

 private:
  std::vector<std::atomic<int64_t>> left_;
  std::atomic<int64_t> missing_;
};

}  // namespace dpo_kernels
