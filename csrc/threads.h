// Threads that share the work of a kernel, and how they wait.
//
// PyTorch's own (OpenMP) take fixed shares and spin until the last one is done. Where another process holds a core, the
// one that waits keeps the other core busy with waiting. Here a thread takes the next share when it is done with one, and
// nobody waits for a thread that has no share; who has to wait sleeps after some microseconds, so that the system
// gives the core to the thread that is waited for.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace dpo_kernels {

constexpr int64_t kThreads = 64;  // more do not run: what each holds is counted in the memory budget
constexpr int64_t kShares = 8;    // of its work that a thread takes one by one

// As many as PyTorch may use.
inline int64_t threads() { return std::min<int64_t>(at::get_num_threads(), kThreads); }

// Runs work() in the calling thread and in up to helpers others at once, and returns when all of them have returned. A
// helper that is late does not run it at all. Rethrows an exception of any of them.
void run_together(int64_t helpers, const std::function<void()>& work);

// Runs work(first, last) over [0, count) on at most threads() threads, in shares of at least `least`; then done() once in
// each thread that took part.
template <typename Work, typename Done>
void run_tasks(int64_t count, int64_t least, const Work& work, const Done& done) {
  const int64_t workers = std::min((count + least - 1) / least, threads());
  const int64_t share = std::max(count / (std::max<int64_t>(workers, 1) * kShares), least);
  std::atomic<int64_t> next{0};
  run_together(workers - 1, [&] {
    for (int64_t i = next.fetch_add(share); i < count; i = next.fetch_add(share)) work(i, std::min(i + share, count));
    done();
  });
}

template <typename Work>
void run_tasks(int64_t count, int64_t least, const Work& work) {
  run_tasks(count, least, work, [] {});
}

}  // namespace dpo_kernels
