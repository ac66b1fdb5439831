// From raw scores to logits: scale, softcap, ALiBi, bias, masks; and dropout's factors. The plain kernels know nothing
// but the interval mask, and leave the scale to the softmax; the general ones know the rest.
#pragma once

#include <cmath>

#include "core/philox.h"
#include "cuda/place.cuh"

namespace flashx::FLASHX_MACHINE {

// True if the batch is dense, and the logits are a positive factor times the scores, hidden by nothing but a window,
// and keep all weights.
FLASHX_CORE bool is_plain(const Problem& problem) {
  return !problem.bias.data && problem.softcap == 0 && !problem.alibi_slopes && problem.dropout_p == 0 &&
         problem.scale > 0 && problem.mask.first == 0 && !problem.blocks.map && !problem.sequences &&
         !problem.members && !problem.pages.table && std::isnan(problem.unified_max);
}

// A query row's part in its logits. Positions have 32 bits: registers are what these kernels are short of.
struct LogitRow {
  int low_key, high_key, first_keys;  // sees the keys [low, high), and of the first ones those before high
  int diagonal_key;                   // the key at distance 0
  int query_index, head_index;        // head: of all sequences, as dropout counts them
  float alibi_slope;
  int64_t bias_offset;  // of its key 0

  FLASHX_DEVICE int low() const { return low_key; }
  FLASHX_DEVICE int high() const { return high_key; }
  FLASHX_DEVICE int first() const { return first_keys; }
};

// The general kernels keep the rows of a tile in shared memory, an array for each number.
template <int kRows>
class LogitRows {
 public:
  static constexpr int kBytes = kRows * 9 * 4;

  class Row {
   public:
    FLASHX_DEVICE explicit Row(uint32_t at) : at_(at) {}
    FLASHX_DEVICE int low() const { return number<int>(0); }
    FLASHX_DEVICE int high() const { return number<int>(1); }
    FLASHX_DEVICE int first() const { return number<int>(2); }
    FLASHX_DEVICE int diagonal() const { return number<int>(3); }
    FLASHX_DEVICE int query() const { return number<int>(4); }
    FLASHX_DEVICE int head() const { return number<int>(5); }
    FLASHX_DEVICE float slope() const { return number<float>(6); }
    FLASHX_DEVICE int64_t bias() const {
      return static_cast<int64_t>(number<uint32_t>(7) | static_cast<uint64_t>(number<uint32_t>(8)) << 32);
    }

   private:
    template <typename T>
    FLASHX_DEVICE T number(int which) const {
      return ptx::ld_shared<T>(at_ + which * kRows * 4);
    }
    uint32_t at_;
  };

  FLASHX_DEVICE explicit LogitRows(uint32_t at) : at_(at) {}
  FLASHX_DEVICE Row operator[](int r) const { return Row(at_ + r * 4); }

  FLASHX_DEVICE void put(int r, const LogitRow& row) const {
    const uint32_t bias[2] = {static_cast<uint32_t>(row.bias_offset),
                              static_cast<uint32_t>(static_cast<uint64_t>(row.bias_offset) >> 32)};
    const uint32_t at = at_ + r * 4;
    ptx::st_shared(at, row.low_key);
    ptx::st_shared(at + kRows * 4, row.high_key);
    ptx::st_shared(at + 2 * kRows * 4, row.first_keys);
    ptx::st_shared(at + 3 * kRows * 4, row.diagonal_key);
    ptx::st_shared(at + 4 * kRows * 4, row.query_index);
    ptx::st_shared(at + 5 * kRows * 4, row.head_index);
    ptx::st_shared(at + 6 * kRows * 4, row.alibi_slope);
    ptx::st_shared(at + 7 * kRows * 4, bias[0]);
    ptx::st_shared(at + 8 * kRows * 4, bias[1]);
  }

 private:
  uint32_t at_;
};

template <bool kGeneral>
class Logits {
 public:
  FLASHX_DEVICE Logits(const Problem& problem, const Place<kGeneral>& place)
      : problem_(problem),
        place_(place),
        scale_(static_cast<float>(problem.scale)),
        cap_(static_cast<float>(problem.softcap)),
        inverse_cap_(problem.softcap == 0 ? 0.0f : static_cast<float>(1 / problem.softcap)) {}

  // What brings scores, as operator() leaves them, to natural logits.
  FLASHX_DEVICE float unit() const { return kGeneral ? 1.0f : scale_; }
  FLASHX_DEVICE bool drops() const { return kGeneral && problem_.dropout_p > 0; }

