// Log-probs, statistics and gradients of a tile of logits, straight from hidden states and the head's weight.
//
// A block of kBlock columns by kBlock tokens is multiplied, folded and forgotten while it is in the L1 cache. Blocks are
// column by token: z^T = W h^T reads W where it lies, as the left operand, and packs the hidden states, which are few.
// Each number of a row of z^T belongs to another token, so that maxima and sums run down the columns of vectors and no
// step adds across a vector.
//
// Base 2 throughout: e = 2^(z log2 e - base) with a whole base >= max z log2 e - 1. Whole bases make every later rescale
// a power of two, which is exact, in bfloat16 too: sums and kept numbers do not depend on the order in which maxima
// were found.
//
// The label's own logit stays out of every sum and joins at the end: where the model is sure, the others' sum is what
// the log-prob consists of, and 1 + it would lose it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "hidden.h"
#include "products.h"
#include "transform.h"

#include <limits>

namespace dpo_kernels {
namespace {

using at::Tensor;

// Rows of the running statistics (kRowStats, M): base; sums of e, of e * log2 e, of e^2 and of z; the label's logit;
// the largest other logit and its column.
enum { kBase, kSum, kSumShifted, kSumSquares, kSumLogits, kTop, kTopAt, kLabelLogit };
static_assert(kLabelLogit + 1 == kRowStats);
constexpr int64_t kLaneStats = kLabelLogit;  // all but the label's logit, which only one thread meets

// One tile: n tokens by v columns.
template <typename T>
struct Tile {
  const T* packed;  // hidden states, pack_transposed
  const T* weight;
  int64_t ldw, n, v, features;
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
        columns, width, features, weight + begin * ldw, ldw,
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
      args.weight.const_data_ptr<T>(),
      args.weight.stride(0),
      args.labels.size(0),
      args.weight.size(0),
      args.weight.size(1),
      args.bias.has_value() ? args.bias->const_data_ptr<float>() : nullptr,
      args.labels.const_data_ptr<int64_t>(),
      args.first,
      Transform(args.temperature, args.logit_scale, args.softcap)};
}

// How threads share a tile: by columns, and by tokens too where that makes the largest share smaller.
struct Grid {
  int64_t column_blocks, token_blocks, column_lanes, token_lanes = 1;

  // For sums down the columns: the lanes of columns do not depend on the tokens, so that a token's sums are the same to
  // the last bit whichever tokens stand beside it.
  static Grid of_sums(int64_t column_blocks, int64_t token_blocks) {
    Grid grid{column_blocks, token_blocks, std::min(threads(), column_blocks)};
    grid.token_lanes = std::clamp<int64_t>(threads() / grid.column_lanes, 1, token_blocks);
    return grid;
  }

  // For blocks that have nothing to do with each other, or only along the columns' tokens.
  static Grid of_blocks(int64_t column_blocks, int64_t token_blocks, bool split_tokens) {
    Grid best{column_blocks, token_blocks, std::min(threads(), column_blocks)};
    for (int64_t columns = best.column_lanes; split_tokens && columns > 0; --columns) {
      const int64_t tokens = std::clamp<int64_t>(threads() / columns, 1, token_blocks);
      const Grid other{column_blocks, token_blocks, columns, tokens};
      if (other.largest_share() < best.largest_share()) best = other;
    }
    return best;
  }

  int64_t largest_share() const { return ceil_div(column_blocks, column_lanes) * ceil_div(token_blocks, token_lanes); }

  // Calls work(lane of columns, column block, first and last token block) for every block, in order within a lane.
  template <typename F>
  void run(bool bfloat16, const F& work) const {
    run_tasks(column_lanes * token_lanes, bfloat16, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t lane = task / token_lanes, part = task % token_lanes;
        for (int64_t c = column_blocks * lane / column_lanes; c < column_blocks * (lane + 1) / column_lanes; ++c)
          work(lane, c, token_blocks * part / token_lanes, token_blocks * (part + 1) / token_lanes);
      }
    });
  }
};

// A number matrix that a caller gave: rows ld apart, of any floating dtype.
struct Matrix {
  char* data = nullptr;
  int64_t ld = 0, size = 0;
  at::ScalarType dtype = at::kFloat;

