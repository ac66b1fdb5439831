// Forward, FlashAttention-2's loop order (Dao, "FlashAttention-2", 3.1): a block owns a tile of packed query rows and
// streams over the key tiles that they see. Q is read and O written once, K and V are read once per row tile. One
// buffer each for K and V: V(j) arrives while S = Q K(j) is computed, K(j + 1) during the softmax and O += P V(j). A
// split (split-KV) is the same block over a part of its schedule, whose result is a partial one for combine.cuh.
#pragma once

#include "core/softmax.h"
#include "cuda/logits.cuh"
#include "cuda/sm80/config.h"

namespace flashx::FLASHX_MACHINE {

template <typename E, int kDim, bool kGeneral>
struct Forward {
  static constexpr sm80::ForwardTiles kTiles = sm80::forward_tiles(sizeof(E), kDim, kGeneral);
  static constexpr int kM = kTiles.fragments, kN = kTiles.keys / 8, kColumns = kDim / 8;
  static constexpr int kRows = kTiles.rows(), kKeys = kTiles.keys;
  using QueryTile = SharedTile<E, kRows, kDim>;
  using KeyTile = SharedTile<E, kKeys, kDim>;

  static constexpr int kThreads = kTiles.warps * 32, kBlocks = 1;
  static constexpr int kSharedBytes = QueryTile::kBytes + 2 * KeyTile::kBytes;
  static_assert(kSharedBytes <= sm80::kLargestShared);

  struct Params {
    Problem problem;
    ForwardTensors tensors;
    // Of the splits, or null: [split][batch, head][query][value dim] and [split][batch, head][query].
    float *partial_out, *partial_lse;
    int64_t row_tiles;
    int split_tiles;  // key tiles of a split
    bool query_aligned, key_aligned, value_aligned, out_aligned;
    bool exact;
  };

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const Place place(problem, ptx::block_x() / params.row_tiles);
    const uint32_t first = first_row(params, ptx::block_x());
    const int q_first = static_cast<int>(place.query(first));
    const int q_last = static_cast<int>(place.query(smaller(first + kRows, place.rows) - 1));
    const RowSchedule schedule(problem.mask, problem.k_len, q_first, q_last, kKeys);
    const int64_t split_begin = static_cast<int64_t>(ptx::block_y()) * params.split_tiles;
    const int begin = static_cast<int>(larger(schedule.first(), split_begin));
    const int end = static_cast<int>(smaller(schedule.last(), split_begin + params.split_tiles));

    const uint32_t query_tile = ptx::shared_base(), key_tile = query_tile + QueryTile::kBytes;
    const uint32_t value_tile = key_tile + KeyTile::kBytes;
    const Rows<E> keys = place.keys<E>(params.tensors.key, problem.k_len, problem.head_dim, params.key_aligned);
    const Rows<E> values = place.keys<E>(params.tensors.value, problem.k_len, problem.value_dim, params.value_aligned);
    load_tile<QueryTile, kThreads>(
        query_tile, place.queries<E>(params.tensors.query, problem.head_dim, params.query_aligned), first);

    const int own = ptx::warp() * kM * 16;  // the warp's first row in the tile
    const Logits<kGeneral> logits(problem, place);
    const auto describe = [&](int m, int half) {
      return logits.row(ptx::opaque(first + own + 16 * m + 8 * half + ptx::lane() / 4));
    };
    // The general logits need their rows in every tile, the plain ones where a tile is partly visible.
    LogitRow rows[kM][2] = {};
    if constexpr (kGeneral) {
      FLASHX_UNROLL
      for (int r = 0; r < 2 * kM; ++r) rows[r / 2][r % 2] = describe(r / 2, r % 2);
    }
    const auto row_of = [&](int m, int half) { return kGeneral ? rows[m][half] : describe(m, half); };

    for (Pass pass = Pass::Plain;;) {
      float acc[kM][kColumns][4], max[kM][2], sum[kM][2];
      clear(acc);
      FLASHX_UNROLL
      for (int r = 0; r < 2 * kM; ++r) max[r / 2][r % 2] = -kInf, sum[r / 2][r % 2] = 0;

      if (begin < end) load_tile<KeyTile, kThreads>(key_tile, keys, static_cast<uint32_t>(begin * kKeys));
      ptx::cp_async_commit();
      for (int j = begin; j < end; ++j) {
        const int k_begin = j * kKeys;
        ptx::cp_async_wait<0>();
        ptx::bar_sync();  // K(j) is there, and V(j - 1) is free
        load_tile<KeyTile, kThreads>(value_tile, values, static_cast<uint32_t>(k_begin));
        ptx::cp_async_commit();

        const TileKind kind = problem.mask.kind(q_first, q_last, k_begin, k_begin + kKeys, problem.k_len);

        // S = Q K^T
        float s[kM][kN][4];
        multiply_rows<QueryTile, KeyTile>(s, query_tile, own, key_tile, params.exact, pass);
        logits.template operator()<false>(s, 0, k_begin, kind != TileKind::Full, row_of,
                                          static_cast<float (*)[kN][4]>(nullptr));

        ptx::cp_async_wait<0>();
        ptx::bar_sync();  // V(j) is there, and K(j) is free
        if (j + 1 < end) load_tile<KeyTile, kThreads>(key_tile, keys, static_cast<uint32_t>(k_begin + kKeys));
        ptx::cp_async_commit();

        // P = softmax(S) so far
        update(s, acc, max, sum, logits.unit());
        if (logits.drops()) {
          logits.template drop<false>(s, 0, k_begin, row_of,
                                      [](float& p, int, int, int, float factor) { p *= factor; });
        }
        // O += P V
        multiply_columns<KeyTile>(acc, s, value_tile, params.exact, pass);
      }
      finish(params, own, max, sum, acc, logits.unit(), pass);
      if (pass == Pass::PositiveDown || !ptx::bar_red_or(pass != Pass::Plain || has_nonfinite(acc))) return;
      // Weights are not negative here.
      pass = pass == Pass::Plain ? Pass::Finite : pass == Pass::Finite ? Pass::PositiveUp : Pass::PositiveDown;
    }
  }

