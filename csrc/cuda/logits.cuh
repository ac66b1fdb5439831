// From raw scores to logits: scale, softcap, ALiBi, bias, masks; and dropout's factors. The plain kernels know nothing
// but the interval mask, and leave the scale to the softmax; the general ones know the rest.
#pragma once

#include <cmath>

#include "core/philox.h"
#include "core/schedule.h"
#include "cuda/tile.cuh"

namespace flashx::FLASHX_MACHINE {

// True if the logits are a positive factor times the scores, hidden by nothing but the interval mask, and keep all
// weights.
FLASHX_CORE bool is_plain(const Problem& problem) {
  return !problem.bias.data && problem.softcap == 0 && !problem.alibi_slopes && problem.dropout_p == 0 &&
         problem.scale > 0;
}

// The (batch, key head) that a block works on, and its packed query rows: see Rows.
struct Place {
  int64_t batch, kv_head;
  uint32_t group, rows;

  FLASHX_DEVICE Place(const Problem& problem, int64_t index)
      : batch(index / problem.kv_heads),
        kv_head(index % problem.kv_heads),
        group(static_cast<uint32_t>(problem.group())),
        rows(static_cast<uint32_t>(problem.q_len) * group) {}

  FLASHX_DEVICE int64_t query(uint32_t row) const { return row / group; }
  FLASHX_DEVICE int64_t head(uint32_t row) const { return kv_head * group + row % group; }

  template <typename E>
  FLASHX_DEVICE Rows<E> queries(const View& view, int dim, bool aligned) const {
    return {view.template at<E>(batch, kv_head * group, 0), view.row, view.head, group, rows, dim, aligned};
  }
  template <typename E>
  FLASHX_DEVICE Rows<E> keys(const View& view, int64_t length, int dim, bool aligned) const {
    return {view.template at<E>(batch, kv_head, 0), view.row, 0, 1, static_cast<uint32_t>(length), dim, aligned};
  }
};

// A query row's part in its logits. Positions have 32 bits: registers are what these kernels are short of.
struct LogitRow {
  int low, high;  // sees the keys [low, high)
  int diagonal;   // the key at distance 0
  int query, head;
  int64_t bias;  // offset of its key 0
  float slope;   // ALiBi
};

template <bool kGeneral>
class Logits {
 public:
  FLASHX_DEVICE Logits(const Problem& problem, const Place& place)
      : problem_(problem),
        place_(place),
        scale_(static_cast<float>(problem.scale)),
        cap_(static_cast<float>(problem.softcap)),
        inverse_cap_(problem.softcap == 0 ? 0.0f : static_cast<float>(1 / problem.softcap)) {}

  // What brings scores, as operator() leaves them, to natural logits.
  FLASHX_DEVICE float unit() const { return kGeneral ? 1.0f : scale_; }
  FLASHX_DEVICE bool drops() const { return kGeneral && problem_.dropout_p > 0; }