  Matrix() = default;
  explicit Matrix(const std::optional<Tensor>& t) {
    if (!t.has_value()) return;
    data = static_cast<char*>(t->data_ptr());
    ld = t->stride(0);
    size = t->element_size();
    dtype = t->scalar_type();
  }
  explicit operator bool() const { return data != nullptr; }
  void* at(int64_t row, int64_t column) const { return data + (row * ld + column) * size; }

  template <typename F>
  void visit(int64_t row, int64_t column, const F& f) const {
    with_type(dtype, [&](auto number) { f(static_cast<decltype(number)*>(at(row, column))); });
  }
  // Rows of a block that lie kBlock apart.
  void write(const float* block, int64_t rows, int64_t columns, int64_t row, int64_t column) const {
    visit(row, column, [&](auto* to) {
      for (int64_t r = 0; r < rows; ++r) convert(block + r * kBlock, to + r * ld, columns);
    });
  }
};

void transpose(const float* block, int64_t rows, int64_t columns, float* to) {
  at::vec::transpose_mxn<float>(block, kBlock, to, kBlock, static_cast<int>(rows), static_cast<int>(columns));
}

template <typename T>
void multiply_row(const T* from, const float* factor, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) (read(from + i) * Vec::loadu(factor + i)).store(to + i);
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]) * factor[i];
}

// Folds a block of logits into the statistics of its tokens, s[i] + t; e in place of z where `exps` says so.
void fold_block(
    float* block, int64_t columns, int64_t width, int64_t first, const Outputs& want, bool exps,
    const Transform& transform, float* const* s) {
  for (int64_t t = 0; t < width; t += kWidth) {
    float* z = block + t;
    Vec top(-kInf), other(-kInf);
    int64_t c = 0;
    for (; c + 2 <= columns; c += 2) {
      top = at::vec::clamp_min(top, Vec::loadu(z + c * kBlock));
      other = at::vec::clamp_min(other, Vec::loadu(z + (c + 1) * kBlock));
    }
    if (c < columns) top = at::vec::clamp_min(top, Vec::loadu(z + c * kBlock));
    top = at::vec::clamp_min(top, other);
    if (want.top) {
      Vec best = Vec::loadu(s[kTop] + t), at_column = Vec::loadu(s[kTopAt] + t);
      for (c = 0; c < columns; ++c) {
        const Vec value = Vec::loadu(z + c * kBlock), better = value > best;
        best = Vec::blendv(best, value, better);
        at_column = Vec::blendv(at_column, Vec(static_cast<float>(first + c)), better);
      }
      best.store(s[kTop] + t);
      at_column.store(s[kTopAt] + t);
    }
    const Vec old = Vec::loadu(s[kBase] + t);
    const Vec base = at::vec::clamp_min((top * Vec(static_cast<float>(kLog2E))).ceil(), old);
    Vec sum(0.f), shifted(0.f), squares(0.f);
    for (c = 0; c < columns; ++c) {
      const Vec value = Vec::loadu(z + c * kBlock);
      const Vec x = scaled_difference(value, base);
      const Vec e = exp2(x);
      sum = sum + e;
      if (want.entropy) shifted = at::vec::fmadd(e, at::vec::clamp_min(x, Vec(-127.f)), shifted);
      if (want.squares) squares = at::vec::fmadd(e, e, squares);
      if (exps) (transform.capped ? e * transform.derivative(value) : e).store(z + c * kBlock);
    }
    const Vec shrink = exp2(old - base);
    const Vec before = Vec::loadu(s[kSum] + t);
    if (want.entropy)
      (shrink * (Vec::loadu(s[kSumShifted] + t) + before * at::vec::clamp_min(old - base, Vec(-127.f))) + shifted)
          .store(s[kSumShifted] + t);
    if (want.squares) (shrink * shrink * Vec::loadu(s[kSumSquares] + t) + squares).store(s[kSumSquares] + t);
    (before * shrink + sum).store(s[kSum] + t);
    base.store(s[kBase] + t);
  }
}