  // A row past the last is taken for the last, so that what it reads exists, but sees nothing.
  FLASHX_DEVICE LogitRow row(uint32_t packed) const {
    const uint32_t r = smaller(packed, place_.rows() - 1);
    LogitRow row{};
    if constexpr (kGeneral) {
      row = this->row(place_.row(r));
    } else {
      const Limits limits = place_.limits(r, r);
      row.low_key = static_cast<int>(limits.lo_min), row.high_key = static_cast<int>(limits.hi_min);
    }
    if (r != packed) row.high_key = 0;
    return row;
  }
  FLASHX_DEVICE LogitRow row(const QueryRow& its) const {
    constexpr int64_t kFar = 1 << 30;
    const IntervalMask mask = problem_.mask_of(its.lies);
    const int64_t (&stride)[4] = problem_.bias.stride;
    LogitRow row{};
    row.low_key = static_cast<int>(mask.lo(its.query, its.lies.k_len));
    row.high_key = static_cast<int>(mask.hi(its.query, its.lies.k_len));
    row.first_keys = static_cast<int>(smaller<int64_t>(mask.first, INT32_MAX));
    row.diagonal_key = static_cast<int>(clamp(its.query + mask.shift, -kFar, kFar));
    row.query_index = static_cast<int>(its.query);
    row.head_index = static_cast<int>(its.sequence * problem_.q_heads + its.head);
    row.bias_offset = its.sequence * stride[0] + its.head * stride[1] + its.query * stride[2];
    if (problem_.alibi_slopes) {
      const float* slopes = static_cast<const float*>(problem_.alibi_slopes);
      row.alibi_slope = ptx::ld_global(slopes + its.sequence * problem_.alibi_batch_stride + its.head);
    }
    return row;
  }

  // s[m][n][i], element (own, stream) of a tile whose keys begin at k_begin. kOwnKeys: keys own, the warp's first one
  // being `own`, and row_of(n, c) is the streamed row of column c of fragment n; otherwise rows own, and row_of(m,
  // half) is theirs. capped, if softcap is on, becomes the capped scores, whose slope the backward needs.
  template <bool kOwnKeys, int kM, int kN, typename RowOf>
  FLASHX_DEVICE void operator()(float (&s)[kM][kN][4], int own, int k_begin, bool hides, RowOf row_of,
                                float (*capped)[kN][4]) const {
    if constexpr (kGeneral) {
      each<kOwnKeys>(s, own, row_of, [&](const auto& row) {
        const bool alibi = problem_.alibi_slopes != nullptr;
        const float slope = alibi ? row.slope() : 0.0f;
        const float diagonal = alibi ? static_cast<float>(row.diagonal() - k_begin) : 0.0f;
        return [=](float& x, int key, int m, int n, int i) {
          x *= scale_;
          if (cap_ != 0) {
            x = cap_ * tanhf(x * inverse_cap_);
            if (capped) capped[m][n][i] = x;
          }
          if (alibi) x -= slope * fabsf(diagonal - static_cast<float>(key));
        };
      });
      if (problem_.bias.data) {
        switch (problem_.bias.dtype) {
          case DType::Float32:
            add_bias<kOwnKeys, float>(s, own, k_begin, row_of);
            break;
          case DType::Float16:
            add_bias<kOwnKeys, Half>(s, own, k_begin, row_of);
            break;
          case DType::BFloat16:
            add_bias<kOwnKeys, BFloat16>(s, own, k_begin, row_of);
            break;
          default:
            add_bias<kOwnKeys, uint8_t>(s, own, k_begin, row_of);
            break;
        }
      }
    }
    if (hides) {
      each<kOwnKeys>(s, own, row_of, [&](const auto& row) {
        const int low = row.low(), high = row.high(), first = kGeneral ? row.first() : 0;
        return [=](float& x, int key, int, int, int) {
          const bool before = k_begin + key < low && (!kGeneral || k_begin + key >= first);
          if (before || k_begin + key >= high) x = -kInf;
        };
      });
      if constexpr (kGeneral) {
        if (problem_.blocks.map) hide_by_map<kOwnKeys>(s, own, k_begin, row_of);
      }
    }
  }

