// Logits level: log-probs in one read of the logits, their gradient in one read and one write.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace dpo_kernels {

// Rows of a matrix of logits (R, V) of any dtype but double; the last stride is 1.
struct LogitsArgs {
  const at::Tensor& logits;
  const std::optional<at::Tensor>& index;  // (M,) int64: the rows that count; absent: all
  const at::Tensor& labels;                // (M,) int64
  double temperature, logit_scale;
  std::optional<double> softcap;
};

// (M,) float each: log-prob, maximum m, log sum exp(z - m), the label's logit.
std::vector<at::Tensor> logits_forward(const LogitsArgs& args);

// Writes d loss / d logits of the rows that count to rows out_index (M,) of out, which may be the logits. Absent: to rows
// 0, 1, ...
void logits_backward(
    const LogitsArgs& args, const at::Tensor& grad, const at::Tensor& log_probs, const at::Tensor& maximum,
    const at::Tensor& log_sum, const at::Tensor& label_logit, at::Tensor& out,
    const std::optional<at::Tensor>& out_index);

}  // namespace dpo_kernels
