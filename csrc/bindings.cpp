// The operators that Python sees, torch.ops.dpo_kernels_cpp, and the checks of every size and dtype at this boundary.

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "hidden.h"
#include "logits.h"
#include "products.h"
#include "recycle.h"
#include "select.h"
#include "threads.h"

#include <algorithm>
#include <string_view>

namespace dpo_kernels {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

bool floating(const Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

void check_operand(const char* name, const Tensor& t) {
  TORCH_CHECK(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name, " is ", t.scalar_type(),
      "; expected float or bfloat16");
}

// What products read in the operands' dtype.
void check_narrower(const char* name, const Tensor& t, at::ScalarType operand) {
  TORCH_CHECK(
      t.scalar_type() == operand || operand == at::kFloat, name, " is ", t.scalar_type(), ", the products ", operand);
}

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  TORCH_CHECK(
      t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " is ", t.sizes(), "; expected (", rows, ", ",
      columns, ")");
  TORCH_CHECK(t.device().is_cpu() && floating(t), name, " is ", t.scalar_type(), " on ", t.device());
  TORCH_CHECK(
      t.stride(1) == 1 || columns <= 1, name, " has strides ", t.strides(), "; expected contiguous rows");
}

void check_vector(const char* name, const Tensor& t, int64_t size, at::ScalarType dtype) {
  TORCH_CHECK(
      t.dim() == 1 && t.size(0) == size && t.scalar_type() == dtype && t.is_contiguous() && t.device().is_cpu(), name,
      " is ", t.scalar_type(), " of ", t.sizes(), "; expected ", size, " contiguous ", dtype);
}

// A matrix that is written: no two of its rows overlap.
void check_written(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_matrix(name, t, rows, columns);
  TORCH_CHECK(rows <= 1 || t.stride(0) >= columns, name, " has rows that overlap: strides ", t.strides());
}

void check_written(const char* name, const Maybe& t, int64_t rows, int64_t columns) {
  if (t.has_value()) check_written(name, *t, rows, columns);
}

void check_vector(const char* name, const Maybe& t, int64_t size) {
  if (t.has_value()) check_vector(name, *t, size, at::kFloat);
}

void check_matrix(const char* name, const Maybe& t, int64_t rows, int64_t columns) {
  if (t.has_value()) check_matrix(name, *t, rows, columns);
}

void check_bases(bool values, const Maybe& bases, int64_t n, int64_t v) {
  TORCH_CHECK(values == bases.has_value(), "saved exponentials and their bases come together");
  check_matrix("bases", bases, ceil_div(v, kBlock), n);
  TORCH_CHECK(!bases.has_value() || bases->scalar_type() == at::kFloat, "bases are ", bases->scalar_type());
}

TileArgs checked_tile(
    const Tensor& packed, const Tensor& weight, const Maybe& bias, const Tensor& labels, int64_t first,
    double temperature, double logit_scale, std::optional<double> softcap) {
  const int64_t n = labels.size(0), v = weight.size(0), features = weight.size(1);
  check_operand("packed", packed);
  check_matrix("weight", weight, v, features);
  check_narrower("weight", weight, packed.scalar_type());
  check_vector("labels", labels, n, at::kLong);
  check_vector("bias", bias, v);
  TORCH_CHECK(n > 0 && v > 0 && features > 0, "an empty tile: ", n, " tokens, weight ", weight.sizes());
  const int64_t pair = packed.scalar_type() == at::kFloat ? 1 : 2, blocks = ceil_div(n, kBlock);
  TORCH_CHECK(packed.is_contiguous(), "packed has strides ", packed.strides());
  check_matrix(
      "packed", packed, (blocks - 1) * kBlock + block_width(n, blocks - 1), round_up(features, pair));
  return {packed, weight, bias, labels, first, temperature, logit_scale, softcap};
}

// names: separated by commas; no name of a statistic holds another.
Outputs parse(std::string_view names) {
  auto has = [&](std::string_view name) { return names.find(name) != std::string_view::npos; };
  const Outputs found{has("entropy"), has("log_sum_sq_probs"), has("mean_logits"), has("is_top1")};
  const int64_t given = names.empty() ? 0 : 1 + std::count(names.begin(), names.end(), ',');
  TORCH_CHECK(found.entropy + found.squares + found.logits + found.argmax == given, "unknown outputs in ", names);
  return found;
}

Tensor pack_op(const Tensor& hidden) {
  check_operand("hidden", hidden);
  TORCH_CHECK(hidden.dim() == 2, "hidden is ", hidden.sizes(), "; expected (n, D)");
  check_matrix("hidden", hidden, hidden.size(0), hidden.size(1));
  return pack_hidden(hidden);
}

void accumulate_op(
    const Tensor& packed, const Tensor& weight, const Maybe& bias, const Tensor& labels, int64_t first,
    double temperature, double logit_scale, std::optional<double> softcap, Tensor state, int64_t row,
    std::string_view outputs, const Maybe& by_token, const Maybe& by_vocab, const Maybe& bases, const Maybe& total) {
  const TileArgs args = checked_tile(packed, weight, bias, labels, first, temperature, logit_scale, softcap);
  const int64_t n = labels.size(0), v = weight.size(0);
  TORCH_CHECK(
      state.dim() == 2 && state.size(0) == kFields && state.is_contiguous() && state.scalar_type() == at::kFloat &&
          row >= 0 && row + n <= state.size(1),
      "state is ", state.scalar_type(), " of ", state.sizes(), " for rows ", row, " to ", row + n);
  TORCH_CHECK(state.device().is_cpu(), "state is on ", state.device());
  TORCH_CHECK(first + v <= 1 << 24, "columns up to ", first + v, "; the first maximum is known up to ", 1 << 24);
  check_written("by_token", by_token, n, v);
  check_written("by_vocab", by_vocab, v, n);
  check_bases(by_token.has_value() || by_vocab.has_value(), bases, n, v);
  TORCH_CHECK(
      !by_token.has_value() || by_token->scalar_type() == packed.scalar_type(), "by_token is ", by_token->scalar_type(),
      ", the products ", packed.scalar_type());
  check_written("bases", bases, ceil_div(v, kBlock), n);
  check_written("total", total, n, weight.size(1));
  TORCH_CHECK(
      !total.has_value() || (by_token.has_value() && total->scalar_type() == at::kFloat), "total needs by_token");
  accumulate(args, state, row, parse(outputs), {by_token, by_vocab, bases, total});
}

std::vector<Tensor> finish_op(const Tensor& state, const Tensor& labels, int64_t vocab_size) {
  TORCH_CHECK(
      state.dim() == 2 && state.size(0) == kFields && state.scalar_type() == at::kFloat && state.is_contiguous(),
      "state is ", state.scalar_type(), " of ", state.sizes());
  check_vector("labels", labels, state.size(1), at::kLong);
  return finish_state(state, labels, vocab_size);
}

Tensor new_state_op(int64_t tokens) {
  TORCH_CHECK(tokens >= 0, "a state of ", tokens, " tokens");
  return new_state(tokens);
}

// What sums of rows of these bases are relative to.
Tensor reference_op(const Tensor& base) {
  check_vector("base", base, base.numel(), at::kFloat);
  Tensor made = base.clone();
  float* to = made.data_ptr<float>();
  for (int64_t t = 0; t < base.numel(); ++t) to[t] = reference(to[t]);
  return made;
}

// For tests: the names that dpo_kernels/statistics.py has too.
std::vector<std::string> state_fields_op() { return {kFieldNames, kFieldNames + kFields}; }

void check_product(const ProductArgs& product) {
  const auto& [out, a, b, add, room] = product;
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a is ", a.sizes(), ", b ", b.sizes());
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  check_matrix("a", a, m, k);
  check_matrix("b", b, k, n);
  check_written("out", out, m, n);
  TORCH_CHECK(m > 0 && n > 0 && k > 0, "an empty product: ", a.sizes(), " x ", b.sizes());
  check_operand("room", room);
  check_vector("room", room, n * round_up(k, room.scalar_type() == at::kFloat ? 1 : 2), room.scalar_type());
  check_narrower("a", a, room.scalar_type());
  check_narrower("b", b, room.scalar_type());
  TORCH_CHECK(!add || out.scalar_type() == at::kFloat, "cannot add to ", out.scalar_type());
}

void multiply_op(Tensor out, const Tensor& a, const Tensor& b, bool add, Tensor room) {
  const ProductArgs product{out, a, b, add, room};
  check_product(product);
  multiply(product);
}

// Products: outs, right operands and rooms, whether by_vocab is the left one (else by_token), and whether they add.
void gradient_op(
    const Tensor& packed, const Tensor& weight, const Maybe& bias, const Tensor& labels, int64_t first,
    double temperature, double logit_scale, std::optional<double> softcap, const Tensor& grad,
    const Tensor& log_probs, const Tensor& maximum, const Tensor& log_sum, const Tensor& label_logit, const Maybe& entropy,
    const Maybe& grad_entropy, const Maybe& by_token, const Maybe& by_vocab, const Maybe& grad_bias,
    const Maybe& exps, const Maybe& bases, at::TensorList outs, at::TensorList rights, at::TensorList rooms,
    at::IntArrayRef of_vocab, at::IntArrayRef adds) {
  const TileArgs args = checked_tile(packed, weight, bias, labels, first, temperature, logit_scale, softcap);
  const int64_t n = labels.size(0), v = weight.size(0);
  check_vector("grad", grad, n, at::kFloat);
  check_vector("log_probs", log_probs, n, at::kFloat);
  check_vector("maximum", maximum, n, at::kFloat);
  check_vector("log_sum", log_sum, n, at::kFloat);
  check_vector("label_logit", label_logit, n, at::kFloat);
  check_vector("entropy", entropy, n);
  check_vector("grad_entropy", grad_entropy, n);
  TORCH_CHECK(entropy.has_value() == grad_entropy.has_value(), "entropy and its gradient come together");
  TORCH_CHECK(!exps.has_value() || !entropy.has_value(), "nothing is saved that an entropy's gradient needs");
  check_written("by_token", by_token, n, v);
  check_written("by_vocab", by_vocab, v, n);
  check_vector("grad_bias", grad_bias, v);
  check_matrix("exps", exps, v, n);
  check_bases(exps.has_value(), bases, n, v);
  TORCH_CHECK(
      rights.size() == outs.size() && rooms.size() == outs.size() && of_vocab.size() == outs.size() &&
          adds.size() == outs.size(),
      outs.size(), " products have ", rights.size(), " right operands, ", rooms.size(), " rooms, ", of_vocab.size(),
      " left operands, ", adds.size(), " sums");
  for (const auto& [name, left] : {std::pair{"by_token", &by_token}, std::pair{"by_vocab", &by_vocab}})
    TORCH_CHECK(
        !left->has_value() || (*left)->scalar_type() == packed.scalar_type(), name, " is ", (*left)->scalar_type(),
        ", the products ", packed.scalar_type());
  TORCH_CHECK(!exps.has_value() || !by_vocab.has_value(), "by_vocab is what was saved");
  std::vector<GradientProduct> products;
  for (size_t i = 0; i < outs.size(); ++i) {
    const Maybe& left = !of_vocab[i] ? by_token : exps.has_value() ? exps : by_vocab;
    TORCH_CHECK(left.has_value(), "product ", i, " has no left operand");
    products.push_back({{outs[i], *left, rights[i], adds[i] != 0, rooms[i]}, of_vocab[i] != 0});
    check_product(products.back().args);
    check_vector("room", rooms[i], rooms[i].numel(), packed.scalar_type());
    for (size_t j = 0; j < i; ++j)
      TORCH_CHECK(rooms[i].data_ptr() != rooms[j].data_ptr(), "products ", j, " and ", i, " have the same room");
  }
  gradient(
      args, {grad, log_probs, maximum, log_sum, label_logit, entropy, grad_entropy},
      {by_token, by_vocab, grad_bias, exps, bases}, products);
}

std::vector<Tensor> select_op(
    const Tensor& exps, const Tensor& bases, const Tensor& to, const Tensor& least, int64_t group, Tensor room,
    Tensor dropped) {
  const int64_t v = exps.size(0), n = to.size(0);
  check_matrix("exps", exps, v, n);
  check_bases(true, bases, n, v);
  check_vector("to", to, n, at::kFloat);
  check_vector("least", least, n, at::kFloat);
  check_vector("room", room, room.numel(), exps.scalar_type());
  check_vector("dropped", dropped, n, at::kDouble);
  TORCH_CHECK(group == kGroup, "groups of ", group, " tokens; they are of ", kGroup);
  return select({exps, bases, to, least}, room, dropped);
}

void check_rows(const char* name, const Maybe& index, int64_t m, const char* of, const Tensor& matrix) {
  if (!index.has_value()) return;
  check_vector(name, *index, m, at::kLong);
  const int64_t* at = index->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < m; ++i)
    TORCH_CHECK(at[i] >= 0 && at[i] < matrix.size(0), name, "[", i, "] is ", at[i], "; ", of, " have ", matrix.size(0), " rows");
}

