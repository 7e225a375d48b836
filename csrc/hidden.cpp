// Log-probs, statistics and gradients of a tile of logits, straight from hidden states and the head's weight.
//
// A block of kBlock columns by kBlock tokens is multiplied, accumulated and forgotten while it is in the L1 cache. Blocks
// are column by token: z^T = W h^T reads W where it lies, as the left operand, and packs the hidden states, which are
// few. Each number of a row of z^T belongs to another token, so that maxima and sums run down the columns of vectors and no
// step adds across a vector.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "hidden.h"
#include "products.h"
#include "transform.h"

#include <memory>

namespace dpo_kernels {
namespace {

using at::Tensor;

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
    Vec total(0.f), shifted(0.f), squares(0.f);
    for (c = 0; c < columns; ++c) {
      const Vec value = Vec::loadu(z + c * kBlock);
      const Vec x = scaled_difference(value, base);
      const Vec e = exp2(x);
      total = total + e;
      if (want.entropy) shifted = at::vec::fmadd(e, at_least(x, -127.f), shifted);
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
  const Matrix by_token(out.by_token), by_vocab(out.by_vocab), bases(out.bases);
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
      if (bases) std::memcpy(bases.at(column_block, token), s[kBase], sizeof(float) * tokens);
      if (by_vocab) by_vocab.write(z, columns, tokens, column_block * kBlock, token);
      if (by_token) {
        transpose(z, columns, tokens, transposed);
        by_token.write(transposed, tokens, columns, token, column_block * kBlock);
      }
    }
  };
  run_products(grid.lanes(), !std::is_same_v<T, float>, [&](int64_t first, int64_t last) { grid.each(first, last, block); });
  const Matrix total(out.total);
  // A merge of 256 tokens takes less than waking a thread; with sums of features to rescale, one of 128 takes more.
  run_tasks(tile.n, total ? 128 : 256, [&](int64_t begin, int64_t end) {
    std::vector<float> old(state[kBase] + begin, state[kBase] + end);
    for (int64_t lane = 0; lane < grid.column_lanes; ++lane) {
      float* s[kLaneFields];
      of_lane(lane, 0, s);
      merge(state, s, begin, end, want);
    }
    if (!total) return;
    // To the new base: what was summed before, and blocks that were accumulated before their lane met its maximum.
    for (int64_t t = begin; t < end; ++t) {
      const float base = state[kBase][t];
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
  std::vector<float> exps_scale;  // scale * 2^-rest: times 2^(base - whole) it turns a saved e into dz

  RowFactors(const RowGradients& rows, int64_t padded, const Transform& transform) {
    const int64_t n = rows.grad.size(0);
    const bool has_entropy = rows.grad_entropy.has_value();
    for (auto* values : {&whole, &rest, &scale, &at_label, &exps_scale}) values->resize(padded);
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
      exps_scale[t] = static_cast<float>(-g * slope * std::exp2(-static_cast<double>(exponent.rest)));
      if (has_entropy) entropy[t] = static_cast<float>(h), entropy_scale[t] = static_cast<float>(-g_entropy * slope);
      at_label[t] = label_gradient(
          g, value(rows.log_probs, t), value(rows.label_logit, t), g_entropy, h, transform);
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

std::unique_ptr<ProductTasks> make_tasks(const ProductArgs& product) {
  const Tensor &out = product.out, &a = product.a, &b = product.b, &room = product.room;
  std::unique_ptr<ProductTasks> made;
  auto make = [&](auto operand, auto number) {
    using T = decltype(operand);
    made = std::make_unique<ProductTasks>(
        out.data_ptr<decltype(number)>(), out.stride(0), a.const_data_ptr<T>(), a.stride(0), b.const_data_ptr<T>(),
        b.stride(0), a.size(0), b.size(1), a.size(1), product.add, room.data_ptr<T>());
  };
  with_type(out.scalar_type(), [&](auto number) {
    a.scalar_type() == at::kFloat ? make(float(), number) : make(at::BFloat16(), number);
  });
  return made;
}

template <typename T>
void gradient_tile(
    const TileArgs& args, const RowGradients& row_gradients, const GradientOutputs& out,
    const std::vector<GradientProduct>& products) {
  const Tile<T> tile = make_tile<T>(args);
  const Grid grid = Grid::of_blocks(tile.column_blocks(), tile.token_blocks(), !out.bias.has_value());
  const RowFactors rows(row_gradients, tile.token_blocks() * kBlock, tile.transform);
  const Matrix by_token(out.by_token), by_vocab(out.by_vocab), exps(out.exps), bases(out.bases);
  float* bias = out.bias.has_value() ? out.bias->data_ptr<float>() : nullptr;
  auto block = [&](int64_t column_block, int64_t first, int64_t last) {
    alignas(64) float dz[kBlock * kBlock], transposed[kBlock * kBlock];
    const int64_t columns = tile.columns_of(column_block), column = column_block * kBlock;
    for (int64_t token_block = first; token_block < last; ++token_block) {
      const int64_t width = block_width(tile.n, token_block), token = token_block * kBlock;
      const int64_t tokens = std::min(kBlock, tile.n - token);
      if (exps) {
        alignas(64) float factor[kBlock];
        const float* base = static_cast<float*>(bases.at(column_block, token));
        for (int64_t t = 0; t < tokens; ++t)
          factor[t] = exp2_whole(base[t] - rows.whole[token + t]) * rows.exps_scale[token + t];
        exps.visit(column, token, [&](const auto* from) {
          for (int64_t c = 0; c < columns; ++c) {
            multiply_row(from + c * exps.ld, factor, dz + c * kBlock, tokens);
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
  };
  // Products with the weight need all columns, so they come last; whoever would wait for columns packs the weight first.
  Phases phases;
  Parts columns_made(grid.column_blocks, grid.token_lanes);
  std::vector<std::unique_ptr<ProductTasks>> of_vocab, of_tokens;
  for (const GradientProduct& product : products)
    (product.by_vocab ? of_vocab : of_tokens).push_back(make_tasks(product.args));
  for (auto& tasks : of_vocab) tasks->add_packing(phases);
  phases.add(grid.lanes(), [&](int64_t first, int64_t last) {
    grid.each(first, last, [&](int64_t, int64_t column_block, int64_t first_block, int64_t last_block) {
      block(column_block, first_block, last_block);
      columns_made.made(column_block);
    });
  });
  for (auto& tasks : of_vocab)
    tasks->add_products(phases, [&](int64_t column_block) { return columns_made.ready(column_block); });
  for (auto& tasks : of_tokens) tasks->add_packing(phases);
  for (auto& tasks : of_tokens) tasks->add_products(phases, [&](int64_t) { return columns_made.all_ready(); });
  phases.run([] { release_products(!std::is_same_v<T, float>); });
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
  if (args.weight.scalar_type() == at::kFloat) accumulate_tile<float>(args, state, row, want, out);
  else accumulate_tile<at::BFloat16>(args, state, row, want, out);
}

void gradient(
    const TileArgs& args, const RowGradients& rows, const GradientOutputs& out,
    const std::vector<GradientProduct>& products) {
  if (args.weight.scalar_type() == at::kFloat) gradient_tile<float>(args, rows, out, products);
  else gradient_tile<at::BFloat16>(args, rows, out, products);
}

void multiply(const ProductArgs& product) {
  const auto tasks = make_tasks(product);
  Phases phases;
  tasks->add_packing(phases);
  tasks->add_products(phases, [](int64_t) { return true; });
  phases.run([&] { release_products(product.a.scalar_type() != at::kFloat); });
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
