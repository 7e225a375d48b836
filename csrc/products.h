// Matrix products of blocks, through oneDNN's brgemm, and the packing it needs.
//
// Rates on one core of an AMD EPYC (Zen 4), any block shape from 32 x 16 x 128 up: bfloat16 210 to 232 GFLOP/s, float32
// 105 to 115 (benchmarks/results).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include "threads.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <vector>

namespace dpo_kernels {

constexpr int64_t kBlock = 64;       // rows and columns of a block of logits: 16 KiB in float32, half of an L1
constexpr int64_t kPacked = 1 << 17; // numbers that one thread packs before a second is asked
// Terms of a product at a time: both operands of a block stay in the L2.
template <typename T>
constexpr int64_t kDepth = std::is_same_v<T, float> ? 256 : 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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

// A number matrix that a caller gave: rows ld apart, of any floating dtype.
struct Matrix {
  char* data = nullptr;
  int64_t ld = 0, size = 0;
  at::ScalarType dtype = at::kFloat;

  Matrix() = default;
  explicit Matrix(const at::Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), ld(t.stride(0)), size(t.element_size()),
        dtype(t.scalar_type()) {}
  // One that is written: a lazy copy becomes a real one.
  static Matrix written(const at::Tensor& t) {
    t.data_ptr();
    return Matrix(t);
  }
  static Matrix written(const std::optional<at::Tensor>& t) { return t.has_value() ? written(*t) : Matrix(); }
  explicit operator bool() const { return data != nullptr; }
  void* at(int64_t row, int64_t column) const { return data + (row * ld + column) * size; }

  template <typename F>
  void visit(int64_t row, int64_t column, const F& f) const {
    with_type(dtype, [&](auto number) { f(static_cast<decltype(number)*>(at(row, column))); });
  }
  template <typename T>
  bool holds() const { return dtype == c10::CppTypeToScalarType<T>::value; }
  template <typename T>
  T* as(int64_t row, int64_t column) const { return static_cast<T*>(at(row, column)); }

  // n numbers from there on, as floats.
  void read(int64_t row, int64_t column, float* to, int64_t n) const {
    visit(row, column, [&](const auto* from) { widen(from, to, n); });
  }
  // Rows of a block that lie kBlock apart.
  void write(const float* block, int64_t rows, int64_t columns, int64_t row, int64_t column) const {
    visit(row, column, [&](auto* to) {
      for (int64_t r = 0; r < rows; ++r) convert(block + r * kBlock, to + r * ld, columns);
    });
  }
};

// Factors that are two numbers each, multiplied by one after the other: their product may be smaller or larger than a float
// can be.
struct Factors {
  std::vector<float> one, two;

