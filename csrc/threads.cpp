#include "threads.h"

#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dpo_kernels {
namespace {

// How long a thread looks for what it waits for before it sleeps. Between two kernels of a step lie 20 to 60
// microseconds of Python.
constexpr std::chrono::microseconds kHelperLooks{100}, kCallerLooks{20};

// Whether found() within that time.
template <typename F>
bool looks(std::chrono::microseconds time, const F& found) {
  const auto until = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (found()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#else
      std::this_thread::yield();
#endif
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

// That this process may run on.
int64_t cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Job {
  const std::function<int64_t()>& work;
  int64_t wanted;  // helpers that may still come
  std::atomic<int64_t> running{0};
  std::exception_ptr error = nullptr;
};

class Pool {
 public:
  void run(int64_t helpers, const std::function<int64_t()>& work) {
    Job job{work, helpers};
    {
      std::lock_guard lock(mutex_);
      ++runs_;
      start(helpers);
      jobs_.push_back(&job);
      open_.fetch_add(1);
      for (int64_t i = std::min<int64_t>(helpers, sleeping_); i > 0; --i) new_job_.notify_one();
    }
    std::exception_ptr error;
    try {
      work();
    } catch (...) {
      error = std::current_exception();
    }
    std::unique_lock lock(mutex_);
    close(job);
    if (job.running > 0) {
      lock.unlock();
      looks(kCallerLooks, [&] { return job.running == 0; });
      lock.lock();
      done_.wait(lock, [&] { return job.running == 0; });
    }
    if (job.error) error = job.error;
    lock.unlock();
    if (error) std::rethrow_exception(error);
  }

  int64_t runs() const { return runs_; }

 private:
  [[noreturn]] void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      if (jobs_.empty()) {
        lock.unlock();
        looks(kHelperLooks, [&] { return open_ > 0; });
        lock.lock();
        ++sleeping_;
        new_job_.wait(lock, [&] { return !jobs_.empty(); });
        --sleeping_;
      }
      Job& job = *jobs_.front();
      ++job.running;
      if (--job.wanted == 0) close(job);
      lock.unlock();
      std::exception_ptr error;
      try {
        job.work();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (error && !job.error) job.error = error;
      if (--job.running == 0) done_.notify_all();
    }
  }

  // Fewer where the system gives no more: a missing helper is only missed. Signals stay with the threads of the program.
  void start(int64_t helpers) {
    if (started_ >= helpers) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < helpers; ++started_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // No further helper may come.
  void close(Job& job) {
    const auto at = std::find(jobs_.begin(), jobs_.end(), &job);
    if (at == jobs_.end()) return;
    jobs_.erase(at);
    open_.fetch_sub(1);
  }

  std::mutex mutex_;
  std::atomic<int64_t> runs_{0};
  std::condition_variable new_job_, done_;
  std::vector<Job*> jobs_;      // that helpers may come to, oldest first
  std::atomic<int64_t> open_{0};  // how many
  int64_t started_ = 0, sleeping_ = 0;
};

// Never destroyed: its threads run until the process ends. A forked process has none of them and begins anew.
Pool*& pool() {
  static Pool* one = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return one;
}

// Whether OpenMP binds threads to cores: then one that is started from a bound thread would share its only core.
bool openmp_binds() {
#if defined(_OPENMP)
  return omp_get_proc_bind() != omp_proc_bind_false;
#else
  return false;
#endif
}

// Runs work() on PyTorch's threads, and sees whether one of them waited for longer than shares take.
void run_on_openmp(int64_t helpers, const std::function<int64_t()>& work) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  std::atomic<Clock::time_point> first_end{Clock::time_point::max()};
  std::atomic<int64_t> shares{0};
  at::parallel_for(0, helpers + 1, 1, [&](int64_t, int64_t) {
    shares += work();
    const auto end = Clock::now();
    auto before = first_end.load();
    while (end < before && !first_end.compare_exchange_weak(before, end)) {
    }
  });
  const auto end = Clock::now();
  const auto share = (end - start) * (helpers + 1) / std::max<int64_t>(shares, 1);
  if (helpers < cores()) crowd.saw(end - first_end.load() > 3 * share + std::chrono::microseconds(300));
}

}  // namespace

Crowd crowd;

bool Crowd::is_here() {
  if (left_.load() <= 0 || Clock::now() > until_.load()) return false;
  left_.fetch_sub(1);
  return true;
}

void Crowd::saw(bool wait) {
  if (!wait) {
    calm_.fetch_add(1);
    return;
  }
  believed_ = calm_.load() < believed_.load() ? std::min<int64_t>(2 * believed_, kMost) : kLeast;
  left_ = believed_.load();
  until_ = Clock::now() + kLongest;
  calm_ = 0;
}

void Crowd::set(bool crowded) {
  believed_ = 0;
  calm_ = 0;
  left_ = crowded ? std::numeric_limits<int64_t>::max() : 0;
  until_ = crowded ? Clock::time_point::max() : Clock::time_point::min();
}

int64_t Phases::take_all(int64_t workers, const std::function<void()>& done) {
  int64_t taken = 0;
  try {
    for (const auto& phase : phases_) {
      if (failed_) break;
      taken += take_shares(phase->next, phase->count, 1, workers * kShares, phase->work);
    }
  } catch (...) {
    failed_ = true;
    throw;
  }
  done();
  return taken;
}

void Phases::run(const std::function<void()>& done) {
  int64_t workers = 1;
  for (const auto& phase : phases_) workers = std::max(workers, std::min(phase->count, threads()));
  run_together(workers - 1, [&] { return take_all(workers, done); });
  if (workers <= cores() && longest_wait_ > kCrowded.count()) crowd.saw(true);
}

void Phases::run_on_own_threads(int64_t helpers, const std::function<void()>& done) {
  dpo_kernels::run_on_own_threads(helpers, [&] { return take_all(helpers + 1, done); });
}

void Phases::sleep(Clock::time_point since) const {
  const auto waited = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - since);
  int64_t before = longest_wait_;
  while (waited.count() > before && !longest_wait_.compare_exchange_weak(before, waited.count())) {
  }
  if (waited > kYields) std::this_thread::sleep_for(kYields);
  else std::this_thread::yield();
}

int64_t runs_on_own_threads() { return pool()->runs(); }

void run_on_own_threads(int64_t helpers, const std::function<int64_t()>& work) { pool()->run(helpers, work); }

void run_together(int64_t helpers, const std::function<int64_t()>& work) {
  if (helpers <= 0 || at::in_parallel_region()) {
    work();
  } else if (!openmp_binds() && helpers < cores() && crowd.is_here()) {
    run_on_own_threads(helpers, work);
  } else {
    run_on_openmp(helpers, work);
  }
}

}  // namespace dpo_kernels
