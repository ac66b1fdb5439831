// The online softmax's one row: what its end state means. (m, l) is the running max, in log2 units, and the
// running sum of exp2(logit - m). Milakov and Gimelshein, "Online normalizer calculation for softmax"; Dao,
// "FlashAttention-2", 3.1.
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

  FLASHX_CORE static RowResult from(T max_log2, T sum) {
    if (sum == T(0)) return {T(0), -std::numeric_limits<T>::infinity()};
    return {T(1) / sum, static_cast<T>((static_cast<double>(max_log2) + std::log2(static_cast<double>(sum))) * kLn2)};
  }
};

// The backward's weights are exp2(logit - lse_log2(lse)): an empty row (lse -inf) gives weights 0, not inf.
template <typename T>
FLASHX_CORE T lse_log2(T lse) {
  return lse == -std::numeric_limits<T>::infinity() ? std::numeric_limits<T>::infinity()
                                                    : static_cast<T>(static_cast<double>(lse) * kLog2e);
}

}  // namespace flashx
