// Backward of a tile of logits: its gradient, and the products with it, in one kernel. dz is made of the logits, which are
// multiplied again, or of what forward saved of them.

#include <ATen/core/Tensor.h>

#include "hidden.h"
#include "tile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace dpo_kernels {
namespace {

using at::Tensor;

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

// Saved exponentials: dz is e times a factor of the token's. So products multiply them as they lie, and what is scaled is the
// hidden states or the sum. Factors may be as far apart as float32 numbers can be, and further: they are powers of two times
// numbers of any size, relative to the largest of them.
struct SavedExps {
  Matrix exps, bases;
  int64_t n;
  std::vector<float> base;  // (n,): the largest that a block's e of the token are relative to
  Factors factors;          // (n,): dz are e relative to `base`, times them
  Factors largest;          // (1,): a power of two near the largest of them
  std::vector<float> fold;  // (n,): factors / largest, which products fold in; 1 where it is too small for that,
  Factors unfolded;         // (n,): and then it is this, by which e is multiplied first; 1 otherwise
  bool all_fold = true;
  std::vector<char> moved;  // of each block of columns: whether any of its e is relative to another number than `base`

  SavedExps(const Tensor& saved, const Tensor& saved_bases, const RowFactors& rows)
      : exps(saved), bases(saved_bases), n(saved.size(1)), base(n, kNoBase), factors(n), largest(1), fold(n), unfolded(n),
        moved(saved_bases.size(0)) {
    const int64_t blocks = saved_bases.size(0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t t = 0; t < n; ++t) base[t] = std::max(base[t], of_block(block)[t]);
    for (int64_t block = 0; block < blocks; ++block) moved[block] = !std::equal(base.begin(), base.end(), of_block(block));
    // Beyond these bounds dz is 0, or smaller than any number beside it. Rows out of reach are not ours; NaN stays NaN.
    constexpr double most = 250;
    std::vector<int> power(n);
    int top = std::numeric_limits<int>::min();
    for (int64_t t = 0; t < n; ++t) {
      const float number = rows.exps_scale[t];
      const double exact = std::clamp(static_cast<double>(base[t]) - rows.whole[t], -most, most);
      power[t] = std::isnan(exact) ? 0 : static_cast<int>(exact);
      factors.set(t, number, power[t]);
      if (number != 0 && std::isfinite(number)) top = std::max(top, power[t] + std::ilogb(number));
    }
    if (top == std::numeric_limits<int>::min()) top = 0;
    largest.set(0, 1.f, top);
    constexpr float least = 0x1p-60f;  // of hidden states times it, what counts beside others is a normal number
    for (int64_t t = 0; t < n; ++t) {
      const float number = rows.exps_scale[t];
      fold[t] = std::ldexp(number, power[t] - top);
      if (number == 0 || !(std::abs(fold[t]) < least)) continue;  // NaN is folded
      fold[t] = 1.f;
      unfolded.set(t, number, power[t] - top);
      all_fold = false;
    }
  }

  const float* of_block(int64_t block) const { return static_cast<float*>(bases.at(block, 0)); }

  // What brings a block's e of tokens [first, first + count) to their `base`: two powers of two, since an e may be 2^48, and
  // what is 2^-126 times it still a number that counts in its own row of dW.
  void to_base(int64_t block, int64_t first, int64_t count, float* one, float* two) const {
    for (int64_t t = first; t < first + count; ++t) {
      const float down = of_block(block)[t] - base[t], half = std::floor(down / 2);
      one[t - first] = exp2_whole(half), two[t - first] = exp2_whole(down - half);
    }
  }

  // e of some tokens, times factors.
  void times(int64_t column, int64_t token, const float* one, const float* two, float* to, int64_t tokens) const {
    exps.visit(column, token, [&](const auto* from) { multiply_row(from, one, to, tokens); });
    multiply_row(to, two, to, tokens);
  }