LogitsArgs checked_logits(
    const Tensor& logits, const Maybe& index, const Tensor& labels, double temperature, double logit_scale,
    std::optional<double> softcap) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits are ", logits.sizes());
  check_matrix("logits", logits, logits.size(0), logits.size(1));
  const int64_t m = index.has_value() ? index->size(0) : logits.size(0);
  check_vector("labels", labels, m, at::kLong);
  check_rows("index", index, m, "logits", logits);
  return {logits, index, labels, temperature, logit_scale, softcap};
}

std::vector<Tensor> logits_forward_op(
    const Tensor& logits, const Maybe& index, const Tensor& labels, double temperature, double logit_scale,
    std::optional<double> softcap) {
  return logits_forward(checked_logits(logits, index, labels, temperature, logit_scale, softcap));
}

void logits_backward_op(
    const Tensor& logits, const Maybe& index, const Tensor& labels, double temperature, double logit_scale,
    std::optional<double> softcap, const Tensor& grad, const Tensor& log_probs, const Tensor& maximum,
    const Tensor& log_sum, const Tensor& label_logit, Tensor out, const Maybe& out_index) {
  const LogitsArgs args = checked_logits(logits, index, labels, temperature, logit_scale, softcap);
  for (const Tensor* t : {&grad, &log_probs, &maximum, &log_sum, &label_logit}) check_vector("a row's vector", *t, labels.size(0), at::kFloat);
  check_written("out", out, out.size(0), logits.size(1));
  TORCH_CHECK(out_index.has_value() || out.size(0) >= labels.size(0), "out has ", out.size(0), " rows");
  check_rows("out_index", out_index, labels.size(0), "out", out);
  TORCH_CHECK(out.scalar_type() == logits.scalar_type(), "out is ", out.scalar_type(), ", logits ", logits.scalar_type());
  logits_backward(args, grad, log_probs, maximum, log_sum, label_logit, out, out_index);
}

