// Matrix products of blocks, through oneDNN's brgemm, and the packing it needs.
//
// Rates on one core of an AMD EPYC (Zen 4), any block shape from 32 x 16 x 128 up: bfloat16 210 to 232 GFLOP/s, float32
// 105 to 115 (benchmarks/results).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include "vec.h"

#include <algorithm>
#include <vector>

namespace dpo_kernels {

constexpr int64_t kBlock = 64;       // rows and columns of a block of logits: 16 KiB in float32, half of an L1
constexpr int64_t kPanel = 1 << 17;  // bytes of a packed right operand that one thread holds: it stays in the L2
constexpr int64_t kThreads = 64;     // more do not run: what each holds is counted in the memory budget

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t threads() { return std::min<int64_t>(at::get_num_threads(), kThreads); }

// Operands are float or BFloat16. A packed right operand (K, N) holds bfloat16 in pairs of k, the order of the dot
// product instructions: (ceil(K / 2), N, 2), an odd last k with a zero beside it. kPair: numbers in such a group.
template <typename T>
constexpr int64_t kPair = std::is_same_v<T, float> ? 1 : 2;

// c (m, n) = a (m, k) b (k, n), or +=; a in rows lda apart, b packed with ldb columns, c in rows ldc apart.
template <typename T>
inline void block_product(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/!std::is_same_v<T, float>);
}

// Runs work(first, last) over [0, count), at most threads() at a time, and frees brgemm's hardware state behind it.
template <typename F>
inline void run_tasks(int64_t count, bool bfloat16, const F& work) {
  const int64_t workers = std::min(count, threads());
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) work(count * w / workers, count * (w + 1) / workers);
    at::native::cpublas::brgemm_release(/*is_vnni=*/bfloat16);
  });
}

// Blocks of kBlock rows of x (n, k), transposed and packed as right operands (k, kBlock); the last block is narrower, a
// multiple of 16, and its missing columns are 0. Block i begins at i * kBlock * round_up(k, kPair<T>).
inline int64_t block_width(int64_t n, int64_t block) { return std::min(kBlock, round_up(n - block * kBlock, 16)); }

template <typename T>
void pack_transposed(const T* x, int64_t n, int64_t k, int64_t ldx, T* packed) {
  const int64_t depth = round_up(k, kPair<T>);
  run_tasks(ceil_div(n, kBlock), false, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const T* from = x + block * kBlock * ldx;
      T* to = packed + block * kBlock * depth;
      const int64_t rows = std::min(kBlock, n - block * kBlock), width = block_width(n, block);
      if (rows < width || depth != k) std::memset(static_cast<void*>(to), 0, sizeof(T) * depth * width);
      if (k % kPair<T> == 0 && ldx % kPair<T> == 0) {  // pairs move as 32-bit words
        at::vec::transpose_mxn<float>(
            reinterpret_cast<const float*>(from), ldx / kPair<T>, reinterpret_cast<float*>(to), width,
            static_cast<int>(rows), static_cast<int>(k / kPair<T>));
      } else {
        for (int64_t i = 0; i < k; ++i)
          for (int64_t r = 0; r < rows; ++r) to[(i / 2 * width + r) * 2 + i % 2] = from[r * ldx + i];
      }
    }
  });
}

// Columns [0, width) of x (k, ...) as a right operand (k, width).
template <typename T>
inline void pack_panel(const T* x, int64_t k, int64_t ldx, int64_t width, T* packed) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < k; ++i) std::memcpy(packed + i * width, x + i * ldx, sizeof(float) * width);
  } else {
    for (int64_t i = 0; i < k; i += 2) {
      uint16_t* to = reinterpret_cast<uint16_t*>(packed) + i * width;
      const uint16_t* even = reinterpret_cast<const uint16_t*>(x) + i * ldx;
      if (i + 1 < k) {
        const uint16_t* odd = even + ldx;
        for (int64_t j = 0; j < width; ++j) to[2 * j] = even[j], to[2 * j + 1] = odd[j];
      } else {
        for (int64_t j = 0; j < width; ++j) to[2 * j] = even[j], to[2 * j + 1] = 0;
      }
    }
  }
}

// out (m, n) = a (m, k) b (k, n), or +=, sums in float32. Rows are lda, ldb and ldo apart. An out of another dtype is
// rounded once and cannot be added to.
//
// Tasks are strips of columns, split by rows where there are fewer strips than threads: each packs its part of b once
// and no two write the same number.
template <typename T, typename Out>
void multiply(
    Out* out, int64_t ldo, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t m, int64_t n, int64_t k, bool add) {
  constexpr bool direct = std::is_same_v<Out, float>;
  constexpr int64_t room = kPanel / static_cast<int64_t>(sizeof(T));
  // Rounded once means summed over all of k first: then the panel is as deep as k and as narrow as that makes it.
  const int64_t width = direct ? kBlock : std::clamp<int64_t>(room / round_up(k, 2) / 16 * 16, 16, kBlock);
  const int64_t depth = direct ? room / kBlock : k;
  const int64_t strips = ceil_div(n, width);
  const int64_t row_blocks = ceil_div(m, kBlock);
  const int64_t parts = std::clamp<int64_t>(ceil_div(threads(), strips), 1, row_blocks);
  run_tasks(strips * parts, !std::is_same_v<T, float>, [&](int64_t first, int64_t last) {
    std::vector<T> panel(round_up(std::min(depth, k), kPair<T>) * width);
    std::vector<float> sums(direct ? 0 : kBlock * width);
    for (int64_t task = first; task < last; ++task) {
      const int64_t column = task / parts * width, part = task % parts;
      const int64_t columns = std::min(width, n - column);
      const int64_t begin = row_blocks * part / parts * kBlock;
      const int64_t end = std::min(m, row_blocks * (part + 1) / parts * kBlock);
      for (int64_t i = 0; i < k; i += depth) {
        const int64_t deep = std::min(depth, k - i);
        pack_panel(b + i * ldb + column, deep, ldb, columns, panel.data());
        for (int64_t row = begin; row < end; row += kBlock) {
          const int64_t rows = std::min(kBlock, end - row);
          const T* left = a + row * lda + i;
          if constexpr (direct) {
            block_product(
                rows, columns, deep, left, lda, panel.data(), columns, out + row * ldo + column, ldo, add || i > 0);
          } else {
            block_product(rows, columns, deep, left, lda, panel.data(), columns, sums.data(), width, false);
            for (int64_t r = 0; r < rows; ++r) convert(&sums[r * width], out + (row + r) * ldo + column, columns);
          }
        }
      }
    }
  });
}

}  // namespace dpo_kernels
