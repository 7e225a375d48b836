// The statistics of a row of logits over a part of the vocabulary: fields, merge, and how the label joins at the end.
// dpo_kernels/statistics.py is the same in Python, with the same names (tests/test_statistics.py compares them).
//
// Two things differ from Python. Sums are over e = 2^(z log2 e - reference(base)), where Python's are relative to
// `maximum`: a whole number, so every later rescale is a power of two, which is exact, in bfloat16 too. The reference is 0
// for all rows but those of very large or small logits, so hardly a row is ever rescaled. `maximum` is kept only beside `argmax`,
// and what `finish` calls the maximum is `base`, within 1 above the largest logit.
//
// The label's own logit stays out of every sum and joins at the end: where the model is sure, the others' sum is what
// the log-prob consists of, and 1 + it would lose it.
#pragma once

#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace dpo_kernels {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kNoBase = -1.5e38f;  // of a row without a finite logit yet
constexpr double kReach = 7e5;       // LARGEST_LOGIT in dpo_kernels/backends/cpp.py

// Rows of a state (kFields, M) of M tokens, float.
enum Field { kBase, kTotal, kShifted, kSquares, kLogits, kMaximum, kArgmax, kLabelLogit, kFields };
constexpr const char* kFieldNames[kFields] = {
    "base",     // the whole exponent of the largest logit
    "total",    // sum of e = 2^(z log2 e - reference(base)), without the label, as in all sums but `logits`
    "shifted",  // sum of e (z log2 e - base)
    "squares",  // sum of e^2
    "logits",   // sum of z, the label's too
    "maximum",  // the largest logit but the label's
    "argmax",   // its first vocabulary entry
    "label_logit"};
constexpr int64_t kLaneFields = kLabelLogit;  // all but the label's logit, which only one thread meets

// Which optional statistics are wanted.
struct Outputs {
  bool entropy, squares, logits, argmax;
};

// The base of a largest logit. One that float32 could not hold in base 2 stays finite, so that `finish` calls the row's
// maximum a number that is out of reach (LARGEST_LOGIT); an infinite one stays infinite.
template <typename N>
N base_of(N largest) {
  constexpr float most = 2e38f, end = std::numeric_limits<float>::max();
  const N beyond = largest - at_least(at_most(largest, end), -end);  // 0, or infinite
  return ceil_of(at_most(largest, most) * N(static_cast<float>(kLog2E))) + beyond;
}

// What sums are relative to in a row of this base. Between the bounds it is 0, and float32 holds the sum of e^2 of 2^24
// entries, up to 2^120, and of small e what is above 2^-94 of the largest.
constexpr float kLeastBase = -32.f, kMostBase = 48.f;
inline float reference(float base) { return base >= kLeastBase && base <= kMostBase ? 0.f : base; }
inline Vec reference(Vec base) {
  return Vec::blendv(base, Vec(0.f), (base >= Vec(kLeastBase)) & (base <= Vec(kMostBase)));
}

// What is summed in a row of a base: of one token (N = float), or of kWidth tokens (N = Vec).
template <typename N>
struct Sums {
  N base{kNoBase}, total{0.f}, shifted{0.f}, squares{0.f};

  // To a base that is not smaller.
  void raise(N to, const Outputs& want) {
    const N shrink = exp2_whole(reference(base) - reference(to));
    // The limit keeps 0 from meeting an infinity; what is that far down does not count.
    if (want.entropy) shifted = shrink * (shifted + total * at_least(base - to, -127.f));
    if (want.squares) squares = shrink * shrink * squares;
    total = total * shrink;
    base = to;
  }

  // Of columns behind these, of the same base.
  void add(N more, N more_shifted, N more_squares, const Outputs& want) {
    total = total + more;
    if (want.entropy) shifted = shifted + more_shifted;
    if (want.squares) squares = squares + more_squares;
  }
};

// Adds the sums of columns behind these, of a base of their own.
inline void merge(Sums<float>& sums, Sums<float> part, const Outputs& want) {
  const float both = std::max(sums.base, part.base);
  sums.raise(both, want);
  part.raise(both, want);
  sums.add(part.total, part.shifted, part.squares, want);
}

// The sums in a state from token t on. Those that are not wanted are 0, and stay in it as they are.
template <typename N>
Sums<N> load(const float* const* state, int64_t t, const Outputs& want) {
  Sums<N> s;
  get(state[kBase] + t, s.base);
  get(state[kTotal] + t, s.total);
  if (want.entropy) get(state[kShifted] + t, s.shifted);
  if (want.squares) get(state[kSquares] + t, s.squares);
  return s;
}

template <typename N>
void store(const Sums<N>& s, float* const* state, int64_t t, const Outputs& want) {
  put(s.base, state[kBase] + t);
  put(s.total, state[kTotal] + t);
  if (want.entropy) put(s.shifted, state[kShifted] + t);
  if (want.squares) put(s.squares, state[kSquares] + t);
}

