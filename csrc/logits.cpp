// Logits level. A row is read in strips that stay in the L1 cache; rows are shared among threads, and split where there
// are fewer rows than threads. Base 2 and the label apart, as softmax_state.h says.

#include "logits.h"

#include <ATen/ops/empty.h>

#include "softmax_state.h"
#include "threads.h"
#include "transform.h"

#include <algorithm>
#include <vector>

namespace dpo_kernels {
namespace {

using at::Tensor;

constexpr int64_t kStrip = 2048;
constexpr Outputs kLogProbsOnly{};

// A part of one row.
struct RowState {
  Sums<float> sums;
  float label_logit = kNaN;

  void merge(const RowState& part) {
    dpo_kernels::merge(sums, part.sums, kLogProbsOnly);
    if (part.label_logit == part.label_logit) label_logit = part.label_logit;
  }
};

template <typename T>
void read_strip(const T* x, int64_t n, const Transform& transform, float* z) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) read(x + i).store(z + i);
  for (; i < n; ++i) z[i] = static_cast<float>(x[i]);
  const int64_t padded = (n + kWidth - 1) / kWidth * kWidth;
  std::fill(z + n, z + padded, 0.f);
  if (!transform.trivial())
    for (i = 0; i < padded; i += kWidth) transform.logit(Vec::loadu(z + i)).store(z + i);
  std::fill(z + n, z + padded, -kInf);
}

float sum_of_strip(const float* z, int64_t n, float base) {
  Vec even(0.f), odd(0.f);
  const Powers powers(Vec(reference(base)));
  int64_t i = 0;
  for (; i + kWidth < n; i += 2 * kWidth) {
    even = even + powers(Vec::loadu(z + i));
    odd = odd + powers(Vec::loadu(z + i + kWidth));
  }
  if (i < n) even = even + powers(Vec::loadu(z + i));
  return sum_of(even + odd);
}

template <typename T>
void accumulate_strip(const T* x, int64_t n, int64_t label, const Transform& transform, RowState& s) {
  alignas(64) float z[kStrip];
  read_strip(x, n, transform, z);
  if (label >= 0 && label < n) s.label_logit = z[label], z[label] = -kInf;
  Vec largest(-kInf);
  for (int64_t i = 0; i < n; i += kWidth) largest = at::vec::clamp_min(largest, Vec::loadu(z + i));
  const float base = std::max(base_of(max_of(largest)), s.sums.base);
  s.sums.raise(base, kLogProbsOnly);
  s.sums.total += sum_of_strip(z, n, base);
}

void gradient_of_strip(float* z, int64_t n, const Transform& transform, Exponent exponent, float scale) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec value = Vec::loadu(z + i);
    const Vec p = exp2(scaled_difference(value, Vec(exponent.whole)) - Vec(exponent.rest));
    (transform.capped ? p * Vec(scale) * transform.derivative(value) : p * Vec(scale)).store(z + i);
  }
}

template <typename T>
void gradient_strip(
    const T* x, int64_t n, int64_t label, const Transform& transform, Exponent exponent, float scale, float at_label,
    T* out) {
  alignas(64) float z[kStrip];
  read_strip(x, n, transform, z);
  gradient_of_strip(z, n, transform, exponent, scale);
  if (label >= 0 && label < n) z[label] = at_label;
  convert(z, out, n);
}

// Calls work(row, part, first column, last column) for M rows of V columns.
template <typename F>
void each_part(int64_t m, int64_t v, int64_t parts, const F& work) {
  run_tasks(m * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) work(i / parts, i % parts, v * (i % parts) / parts, v * (i % parts + 1) / parts);
  });
}

int64_t parts_of(int64_t m, int64_t v) {
  const int64_t wanted = m == 0 ? 1 : (threads() + m - 1) / m;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(v / kStrip, 1));
}

// Strips of a row, of columns [begin, end).
template <typename F>
void each_strip(int64_t begin, int64_t end, const F& work) {
  for (int64_t i = begin; i < end; i += kStrip) work(i, std::min(kStrip, end - i));
}

}  // namespace

std::vector<Tensor> logits_forward(const LogitsArgs& args) {
  const int64_t m = args.labels.size(0), v = args.logits.size(1), parts = parts_of(m, v);
  const int64_t* labels = args.labels.const_data_ptr<int64_t>();
  const int64_t* index = args.index.has_value() ? args.index->const_data_ptr<int64_t>() : nullptr;
  const Transform transform(args.temperature, args.logit_scale, args.softcap);
  std::vector<RowState> states(m * parts);
  with_type(args.logits.scalar_type(), [&](auto number) {
    const auto* logits = args.logits.const_data_ptr<decltype(number)>();
    each_part(m, v, parts, [&](int64_t row, int64_t part, int64_t begin, int64_t end) {
      const auto* x = logits + (index == nullptr ? row : index[row]) * args.logits.stride(0);
      each_strip(begin, end, [&](int64_t i, int64_t n) {
        accumulate_strip(x + i, n, labels[row] - i, transform, states[row * parts + part]);
      });
    });
  });
  std::vector<Tensor> result;
  float* r[4];
  for (float*& row : r) {
    result.push_back(at::empty({m}, args.labels.options().dtype(at::kFloat)));
    row = result.back().data_ptr<float>();
  }
  for (int64_t row = 0; row < m; ++row) {
    RowState all = states[row * parts];
    for (int64_t part = 1; part < parts; ++part) all.merge(states[row * parts + part]);
    const Joined joined = join(all.sums.base, all.sums.total, all.label_logit);
    r[0][row] = static_cast<float>(joined.log_prob);
    r[1][row] = static_cast<float>(joined.maximum);
    r[3][row] = all.label_logit;
    r[2][row] = static_cast<float>(joined.lse - static_cast<double>(r[1][row]));
  }
  return result;
}

void logits_backward(
    const LogitsArgs& args, const Tensor& grad, const Tensor& log_probs, const Tensor& maximum, const Tensor& log_sum,
    const Tensor& label_logit, Tensor& out, const std::optional<Tensor>& out_index) {
  const int64_t m = args.labels.size(0), v = args.logits.size(1);
  const int64_t* labels = args.labels.const_data_ptr<int64_t>();
  const int64_t* index = args.index.has_value() ? args.index->const_data_ptr<int64_t>() : nullptr;
  const int64_t* to = out_index.has_value() ? out_index->const_data_ptr<int64_t>() : nullptr;
  const Transform transform(args.temperature, args.logit_scale, args.softcap);
  const float *g = grad.const_data_ptr<float>(), *lp = log_probs.const_data_ptr<float>();
  const float *largest = maximum.const_data_ptr<float>(), *ls = log_sum.const_data_ptr<float>();
  const float* y = label_logit.const_data_ptr<float>();
  with_type(args.logits.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const T* logits = args.logits.const_data_ptr<T>();
    T* gradient = out.data_ptr<T>();
    each_part(m, v, parts_of(m, v), [&](int64_t row, int64_t, int64_t begin, int64_t end) {
      const T* x = logits + (index == nullptr ? row : index[row]) * args.logits.stride(0);
      T* dx = gradient + (to == nullptr ? row : to[row]) * out.stride(0);
      const float scale = -g[row] * transform.slope;
      const float at_label = label_gradient(g[row], lp[row], y[row], 0., 0., transform);
      each_strip(begin, end, [&](int64_t i, int64_t n) {
        gradient_strip(
            x + i, n, labels[row] - i, transform, Exponent(largest[row], ls[row]), scale, at_label, dx + i);
      });
    });
  });
}

}  // namespace dpo_kernels