 private:
  // The online softmax: scores become weights relative to the running max, sums so far are rescaled to it.
  static FLASHX_DEVICE void update(float (&s)[kM][kN][4], float (&acc)[kM][kColumns][4], float (&max)[kM][2],
                                   float (&sum)[kM][2], float unit) {
    const float factor = unit * static_cast<float>(kLog2e);
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) {
      FLASHX_UNROLL
      for (int half = 0; half < 2; ++half) {
        float highest = max[m][half];
        FLASHX_UNROLL
        for (int n = 0; n < kN; ++n) highest = fmaxf(highest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        highest = fmaxf(highest, ptx::shfl_bfly(highest, 1));
        highest = fmaxf(highest, ptx::shfl_bfly(highest, 2));
        const float shift = highest == -kInf ? 0.0f : highest;  // nothing seen yet: weights 0, not NaN
        const float rescale = ptx::ex2((max[m][half] - shift) * factor);
        max[m][half] = highest;
        float total = 0;
        FLASHX_UNROLL
        for (int n = 0; n < kN; ++n) {
          FLASHX_UNROLL
          for (int c = 0; c < 2; ++c) {
            float& x = s[m][n][2 * half + c];
            // The general logits may be as low as floats go: their difference is taken before it is scaled.
            x = kGeneral ? ptx::ex2((x - shift) * factor) : ptx::ex2(fmaf(x, factor, -shift * factor));
            total += x;
          }
        }
        sum[m][half] = sum[m][half] * rescale + total;
        FLASHX_UNROLL
        for (int n = 0; n < kColumns; ++n) acc[m][n][2 * half] *= rescale, acc[m][n][2 * half + 1] *= rescale;
      }
    }
  }

  // The block's first packed row. Last row tiles first: under a causal mask they are the longest.
  static FLASHX_DEVICE uint32_t first_row(const Params& params, uint32_t block) {
    return static_cast<uint32_t>(params.row_tiles - 1 - block % params.row_tiles) * kRows;
  }

  static FLASHX_DEVICE void finish(const Params& params, int own, const float (&max)[kM][2], float (&sum)[kM][2],
                                   const float (&acc)[kM][kColumns][4], float unit, Pass pass) {
    const Problem& problem = params.problem;
    // Opaque: what the end needs is worked out anew, not kept through the loop.
    const uint32_t block = ptx::opaque(ptx::block_x());
    const Place place(problem, block / params.row_tiles);
    const uint32_t row = first_row(params, block) + own;
    float factor[kM][2];
    FLASHX_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
      const int m = r / 2, half = r % 2;
      float total = sum[m][half];
      total += ptx::shfl_bfly(total, 1);
      total += ptx::shfl_bfly(total, 2);
      float highest = max[m][half] == -kInf ? -kInf : max[m][half] * unit, rescale = 1;
      const uint32_t packed = row + 16 * m + 8 * half + ptx::lane() / 4;
      const bool real = packed < place.rows;
      // A sink is one more key, with value 0; the first split has it.
      if (problem.sinks && real && ptx::block_y() == 0) {
        const float sink = ptx::ld_global(static_cast<const float*>(problem.sinks) + place.head(packed));
        const float together = fmaxf(highest, sink), shift = together == -kInf ? 0.0f : together;
        rescale = ptx::ex2((highest - shift) * static_cast<float>(kLog2e));
        total = total * rescale + ptx::ex2((sink - shift) * static_cast<float>(kLog2e));
        highest = together;
      }
      const RowResult<float> result = RowResult<float>::from(highest, total, 1);
      factor[m][half] = result.out_scale * rescale;
      if (real && ptx::lane() % 4 == 0 && pass <= Pass::Finite) {
        const int64_t head = place.batch * problem.q_heads + place.head(packed);
        const int64_t at = head * problem.q_len + place.query(packed);
        if (params.partial_lse) {
          const int64_t all = problem.batch * problem.q_heads * problem.q_len;
          ptx::st_global(params.partial_lse + ptx::block_y() * all + at, result.lse);
        } else {
          ptx::st_global(static_cast<float*>(params.tensors.lse) + at, result.lse);
        }
      }
    }
    if (params.partial_out) {
      const int64_t length = problem.q_len, dim = problem.value_dim;
      const View view{params.partial_out + ptx::block_y() * problem.batch * problem.q_heads * length * dim,
                      problem.q_heads * length * dim, length * dim, dim};
      store_sums(acc, factor, place.queries<float>(view, problem.value_dim, false), row, pass);
    } else {
      store_sums(acc, factor, place.queries<E>(params.tensors.out, problem.value_dim, params.out_aligned), row, pass);
    }
  }
};

}  // namespace flashx::FLASHX_MACHINE