// Joins what a lane of columns found for tokens [begin, end) to the statistics of all columns before.
void merge_lane(float* const* stats, float* const* lane, int64_t begin, int64_t end, const Outputs& want) {
  for (int64_t t = begin; t < end; ++t) {
    const float base = std::max(stats[kBase][t], lane[kBase][t]);
    const float down = stats[kBase][t] - base, lane_down = lane[kBase][t] - base;
    const float shrink = exp2_whole(down), grow = exp2_whole(lane_down);
    if (want.entropy)
      stats[kSumShifted][t] =
          shrink * (stats[kSumShifted][t] + stats[kSum][t] * std::max(down, -127.f)) +
          grow * (lane[kSumShifted][t] + lane[kSum][t] * std::max(lane_down, -127.f));
    if (want.squares)
      stats[kSumSquares][t] =
          shrink * shrink * stats[kSumSquares][t] + grow * grow * lane[kSumSquares][t];
    if (want.mean) stats[kSumLogits][t] += lane[kSumLogits][t];
    if (want.top && lane[kTop][t] > stats[kTop][t]) {
      stats[kTop][t] = lane[kTop][t];
      stats[kTopAt][t] = lane[kTopAt][t];
    }
    stats[kSum][t] = stats[kSum][t] * shrink + lane[kSum][t] * grow;
    stats[kBase][t] = base;
  }
}

template <typename T>
void fold_tile(const TileArgs& args, Tensor& row_stats, int64_t row, const Outputs& want, const FoldOutputs& out) {
  const Tile<T> tile = make_tile<T>(args);
  const Grid grid = Grid::of_sums(tile.column_blocks(), tile.token_blocks());
  const int64_t padded = tile.token_blocks() * kBlock;
  float* stats[kRowStats];
  for (int64_t i = 0; i < kRowStats; ++i) stats[i] = row_stats.data_ptr<float>() + i * row_stats.stride(0) + row;
  std::vector<float> found(grid.column_lanes * kLaneStats * padded, 0.f);
  auto of_lane = [&](int64_t lane, int64_t token, float** s) {
    for (int64_t i = 0; i < kLaneStats; ++i) s[i] = &found[(lane * kLaneStats + i) * padded + token];
  };
  for (int64_t lane = 0; lane < grid.column_lanes; ++lane) {
    float* s[kLaneStats];
    of_lane(lane, 0, s);
    std::fill_n(s[kBase], padded, kNoBase);
    std::fill_n(s[kTop], padded, -kInf);
  }
  const Matrix by_token(out.by_token), by_vocab(out.by_vocab), bases(out.bases);
  grid.run(!std::is_same_v<T, float>, [&](int64_t lane, int64_t column_block, int64_t first, int64_t last) {
    alignas(64) float z[kBlock * kBlock], transposed[kBlock * kBlock];
    const int64_t columns = tile.columns_of(column_block);
    for (int64_t token_block = first; token_block < last; ++token_block) {
      const int64_t width = block_width(tile.n, token_block), token = token_block * kBlock;
      const int64_t tokens = std::min(kBlock, tile.n - token);
      float* s[kLaneStats];
      of_lane(lane, token, s);
      tile.logits(column_block, token_block, z);
      if (want.mean)
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t t = 0; t < tokens; ++t) s[kSumLogits][t] += z[c * kBlock + t];
      tile.each_label(column_block, token_block, [&](int64_t t, int64_t at) {
        stats[kLabelLogit][token + t] = z[at];
        z[at] = -kInf;
      });
      fold_block(
          z, columns, width, tile.first + column_block * kBlock, want, static_cast<bool>(bases), tile.transform, s);
      if (bases) std::memcpy(bases.at(column_block, token), s[kBase], sizeof(float) * tokens);
      if (by_vocab) by_vocab.write(z, columns, tokens, column_block * kBlock, token);
      if (by_token) {
        transpose(z, columns, tokens, transposed);
        by_token.write(transposed, tokens, columns, token, column_block * kBlock);
      }
    }
  });
  const Matrix total(out.total);
  at::parallel_for(0, tile.n, 128, [&](int64_t begin, int64_t end) {
    std::vector<float> old(stats[kBase] + begin, stats[kBase] + end);
    for (int64_t lane = 0; lane < grid.column_lanes; ++lane) {
      float* s[kLaneStats];
      of_lane(lane, 0, s);
      merge_lane(stats, s, begin, end, want);
    }
    if (!total) return;
    // To the new base: what was summed before, and blocks that were folded before their lane met its maximum.
    for (int64_t t = begin; t < end; ++t) {
      const float base = stats[kBase][t];
      auto scale = [&](const Matrix& matrix, int64_t column, int64_t columns, float factor) {
        if (factor == 1.f) return;
        matrix.visit(t, column, [&](auto* x) {
          using X = std::remove_pointer_t<decltype(x)>;
          for (int64_t c = 0; c < columns; ++c) x[c] = static_cast<X>(static_cast<float>(x[c]) * factor);
        });
      };
      scale(total, 0, tile.features, exp2_whole(old[t - begin] - base));
      for (int64_t block = 0; block < tile.column_blocks(); ++block)
        scale(
            by_token, block * kBlock, tile.columns_of(block),
            exp2_whole(*static_cast<float*>(bases.at(block, t)) - base));
    }
  });
}

