// What threads.h asks of PyTorch, for threads_stress.cpp: no thread sanitizer looks through OpenMP.
#pragma once

#include <cstdint>

namespace at {

inline int get_num_threads() { return 4; }
inline bool in_parallel_region() { return false; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& work) {
  if (begin < end) work(begin, end);
}

}  // namespace at
