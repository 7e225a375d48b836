// Callers in several threads ask for short and long work, some of which throws; for the thread sanitizer (make sanitize).
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "threads.h"

int main() {
  auto caller = [](int64_t seed) {
    for (int64_t round = 0; round < 3000; ++round) {
      const int64_t count = (7 * round + seed) % 40, fails = round % 97 == 3 ? count / 2 : -1;
      std::vector<int> runs(count, 0);
      bool failed = false;
      try {
        std::atomic<int64_t> next{0};
        dpo_kernels::run_on_own_threads(3, [&] {
          int64_t taken = 0;
          for (int64_t i = next++; i < count; i = next++, ++taken) {
            if (i == fails) throw std::runtime_error("as asked");
            volatile double x = 1;
            for (int k = 0; k < 200 * (round % 5); ++k) x = x * 1.0001;
            ++runs[i];
          }
          return taken;
        });
      } catch (const std::runtime_error&) {
        failed = true;
      }
      if (failed != (fails >= 0 && count > 0)) std::abort();
      for (int run : runs)
        if (!failed && run != 1) std::abort();
    }
  };
  std::vector<std::thread> callers;
  for (int64_t seed = 0; seed < 4; ++seed) callers.emplace_back(caller, seed);
  for (auto& thread : callers) thread.join();
  std::printf("12,000 jobs of 4 callers, %lld with help\n", static_cast<long long>(dpo_kernels::runs_on_own_threads()));
  std::fflush(stdout);
  std::_Exit(0);
}