// What backward needs of each token, in float32 from float64: of n tokens, padded with tokens that have no gradient.
struct RowFactors {
  std::vector<float> whole, rest, scale, entropy, entropy_scale, at_label;
  std::vector<float> kept_scale;  // scale * 2^-rest: times 2^(base - whole) it turns a kept e into dz

  RowFactors(const RowGradients& rows, int64_t padded, const Transform& transform) {
    const int64_t n = rows.grad.size(0);
    const bool has_entropy = rows.grad_entropy.has_value();
    for (auto* values : {&whole, &rest, &scale, &at_label, &kept_scale}) values->resize(padded);
    if (has_entropy)
      for (auto* values : {&entropy, &entropy_scale}) values->resize(padded);
    for (int64_t t = 0; t < padded; ++t) {
      const Exponent exponent = t < n ? Exponent(value(rows.maximum, t), value(rows.log_sum, t)) : Exponent();
      whole[t] = exponent.whole, rest[t] = exponent.rest;
      if (t >= n) continue;
      const double g = value(rows.grad, t), slope = transform.slope;
      const double g_entropy = has_entropy ? value(*rows.grad_entropy, t) : 0.;
      const double h = has_entropy ? value(*rows.entropy, t) : 0.;
      scale[t] = static_cast<float>(-g * slope);
      kept_scale[t] = static_cast<float>(-g * slope * std::exp2(-static_cast<double>(exponent.rest)));
      if (has_entropy) entropy[t] = static_cast<float>(h), entropy_scale[t] = static_cast<float>(-g_entropy * slope);
      at_label[t] = label_gradient(
          g, value(rows.log_probs, t), value(rows.maximum, t), value(rows.log_sum, t), g_entropy, h, transform);
    }
  }
  static double value(const Tensor& t, int64_t i) { return t.const_data_ptr<float>()[i]; }
};

// d loss / d a in place of z.
void gradient_block(
    float* block, int64_t columns, int64_t width, int64_t token, const RowFactors& rows, const Transform& transform) {
  const bool has_entropy = !rows.entropy.empty();
  for (int64_t t = 0; t < width; t += kWidth) {
    float* z = block + t;
    const Vec whole = Vec::loadu(&rows.whole[token + t]), rest = Vec::loadu(&rows.rest[token + t]);
    const Vec scale = Vec::loadu(&rows.scale[token + t]);
    const Vec entropy = has_entropy ? Vec::loadu(&rows.entropy[token + t]) : Vec(0.f);
    const Vec entropy_scale = has_entropy ? Vec::loadu(&rows.entropy_scale[token + t]) : Vec(0.f);
    for (int64_t c = 0; c < columns; ++c) {
      const Vec value = Vec::loadu(z + c * kBlock);
      const Vec x = scaled_difference(value, whole) - rest;
      Vec factor = scale;
      if (has_entropy) {
        const Vec log_p = at::vec::clamp_min(x, Vec(-127.f)) * Vec(static_cast<float>(kLn2));
        factor = at::vec::fmadd(entropy_scale, log_p + entropy, factor);
      }
      if (transform.capped) factor = factor * transform.derivative(value);
      (exp2(x) * factor).store(z + c * kBlock);
    }
  }
}

