// From product to logit, z = cap(logit_scale * a) / temperature with cap(u) = softcap * tanh(u / softcap), and back.
#pragma once

#include "vec.h"

#include <algorithm>
#include <limits>
#include <optional>

namespace dpo_kernels {

// Of float arithmetic throughout. slope: dz/da without the cap's own derivative, 1 - (z * temperature / softcap)^2.
struct Transform {
  float slope;
  float inner;  // logit_scale / softcap
  float outer;  // softcap / temperature
  float back;   // temperature / softcap
  bool capped;

  Transform(double temperature, double logit_scale, std::optional<double> softcap)
      : slope(static_cast<float>(logit_scale / temperature)),
        inner(static_cast<float>(logit_scale / softcap.value_or(1.))),
        outer(static_cast<float>(softcap.value_or(1.) / temperature)),
        back(static_cast<float>(temperature / softcap.value_or(1.))),
        capped(softcap.has_value()) {}

  bool trivial() const { return !capped && slope == 1.f; }

  Vec logit(Vec a) const { return capped ? (a * Vec(inner)).tanh() * Vec(outer) : a * Vec(slope); }
  Vec derivative(Vec z) const {
    const Vec t = at::vec::clamp_min(z * Vec(back), Vec(-1.f));  // -inf marks a label that was taken out
    return capped ? Vec(1.f) - t * t : Vec(1.f);
  }
};

// exp(z - lse) = 2^(z * log2 e - whole - rest): the whole part is subtracted inside the product's rounding, so that the
// exponent keeps the digits that a single float32 log-sum-exp would cost it.
struct Exponent {
  float whole;
  float rest;

  Exponent() : whole(1048576.f), rest(0.f) {}  // of a row that is padding: far more than any logit's exponent
  Exponent(double maximum, double log_sum) {
    const double exact = (maximum + log_sum) * kLog2E;
    whole = static_cast<float>(std::floor(exact));
    rest = static_cast<float>(exact - static_cast<double>(whole));
  }
};

// d loss / d a at the label, from the gradients of its log-prob and of the row's entropy: -g expm1(log p), since 1 - p
// loses every digit where the model is sure.
inline float label_gradient(
    double g, double log_prob, double label_logit, double g_entropy, double entropy, const Transform& transform) {
  double d = -g * std::expm1(log_prob);
  if (g_entropy != 0) d -= g_entropy * std::exp(log_prob) * (std::max(log_prob, -1e4) + entropy);
  const double tanh = label_logit * transform.back;
  return static_cast<float>(d * transform.slope * (transform.capped ? 1 - tanh * tanh : 1.));
}

constexpr float kHighLog2E = static_cast<float>(kLog2E), kLowLog2E = static_cast<float>(kLog2E - kHighLog2E);
static_assert(kLowLog2E > 0, "z = -inf must not meet the other sign");

// z * log2 e - base, with log2 e in two parts: the first alone is off by 1.3e-8 of z, which is much where z is large.
// Of logits beyond +-700,000, whose own spacing is over 0.06, it says nothing: such rows are the PyTorch back end's
// (LARGEST_LOGIT in dpo_kernels/backends/cpp.py).
inline Vec scaled_difference(Vec z, Vec base) {
  return at::vec::fmadd(z, Vec(kLowLog2E), at::vec::fmadd(z, Vec(kHighLog2E), Vec(0.f) - base));
}

// exp(z) 2^-base for a whole base, as exact wherever z lies: z log2 e is rounded to a whole number first, and what is left
// of it has all its digits. 0 where it is below 2^-126.5; of logits out of reach it says nothing, but NaN stays NaN.
class Powers {
 public:
  explicit Powers(Vec base) : shift_(Vec(kMagic) - at::vec::clamp_min(base, Vec(-kReachInBase2))) {}

  Vec operator()(Vec z) const {
    Vec whole, rest;
    return of(z, whole, rest);
  }

  // The same; z log2 e = whole + rest.
  Vec of(Vec z, Vec& whole, Vec& rest) const {
    z = at::vec::clamp_min(z, Vec(-2 * kReachInBase2));  // an infinite one has no parts
    const Vec shifted = at::vec::fmadd(z, Vec(kHighLog2E), shift_);
    whole = shifted - shift_;
    rest = at::vec::fmadd(z, Vec(kLowLog2E), at::vec::fmadd(z, Vec(kHighLog2E), shift_ - shifted));
    return exp2_of_parts(at::vec::clamp_min(shifted, Vec(kMagic - 127.f)), rest);
  }

 private:
  static constexpr float kReachInBase2 = 1.1e6f;  // more than kReach * log2 e
  Vec shift_;
};

}  // namespace dpo_kernels