// Makes the first fields those of `size` tokens that have seen no logit yet.
inline void clear(float* const* state, int64_t fields, int64_t size) {
  for (int64_t i = 0; i < fields; ++i) {
    const float start = i == kBase ? kNoBase : i == kMaximum ? -kInf : i == kLabelLogit ? kNaN : 0.f;
    std::fill_n(state[i], size, start);
  }
}

// Merges a state of the vocabulary behind it into a state, tokens [begin, end).
inline void merge(float* const* state, const float* const* part, int64_t begin, int64_t end, const Outputs& want) {
  for (int64_t t = begin; t < end; ++t) {
    Sums<float> sums = load<float>(state, t, want);
    merge(sums, load<float>(part, t, want), want);
    store(sums, state, t, want);
    if (want.logits) state[kLogits][t] += part[kLogits][t];
    if (want.argmax && part[kMaximum][t] > state[kMaximum][t]) {
      state[kMaximum][t] = part[kMaximum][t];
      state[kArgmax][t] = part[kArgmax][t];
    }
  }
}

// A row once the label joins the others.
struct Joined {
  double log_prob;
  double lse;      // log sum exp z over the vocabulary
  double lse_of_others;  // the same over all but the label; -inf if all are banned
  double maximum;  // a number near the largest logit
};

inline Joined join(float of_row, double total, double y) {
  const double base = of_row * kLn2;
  const bool any = of_row > kNoBase;  // not total > 0: far from zero, rounding leaves nothing of the sums (see LARGEST_LOGIT)
  Joined r;
  r.lse_of_others = reference(of_row) * kLn2 + std::log(total);
  const double ahead = y - r.lse_of_others;
  // log sigmoid of how far the label is ahead of the others: exact down to the smallest log-prob
  r.log_prob = ahead > 0 ? -std::log1p(std::exp(-ahead)) : ahead - std::log1p(std::exp(ahead));
  if (std::isinf(y) && y > 0) r.log_prob = std::numeric_limits<double>::quiet_NaN();
  // From the larger of the two: y - log_prob would lose everything where y is finite and hugely negative.
  r.lse = ahead > 0 ? y + std::log1p(std::exp(-ahead)) : r.lse_of_others + std::log1p(std::exp(ahead));
  // Others that are out of reach make the row so, also where the label is not: their sums may be anything.
  r.maximum = !any ? y : std::abs(base) > kReach ? base : std::max(base, y);
  return r;
}

// What `finish` makes of each token: statistics.Finished, then the optional statistics of statistics.TokenStats.
struct Finished {
  enum { kLogProb, kMaximum, kLogSum, kOthers, kLabelLogit, kEntropy, kLogSquares, kMeanLogit, kIsTop1, kSize };
};

// Joins the label for tokens [begin, end). Optional statistics mean nothing unless their fields were accumulated.
inline void finish(
    const float* const* s, const int64_t* labels, double vocab_size, int64_t begin, int64_t end, float* const* r) {
  for (int64_t t = begin; t < end; ++t) {
    const double y = s[kLabelLogit][t], base = s[kBase][t] * kLn2, total = s[kTotal][t];
    const double summed_to = reference(s[kBase][t]) * kLn2;
    const auto [log_prob, lse, lse_of_others, maximum] = join(s[kBase][t], total, y);
    const double share = std::exp(lse_of_others - lse), p = std::exp(log_prob);
    const double shifted = total > 0 ? kLn2 * s[kShifted][t] / total : 0.;
    r[Finished::kLogProb][t] = static_cast<float>(log_prob);
    r[Finished::kMaximum][t] = static_cast<float>(maximum);
    r[Finished::kLogSum][t] = static_cast<float>(lse - static_cast<double>(r[Finished::kMaximum][t]));
    r[Finished::kOthers][t] = static_cast<float>(std::exp(base - lse));
    r[Finished::kLabelLogit][t] = s[kLabelLogit][t];
    r[Finished::kEntropy][t] = static_cast<float>(
        (lse - maximum) - (share > 0 ? share * (base + shifted - maximum) : 0.) - (p > 0 ? p * (y - maximum) : 0.));
    r[Finished::kLogSquares][t] =
        static_cast<float>(std::log(s[kSquares][t] * std::exp(2 * (summed_to - lse)) + p * p));
    r[Finished::kMeanLogit][t] = static_cast<float>(s[kLogits][t] / vocab_size);
    r[Finished::kIsTop1][t] = s[kLabelLogit][t] > s[kMaximum][t] ||
            (s[kLabelLogit][t] == s[kMaximum][t] && static_cast<float>(labels[t]) < s[kArgmax][t])
        ? 1.f
        : 0.f;
  }
}

}  // namespace dpo_kernels