template <typename T>
void gradient_tile(const TileArgs& args, const RowGradients& row_gradients, const GradientOutputs& out) {
  const Tile<T> tile = make_tile<T>(args);
  const Grid grid = Grid::of_blocks(tile.column_blocks(), tile.token_blocks(), !out.bias.has_value());
  const RowFactors rows(row_gradients, tile.token_blocks() * kBlock, tile.transform);
  const Matrix by_token(out.by_token), by_vocab(out.by_vocab), kept(out.kept), bases(out.bases);
  float* bias = out.bias.has_value() ? out.bias->data_ptr<float>() : nullptr;
  grid.run(!std::is_same_v<T, float>, [&](int64_t, int64_t column_block, int64_t first, int64_t last) {
    alignas(64) float dz[kBlock * kBlock], transposed[kBlock * kBlock];
    const int64_t columns = tile.columns_of(column_block), column = column_block * kBlock;
    for (int64_t token_block = first; token_block < last; ++token_block) {
      const int64_t width = block_width(tile.n, token_block), token = token_block * kBlock;
      const int64_t tokens = std::min(kBlock, tile.n - token);
      if (kept) {
        alignas(64) float factor[kBlock];
        const float* base = static_cast<float*>(bases.at(column_block, token));
        for (int64_t t = 0; t < tokens; ++t)
          factor[t] = exp2_whole(base[t] - rows.whole[token + t]) * rows.kept_scale[token + t];
        kept.visit(column, token, [&](const auto* from) {
          for (int64_t c = 0; c < columns; ++c) {
            multiply_row(from + c * kept.ld, factor, dz + c * kBlock, tokens);
            std::fill(dz + c * kBlock + tokens, dz + c * kBlock + width, 0.f);
          }
        });
      } else {
        tile.logits(column_block, token_block, dz);
        gradient_block(dz, columns, width, token, rows, tile.transform);
      }
      tile.each_label(
          column_block, token_block, [&](int64_t t, int64_t at) { dz[at] = rows.at_label[token + t]; });
      if (bias != nullptr)
        for (int64_t c = 0; c < columns; ++c) {
          Vec sum(0.f);
          for (int64_t t = 0; t < width; t += kWidth) sum = sum + Vec::loadu(dz + c * kBlock + t);
          bias[column + c] += sum_of(sum);
        }
      if (by_vocab) by_vocab.write(dz, columns, tokens, column, token);
      if (by_token) {
        transpose(dz, columns, tokens, transposed);
        by_token.write(transposed, tokens, columns, token, column);
      }
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

void fold(const TileArgs& args, Tensor& stats, int64_t row, const Outputs& want, const FoldOutputs& out) {
  if (args.weight.scalar_type() == at::kFloat) fold_tile<float>(args, stats, row, want, out);
  else fold_tile<at::BFloat16>(args, stats, row, want, out);
}

void gradient(const TileArgs& args, const RowGradients& rows, const GradientOutputs& out) {
  if (args.weight.scalar_type() == at::kFloat) gradient_tile<float>(args, rows, out);
  else gradient_tile<at::BFloat16>(args, rows, out);
}

std::vector<Tensor> finish(const Tensor& stats, const Tensor& labels, int64_t vocab_size) {
  const int64_t m = labels.size(0);
  std::vector<Tensor> result;
  const float* s[kRowStats];
  float* r[kFinished];
  for (int64_t i = 0; i < kRowStats; ++i) s[i] = stats.const_data_ptr<float>() + i * stats.stride(0);
  for (int64_t i = 0; i < kFinished; ++i) {
    result.push_back(at::empty({m}, stats.options()));
    r[i] = result.back().data_ptr<float>();
  }
  const int64_t* label = labels.const_data_ptr<int64_t>();
  at::parallel_for(0, m, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const double y = s[kLabelLogit][t], base = s[kBase][t] * kLn2, sum = s[kSum][t];
      const auto [log_prob, lse, others, top] = join(s[kBase][t], sum, y);
      const double share = std::exp(others - lse), p = std::exp(log_prob);
      const double shifted = sum > 0 ? kLn2 * s[kSumShifted][t] / sum : 0.;
      r[kLogProb][t] = static_cast<float>(log_prob);
      r[kMaximum][t] = static_cast<float>(top);
      r[kLogSum][t] = static_cast<float>(lse - static_cast<double>(r[kMaximum][t]));
      r[kOthers][t] = static_cast<float>(std::exp(base - lse));
      r[kEntropy][t] = static_cast<float>(
          (lse - top) - (share > 0 ? share * (base + shifted - top) : 0.) - (p > 0 ? p * (y - top) : 0.));
      r[kLogSquares][t] = static_cast<float>(
          std::log(s[kSumSquares][t] * std::exp(2 * (base - lse)) + p * p));
      r[kMean][t] = static_cast<float>(s[kSumLogits][t] / static_cast<double>(vocab_size));
      r[kTop1][t] = s[kLabelLogit][t] > s[kTop][t] ||
              (s[kLabelLogit][t] == s[kTop][t] && static_cast<float>(label[t]) < s[kTopAt][t])
          ? 1.f
          : 0.f;
    }
  });
  return result;
}

}  // namespace dpo_kernels
