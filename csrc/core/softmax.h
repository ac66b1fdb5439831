// The online softmax's one row: what its end state means. (m, l) is the running max, in the units of the scores, and
// the running sum of exp2((score - m) * factor), where factor brings scores to log2 units. Differences are taken before
// they are scaled, so that logits as low as floats go (a mask of finfo.min) do not overflow. Milakov and Gimelshein,
// "Online normalizer calculation for softmax"; Dao, "FlashAttention-2", 3.1.
#pragma once

#include <cmath>
#include <limits>

#include "core/config.h"

namespace flashx {

// The one place that decides what a row that sees no key gives: out = 0 * acc = 0, lse = -inf.
template <typename T>
struct RowResult {
  T out_scale;  // out = acc * out_scale
  T lse;        // natural log

  // unit brings scores to natural units.
  FLASHX_CORE static RowResult from(T max, T sum, T unit) {
    if (sum == T(0)) return {scale_of(sum), -std::numeric_limits<T>::infinity()};
    const double log_sum = std::log(static_cast<double>(sum));
    return {scale_of(sum), static_cast<T>(static_cast<double>(max) * static_cast<double>(unit) + log_sum)};
  }
  // out_scale alone: logarithms take time.
  FLASHX_CORE static T scale_of(T sum) { return sum == T(0) ? T(0) : T(1) / sum; }
};

// The backward's weights are exp(logit - backward_lse(lse)): an empty row (lse -inf) gives weights 0, not inf.
template <typename T>
FLASHX_CORE T backward_lse(T lse) {
  return lse == -std::numeric_limits<T>::infinity() ? std::numeric_limits<T>::infinity() : lse;
}

}  // namespace flashx