  // f(s[m][n][i], m, n, i, factor) for every element: dropout's factor of its weight, 0 or 1 / (1 - p).
  template <bool kOwnKeys, int kM, int kN, typename RowOf, typename F>
  FLASHX_DEVICE void drop(float (&s)[kM][kN][4], int own, int k_begin, RowOf row_of, F f) const {
    if constexpr (kGeneral) {
      const Philox philox(problem_.seed);
      const uint64_t threshold = dropout_threshold(problem_.dropout_p);
      const float kept = problem_.dropout_p < 1 ? static_cast<float>(1 / (1 - problem_.dropout_p)) : 0.0f;
      uint32_t words[4] = {};
      each<kOwnKeys>(s, own, row_of, [&](const auto& row) {
        const uint32_t query = static_cast<uint32_t>(row.query()), head = static_cast<uint32_t>(row.head());
        return [&, query, head](float& x, int key, int m, int n, int i) {
          const uint32_t column = static_cast<uint32_t>(k_begin) + key;
          // Two neighbouring keys share a counter.
          if (kOwnKeys || i % 2 == 0) philox(column / 4, query, head, words);
          uint32_t word = 0;  // words[column % 4]; an index would put the array into local memory
          FLASHX_UNROLL
          for (uint32_t w = 0; w < 4; ++w) word |= words[w] & (0u - (column % 4 == w));
          f(x, m, n, i, word >= threshold ? kept : 0.0f);
        };
      });
    }
  }

 private:
  // of_row(its row)(s[m][n][i], its key counted from the tile's first, m, n, i)
  template <bool kOwnKeys, int kM, int kN, typename RowOf, typename OfRow>
  FLASHX_DEVICE void each(float (&s)[kM][kN][4], int own, RowOf row_of, OfRow of_row) const {
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) {
      if constexpr (kOwnKeys) {
        FLASHX_UNROLL
        for (int c = 0; c < 2 * kN; ++c) {
          const int n = c / 2;
          const auto f = of_row(row_of(n, c % 2));
          FLASHX_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * half + c % 2;
            f(s[m][n][i], own + 16 * m + 8 * half + g, m, n, i);
          }
        }
      } else {
        FLASHX_UNROLL
        for (int half = 0; half < 2; ++half) {
          const auto f = of_row(row_of(m, half));
          FLASHX_UNROLL
          for (int c = 0; c < 2 * kN; ++c) {
            const int n = c / 2, i = 2 * half + c % 2;
            f(s[m][n][i], 8 * n + 2 * t + c % 2, m, n, i);
          }
        }
      }
    }
  }

  // Where the block map says so, 16 keys at a time.
  template <bool kOwnKeys, int kM, int kN, typename RowOf>
  FLASHX_DEVICE void hide_by_map(float (&s)[kM][kN][4], int own, int k_begin, RowOf row_of) const {
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    const auto piece = [&](const auto& row, int key) {
      const uint32_t heads = static_cast<uint32_t>(problem_.q_heads), head = static_cast<uint32_t>(row.head());
      return problem_.blocks.piece<uint32_t>(LoadGlobal{}, head / heads, head % heads, row.query(), k_begin + key);
    };
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) {
      if constexpr (kOwnKeys) {
        FLASHX_UNROLL
        for (int c = 0; c < 2 * kN; ++c) {
          const uint32_t bits = piece(row_of(c / 2, c % 2), own + 16 * m) >> g;
          if ((bits & 1) == 0) s[m][c / 2][c % 2] = -kInf;
          if ((bits >> 8 & 1) == 0) s[m][c / 2][2 + c % 2] = -kInf;
        }
      } else {
        FLASHX_UNROLL
        for (int r = 0; r < kN; ++r) {
          const int half = r % 2, n = r / 2 * 2;
          const uint32_t bits = piece(row_of(m, half), 8 * n) >> 2 * t;
          FLASHX_UNROLL
          for (int i = 0; i < 4; ++i) {
            if ((bits >> (8 * (i / 2) + i % 2) & 1) == 0) s[m][n + i / 2][2 * half + i % 2] = -kInf;
          }
        }
      }
    }
  }

  template <bool kOwnKeys, typename B, int kM, int kN, typename RowOf>
  FLASHX_DEVICE void add_bias(float (&s)[kM][kN][4], int own, int k_begin, RowOf row_of) const {
    const B* bias = static_cast<const B*>(problem_.bias.data);
    const int keys = static_cast<int>(problem_.k_len) - k_begin;
    each<kOwnKeys>(s, own, row_of, [&](const auto& row) {
      const B* const of_row = bias + row.bias();
      return [=](float& x, int key, int, int, int) {
        if (key >= keys) return;  // hidden, and not there
        const B b = ptx::ld_global(of_row + int64_t{k_begin + key} * problem_.bias.stride[3]);
        if constexpr (sizeof(B) == 1) {
          if (!b) x = -kInf;
        } else {
          const float y = ptx::cvt_f32(b);
          x = y == -kInf ? y : x + y;  // -inf hides NaN too
        }
      };
    });
  }

  const Problem& problem_;
  Place<kGeneral> place_;
  float scale_, cap_, inverse_cap_;
};

}  // namespace flashx::FLASHX_MACHINE