  explicit Factors(int64_t count = 0) : one(count, 1.f), two(count, 1.f) {}
  // number * 2^power
  void set(int64_t i, float number, int power) {
    one[i] = std::ldexp(1.f, power / 2), two[i] = std::ldexp(number, power - power / 2);
  }
};

// A number of an operand.
struct Entry {
  int64_t row, term;
  float value;
};

// What the left operand (m, k) of a product is, where it is not a matrix as it lies: one whose columns are multiplied by
// `terms`, and in blocks of kBlock rows that are `scaled` by factors of the block's own; whose rows are multiplied by `rows`;
// plus some entries.
struct LeftOperand {
  const float* terms = nullptr;  // (k,), or all 1: folded into the right operand as it is packed
  std::function<bool(int64_t row_block)> scaled;
  // The factors of terms [first, first + count) of a block, one and two.
  std::function<void(int64_t row_block, int64_t first, int64_t count, float* one, float* two)> scales;
  const Factors* rows = nullptr;  // of each row, or one of all, or all 1: of the sums
  std::vector<Entry> entries;     // in the order of their rows; their products are float32
};

constexpr int64_t kMade = 256;  // terms of a left operand that a thread makes at a time: 64 KiB in float32

// block_product into a block c of rows kBlock apart, for any k, of a block of rows of a matrix. In float32 each kDepth terms
// are summed on their own: a long sum rounds small terms to the spacing of what it holds already. (A depth of 1024 for logits
// is 2% faster and three times less exact: 3.5e-6 against 1.1e-6 at 1,024 features.) What a matrix holds narrower, or scaled,
// is made here.
template <typename T>
inline void deep_product(
    int64_t m, int64_t n, int64_t k, const Matrix& a, int64_t row_block, const T* b, int64_t ldb, float* c,
    const LeftOperand* left = nullptr) {
  constexpr bool apart = std::is_same_v<T, float>;
  static_assert(!apart || kMade >= kDepth<T>, "parts that are summed on their own are no shorter than what is made");
  const bool scaled = left != nullptr && left->scaled && left->scaled(row_block), make = scaled || !a.holds<T>();
  alignas(64) float part[apart ? kBlock * kBlock : 1];
  alignas(64) T made[kBlock * kMade];
  const int64_t row = row_block * kBlock, step = make ? std::min(kMade, kDepth<T>) : kDepth<T>;
  for (int64_t i = 0; i < k; i += step) {
    const bool later = i > 0;
    const int64_t depth = std::min(step, k - i);
    if (make) {
      alignas(64) float one[kMade], two[kMade], wide[kMade];
      if (scaled) left->scales(row_block, i, depth, one, two);
      for (int64_t r = 0; r < m; ++r) {
        float* to = wide;
        if constexpr (apart) to = made + r * depth;
        a.read(row + r, i, to, depth);
        if (scaled)
          for (int64_t j = 0; j < depth; ++j) to[j] = to[j] * one[j] * two[j];
        if constexpr (!apart) convert(wide, made + r * depth, depth);
      }
    }
    block_product(
        m, n, depth, make ? made : a.as<T>(row, i), make ? depth : a.ld, b + i * ldb, ldb, apart && later ? part : c, kBlock,
        !apart && later);
    if (apart && later)
      for (int64_t r = 0; r < m; ++r)
        for (int64_t j = 0; j < n; ++j) c[r * kBlock + j] += part[r * kBlock + j];
  }
}

// Frees brgemm's hardware state, in a thread that may have multiplied.
inline void release_products(bool bfloat16) { at::native::cpublas::brgemm_release(/*is_vnni=*/bfloat16); }

// Tasks with products in them.
template <typename F>
void run_products(int64_t count, bool bfloat16, const F& work) {
  run_tasks(count, 1, work, [&] { release_products(bfloat16); });
}

// Blocks of kBlock rows of x (n, k), transposed and packed as right operands (k, kBlock); the last block is narrower, a
// multiple of 16, and its missing columns are 0. Block i begins at i * kBlock * round_up(k, kPair<T>).
inline int64_t block_width(int64_t n, int64_t block) { return std::min(kBlock, round_up(n - block * kBlock, 16)); }

template <typename T>
void pack_transposed(const T* x, int64_t n, int64_t k, int64_t ldx, T* packed) {
  const int64_t depth = round_up(k, kPair<T>);
  const int64_t least = ceil_div(kPacked, kBlock * depth);
  run_tasks(ceil_div(n, kBlock), least, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const T* from = x + block * kBlock * ldx;
      T* to = packed + block * kBlock * depth;
      const int64_t rows = std::min(kBlock, n - block * kBlock), width = block_width(n, block);
      if (rows < width || depth != k) std::memset(static_cast<void*>(to), 0, sizeof(T) * depth * width);
      const bool words = reinterpret_cast<uintptr_t>(x) % alignof(float) == 0;  // a view may begin at an odd number
      if (words && k % kPair<T> == 0 && ldx % kPair<T> == 0) {  // pairs move as 32-bit words
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

// Columns [column, column + width) of x (k, ...) as a right operand (k, width); its rows times `factors` (k,), unless these
// are null.
template <typename T>
inline void pack_strip(const Matrix& x, int64_t column, int64_t k, int64_t width, const float* factors, T* packed) {
  alignas(64) float wide[kBlock];
  alignas(64) T made[2][kBlock];
  const bool as_it_lies = factors == nullptr && x.holds<T>();
  auto row = [&](int64_t i) -> const T* {
    if (as_it_lies) return x.as<T>(i, column);
    x.read(i, column, wide, width);
    if (factors != nullptr)
      for (int64_t j = 0; j < width; ++j) wide[j] *= factors[i];
    convert(wide, made[i % 2], width);
    return made[i % 2];
  };
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < k; ++i) std::memcpy(packed + i * width, row(i), sizeof(float) * width);
  } else {
    for (int64_t i = 0; i < k; i += 2) {
      uint16_t* to = reinterpret_cast<uint16_t*>(packed) + i * width;
      const uint16_t* even = reinterpret_cast<const uint16_t*>(row(i));
      if (i + 1 < k) {
        const uint16_t* odd = reinterpret_cast<const uint16_t*>(row(i + 1));
        for (int64_t j = 0; j < width; ++j) to[2 * j] = even[j], to[2 * j + 1] = odd[j];
      } else {
        for (int64_t j = 0; j < width; ++j) to[2 * j] = even[j], to[2 * j + 1] = 0;
      }
    }
  }
}

// A product as tasks of a kernel: strips of the right operand are packed, then blocks of rows multiplied by strips, so that
// no two tasks write the same number.
class ProductTasks {
 public:
  // out (m, n) = a (m, k) b (k, n), or +=, sums in float32. a and b hold numbers of T, or narrower ones. An out of another
  // dtype than float is rounded once and cannot be added to. room: n * round_up(k, kPair<T>) numbers, for b in packed strips
  // of kBlock columns.
  template <typename T>
  ProductTasks(
      const Matrix& out, const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k, bool add, T* room,
      LeftOperand left = {})
      : row_blocks_(ceil_div(m, kBlock)), strips_(ceil_div(n, kBlock)), packed_(strips_, 1) {
    const int64_t strip_size = kBlock * round_up(k, kPair<T>);
    auto columns_of = [=](int64_t strip) { return std::min(kBlock, n - strip * kBlock); };
    pack_ = [=, terms = left.terms](int64_t strip) {
      pack_strip(b, strip * kBlock, k, columns_of(strip), terms, room + strip * strip_size);
    };
    multiply_ = [=, left = std::move(left)](int64_t row_block, int64_t strip) {
      alignas(64) float sums[kBlock * kBlock];
      const int64_t row = row_block * kBlock, rows = std::min(kBlock, m - row);
      const int64_t column = strip * kBlock, columns = columns_of(strip);
      deep_product(rows, columns, k, a, row_block, room + strip * strip_size, columns, sums, &left);
      auto entry = std::lower_bound(
          left.entries.begin(), left.entries.end(), row, [](const Entry& e, int64_t r) { return e.row < r; });
      for (int64_t r = 0; r < rows; ++r) {
        float* from = sums + r * kBlock;
        if (left.rows != nullptr) {
          const int64_t of = left.rows->one.size() == 1 ? 0 : row + r;
          const float one = left.rows->one[of], two = left.rows->two[of];
          for (int64_t c = 0; c < columns; ++c) from[c] = from[c] * one * two;
        }
        for (; entry != left.entries.end() && entry->row == row + r; ++entry)
          b.visit(entry->term, column, [&](const auto* right) {
            for (int64_t c = 0; c < columns; ++c) from[c] += entry->value * static_cast<float>(right[c]);
          });
        out.visit(row + r, column, [&](auto* to) {
          if constexpr (std::is_same_v<decltype(to), float*>)
            if (add) {
              for (int64_t c = 0; c < columns; ++c) to[c] += from[c];
              return;
            }
          convert(from, to, columns);
        });
      }
    };
  }

  // A phase that packs. A single block of rows takes each strip while it is in cache: then add_products' phase packs too.
  void add_packing(Phases& phases) {
    if (row_blocks_ == 1) return;
    phases.add(strips_, [this](int64_t first, int64_t last) {
      for (int64_t strip = first; strip < last; ++strip) pack_(strip), packed_.made(strip);
    });
  }

  // A phase that multiplies. Threads share blocks of rows by strips; a thread's blocks follow each other along the rows. A
  // block of sums stays in the L1 cache until it is complete. ready(block of rows): whether the left operand is there.
  template <typename Ready>
  void add_products(Phases& phases, const Ready& ready) {
    phases.add(row_blocks_ * strips_, [this, &phases, ready](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t row_block = task / strips_, strip = task % strips_;
        if (!phases.wait([&] { return ready(row_block); })) return;
        if (row_blocks_ == 1) pack_(strip);
        else if (!phases.wait([&] { return packed_.ready(strip); })) return;
        multiply_(row_block, strip);
      }
    });
  }

 private:
  const int64_t row_blocks_, strips_;
  std::function<void(int64_t)> pack_;
  std::function<void(int64_t, int64_t)> multiply_;
  Parts packed_;
};

}  // namespace dpo_kernels
