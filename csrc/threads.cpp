#include "threads.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <limits>
#include <mutex>
#include <string_view>
#include <thread>
#include <vector>

namespace dpo_kernels {
namespace {

// How long a thread looks for what it waits for before it sleeps. Between two kernels of a step lie 20 to 60
// microseconds of Python.
constexpr std::chrono::microseconds kHelperLooks{100}, kCallerLooks{20};

// Whether found() within that time. Threads that outnumber the cores do not look: they would look in each other's time.
template <typename F>
bool looks(std::chrono::microseconds time, bool at_all, const F& found) {
  if (!at_all) return found();
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

struct Job {
  const std::function<int64_t()>& work;
  int64_t wanted;  // helpers that may still come
  std::atomic<int64_t> running{0};
  std::exception_ptr error = nullptr;
};

class Pool {
 public:
  static int64_t cores() {
    static const int64_t found = std::max(1u, std::thread::hardware_concurrency());
    return found;
  }

  void run(int64_t helpers, const std::function<int64_t()>& work) {
    Job job{work, helpers};
    {
      std::lock_guard lock(mutex_);
      for (; started_ < helpers; ++started_) std::thread([this] { help(); }).detach();
      outnumber_ = helpers >= cores();
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
      looks(kCallerLooks, !outnumber_, [&] { return job.running == 0; });
      lock.lock();
      done_.wait(lock, [&] { return job.running == 0; });
    }
    if (job.error) error = job.error;
    lock.unlock();
    if (error) std::rethrow_exception(error);
  }

 private:
  [[noreturn]] void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      if (jobs_.empty()) {
        lock.unlock();
        looks(kHelperLooks, !outnumber_, [&] { return open_ > 0; });
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
      if (error) job.error = error;
      if (--job.running == 0) done_.notify_all();
    }
  }

  // No further helper may come.
  void close(Job& job) {
    const auto at = std::find(jobs_.begin(), jobs_.end(), &job);
    if (at == jobs_.end()) return;
    jobs_.erase(at);
    open_.fetch_sub(1);
  }

  std::mutex mutex_;
  std::condition_variable new_job_, done_;
  std::vector<Job*> jobs_;      // that helpers may come to, oldest first
  std::atomic<int64_t> open_{0};  // how many
  std::atomic<bool> outnumber_{false};  // threads of the last job, its caller among them, the cores
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
  static const bool binds = [] {
    const char* bind = std::getenv("OMP_PROC_BIND");
    const bool asked = bind != nullptr && std::string_view(bind) != "false" && std::string_view(bind) != "FALSE";
    return asked || std::getenv("GOMP_CPU_AFFINITY") != nullptr || std::getenv("KMP_AFFINITY") != nullptr;
  }();
  return binds;
}

using Clock = std::chrono::steady_clock;

// Whether the cores are crowded by others, in kernels of ours, since time passes without any. A single wait may be the
// system's noise, so it is believed for a few kernels, and for twice as many each time that the next one follows at once.
// Races between callers cost a kernel at the wrong threads.
class Crowd {
 public:
  // Asked once a kernel.
  bool is_here() {
    if (left_.load() <= 0) return false;
    left_.fetch_sub(1);
    return true;
  }

  void saw(bool wait) {
    if (wait) {
      believed_ = calm_.load() < believed_.load() ? std::min<int64_t>(2 * believed_, kMost) : kLeast;
      left_ = believed_.load();
      calm_ = 0;
    } else {
      calm_.fetch_add(1);
    }
  }

  void set(bool crowded) {
    believed_ = 0;
    calm_ = 0;
    left_ = crowded ? std::numeric_limits<int64_t>::max() : 0;
  }

 private:
  static constexpr int64_t kLeast = 16, kMost = 1024;  // a step has 20 to 100 kernels
  std::atomic<int64_t> left_{0};      // kernels for which it is still believed
  std::atomic<int64_t> believed_{0};  // for how many, the last time
  std::atomic<int64_t> calm_{0};      // kernels without a wait since then
};
Crowd crowd;

// Runs work() on PyTorch's threads, and sees whether one of them was waited for longer than a share takes.
void run_on_openmp(int64_t helpers, const std::function<int64_t()>& work) {
  const auto start = Clock::now();
  auto end_of_own = start;
  int64_t taken = 0;
  at::parallel_for(0, helpers + 1, 1, [&](int64_t first, int64_t) {
    const int64_t shares = work();
    if (first == 0) taken = shares, end_of_own = Clock::now();  // the calling thread
  });
  const auto end = Clock::now();
  const auto share = (end_of_own - start) / std::max<int64_t>(taken, 1);
  crowd.saw(end - end_of_own > 2 * share + std::chrono::microseconds(300));
}

}  // namespace

void set_crowded(bool crowded) { crowd.set(crowded); }

void run_together(int64_t helpers, const std::function<int64_t()>& work) {
  if (helpers <= 0 || at::in_parallel_region()) {
    work();
  } else if (openmp_binds() || (helpers < Pool::cores() && !crowd.is_here())) {
    run_on_openmp(helpers, work);
  } else {
    pool()->run(helpers, work);
  }
}

}  // namespace dpo_kernels
