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
  // A kernel of two phases, by two callers at once, of which some throw.
  auto in_phases = [](int64_t seed) {
    for (int64_t round = 0; round < 1000; ++round) {
      const int64_t count = (5 * round + seed) % 30 + 1, fails = round % 97 == 3 ? count / 2 : -1;
      std::vector<int> made(count, 0), runs(count, 0);
      bool failed = false;
      dpo_kernels::Phases phases;
      dpo_kernels::Parts parts(count, 1);
      phases.add(count, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          if (i == fails) throw std::runtime_error("as asked");
          made[i] = 1, parts.made(i);
        }
      });
      phases.add(count, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t part = count - 1 - i;
          if (!phases.wait([&] { return parts.ready(part); })) return;
          runs[i] = made[part];
        }
      });
      try {
        phases.run_on_own_threads(3, [] {});
      } catch (const std::runtime_error&) {
        failed = true;
      }
      if (failed != (fails >= 0)) std::abort();
      for (int run : runs)
        if (!failed && run != 1) std::abort();
    }
  };
  std::vector<std::thread> of_phases;
  for (int64_t seed = 0; seed < 2; ++seed) of_phases.emplace_back(in_phases, seed);
  for (auto& thread : of_phases) thread.join();
  std::vector<std::thread> callers;
  for (int64_t seed = 0; seed < 4; ++seed) callers.emplace_back(caller, seed);
  for (auto& thread : callers) thread.join();
  std::printf("12,000 jobs of 4 callers, %lld with help\n", static_cast<long long>(dpo_kernels::runs_on_own_threads()));
  std::fflush(stdout);
  std::_Exit(0);
}