Tensor empty_op(std::string_view purpose, int64_t rows, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK(rows >= 0 && columns >= 0, "a matrix of ", rows, " x ", columns);
  return recycled(std::string(purpose), rows, columns, dtype);
}

// For tests: 2^x as the kernels compute it.
Tensor exp2_op(const Tensor& x) {
  check_vector("x", x, x.numel(), at::kFloat);
  Tensor y = x.clone();
  float* p = y.data_ptr<float>();
  TORCH_CHECK(x.numel() % kWidth == 0, "x has ", x.numel(), " numbers; expected a multiple of ", kWidth);
  for (int64_t i = 0; i < x.numel(); i += kWidth) exp2(Vec::loadu(p + i)).store(p + i);
  return y;
}

// For tests: how often each of `count` tasks ran, on threads of ours or as kernels run. Task `fails`, if there is one, throws.
Tensor run_tasks_op(int64_t count, int64_t fails, bool ours) {
  Tensor runs = at::zeros({count}, at::TensorOptions().dtype(at::kLong));
  int64_t* of_task = runs.data_ptr<int64_t>();
  auto task = [&](int64_t i) {
    TORCH_CHECK(i != fails, "task ", i, " fails");
    ++of_task[i];
  };
  if (ours) {
    std::atomic<int64_t> next{0};
    run_on_own_threads(threads() - 1, [&] {
      int64_t taken = 0;
      for (int64_t i = next++; i < count; i = next++, ++taken) task(i);
      return taken;
    });
  } else {
    run_tasks(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) task(i);
    });
  }
  return runs;
}

