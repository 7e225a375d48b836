// Forward of a tile of logits, straight from hidden states and the head's weight: statistics, and what backward is left.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "hidden.h"
#include "tile.h"

#include <memory>

namespace dpo_kernels {
namespace {

using at::Tensor;

// Accumulates a block of logits into the states of its tokens, s[i] + t; e in place of z where `exps` says so.
void accumulate_block(
    float* block, int64_t columns, int64_t width, int64_t first, const Outputs& want, bool exps,
    const Transform& transform, float* const* s) {
  for (int64_t t = 0; t < width; t += kWidth) {
    float* z = block + t;
    Vec largest(-kInf), other(-kInf);
    int64_t c = 0;
    for (; c + 2 <= columns; c += 2) {
      largest = at::vec::clamp_min(largest, Vec::loadu(z + c * kBlock));
      other = at::vec::clamp_min(other, Vec::loadu(z + (c + 1) * kBlock));
    }
    if (c < columns) largest = at::vec::clamp_min(largest, Vec::loadu(z + c * kBlock));
    largest = at::vec::clamp_min(largest, other);
    if (want.argmax) {
      Vec best = Vec::loadu(s[kMaximum] + t), at_column = Vec::loadu(s[kArgmax] + t);
      for (c = 0; c < columns; ++c) {
        const Vec value = Vec::loadu(z + c * kBlock), better = value > best;
        best = Vec::blendv(best, value, better);
        at_column = Vec::blendv(at_column, Vec(static_cast<float>(first + c)), better);
      }
      best.store(s[kMaximum] + t);
      at_column.store(s[kArgmax] + t);
    }
    Sums<Vec> sums = load<Vec>(s, t, want);
    const Vec base = at::vec::clamp_min(base_of(largest), sums.base);
    const Powers powers(reference(base));
    Vec total(0.f), shifted(0.f), squares(0.f);
    for (c = 0; c < columns; ++c) {
      const Vec value = Vec::loadu(z + c * kBlock);
      Vec whole, rest;
      const Vec e = powers.of(value, whole, rest);
      total = total + e;
      if (want.entropy) shifted = at::vec::fmadd(e, at_least((whole - base) + rest, -127.f), shifted);
      if (want.squares) squares = at::vec::fmadd(e, e, squares);
      if (exps) (transform.capped ? e * transform.derivative(value) : e).store(z + c * kBlock);
    }
    sums.raise(base, want);
    sums.add(total, shifted, squares, want);
    store(sums, s, t, want);
  }
}

template <typename T>
void accumulate_tile(const TileArgs& args, Tensor& whole_state, int64_t row, const Outputs& want, const ExpOutputs& out) {
  const Tile<T> tile = make_tile<T>(args);
  const Grid grid = Grid::of_sums(tile.column_blocks(), tile.token_blocks());
  const int64_t padded = tile.token_blocks() * kBlock;
  float* state[kFields];
  for (int64_t i = 0; i < kFields; ++i) state[i] = whole_state.data_ptr<float>() + i * whole_state.stride(0) + row;
  const auto found = std::make_unique_for_overwrite<float[]>(grid.column_lanes * kLaneFields * padded);
  auto of_lane = [&](int64_t lane, int64_t token, float** s) {
    for (int64_t i = 0; i < kLaneFields; ++i) s[i] = &found[(lane * kLaneFields + i) * padded + token];
  };
  for (int64_t lane = 0; lane < grid.column_lanes; ++lane) {
    float* s[kLaneFields];
    of_lane(lane, 0, s);
    clear(s, kLaneFields, padded);
  }
  const Matrix by_token = Matrix::written(out.by_token), by_vocab = Matrix::written(out.by_vocab);
  const Matrix bases = Matrix::written(out.bases);
  const bool narrow = by_vocab && by_vocab.dtype == at::kHalf;  // holds nothing above 65,504
  auto block = [&](int64_t lane, int64_t column_block, int64_t first, int64_t last) {
    alignas(64) float z[kBlock * kBlock], transposed[kBlock * kBlock];
    const int64_t columns = tile.columns_of(column_block);
    for (int64_t token_block = first; token_block < last; ++token_block) {
      const int64_t width = block_width(tile.n, token_block), token = token_block * kBlock;
      const int64_t tokens = std::min(kBlock, tile.n - token);
      float* s[kLaneFields];
      of_lane(lane, token, s);
      tile.logits(column_block, token_block, z);
      if (want.logits)
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t t = 0; t < tokens; ++t) s[kLogits][t] += z[c * kBlock + t];
      tile.each_label(column_block, token_block, [&](int64_t t, int64_t at) {
        state[kLabelLogit][token + t] = z[at];
        z[at] = -kInf;
      });
      accumulate_block(
          z, columns, width, tile.first + column_block * kBlock, want, static_cast<bool>(bases), tile.transform, s);
      if (bases) {
        float* relative_to = bases.as<float>(column_block, token);
        for (int64_t t = 0; t < tokens; ++t) relative_to[t] = narrow ? s[kBase][t] : reference(s[kBase][t]);
      }
      if (narrow) {
        alignas(64) float down[kBlock];
        for (int64_t t = 0; t < tokens; ++t) down[t] = exp2_whole(reference(s[kBase][t]) - s[kBase][t]);
        for (int64_t c = 0; c < columns; ++c) multiply_row(z + c * kBlock, down, z + c * kBlock, tokens);
      }
      if (by_vocab) by_vocab.write(z, columns, tokens, column_block * kBlock, token);
      if (by_token) {
        transpose(z, kBlock, columns, tokens, transposed, kBlock);
        by_token.write(transposed, tokens, columns, token, column_block * kBlock);
      }
    }
  };
  run_products(grid.lanes(), !std::is_same_v<T, float>, [&](int64_t first, int64_t last) { grid.each(first, last, block); });
  const Matrix total = Matrix::written(out.total);
  // A merge of 256 tokens takes less than waking a thread; with sums of features to rescale, one of 128 takes more.
  run_tasks(tile.n, total ? 128 : 256, [&](int64_t begin, int64_t end) {
    std::vector<float> old(state[kBase] + begin, state[kBase] + end);
    for (int64_t lane = 0; lane < grid.column_lanes; ++lane) {
      float* s[kLaneFields];
      of_lane(lane, 0, s);
      merge(state, s, begin, end, want);
    }
    if (!total) return;
    // To the new reference: what was summed before, and blocks whose lane had another one when they were accumulated.
    for (int64_t t = begin; t < end; ++t) {
      const float base = reference(state[kBase][t]);
      auto scale = [&](const Matrix& matrix, int64_t column, int64_t columns, float factor) {
        if (factor == 1.f) return;
        matrix.visit(t, column, [&](auto* x) {
          using X = std::remove_pointer_t<decltype(x)>;
          for (int64_t c = 0; c < columns; ++c) x[c] = static_cast<X>(static_cast<float>(x[c]) * factor);
        });
      };
      scale(total, 0, tile.features, exp2_whole(reference(old[t - begin]) - base));
      for (int64_t block = 0; block < tile.column_blocks(); ++block)
        scale(
            by_token, block * kBlock, tile.columns_of(block),
            exp2_whole(*static_cast<float*>(bases.at(block, t)) - base));
    }
  });
}

}  // namespace

