// The online softmax of a tile of scores S^T[key][lane]: weights relative to a row's shift, and what a new shift does
// to its sums. It can be done in pieces, beside a product.
#pragma once

#include "cpu/math.h"
#include "cpu/rows.h"

namespace flashx::FLASHX_ISA {

// A row block's sums so far, rows being lanes.
template <typename W>
struct RowSums {
  using T = ComputeOf<W>;
  static constexpr int ld = kBlockLanes<W>;

  T* acc;                 // [value dim][lane]
  alignas(64) T max[ld];  // what weights are relative to
  alignas(64) T sum[ld];
};

// What a row's weights are relative to, after scores up to `top`: the largest score so far, or up to
// kSlack less in log2 units, since rescaling the sums takes time (Shah et al., "FlashAttention-4"). The weight that
// most of a row's output comes from is then not exp2(0), and rounded: too much for float32.
template <typename E, typename T, typename V>
FLASHX_CORE V next_shift(V shift, V top, T factor) {
  constexpr int kSlack = sizeof(E) == 2 ? 8 : 0;
  return (top > shift + kSlack / factor) | (shift == -kInf<T>) ? top : shift;
}

// P^T = exp2((scores - max) * factor), into `to`: the scores' own place, or a right operand. What is summed up in which
// order does not depend on the pieces.
template <typename E, typename W, typename To>
class Weighing {
  using T = ComputeOf<W>;
  using Sums = RowSums<W>;
  static constexpr int n = kLanes<T>, ld = kBlockLanes<W>;
  static constexpr int kStep = 4;  // keys that are summed up together; their number is a multiple of it

 public:
  Weighing() = default;  // of nothing

  // follows: the shift is the scores' maximum, or near it. pieces: about as many as it is to be done in.
  Weighing(Sums& sums, int vectors, int value_dim, const T* scores, int keys, T factor, bool follows, To* to,
           int pieces = 1)
      : sums_(&sums),
        vectors_(vectors),
        value_dim_(value_dim),
        scores_(scores),
        keys_(keys),
        factor_(factor),
        follows_(follows),
        to_(to),
        step_(static_cast<int>(round_up(ceil_div(vectors * keys, larger(pieces - vectors, 1)), kStep))) {}

  // The next piece.
  void operator()() {
    if (vector_ == vectors_) return;
    if (key_ == 0 && !started_) return start();
    weigh(smaller(key_ + step_, keys_));
  }

  void finish() {
    while (vector_ < vectors_) {
      if (!started_) start();
      weigh(keys_);
    }
  }

 private:
  // Finds a vector of rows' shift.
  void start() {
    started_ = true;
    T* const max_at = sums_->max + vector_ * n;
    shift_ = load(max_at);
    for (Vec<T>& total : totals_) total = Vec<T>{};
    if (!follows_) return;
    const T* const scores = scores_ + vector_ * n;
    Vec<T> top[kStep] = {broadcast(-kInf<T>), broadcast(-kInf<T>), broadcast(-kInf<T>), broadcast(-kInf<T>)};
    for (int j = 0; j < keys_; j += kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < kStep; ++u) top[u] = max(top[u], load(scores + (j + u) * ld));
    }
    const Vec<T> old_shift = shift_;
    shift_ = next_shift<E>(shift_, max(max(top[0], top[1]), max(top[2], top[3])), factor_);
    if (any(shift_ != old_shift)) {
      store(max_at, shift_);
      rescale(old_shift);
    }
    // A row that has seen nothing yet subtracts 0, not -inf.
    shift_ = shift_ == -kInf<T> ? Vec<T>{} : shift_;
  }

  // The sums, from one shift to another one.
  void rescale(Vec<T> old_shift) {
    const Vec<T> by = old_shift == shift_ ? broadcast(T(1)) : exp2<T>((old_shift - shift_) * factor_);
    T* const sum = sums_->sum + vector_ * n;
    store(sum, load(sum) * by);
    for (int d = 0; d < value_dim_; ++d) {
      T* const acc = sums_->acc + d * ld + vector_ * n;
      store(acc, load(acc) * by);
    }
  }

  // A vector of rows' weights of the keys before `end`.
  void weigh(int end) {
    const T* const scores = scores_ + vector_ * n;
    const Vec<T> shift = shift_;
    Vec<T> totals[kStep] = {totals_[0], totals_[1], totals_[2], totals_[3]};
    for (; key_ < end; key_ += kStep) {
      Vec<T> p[kStep];
#pragma GCC unroll 4
      for (int u = 0; u < kStep; ++u) {
        p[u] = exp2<T>((load(scores + (key_ + u) * ld) - shift) * factor_);
        totals[u] += p[u];
      }
      put(p);
    }
    if (end < keys_) {
      for (int u = 0; u < kStep; ++u) totals_[u] = totals[u];
      return;
    }
    T* const sum = sums_->sum + vector_ * n;
    store(sum, load(sum) + ((totals[0] + totals[1]) + (totals[2] + totals[3])));
    ++vector_, key_ = 0, started_ = false;
  }

  FLASHX_CORE void put(const Vec<T> (&p)[kStep]) {
    if constexpr (std::is_same_v<To, T>) {
#pragma GCC unroll 4
      for (int u = 0; u < kStep; ++u) store(to_ + (key_ + u) * ld + vector_ * n, p[u]);
    } else {
      Operands<W>::store_pair(p[0], p[1], ld, key_, vector_, to_);
      Operands<W>::store_pair(p[2], p[3], ld, key_ + 2, vector_, to_);
    }
  }

  Sums* sums_ = nullptr;
  int vectors_ = 0, value_dim_ = 0;
  const T* scores_ = nullptr;
  int keys_ = 0;
  T factor_ = 0;
  bool follows_ = false;
  To* to_ = nullptr;
  int step_ = 0;
  int vector_ = 0, key_ = 0;  // the next ones
  bool started_ = false;      // the vector's shift is known
  Vec<T> shift_, totals_[kStep];
};

}  // namespace flashx::FLASHX_ISA