  // A row past the last is taken for the last: what it reads exists, what it gives nobody keeps.
  FLASHX_DEVICE LogitRow row(uint32_t packed) const {
    const uint32_t r = smaller(packed, place_.rows - 1);
    const int64_t query = place_.query(r);
    LogitRow row{};
    row.low = static_cast<int>(problem_.mask.lo(query, problem_.k_len));
    row.high = static_cast<int>(problem_.mask.hi(query, problem_.k_len));
    if constexpr (kGeneral) {
      constexpr int64_t kFar = 1 << 30;
      const int64_t (&stride)[4] = problem_.bias.stride;
      const int64_t head = place_.head(r);
      row.diagonal = static_cast<int>(clamp(query + problem_.mask.shift, -kFar, kFar));
      row.query = static_cast<int>(query), row.head = static_cast<int>(head);
      row.bias = place_.batch * stride[0] + head * stride[1] + query * stride[2];
      if (problem_.alibi_slopes) {
        const float* slopes = static_cast<const float*>(problem_.alibi_slopes);
        row.slope = ptx::ld_global(slopes + place_.batch * problem_.alibi_batch_stride + head);
      }
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
      each<kOwnKeys>(s, own, row_of, [&](float& x, const LogitRow& row, int key, int m, int n, int i) {
        x *= scale_;
        if (cap_ != 0) {
          x = cap_ * tanhf(x * inverse_cap_);
          if (capped) capped[m][n][i] = x;
        }
        if (problem_.alibi_slopes) {
          const float distance = static_cast<float>(row.diagonal - k_begin) - static_cast<float>(key);
          x -= row.slope * fabsf(distance);
        }
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
      each<kOwnKeys>(s, own, row_of, [&](float& x, const LogitRow& row, int key, int, int, int) {
        if (k_begin + key < row.low || k_begin + key >= row.high) x = -kInf;
      });
    }
  }

  // f(s[m][n][i], m, n, i, factor) for every element: dropout's factor of its weight, 0 or 1 / (1 - p).
  template <bool kOwnKeys, int kM, int kN, typename RowOf, typename F>
  FLASHX_DEVICE void drop(float (&s)[kM][kN][4], int own, int k_begin, RowOf row_of, F f) const {
    const Philox philox(problem_.seed);
    const uint64_t threshold = dropout_threshold(problem_.dropout_p);
    const float kept = problem_.dropout_p < 1 ? static_cast<float>(1 / (1 - problem_.dropout_p)) : 0.0f;
    uint32_t words[4] = {};
    each<kOwnKeys>(s, own, row_of, [&](float& x, const LogitRow& row, int key, int m, int n, int i) {
      const uint32_t column = static_cast<uint32_t>(k_begin) + key;
      // Two neighbouring keys share a counter.
      if (kOwnKeys || i % 2 == 0) {
        philox(column / 4, static_cast<uint32_t>(row.query),
               static_cast<uint32_t>(place_.batch * problem_.q_heads + row.head), words);
      }
      uint32_t word = 0;  // words[column % 4]; an index would put the array into local memory
      FLASHX_UNROLL
      for (uint32_t w = 0; w < 4; ++w) word |= words[w] & (0u - (column % 4 == w));
      f(x, m, n, i, word >= threshold ? kept : 0.0f);
    });
  }

 private:
  // f(s[m][n][i], its row, its key counted from the tile's first, m, n, i).
  template <bool kOwnKeys, int kM, int kN, typename RowOf, typename F>
  FLASHX_DEVICE void each(float (&s)[kM][kN][4], int own, RowOf row_of, F f) const {
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) {
      if constexpr (kOwnKeys) {
        FLASHX_UNROLL
        for (int c = 0; c < 2 * kN; ++c) {
          const int n = c / 2;
          const LogitRow row = row_of(n, c % 2);
          FLASHX_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * half + c % 2;
            f(s[m][n][i], row, own + 16 * m + 8 * half + g, m, n, i);
          }
        }
      } else {
        FLASHX_UNROLL
        for (int half = 0; half < 2; ++half) {
          const LogitRow row = row_of(m, half);
          FLASHX_UNROLL
          for (int c = 0; c < 2 * kN; ++c) {
            const int n = c / 2, i = 2 * half + c % 2;
            f(s[m][n][i], row, 8 * n + 2 * t + c % 2, m, n, i);
          }
        }
      }
    }
  }

  template <bool kOwnKeys, typename B, int kM, int kN, typename RowOf>
  FLASHX_DEVICE void add_bias(float (&s)[kM][kN][4], int own, int k_begin, RowOf row_of) const {
    const B* bias = static_cast<const B*>(problem_.bias.data);
    const int keys = static_cast<int>(problem_.k_len) - k_begin;
    each<kOwnKeys>(s, own, row_of, [&](float& x, const LogitRow& row, int key, int, int, int) {
      if (key >= keys) return;  // hidden, and not there
      const B b = ptx::ld_global(bias + row.bias + int64_t{k_begin + key} * problem_.bias.stride[3]);
      if constexpr (sizeof(B) == 1) {
        if (!b) x = -kInf;
      } else {
        const float y = ptx::cvt_f32(b);
        x = y == -kInf ? y : x + y;  // -inf hides NaN too
      }
    });
  }

  const Problem& problem_;
  const Place& place_;
  float scale_, cap_, inverse_cap_;
};

}  // namespace flashx::FLASHX_MACHINE