Tensor pack_hidden(const Tensor& hidden) {
  const int64_t n = hidden.size(0), features = hidden.size(1);
  const int64_t width = n == 0 ? 0 : (ceil_div(n, kBlock) - 1) * kBlock + block_width(n, ceil_div(n, kBlock) - 1);
  if (hidden.scalar_type() == at::kFloat) {
    Tensor packed = at::empty({width, features}, hidden.options());
    pack_transposed(hidden.const_data_ptr<float>(), n, features, hidden.stride(0), packed.data_ptr<float>());
    return packed;
  }
  Tensor packed = at::empty({width, round_up(features, 2)}, hidden.options());
  pack_transposed(
      hidden.const_data_ptr<at::BFloat16>(), n, features, hidden.stride(0), packed.data_ptr<at::BFloat16>());
  return packed;
}

void accumulate(const TileArgs& args, Tensor& state, int64_t row, const Outputs& want, const ExpOutputs& out) {
  if (args.packed.scalar_type() == at::kFloat) accumulate_tile<float>(args, state, row, want, out);
  else accumulate_tile<at::BFloat16>(args, state, row, want, out);
}

Tensor new_state(int64_t tokens) {
  Tensor state = at::empty({kFields, tokens}, at::TensorOptions().dtype(at::kFloat));
  float* s[kFields];
  for (int64_t i = 0; i < kFields; ++i) s[i] = state.data_ptr<float>() + i * tokens;
  clear(s, kFields, tokens);
  return state;
}

std::vector<Tensor> finish_state(const Tensor& state, const Tensor& labels, int64_t vocab_size) {
  const int64_t m = labels.size(0);
  std::vector<Tensor> result;
  const float* s[kFields];
  float* r[Finished::kSize];
  for (int64_t i = 0; i < kFields; ++i) s[i] = state.const_data_ptr<float>() + i * state.stride(0);
  for (int64_t i = 0; i < Finished::kSize; ++i) {
    result.push_back(at::empty({m}, state.options()));
    r[i] = result.back().data_ptr<float>();
  }
  const int64_t* label = labels.const_data_ptr<int64_t>();
  run_tasks(m, 1024, [&](int64_t begin, int64_t end) {
    finish(s, label, static_cast<double>(vocab_size), begin, end, r);
  });
  return result;
}

}  // namespace dpo_kernels
