// A tile of logits, and how threads share it.
//
// A block of kBlock columns by kBlock tokens is multiplied, accumulated and forgotten while it is in the L1 cache. Blocks
// are column by token: z^T = W h^T reads W where it lies, as the left operand, and packs the hidden states, which are
// few. Each number of a row of z^T belongs to another token, so that maxima and sums run down the columns of vectors and no
// step adds across a vector.
#pragma once

#include <ATen/core/Tensor.h>

#include "hidden.h"
#include "products.h"
#include "transform.h"

namespace dpo_kernels {

// One tile: n tokens by v columns.
template <typename T>
struct Tile {
  const T* packed;  // hidden states, pack_transposed
  Matrix weight;
  int64_t n, v, features;
  const float* bias;  // (v,) or null
  const int64_t* labels;
  int64_t first;  // the tile's first column
  Transform transform;

  int64_t column_blocks() const { return ceil_div(v, kBlock); }
  int64_t token_blocks() const { return ceil_div(n, kBlock); }
  int64_t columns_of(int64_t block) const { return std::min(kBlock, v - block * kBlock); }

  // Logits of a block, (columns, kBlock) of which block_width tokens are used.
  void logits(int64_t column_block, int64_t token_block, float* z) const {
    const int64_t begin = column_block * kBlock, columns = columns_of(column_block);
    const int64_t width = block_width(n, token_block);
    deep_product(
        columns, width, features, weight, column_block,
        packed + token_block * kBlock * round_up(features, kPair<T>), width, z);
    if (bias == nullptr && transform.trivial()) return;
    for (int64_t c = 0; c < columns; ++c) {
      const Vec shift(bias == nullptr ? 0.f : bias[begin + c]);
      for (int64_t t = 0; t < width; t += kWidth) {
        const Vec a = Vec::loadu(z + c * kBlock + t) + shift;
        (transform.trivial() ? a : transform.logit(a)).store(z + c * kBlock + t);
      }
    }
  }

  // Calls found(token of the block, index into the block) for labels among the block's columns.
  template <typename F>
  void each_label(int64_t column_block, int64_t token_block, const F& found) const {
    const int64_t begin = first + column_block * kBlock, columns = columns_of(column_block);
    const int64_t tokens = std::min(kBlock, n - token_block * kBlock);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t column = labels[token_block * kBlock + t] - begin;
      if (column >= 0 && column < columns) found(t, column * kBlock + t);
    }
  }
};

template <typename T>
Tile<T> make_tile(const TileArgs& args) {
  return {
      args.packed.const_data_ptr<T>(),
      Matrix(args.weight),
      args.labels.size(0),
      args.weight.size(0),
      args.weight.size(1),
      args.bias.has_value() ? args.bias->const_data_ptr<float>() : nullptr,
      args.labels.const_data_ptr<int64_t>(),
      args.first,
      Transform(args.temperature, args.logit_scale, args.softcap)};
}

constexpr int64_t kPiece = 64;  // column blocks: the width of the usual tile (dpo_kernels/backends/cpp.py)

// How threads share a tile: by columns, and by tokens too where that makes the largest share smaller.
struct Grid {
  int64_t column_blocks, token_blocks, column_lanes, token_lanes = 1;
  int64_t piece = column_blocks, piece_lanes = column_lanes;  // column blocks that share lanes, and how many of these

  // For sums down the columns: the lanes of columns depend neither on the tokens nor on the tile's width, beyond a piece,
  // so that a token's sums are the same to the last bit whichever tokens, and how many, stand beside it.
  static Grid of_sums(int64_t column_blocks, int64_t token_blocks) {
    const int64_t lanes = std::max(threads(), std::min(threads() * kShares, kThreads));
    const int64_t piece = std::min(column_blocks, kPiece), piece_lanes = std::min(lanes, piece);
    const int64_t whole = (column_blocks - 1) / piece, last = column_blocks - whole * piece;
    Grid grid{column_blocks, token_blocks, whole * piece_lanes + std::min(piece_lanes, last)};
    grid.piece = piece, grid.piece_lanes = piece_lanes;
    grid.token_lanes = std::clamp<int64_t>(threads() / grid.column_lanes, 1, token_blocks);
    return grid;
  }

  // For blocks that have nothing to do with each other, or only along the columns' tokens.
  static Grid of_blocks(int64_t column_blocks, int64_t token_blocks, bool split_tokens) {
    if (column_blocks >= threads() * kShares) return {column_blocks, token_blocks, column_blocks};
    Grid best{column_blocks, token_blocks, std::min(threads(), column_blocks)};
    for (int64_t columns = best.column_lanes; split_tokens && columns > 0; --columns) {
      const int64_t tokens = std::clamp<int64_t>(threads() / columns, 1, token_blocks);
      const Grid other{column_blocks, token_blocks, columns, tokens};
      if (other.largest_share() < best.largest_share()) best = other;
    }
    return best;
  }

  int64_t largest_share() const { return ceil_div(column_blocks, column_lanes) * ceil_div(token_blocks, token_lanes); }

  int64_t lanes() const { return column_lanes * token_lanes; }

  // Calls work(lane of columns, column block, first and last token block) for every block of some lanes, in order within a
  // lane.
  template <typename F>
  void each(int64_t first, int64_t last, const F& work) const {
    for (int64_t task = first; task < last; ++task) {
      const int64_t lane = task / token_lanes, part = task % token_lanes;
      const int64_t begin = lane / piece_lanes * piece, of_piece = lane % piece_lanes;
      const int64_t blocks = std::min(piece, column_blocks - begin), lanes = std::min(piece_lanes, blocks);
      for (int64_t c = begin + blocks * of_piece / lanes; c < begin + blocks * (of_piece + 1) / lanes; ++c)
        work(lane, c, token_blocks * part / token_lanes, token_blocks * (part + 1) / token_lanes);
    }
  }
};

// to = from * factor, n numbers.
template <typename T>
void multiply_row(const T* from, const float* factor, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) (read(from + i) * Vec::loadu(factor + i)).store(to + i);
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]) * factor[i];
}

// Rows of a block, ld apart, become columns of rows ldt apart.
template <typename T>
void transpose(const T* from, int64_t ld, int64_t rows, int64_t columns, T* to, int64_t ldt) {
  constexpr int64_t side = 32;  // ATen's vectors take no larger block of 16-bit numbers
  for (int64_t r = 0; r < rows; r += side)
    for (int64_t c = 0; c < columns; c += side)
      at::vec::transpose_mxn<T>(
          from + r * ld + c, ld, to + c * ldt + r, ldt, static_cast<int>(std::min(side, rows - r)),
          static_cast<int>(std::min(side, columns - c)));
}

}  // namespace dpo_kernels
