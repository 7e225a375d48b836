// What hidden.cpp (forward) and gradient.cpp (backward) offer; shapes and meaning of every argument. Tensors were checked by
// the caller (bindings.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "softmax_state.h"

namespace dpo_kernels {

// A tile of n tokens by v columns, in operands of float or bfloat16: of packed's dtype. The weight may be narrower.
struct TileArgs {
  const at::Tensor& packed;               // pack_hidden of (n, D)
  const at::Tensor& weight;               // (v, D), rows of any stride
  const std::optional<at::Tensor>& bias;  // (v,) float
  const at::Tensor& labels;               // (n,) int64
  int64_t first;                          // the tile's first column
  double temperature, logit_scale;
  std::optional<double> softcap;
};

// Where to leave e of the tile; absent in a call without gradients.
struct ExpOutputs {
  const std::optional<at::Tensor>& by_token;  // (n, v): e times the cap's derivative, 0 at the label
  const std::optional<at::Tensor>& by_vocab;  // (v, n): the same
  const std::optional<at::Tensor>& bases;     // (blocks of 64 columns, n) float: what each block's e is relative to, the
                                              // reference of its base, or in float16 its base
  const std::optional<at::Tensor>& total;     // (n, D) float, summed relative to the old reference: brought to the new
                                              // one, and by_token with it
};

struct RowGradients {
  const at::Tensor &grad, &log_probs, &maximum, &log_sum, &label_logit;  // (n,) float each
  const std::optional<at::Tensor>&entropy, &grad_entropy;  // (n,) float
};

// out (m, n) = a (m, k) b (k, n), or +=, in the dtype of room, which is for b, packed. a and b may be narrower.
struct ProductArgs {
  at::Tensor out, a, b;
  bool add;
  at::Tensor room;
};

// One whose left operand is d loss / d a of a tile: by_vocab or by_token.
struct GradientProduct {
  ProductArgs args;
  bool by_vocab;
};

// Where to leave d loss / d a of the tile, 0 at the labels; and where it comes from if saved: by_token is then e relative to
// one number a token.
struct GradientOutputs {
  const std::optional<at::Tensor>& by_token;  // (n, v)
  const std::optional<at::Tensor>& by_vocab;  // (v, n)
  const std::optional<at::Tensor>& bias;      // (v,) float: sums over tokens are added to it
  const std::optional<at::Tensor>& exps;      // (v, n), by_vocab of accumulate; products by_vocab multiply it then
  const std::optional<at::Tensor>& bases;     // of accumulate
};

// Hidden states (n, D) as the right operand of every product with the weight.
at::Tensor pack_hidden(const at::Tensor& hidden);

// Merges a tile into the state (kFields, M) of tokens [row, row + n).
void accumulate(const TileArgs& args, at::Tensor& state, int64_t row, const Outputs& want, const ExpOutputs& out);

// Gradient of a tile's products: dz_v = -p_v [g + gH (log p_v + H)] off the label, through the transform; and what is
// multiplied by it, in the same kernel.
void gradient(
    const TileArgs& args, const RowGradients& rows, const GradientOutputs& out,
    const std::vector<GradientProduct>& products);

void multiply(const ProductArgs& product);

// The state (kFields, M) of M tokens that have seen no logit yet.
at::Tensor new_state(int64_t tokens);

// (M,) each: `Finished`, in its order.
std::vector<at::Tensor> finish_state(const at::Tensor& state, const at::Tensor& labels, int64_t vocab_size);

}  // namespace dpo_kernels
