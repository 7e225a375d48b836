// What select.cpp offers. Tensors were checked by the caller (bindings.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace dpo_kernels {

constexpr int64_t kGroup = 128;  // tokens that share a list of columns (GROUP in dpo_kernels/workload.py)

// What forward saved of a tile, `by_vocab` and `bases` of accumulate, and what is worth keeping of it.
struct SelectArgs {
  const at::Tensor& exps;   // (v, n)
  const at::Tensor& bases;  // (blocks of 64 columns, n) float
  const at::Tensor& to;     // (n,) float: no smaller than a token's bases
  const at::Tensor& least;  // (n,) float: e relative to `to` from which on it is kept
};

// A column is kept for a group of tokens where e of any of them is not below `least`.
//
// Writes e relative to `to` to `room`, group after group, each (kept columns, tokens of the group); adds what it leaves out to
// `dropped` (n,) double, relative to `to` too. Returns the kept columns, int64, group after group, and how many each group
// has; nothing, and writes nothing, if there is more to keep than `room` holds.
std::vector<at::Tensor> select(const SelectArgs& args, at::Tensor& room, at::Tensor& dropped);

}  // namespace dpo_kernels
