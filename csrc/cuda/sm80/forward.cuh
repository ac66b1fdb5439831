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

  using RowTable = LogitRows<kRows>;

  static constexpr int kThreads = kTiles.warps * 32, kBlocks = 1;
  static constexpr int kTileBytes = QueryTile::kBytes + 2 * KeyTile::kBytes;
  static constexpr int kSharedBytes = kTileBytes + (kGeneral ? RowTable::kBytes + Place<kGeneral>::kSharedBytes : 0);
  static_assert(kSharedBytes <= sm80::kLargestShared);

  struct Params {
    Problem problem;
    ForwardTensors tensors;
    // Of the splits, or null: [split][row][value dim] and [split][row], rows as Problem::row counts them.
    float *partial_out, *partial_lse;
    View carried;  // tensors.carry.acc
    int64_t row_tiles, rows;
    int split_tiles;  // key tiles of a split
    bool query_aligned, key_aligned, value_aligned, out_aligned;
    bool exact;
  };

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const uint32_t query_tile = ptx::shared_base(), key_tile = query_tile + QueryTile::kBytes;
    const uint32_t value_tile = key_tile + KeyTile::kBytes;
    const auto place = Place<kGeneral>::of_rows(problem, ptx::block_x(), params.row_tiles, kRows, place_at());
    const uint32_t first = place.first(), last = smaller(first + kRows, place.rows()) - 1;
    if (kGeneral && first >= place.rows()) return;
    const auto schedule = [&] { return RowSchedule(place.limits(first, last), place.k_len(), kKeys); };
    const int split_begin = static_cast<int>(ptx::block_y() * params.split_tiles);
    const int begin = static_cast<int>(larger<int64_t>(schedule().first(), split_begin));
    const int end = static_cast<int>(smaller(schedule().last(), int64_t{split_begin} + params.split_tiles));
    auto walk = make_walk<kGeneral>(
        end, [&](int j) { return place.sight(first, last, int64_t{j} * kKeys, int64_t{j} * kKeys + kKeys); },
        [&](int j) { return static_cast<int>(schedule().next(j)); });

    const auto keys = place.template paged_keys<E>(params.tensors.key, problem.head_dim, params.key_aligned);
    const auto values = place.template paged_keys<E>(params.tensors.value, problem.value_dim, params.value_aligned);
    load_tile<QueryTile, kThreads>(
        query_tile, place.template queries<E>(params.tensors.query, problem.head_dim, params.query_aligned), first);

    const int own = ptx::warp() * kM * 16;  // the warp's first row in the tile
    const Logits<kGeneral> logits(problem, place);
    if constexpr (kGeneral) {
      for (int r = ptx::thread(); r < kRows; r += kThreads) row_table().put(r, logits.row(first + r));
    }
    const auto row_of = [&](int r) {
      if constexpr (kGeneral) {
        return row_table()[own + r];
      } else {
        return logits.row(ptx::opaque(first + own + r));
      }
    };
    // A carried state may have any maximum.
    const Carry& carry = params.tensors.carry;
    const bool carried = kGeneral && carry.max && !params.partial_out;
    const float unified = static_cast<float>(problem.unified_max) / logits.unit();
    bool fixed = kGeneral && !carried && !std::isnan(unified);

    for (Pass pass = Pass::Plain;;) {
      float acc[kM][kColumns][4], max[kM][2], sum[kM][2];
      clear(acc);
      FLASHX_UNROLL
      for (int r = 0; r < 2 * kM; ++r) max[r / 2][r % 2] = -kInf, sum[r / 2][r % 2] = 0;
      if (carried) resume(params, place, first + own, max, sum, acc, pass);

      int j = walk.next(begin);
      if (j < end) load_tile<KeyTile, kThreads>(key_tile, keys.now(), static_cast<uint32_t>(j * kKeys));
      ptx::cp_async_commit();
      for (int upcoming; j < end; j = upcoming) {
        const int k_begin = j * kKeys;
        ptx::cp_async_wait<0>();
        ptx::bar_sync();  // K(j) is there, and the last V is free
        load_tile<KeyTile, kThreads>(value_tile, values.now(), static_cast<uint32_t>(k_begin));
        ptx::cp_async_commit();

        // S = Q K^T
        const bool hides = !walk.whole(j);
        upcoming = walk.next(j + 1);
        const uint32_t map = logits.template look_up<false, kN>(0, k_begin, hides, row_of);
        float s[kM][kN][4];
        multiply_rows<QueryTile, KeyTile>(s, query_tile, own, key_tile, params.exact, pass);
        logits.template operator()<false>(s, 0, k_begin, hides, row_of, map, static_cast<float (*)[kN][4]>(nullptr));

        ptx::cp_async_wait<0>();
        ptx::bar_sync();  // V(j) is there, and K(j) is free
        if (upcoming < end) load_tile<KeyTile, kThreads>(key_tile, keys.now(), static_cast<uint32_t>(upcoming * kKeys));
        ptx::cp_async_commit();

        // P = softmax(S) so far
        update(s, acc, max, sum, logits.unit(), fixed, unified);
        if (logits.drops()) {
          logits.template drop<false>(s, 0, k_begin, row_of,
                                      [](float& p, int, int, int, float factor) { p *= factor; });
        }
        // O += P V
        multiply_columns<KeyTile>(acc, s, value_tile, params.exact, pass);
      }
      if (fixed) {
        const bool fits = fix(max, unified, logits.unit(), first + own, place.rows()) && !has_nonfinite(acc);
        fixed = false;
        if (ptx::bar_red_or(!fits)) continue;
      }
      if (carried && pass == Pass::Plain && ptx::bar_red_or(has_nonfinite(acc))) {
        // The state that the sweep went on from is still wanted.
        pass = Pass::Finite;
        continue;
      }
      finish(params, own, max, sum, acc, logits.unit(), pass);
      if (pass == Pass::PositiveDown || !ptx::bar_red_or(pass != Pass::Plain || has_nonfinite(acc))) return;
      // Weights are not negative here.
      pass = pass == Pass::Plain ? Pass::Finite : pass == Pass::Finite ? Pass::PositiveUp : Pass::PositiveDown;
    }
  }

 private:
  // The general kernel's room in shared memory behind the tiles.
  static FLASHX_DEVICE RowTable row_table() { return RowTable(ptx::shared_base() + kTileBytes); }
  static FLASHX_DEVICE uint32_t place_at() { return ptx::shared_base() + kTileBytes + RowTable::kBytes; }

  // The online softmax: scores become weights relative to the running max, sums so far are rescaled to it; or, `fixed`,
  // weights relative to `unified`, and each lane keeps the max of what it has seen.
  static FLASHX_DEVICE void update(float (&s)[kM][kN][4], float (&acc)[kM][kColumns][4], float (&max)[kM][2],
                                   float (&sum)[kM][2], float unit, bool fixed, float unified) {
    const float factor = unit * static_cast<float>(kLog2e);
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) {
      FLASHX_UNROLL
      for (int half = 0; half < 2; ++half) {
        float highest = max[m][half];
        FLASHX_UNROLL
        for (int n = 0; n < kN; ++n) highest = fmaxf(highest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        float shift = unified, rescale = 1;
        if (!fixed) {
          highest = fmaxf(highest, ptx::shfl_bfly(highest, 1));
          highest = fmaxf(highest, ptx::shfl_bfly(highest, 2));
          shift = highest == -kInf ? 0.0f : highest;  // nothing seen yet: weights 0, not NaN
          rescale = ptx::ex2((max[m][half] - shift) * factor);
        }
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
        if (fixed) continue;
        FLASHX_UNROLL
        for (int n = 0; n < kColumns; ++n) acc[m][n][2 * half] *= rescale, acc[m][n][2 * half + 1] *= rescale;
      }
    }
  }

  // After weights relative to `unified`: makes it the rows' max, and tells whether it was near enough to their own for
  // weights to keep their precision, in float16 the narrower.
  static FLASHX_DEVICE bool fix(float (&max)[kM][2], float unified, float unit, uint32_t row, uint32_t rows) {
    constexpr float kAbove = std::is_same_v<E, Half> ? 10.0f : 20.0f, kBelow = std::is_same_v<E, Half> ? 7.0f : 20.0f;
    bool fits = true;
    FLASHX_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
      float& highest = max[r / 2][r % 2];
      highest = fmaxf(highest, ptx::shfl_bfly(highest, 1));
      highest = fmaxf(highest, ptx::shfl_bfly(highest, 2));
      if (highest == -kInf) continue;  // saw nothing
      const float above = (highest - unified) * unit;
      const bool real = row + 16 * (r / 2) + 8 * (r % 2) + ptx::lane() / 4 < rows;
      fits = fits && (!real || (above >= -kBelow && above <= kAbove));
      highest = unified;
    }
    return fits;
  }

  // The state that an earlier call has left.
  static FLASHX_DEVICE void resume(const Params& params, const Place<kGeneral>& place, uint32_t row,
                                   float (&max)[kM][2], float (&sum)[kM][2], float (&acc)[kM][kColumns][4], Pass pass) {
    const Carry& carry = params.tensors.carry;
    FLASHX_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
      const uint32_t packed = row + 16 * (r / 2) + 8 * (r % 2) + ptx::lane() / 4;
      if (packed >= place.rows()) continue;
      const int64_t at = place.number(packed);
      max[r / 2][r % 2] = ptx::ld_global(static_cast<const float*>(carry.max) + at);
      // A lane's sum is a part of the row's.
      if (ptx::lane() % 4 == 0) sum[r / 2][r % 2] = ptx::ld_global(static_cast<const float*>(carry.sum) + at);
    }
    if (pass <= Pass::Finite) load_sums(acc, carried_rows(params, place), row);
  }

  static FLASHX_DEVICE auto carried_rows(const Params& params, const Place<kGeneral>& place) {
    return place.template queries<float>(params.carried, params.problem.value_dim, false);
  }

  static FLASHX_DEVICE void finish(const Params& params, int own, const float (&max)[kM][2], float (&sum)[kM][2],
                                   const float (&acc)[kM][kColumns][4], float unit, Pass pass) {
    const Problem& problem = params.problem;
    const auto place = Place<kGeneral>::rows_again(problem, params.row_tiles, kRows, place_at());
    const uint32_t row = place.first() + own, rows = place.rows();
    const Carry& carry = params.tensors.carry;
    const bool suspend = kGeneral && carry.suspend && !params.partial_out;
    float factor[kM][2];
    FLASHX_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
      const int m = r / 2, half = r % 2;
      float total = sum[m][half];
      total += ptx::shfl_bfly(total, 1);
      total += ptx::shfl_bfly(total, 2);
      const uint32_t packed = row + 16 * m + 8 * half + ptx::lane() / 4;
      const bool real = packed < rows, writes = real && ptx::lane() % 4 == 0 && pass <= Pass::Finite;
      if (suspend) {
        factor[m][half] = 1;
        if (writes) {
          const int64_t at = place.number(packed);
          ptx::st_global(static_cast<float*>(carry.max) + at, max[m][half]);
          ptx::st_global(static_cast<float*>(carry.sum) + at, total);
        }
        continue;
      }
      float highest = max[m][half] == -kInf ? -kInf : max[m][half] * unit, rescale = 1;
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
      if (writes) {
        float* lse = params.partial_lse ? params.partial_lse + ptx::block_y() * params.rows
                                        : static_cast<float*>(params.tensors.lse);
        ptx::st_global(lse + place.number(packed), result.lse);
      }
    }
    if (suspend) {
      store_sums(acc, factor, carried_rows(params, place), row, pass);
    } else if (params.partial_out) {
      const int64_t length = problem.q_rows, dim = problem.value_dim;
      const View view{params.partial_out + ptx::block_y() * params.rows * dim,
                      problem.packed ? 0 : problem.q_heads * length * dim, length * dim, dim};
      store_sums(acc, factor, place.template queries<float>(view, problem.value_dim, false), row, pass);
    } else {
      store_sums(acc, factor, place.template queries<E>(params.tensors.out, problem.value_dim, params.out_aligned), row,
                 pass);
    }
  }
};

}  // namespace flashx::FLASHX_MACHINE