  // What products by_vocab multiply.
  LeftOperand left() const {
    LeftOperand made;
    made.terms = fold.data();
    made.rows = &largest;
    made.scaled = [this](int64_t block) { return moved[block] || !all_fold; };
    made.scales = [this](int64_t block, int64_t first, int64_t count, float* one, float* two) {
      to_base(block, first, count, one, two);
      for (int64_t t = 0; t < count; ++t) one[t] *= unfolded.one[first + t], two[t] *= unfolded.two[first + t];
    };
    return made;
  }
};

template <typename T>
std::unique_ptr<ProductTasks> make_tasks(const ProductArgs& product, const LeftOperand& left = {}) {
  const Tensor &a = product.a, &b = product.b;
  return std::make_unique<ProductTasks>(
      Matrix::written(product.out), Matrix(a), Matrix(b), a.size(0), b.size(1), a.size(1), product.add,
      product.room.data_ptr<T>(), left);
}

// The left operands of products. What dz is at the labels they leave out: it joins the products in float32.
struct Lefts {
  LeftOperand of_vocab, of_tokens;

  template <typename T>
  void add_labels(const Tile<T>& tile, const RowFactors& rows) {
    for (int64_t t = 0; t < tile.n; ++t) {
      const int64_t column = tile.labels[t] - tile.first;
      if (column < 0 || column >= tile.v) continue;
      of_tokens.entries.push_back({t, column, rows.at_label[t]});
      of_vocab.entries.push_back({column, t, rows.at_label[t]});
    }
    std::stable_sort(
        of_vocab.entries.begin(), of_vocab.entries.end(), [](const Entry& a, const Entry& b) { return a.row < b.row; });
  }
};

// One kernel: block(column block, first and last token block) for every block of a grid, and products. Those by_vocab need
// nothing but the column block that they multiply, or not even that (`made_before`). The others need all of them, so they
// come last; whoever would wait for columns packs the weight first.
template <typename T, typename Block>
void run_gradient(
    const Grid& grid, const Block& block, const std::vector<GradientProduct>& products, const Lefts& lefts,
    bool made_before) {
  std::vector<std::unique_ptr<ProductTasks>> of_vocab, of_tokens;
  for (const GradientProduct& product : products)
    if (product.by_vocab) of_vocab.push_back(make_tasks<T>(product.args, lefts.of_vocab));
    else of_tokens.push_back(make_tasks<T>(product.args, lefts.of_tokens));
  Phases phases;
  Parts columns_made(grid.column_blocks, grid.token_lanes);
  for (auto& tasks : of_vocab) tasks->add_packing(phases);
  phases.add(grid.lanes(), [&](int64_t first, int64_t last) {
    grid.each(first, last, [&](int64_t, int64_t column_block, int64_t first_block, int64_t last_block) {
      block(column_block, first_block, last_block);
      columns_made.made(column_block);
    });
  });
  for (auto& tasks : of_vocab)
    tasks->add_products(phases, [&](int64_t column_block) { return made_before || columns_made.ready(column_block); });
  for (auto& tasks : of_tokens) tasks->add_packing(phases);
  for (auto& tasks : of_tokens) tasks->add_products(phases, [&](int64_t) { return columns_made.all_ready(); });
  phases.run([] { release_products(!std::is_same_v<T, float>); });
}

void add_to_bias(const float* dz, int64_t columns, int64_t width, float* bias) {
  for (int64_t c = 0; c < columns; ++c) {
    Vec sum(0.f);
    for (int64_t t = 0; t < width; t += kWidth) sum = sum + Vec::loadu(dz + c * kBlock + t);
    bias[c] += sum_of(sum);
  }
}

template <typename T>
void gradient_of_saved(
    const Tile<T>& tile, const Grid& grid, const RowFactors& rows, const GradientOutputs& out,
    const std::vector<GradientProduct>& products) {
  const SavedExps saved(*out.exps, *out.bases, rows);
  const Matrix by_token = Matrix::written(out.by_token);
  float* bias = out.bias.has_value() ? out.bias->data_ptr<float>() : nullptr;
  auto block = [&](int64_t column_block, int64_t first, int64_t last) {
    const int64_t columns = tile.columns_of(column_block), column = column_block * kBlock;
    const bool as_it_lies = !saved.moved[column_block] && saved.exps.holds<T>();
    alignas(64) float one[kBlock], two[kBlock], e[kBlock * kBlock];
    alignas(64) T rounded[kBlock * kBlock];
    for (int64_t token = first * kBlock; token < std::min(last * kBlock, tile.n); token += kBlock) {
      const int64_t tokens = std::min(kBlock, tile.n - token), width = round_up(tokens, kWidth);
      if (!as_it_lies || bias != nullptr) {
        saved.to_base(column_block, token, tokens, one, two);
        for (int64_t c = 0; c < columns; ++c) {
          saved.times(column + c, token, one, two, e + c * kBlock, tokens);
          std::fill(e + c * kBlock + tokens, e + c * kBlock + width, 0.f);
        }
      }
      if (by_token && as_it_lies) {
        transpose(
            saved.exps.as<T>(column, token), saved.exps.ld, columns, tokens, by_token.as<T>(token, column), by_token.ld);
      } else if (by_token) {
        for (int64_t c = 0; c < columns; ++c) convert(e + c * kBlock, rounded + c * kBlock, tokens);
        transpose(rounded, kBlock, columns, tokens, by_token.as<T>(token, column), by_token.ld);
      }
      if (bias == nullptr) continue;
      for (int64_t c = 0; c < columns; ++c) {
        float* dz = e + c * kBlock;
        multiply_row(dz, &saved.factors.one[token], dz, tokens);
        multiply_row(dz, &saved.factors.two[token], dz, tokens);
      }
      add_to_bias(e, columns, width, bias + column);
      tile.each_label(column_block, token / kBlock, [&](int64_t t, int64_t at) {
        bias[column + at / kBlock] += rows.at_label[token + t];
      });
    }
  };
  Lefts lefts{saved.left(), {}};
  lefts.of_tokens.rows = &saved.factors;
  lefts.add_labels(tile, rows);
  run_gradient<T>(grid, block, products, lefts, /*made_before=*/true);
}

template <typename T>
void gradient_tile(
    const TileArgs& args, const RowGradients& row_gradients, const GradientOutputs& out,
    const std::vector<GradientProduct>& products) {
  const Tile<T> tile = make_tile<T>(args);
  const Grid grid = Grid::of_blocks(tile.column_blocks(), tile.token_blocks(), !out.bias.has_value());
  const RowFactors rows(row_gradients, tile.token_blocks() * kBlock, tile.transform);
  if (out.exps.has_value()) return gradient_of_saved(tile, grid, rows, out, products);
  const Matrix by_token = Matrix::written(out.by_token), by_vocab = Matrix::written(out.by_vocab);
  float* bias = out.bias.has_value() ? out.bias->data_ptr<float>() : nullptr;
  auto block = [&](int64_t column_block, int64_t first, int64_t last) {
    alignas(64) float dz[kBlock * kBlock], transposed[kBlock * kBlock];
    const int64_t columns = tile.columns_of(column_block), column = column_block * kBlock;
    for (int64_t token_block = first; token_block < last; ++token_block) {
      const int64_t width = block_width(tile.n, token_block), token = token_block * kBlock;
      const int64_t tokens = std::min(kBlock, tile.n - token);
      tile.logits(column_block, token_block, dz);
      gradient_block(dz, columns, width, token, rows, tile.transform);
      tile.each_label(column_block, token_block, [&](int64_t t, int64_t at) {  // see Lefts
        dz[at] = 0.f;
        if (bias != nullptr) bias[column + at / kBlock] += rows.at_label[token + t];
      });
      if (bias != nullptr) add_to_bias(dz, columns, width, bias + column);
      if (by_vocab) by_vocab.write(dz, columns, tokens, column, token);
      if (by_token) {
        transpose(dz, kBlock, columns, tokens, transposed, kBlock);
        by_token.write(transposed, tokens, columns, token, column);
      }
    }
  };
  Lefts lefts;
  lefts.add_labels(tile, rows);
  run_gradient<T>(grid, block, products, lefts, /*made_before=*/false);
}

}  // namespace

void gradient(
    const TileArgs& args, const RowGradients& rows, const GradientOutputs& out,
    const std::vector<GradientProduct>& products) {
  if (args.packed.scalar_type() == at::kFloat) gradient_tile<float>(args, rows, out, products);
  else gradient_tile<at::BFloat16>(args, rows, out, products);
}

void multiply(const ProductArgs& product) {
  const bool wide = product.room.scalar_type() == at::kFloat;
  const auto tasks = wide ? make_tasks<float>(product) : make_tasks<at::BFloat16>(product);
  Phases phases;
  tasks->add_packing(phases);
  tasks->add_products(phases, [](int64_t) { return true; });
  phases.run([&] { release_products(!wide); });
}

}  // namespace dpo_kernels
