// What hidden.cpp offers; shapes and meaning of every argument. Tensors were checked by the caller (bindings.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace dpo_kernels {

constexpr int64_t kRowStats = 8;  // rows of the running statistics

// What finish returns, in order.
enum { kLogProb, kMaximum, kLogSum, kOthers, kEntropy, kLogSquares, kMean, kTop1, kFinished };

// A tile of n tokens by v columns, in operands of float or bfloat16.
struct TileArgs {
  const at::Tensor& packed;               // pack_hidden of (n, D)
  const at::Tensor& weight;               // (v, D), rows of any stride
  const std::optional<at::Tensor>& bias;  // (v,) float
  const at::Tensor& labels;               // (n,) int64
  int64_t first;                          // the tile's first column
  double temperature, logit_scale;
  std::optional<double> softcap;
};

// Which optional statistics are wanted.
struct Outputs {
  bool entropy, squares, mean, top;
};

// Where to leave e of the tile; absent in a call without gradients.
struct FoldOutputs {
  const std::optional<at::Tensor>& by_token;  // (n, v): e times the cap's derivative, 0 at the label
  const std::optional<at::Tensor>& by_vocab;  // (v, n): the same
  const std::optional<at::Tensor>& bases;     // (blocks of 64 columns, n) float: the base of each block's e
  const std::optional<at::Tensor>& total;     // (n, D) float, summed relative to the old base: brought to the new one,
                                              // and by_token with it
};

struct RowGradients {
  const at::Tensor &grad, &log_probs, &maximum, &log_sum;  // (n,) float each
  const std::optional<at::Tensor>&entropy, &grad_entropy;  // (n,) float
};

// Where to leave d loss / d a of the tile, and where it comes from if kept.
struct GradientOutputs {
  const std::optional<at::Tensor>& by_token;  // (n, v)
  const std::optional<at::Tensor>& by_vocab;  // (v, n)
  const std::optional<at::Tensor>& bias;      // (v,) float: sums over tokens are added to it
  const std::optional<at::Tensor>& kept;      // (v, n), by_vocab of fold
  const std::optional<at::Tensor>& bases;     // of fold
};

// Hidden states (n, D) as the right operand of every product with the weight.
at::Tensor pack_hidden(const at::Tensor& hidden);

// Folds a tile into the running statistics (kRowStats, M) of tokens [row, row + n).
void fold(const TileArgs& args, at::Tensor& stats, int64_t row, const Outputs& want, const FoldOutputs& out);

// Gradient of a tile's products: dz_v = -p_v [g + gH (log p_v + H)] off the label, through the transform.
void gradient(const TileArgs& args, const RowGradients& rows, const GradientOutputs& out);

// (M,) each: log-prob; the maximum m and log sum exp(z - m); the factor that turns e into probabilities; entropy,
// log sum p^2, mean logit and whether the label is the first maximum, which mean nothing unless they were wanted.
std::vector<at::Tensor> finish(const at::Tensor& stats, const at::Tensor& labels, int64_t vocab_size);

}  // namespace dpo_kernels
