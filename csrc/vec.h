// Vector helpers: one source for AVX-512, AVX2 and plain builds, through ATen's Vectorized.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dpo_kernels {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kWidth = Vec::size();

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: added to a number, it rounds and leaves the whole number in the low bits

// 2^(n + f) of n + kMagic, n from -127 to 127, and f in [-1/2, 1/2], to 2 units in the last place
// (tests/backends/test_cpp.py measures 1.1); 0 for n = -127. 2^f by a polynomial of degree 6 whose relative error is 1.9e-9
// (Remez exchange); n goes into the exponent's bits.
inline Vec exp2_of_parts(Vec shifted, Vec f) {
  Vec p = at::vec::fmadd(f, Vec(1.5345812215840183e-4f), Vec(1.339993120947414e-3f));
  p = at::vec::fmadd(f, p, Vec(9.618488956522791e-3f));
  p = at::vec::fmadd(f, p, Vec(5.5503287769976636e-2f));
  p = at::vec::fmadd(f, p, Vec(2.4022646890639573e-1f));
  p = at::vec::fmadd(f, p, Vec(6.931472057372526e-1f));
  p = at::vec::fmadd(f, p, Vec(1.f));
  using Int = at::vec::Vectorized<int32_t>;
  const Int exponent = (at::vec::cast<int32_t>(shifted) << Int(23)) + Int(127 << 23);
  return p * at::vec::cast<float>(exponent);
}

// 2^x for x <= 127; 0 below -126.5, NaN for NaN.
inline Vec exp2(Vec x) {
  x = at::vec::clamp_min(x, Vec(-127.f));
  const Vec magic(kMagic);
  const Vec shifted = x + magic;
  return exp2_of_parts(shifted, x - (shifted - magic));
}

// 2^n for whole n <= 127, exactly; 0 below -126.
inline float exp2_whole(float n) {
  if (!(n >= -126.f)) return n != n ? n : 0.f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline Vec exp2_whole(Vec n) { return exp2(n); }

inline float at_least(float x, float least) { return std::max(x, least); }
inline Vec at_least(Vec x, float least) { return at::vec::clamp_min(x, Vec(least)); }

inline float at_most(float x, float most) { return std::min(x, most); }
inline Vec at_most(Vec x, float most) { return at::vec::clamp_max(x, Vec(most)); }
inline float ceil_of(float x) { return std::ceil(x); }
inline Vec ceil_of(Vec x) { return x.ceil(); }

// One number, or kWidth of them.
inline void get(const float* from, float& x) { x = *from; }
inline void get(const float* from, Vec& x) { x = Vec::loadu(from); }
inline void put(float x, float* to) { *to = x; }
inline void put(Vec x, float* to) { x.store(to); }

template <typename T>
inline Vec read(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p);
  } else {
    Vec result;
    at::vec::load_to_float<T>(p, result);
    return result;
  }
}

// Stores two vectors, 2 * kWidth numbers, rounded to nearest even.
template <typename T>
inline void store2(T* p, Vec a, Vec b) {
  if constexpr (std::is_same_v<T, float>) {
    a.store(p);
    b.store(p + kWidth);
  } else {
    at::vec::convert_from_float<T>(a, b).store(p);
  }
}

// Writes n floats as T.
template <typename T>
inline void convert(const float* from, T* to, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, from, sizeof(float) * n);
  } else {
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) store2(to + i, Vec::loadu(from + i), Vec::loadu(from + i + kWidth));
    for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
  }
}

// Reads n numbers of T as floats.
template <typename T>
inline void widen(const T* from, float* to, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, from, sizeof(float) * n);
  } else {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) read(from + i).store(to + i);
    for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
  }
}

// f(T()) for the C++ type of a dtype: float, BFloat16 or Half.
template <typename F>
inline void with_type(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) f(float());
  else if (dtype == at::kBFloat16) f(at::BFloat16());
  else f(at::Half());
}

inline float sum_of(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, v);
}

inline float max_of(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::clamp_min(a, b); }, v);
}

}  // namespace dpo_kernels