// For tests: how often each of `count` tasks of a second phase ran, each of which waits for both pieces of a part of the
// first. Task `fails`, if there is one, throws: of the first phase, or from 2 * count on of the second.
Tensor run_phases_op(int64_t count, int64_t fails) {
  Tensor runs = at::zeros({count}, at::TensorOptions().dtype(at::kLong));
  int64_t* of_task = runs.data_ptr<int64_t>();
  Phases phases;
  Parts parts(count, 2);
  phases.add(2 * count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      TORCH_CHECK(i != fails, "task ", i, " fails");
      parts.made(i % count);
    }
  });
  phases.add(count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (!phases.wait([&] { return parts.ready(count - 1 - i); })) return;
      TORCH_CHECK(2 * count + i != fails, "task ", 2 * count + i, " fails");
      ++of_task[i];
    }
  });
  phases.run([] {});
  return runs;
}

void set_crowded_op(bool crowded) { crowd.set(crowded); }

// For tests: whether each of these kernels ran on threads of ours, of which a wait says whether PyTorch's had to wait.
std::vector<int64_t> crowd_op(at::IntArrayRef waits) {
  Crowd seen;
  std::vector<int64_t> ours;
  for (int64_t wait : waits) {
    ours.push_back(seen.is_here());
    if (!ours.back()) seen.saw(wait != 0);
  }
  return ours;
}

}  // namespace
}  // namespace dpo_kernels

