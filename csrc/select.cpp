// Which of a tile's saved exponentials are worth a product, and what the others sum to.

#include "select.h"

#include <ATen/ops/empty.h>

#include "products.h"
#include "softmax_state.h"

#include <algorithm>
#include <numeric>

namespace dpo_kernels {
namespace {

using at::Tensor;

class Selection {
 public:
  explicit Selection(const SelectArgs& args)
      : args_(args), exps_(args.exps), bases_(args.bases), v_(args.exps.size(0)), n_(args.exps.size(1)),
        groups_(ceil_div(n_, kGroup)), blocks_(ceil_div(v_, kBlock)), kept_(groups_ * v_), left_out_(blocks_ * n_) {
    run_tasks(blocks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t group = 0; group < groups_; ++group) look_at(block, group);
    });
  }

  std::vector<Tensor> write(Tensor& room, Tensor& dropped) const {
    Tensor counts = at::empty({groups_}, at::TensorOptions().dtype(at::kLong));
    int64_t* of_group = counts.data_ptr<int64_t>();
    int64_t numbers = 0;
    for (int64_t group = 0; group < groups_; ++group) {
      const uint8_t* kept = &kept_[group * v_];
      of_group[group] = std::accumulate(kept, kept + v_, int64_t{0});
      numbers += of_group[group] * tokens_of(group);
    }
    if (numbers > room.numel()) return {};
    const int64_t total = std::accumulate(of_group, of_group + groups_, int64_t{0});
    Tensor columns = at::empty({total}, at::TensorOptions().dtype(at::kLong));
    int64_t* column = columns.data_ptr<int64_t>();
    std::vector<int64_t> places(total);  // in room, of each kept column's numbers
    for (int64_t group = 0, i = 0, place = 0; group < groups_; ++group)
      for (int64_t c = 0; c < v_; ++c)
        if (kept_[group * v_ + c]) {
          column[i] = c, places[i++] = place;
          place += tokens_of(group);
        }
    int64_t start = 0;
    for (int64_t group = 0; group < groups_; start += of_group[group++])
      run_tasks(of_group[group], kBlock, [&](int64_t begin, int64_t end) {
        for (int64_t i = start + begin; i < start + end; ++i) copy(group, column[i], room, places[i]);
      });
    double* to = dropped.data_ptr<double>();
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t t = 0; t < n_; ++t) to[t] += left_out_[block * n_ + t];
    return {columns, counts};
  }

 private:
  const SelectArgs& args_;
  const Matrix exps_, bases_;
  const int64_t v_, n_, groups_, blocks_;
  std::vector<uint8_t> kept_;     // (groups, v)
  std::vector<float> left_out_;  // (blocks, n): sums, relative to `to`

  int64_t tokens_of(int64_t group) const { return std::min(kGroup, n_ - group * kGroup); }

  // 2^(base - to) of a group's tokens in a block of columns; whether all are 1.
  bool shrink(int64_t block, int64_t group, float* factor) const {
    const float *base = bases_.as<float>(block, group * kGroup), *to = args_.to.const_data_ptr<float>() + group * kGroup;
    bool same = true;
    for (int64_t t = 0; t < tokens_of(group); ++t) {
      factor[t] = exp2_whole(base[t] - to[t]);
      same = same && factor[t] == 1.f;
    }
    return same;
  }

  void look_at(int64_t block, int64_t group) {
    const int64_t tokens = tokens_of(group), first = group * kGroup;
    alignas(64) float e[kGroup] = {}, factor[kGroup], bound[kGroup], sums[kGroup] = {};
    std::fill_n(factor, kGroup, 1.f);
    std::fill_n(bound, kGroup, kInf);
    const bool same = shrink(block, group, factor);
    std::copy_n(args_.least.const_data_ptr<float>() + first, tokens, bound);
    for (int64_t c = block * kBlock; c < std::min((block + 1) * kBlock, v_); ++c) {
      exps_.read(c, first, e, tokens);
      Vec below = Vec::loadu(e) == Vec::loadu(e);
      for (int64_t t = 0; t < kGroup; t += kWidth) {
        const Vec value = same ? Vec::loadu(e + t) : Vec::loadu(e + t) * Vec::loadu(factor + t);
        value.store(e + t);
        below = below & (value < Vec::loadu(bound + t));  // false for a NaN, which is kept
      }
      if (below.zero_mask() != 0) {
        kept_[group * v_ + c] = 1;
      } else {
        for (int64_t t = 0; t < kGroup; t += kWidth) (Vec::loadu(sums + t) + Vec::loadu(e + t)).store(sums + t);
      }
    }
    std::copy_n(sums, tokens, &left_out_[block * n_ + first]);
  }

  void copy(int64_t group, int64_t column, Tensor& room, int64_t place) const {
    const int64_t tokens = tokens_of(group);
    alignas(64) float e[kGroup], factor[kGroup];
    exps_.read(column, group * kGroup, e, tokens);
    if (!shrink(column / kBlock, group, factor))
      for (int64_t t = 0; t < tokens; ++t) e[t] *= factor[t];
    with_type(room.scalar_type(), [&](auto number) {
      convert(e, room.data_ptr<decltype(number)>() + place, tokens);
    });
  }
};

}  // namespace

std::vector<Tensor> select(const SelectArgs& args, Tensor& room, Tensor& dropped) {
  return Selection(args).write(room, dropped);
}

}  // namespace dpo_kernels