#define TILE "Tensor packed, Tensor weight, Tensor? bias, Tensor labels, int first, float temperature, float logit_scale, float? softcap"
#define LOGITS "Tensor logits, Tensor? index, Tensor labels, float temperature, float logit_scale, float? softcap"

TORCH_LIBRARY(dpo_kernels_cpp, m) {
  m.def("pack(Tensor hidden) -> Tensor", dpo_kernels::pack_op);
  m.def(
      "accumulate(" TILE ", Tensor(a!) state, int row, str outputs, Tensor(b!)? by_token, Tensor(c!)? by_vocab,"
      " Tensor(d!)? bases, Tensor(e!)? total) -> ()",
      dpo_kernels::accumulate_op);
  m.def("new_state(int tokens) -> Tensor", dpo_kernels::new_state_op);
  m.def("finish(Tensor state, Tensor labels, int vocab_size) -> Tensor[]", dpo_kernels::finish_op);
  m.def("reference(Tensor base) -> Tensor", dpo_kernels::reference_op);
  m.def("state_fields() -> str[]", dpo_kernels::state_fields_op);
  m.def(
      "gradient(" TILE ", Tensor grad, Tensor log_probs, Tensor maximum, Tensor log_sum, Tensor label_logit,"
      " Tensor? entropy,"
      " Tensor? grad_entropy, Tensor(a!)? by_token, Tensor(b!)? by_vocab, Tensor(c!)? grad_bias, Tensor? exps,"
      " Tensor? bases, Tensor(d!)[] outs, Tensor[] rights, Tensor(e!)[] rooms, int[] of_vocab, int[] adds) -> ()",
      dpo_kernels::gradient_op);
  m.def("multiply(Tensor(a!) out, Tensor a, Tensor b, bool add, Tensor(b!) room) -> ()", dpo_kernels::multiply_op);
  m.def(
      "select(Tensor exps, Tensor bases, Tensor to, Tensor least, int group, Tensor(a!) room, Tensor(b!)"
      " dropped) -> Tensor[]",
      dpo_kernels::select_op);
  m.def("logits_forward(" LOGITS ") -> Tensor[]", dpo_kernels::logits_forward_op);
  m.def(
      "logits_backward(" LOGITS ", Tensor grad, Tensor log_probs, Tensor maximum, Tensor log_sum, Tensor label_logit, Tensor(a!) out, Tensor? out_index) -> ()",
      dpo_kernels::logits_backward_op);
  m.def("empty(str purpose, int rows, int columns, ScalarType dtype) -> Tensor", dpo_kernels::empty_op);
  m.def("release() -> int", dpo_kernels::release_recycled);
  m.def("run_tasks(int count, int fails, bool ours) -> Tensor", dpo_kernels::run_tasks_op);
  m.def("run_phases(int count, int fails) -> Tensor", dpo_kernels::run_phases_op);
  m.def("set_crowded(bool crowded) -> ()", dpo_kernels::set_crowded_op);
  m.def("crowd(int[] waits) -> int[]", dpo_kernels::crowd_op);
  m.def("runs_on_own_threads() -> int", dpo_kernels::runs_on_own_threads);
  m.def("exp2(Tensor x) -> Tensor", dpo_kernels::exp2_op);
}
