// Backward by recomputation, in sweeps whose blocks own what they write: nothing is summed in memory, so the same call
// gives the same bits. With P = exp(S - lse), delta = rowsum(dO * O) - dlse and dS = P * (dO V^T - delta):
//   GradKeyValue  owns keys, streams over packed query rows:  dV = P^T dO, dK = dS^T Q   (scores are S^T = K Q^T)
//   GradQuery     owns packed query rows, streams over keys:  dQ = dS K
//   GradBias      owns a tile of dBias:                       the sum of dS over whatever the bias broadcasts over
// Seven products instead of the five of one sweep that adds to dQ in memory, and no traffic for that. P and dS go from
// one product to the next in registers, in all sweeps. Dao et al., "FlashAttention", appendix B;
// "FlashAttention-2", 3.1.2.
#pragma once

#include "core/softmax.h"
#include "cuda/logits.cuh"
#include "cuda/sm80/config.h"

namespace flashx::FLASHX_MACHINE {

struct BackwardParams {
  Problem problem;
  BackwardTensors tensors;
  int64_t tiles;  // of what a block owns, for a (batch, key head)
  bool query_aligned, key_aligned, value_aligned, grad_out_aligned;
  bool grad_query_aligned, grad_key_aligned, grad_value_aligned;
  bool exact;
};

// A query row's normaliser and delta: what its weights' gradients need.
struct RowEnd {
  float lse, delta;

  static FLASHX_DEVICE RowEnd none() { return {kInf, 0}; }  // weights 0
  static FLASHX_DEVICE RowEnd of(const BackwardTensors& tensors, int64_t number) {
    return {backward_lse(ptx::ld_global(static_cast<const float*>(tensors.lse) + number)),
            ptx::ld_global(static_cast<const float*>(tensors.delta) + number)};
  }
  template <bool kGeneral>
  static FLASHX_DEVICE RowEnd of(const BackwardTensors& tensors, const Place<kGeneral>& place, uint32_t packed) {
    return packed < place.rows() ? of(tensors, place.number(packed)) : none();
  }
};

// Scores and dP of a tile become, in place, the weights that multiply values and dS: the gradient of the scores, or,
// for a bias, of the logits, which softcap's slope is not yet part of.
template <bool kGeneral, bool kOwnKeys, bool kOfLogits = false, int kN, typename RowOf, typename EndOf>
FLASHX_DEVICE void differentiate(const Problem& problem, const Logits<kGeneral>& logits, float (&s)[1][kN][4],
                                 float (&dp)[1][kN][4], int own, int k_begin, bool hides, RowOf row_of, uint32_t map,
                                 EndOf end_of, bool want_dp) {
  const float unit = logits.unit(), cap = static_cast<float>(problem.softcap);
  float capped[1][kN][4];
  logits.template operator()<kOwnKeys>(s, own, k_begin, hides, row_of, map, kGeneral ? capped : nullptr);
  FLASHX_UNROLL
  for (int n = 0; n < kN; ++n) {
    FLASHX_UNROLL
    for (int i = 0; i < 4; ++i) {
      const RowEnd end = end_of(n, i);
      s[0][n][i] = ptx::ex2(fmaf(s[0][n][i], unit, -end.lse) * static_cast<float>(kLog2e));
    }
  }
  const auto gradient = [&](float p, int n, int i, float factor) {
    // Where the weight is 0, dO V^T may be NaN: the value may be hidden.
    float ds = p == 0 ? 0.0f : p * ((factor == 0 ? 0.0f : factor * dp[0][n][i]) - end_of(n, i).delta);
    if constexpr (kGeneral && !kOfLogits) {
      if (cap != 0) {
        const float t = capped[0][n][i] / cap;
        ds = p == 0 ? 0.0f : ds * (1 - t * t);
      }
    }
    dp[0][n][i] = ds;
  };
  if (logits.drops()) {
    logits.template drop<kOwnKeys>(s, own, k_begin, row_of, [&](float& p, int, int n, int i, float factor) {
      if (want_dp) gradient(p, n, i, factor);
      p *= factor;
    });
  } else if (want_dp) {
    FLASHX_UNROLL
    for (int n = 0; n < kN; ++n) {
      FLASHX_UNROLL
      for (int i = 0; i < 4; ++i) gradient(s[0][n][i], n, i, 1);
    }
  }
}

FLASHX_DEVICE Pass next(Pass pass) { return static_cast<Pass>(static_cast<int>(pass) + 1); }

// kKey, kValue: which of dK and dV this sweep sums.
template <typename E, int kDim, bool kGeneral, bool kKey, bool kValue>
struct GradKeyValue {
  static constexpr sm80::BackwardTiles kTiles = sm80::backward_tiles(sizeof(E), kDim, kGeneral);
  static constexpr int kN = kTiles.stream / 8, kColumns = kDim / 8, kStages = kTiles.stages;
  static constexpr int kOwn = kTiles.rows(), kStream = kTiles.stream;
  using OwnTile = SharedTile<E, kOwn, kDim>;
  using StreamTile = SharedTile<E, kStream, kDim>;

  using RowTable = LogitRows<kStream>;

  static constexpr int kThreads = kTiles.warps * 32, kBlocks = 1;
  static constexpr int kEndBytes = kStream * static_cast<int>(sizeof(RowEnd));
  static constexpr int kRowBytes = kEndBytes + (kGeneral ? RowTable::kBytes : 0);
  static constexpr int kStageBytes = 2 * StreamTile::kBytes + static_cast<int>(round_up(kRowBytes, 128));
  static constexpr int kPlace = 2 * OwnTile::kBytes + kStages * kStageBytes;  // where it lies
  static constexpr int kSharedBytes = kPlace + Place<kGeneral>::kSharedBytes;
  static_assert(kSharedBytes <= sm80::kLargestShared);

  using Params = BackwardParams;

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const auto place =
        Place<kGeneral>::of_keys(problem, ptx::block_x(), params.tiles, kOwn, ptx::shared_base() + kPlace);
    const int k_begin = static_cast<int>(place.first());
    if (kGeneral && k_begin >= place.k_len()) return;
    const uint32_t key_tile = ptx::shared_base(), value_tile = key_tile + OwnTile::kBytes;
    const uint32_t stages = value_tile + OwnTile::kBytes;
    const auto queries = place.template queries<E>(params.tensors.query, problem.head_dim, params.query_aligned);
    const auto grad_outs =
        place.template queries<E>(params.tensors.grad_out, problem.value_dim, params.grad_out_aligned);
    load_tile<OwnTile, kThreads>(key_tile,
                                 place.template keys<E>(params.tensors.key, problem.head_dim, params.key_aligned),
                                 static_cast<uint32_t>(k_begin));
    load_tile<OwnTile, kThreads>(value_tile,
                                 place.template keys<E>(params.tensors.value, problem.value_dim, params.value_aligned),
                                 static_cast<uint32_t>(k_begin));

    const ColumnSchedule schedule = place.rows_of(k_begin, smaller<int64_t>(k_begin + kOwn, place.k_len()));
    const int begin = static_cast<int>(schedule.begin / kStream);
    const int end = schedule.begin < schedule.end ? static_cast<int>(ceil_div(schedule.end, kStream)) : begin;
    auto walk = make_walk<kGeneral>(
        end,
        [&](int j) {
          const uint32_t row = static_cast<uint32_t>(j) * kStream, rows = place.rows();
          Sight sight = place.sight(row, smaller(row + kStream, rows) - 1, k_begin, k_begin + kOwn);
          // Rows past the last are zeros, and against an infinite key their scores NaN: they must be hidden.
          sight.whole &= row + kStream <= rows;
          return sight;
        },
        [](int j) { return j; });
    const Logits<kGeneral> logits(problem, place);
    const auto stage_at = [&](int stage) { return stages + static_cast<uint32_t>(stage) * kStageBytes; };
    const auto load = [&](int j, uint32_t stage) {
      if (j < end) {
        const uint32_t row = static_cast<uint32_t>(j * kStream);
        load_tile<StreamTile, kThreads>(stage, queries, row);
        load_tile<StreamTile, kThreads>(stage + StreamTile::kBytes, grad_outs, row);
        for (int r = ptx::thread(); r < kStream; r += kThreads) {
          const uint32_t row_ends = stage + 2 * StreamTile::kBytes;
          RowEnd row_end;
          if constexpr (kGeneral) {
            const bool is = row + r < place.rows();
            const QueryRow its = place.row(is ? row + r : place.rows() - 1);
            row_end = is ? RowEnd::of(params.tensors, place.number(its)) : RowEnd::none();
            LogitRow logit_row = logits.row(its);
            if (!is) logit_row.high_key = 0;
            RowTable(row_ends + kEndBytes).put(r, logit_row);
          } else {
            row_end = RowEnd::of(params.tensors, place, row + r);
          }
          const uint32_t at = row_ends + r * static_cast<uint32_t>(sizeof(RowEnd));
          ptx::st_shared(at, row_end.lse);
          ptx::st_shared(at + 4, row_end.delta);
        }
      }
      ptx::cp_async_commit();
    };

    const int own = ptx::warp() * 16;
    for (Pass pass = Pass::Plain;;) {
      float grad_key[1][kKey ? kColumns : 1][4], grad_value[1][kValue ? kColumns : 1][4];
      clear(grad_key);
      clear(grad_value);
      int j = walk.next(begin), stage = 0;
      if (kStages > 1) load(j, stages);
      for (int upcoming; j < end; j = upcoming, stage = (stage + 1) % kStages) {
        const uint32_t query_tile = stage_at(stage), grad_out_tile = query_tile + StreamTile::kBytes;
        const uint32_t row_ends = grad_out_tile + StreamTile::kBytes;
        const bool hides = !walk.whole(j);
        upcoming = walk.next(j + 1);
        load(kStages > 1 ? upcoming : j, stage_at((stage + 1) % kStages));
        ptx::cp_async_wait<kStages - 1>();
        ptx::bar_sync();  // tile j is there

        const auto row_of = [&](int r) {
          if constexpr (kGeneral) {
            return RowTable(row_ends + kEndBytes)[r];
          } else {
            // Opaque: rows are described anew where they are asked for, not kept in registers from use to use.
            return logits.row(ptx::opaque(static_cast<uint32_t>(j * kStream + r)));
          }
        };
        const uint32_t map = logits.template look_up<true, kN>(own, k_begin, hides, row_of);

        // S^T = K Q^T, dP^T = V dO^T
        float s[1][kN][4], dp[1][kN][4];
        multiply_rows<OwnTile, StreamTile>(s, key_tile, own, query_tile, params.exact, pass);
        if (kKey) multiply_rows<OwnTile, StreamTile>(dp, value_tile, own, grad_out_tile, params.exact, pass);

        const auto end_of = [&](int n, int i) {
          const uint32_t at = row_ends + (8 * n + ptx::lane() % 4 * 2 + i % 2) * static_cast<uint32_t>(sizeof(RowEnd));
          return RowEnd{ptx::ld_shared<float>(at), ptx::ld_shared<float>(at + 4)};
        };
        differentiate<kGeneral, true>(problem, logits, s, dp, own, k_begin, hides, row_of, map, end_of, kKey);

        // dV += P^T dO, dK += dS^T Q
        if constexpr (kValue) multiply_columns<StreamTile>(grad_value, s, grad_out_tile, params.exact, pass);
        if constexpr (kKey) multiply_columns<StreamTile>(grad_key, dp, query_tile, params.exact, pass);
        ptx::bar_sync();  // tile j's buffer is free
      }
      const auto end_place = Place<kGeneral>::keys_again(problem, params.tiles, kOwn, ptx::shared_base() + kPlace);
      const uint32_t key = end_place.first() + own;
      const float scale = static_cast<float>(problem.scale);
      if constexpr (kKey) {
        store_sums(grad_key, {{scale, scale}},
                   end_place.template keys<E>(params.tensors.grad_key, problem.head_dim, params.grad_key_aligned), key,
                   pass);
      }
      if constexpr (kValue) {
        store_sums(grad_value, {{1, 1}},
                   end_place.template keys<E>(params.tensors.grad_value, problem.value_dim, params.grad_value_aligned),
                   key, pass);
      }
      const bool again = pass != Pass::Plain || has_nonfinite(grad_key) || has_nonfinite(grad_value);
      if (pass == Pass::NegativeUp || !ptx::bar_red_or(again)) return;
      pass = next(pass);
    }
  }
};

template <typename E, int kDim, bool kGeneral>
struct GradQuery {
  static constexpr sm80::BackwardTiles kTiles = sm80::backward_tiles(sizeof(E), kDim, kGeneral);
  static constexpr int kN = kTiles.stream / 8, kColumns = kDim / 8, kStages = kTiles.stages;
  static constexpr int kOwn = kTiles.rows(), kStream = kTiles.stream;
  using OwnTile = SharedTile<E, kOwn, kDim>;
  using StreamTile = SharedTile<E, kStream, kDim>;

  using RowTable = LogitRows<kOwn>;

  static constexpr int kThreads = kTiles.warps * 32, kBlocks = 1;
  static constexpr int kStageBytes = 2 * StreamTile::kBytes;
  static constexpr int kRowTable = 2 * OwnTile::kBytes + kStages * kStageBytes;  // where it lies
  static constexpr int kPlace = kRowTable + (kGeneral ? RowTable::kBytes : 0);
  static constexpr int kSharedBytes = kPlace + Place<kGeneral>::kSharedBytes;
  static_assert(kSharedBytes <= sm80::kLargestShared);

  using Params = BackwardParams;

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const auto place =
        Place<kGeneral>::of_rows(problem, ptx::block_x(), params.tiles, kOwn, ptx::shared_base() + kPlace);
    const uint32_t first = place.first(), last = smaller(first + kOwn, place.rows()) - 1;
    if (kGeneral && first >= place.rows()) return;
    const auto schedule = [&] { return RowSchedule(place.limits(first, last), place.k_len(), kStream); };
    const int begin = static_cast<int>(schedule().first()), end = static_cast<int>(schedule().last());
    auto walk = make_walk<kGeneral>(
        end, [&](int j) { return place.sight(first, last, int64_t{j} * kStream, int64_t{j} * kStream + kStream); },
        [&](int j) { return static_cast<int>(schedule().next(j)); });

    const uint32_t query_tile = ptx::shared_base(), grad_out_tile = query_tile + OwnTile::kBytes;
    const uint32_t stages = grad_out_tile + OwnTile::kBytes;
    const auto keys = place.template keys<E>(params.tensors.key, problem.head_dim, params.key_aligned);
    const auto values = place.template keys<E>(params.tensors.value, problem.value_dim, params.value_aligned);
    load_tile<OwnTile, kThreads>(
        query_tile, place.template queries<E>(params.tensors.query, problem.head_dim, params.query_aligned), first);
    load_tile<OwnTile, kThreads>(
        grad_out_tile, place.template queries<E>(params.tensors.grad_out, problem.value_dim, params.grad_out_aligned),
        first);
    const auto stage_at = [&](int stage) { return stages + static_cast<uint32_t>(stage) * kStageBytes; };
    const auto load = [&](int j, uint32_t stage) {
      if (j < end) {
        load_tile<StreamTile, kThreads>(stage, keys, static_cast<uint32_t>(j * kStream));
        load_tile<StreamTile, kThreads>(stage + StreamTile::kBytes, values, static_cast<uint32_t>(j * kStream));
      }
      ptx::cp_async_commit();
    };

    const int own = ptx::warp() * 16;
    const Logits<kGeneral> logits(problem, place);
    const RowTable row_table(ptx::shared_base() + kRowTable);
    if constexpr (kGeneral) {
      for (int r = ptx::thread(); r < kOwn; r += kThreads) row_table.put(r, logits.row(first + r));
    }
    const auto row_of = [&](int r) {
      if constexpr (kGeneral) {
        return row_table[own + r];
      } else {
        return logits.row(ptx::opaque(first + own + r));
      }
    };
    RowEnd ends[2];
    FLASHX_UNROLL
    for (int half = 0; half < 2; ++half) {
      ends[half] = RowEnd::of(params.tensors, place, ptx::opaque(first + own + 8 * half + ptx::lane() / 4));
    }
    const auto end_of = [&](int, int i) { return ends[i / 2]; };

    for (Pass pass = Pass::Plain;;) {
      float acc[1][kColumns][4];
      clear(acc);
      int j = walk.next(begin), stage = 0;
      if (kStages > 1) load(j, stages);
      for (int upcoming; j < end; j = upcoming, stage = (stage + 1) % kStages) {
        const uint32_t key_tile = stage_at(stage);
        const bool hides = !walk.whole(j);
        upcoming = walk.next(j + 1);
        load(kStages > 1 ? upcoming : j, stage_at((stage + 1) % kStages));
        ptx::cp_async_wait<kStages - 1>();
        ptx::bar_sync();  // tile j is there

        const uint32_t map = logits.template look_up<false, kN>(0, j * kStream, hides, row_of);

        // S = Q K^T, dP = dO V^T
        float s[1][kN][4], dp[1][kN][4];
        multiply_rows<OwnTile, StreamTile>(s, query_tile, own, key_tile, params.exact, pass);
        multiply_rows<OwnTile, StreamTile>(dp, grad_out_tile, own, key_tile + StreamTile::kBytes, params.exact, pass);
        differentiate<kGeneral, false>(problem, logits, s, dp, 0, j * kStream, hides, row_of, map, end_of, true);

        // dQ += dS K
        multiply_columns<StreamTile>(acc, dp, key_tile, params.exact, pass);
        ptx::bar_sync();  // tile j's buffer is free
      }
      if (kGeneral && params.tensors.adds_grad_query && pass == Pass::Plain && ptx::bar_red_or(has_nonfinite(acc))) {
        // What is added to must be added to once.
        pass = Pass::Finite;
        continue;
      }
      finish(params, own, acc, pass);
      if (pass == Pass::NegativeUp || !ptx::bar_red_or(pass != Pass::Plain || has_nonfinite(acc))) return;
      pass = next(pass);
    }
  }

 private:
  static FLASHX_DEVICE void finish(const Params& params, int own, const float (&acc)[1][kColumns][4], Pass pass) {
    const Problem& problem = params.problem;
    const auto place = Place<kGeneral>::rows_again(problem, params.tiles, kOwn, ptx::shared_base() + kPlace);
    const float scale = static_cast<float>(problem.scale);
    const uint32_t row = place.first() + own;
    if (kGeneral && params.tensors.adds_grad_query) {
      store_sums(acc, {{scale, scale}},
                 place.template queries<float>(params.tensors.grad_query, problem.head_dim, false), row, pass, true);
    } else {
      store_sums(acc, {{scale, scale}},
                 place.template queries<E>(params.tensors.grad_query, problem.head_dim, params.grad_query_aligned), row,
                 pass);
    }
  }
};

// Heads are not packed here: rows are queries.
template <typename E, int kDim>
struct GradBias {
  static constexpr sm80::BackwardTiles kTiles = sm80::backward_tiles(sizeof(E), kDim, true);
  static constexpr int kN = kTiles.stream / 8;
  static constexpr int kRows = kTiles.rows(), kKeys = kTiles.stream;
  using QueryTile = SharedTile<E, kRows, kDim>;
  using KeyTile = SharedTile<E, kKeys, kDim>;

  static constexpr int kThreads = kTiles.warps * 32, kBlocks = 1;
  static constexpr int kSumBytes = kRows * kKeys * 4;
  using RowTable = LogitRows<kRows>;
  static constexpr int kTileBytes = 2 * QueryTile::kBytes + 2 * KeyTile::kBytes;
  static constexpr int kRowTable = larger(kTileBytes, kSumBytes),
                       kPlace = kRowTable + RowTable::kBytes;  // where they lie
  static constexpr int kSharedBytes = kPlace + Place<true>::kSharedBytes;
  static_assert(kSharedBytes <= sm80::kLargestShared);

  using Params = BackwardParams;

  // What a block sums over, or spans, in one dimension.
  struct Owned {
    int64_t begin, end;
    bool broadcast;

    FLASHX_DEVICE Owned(int64_t index, int64_t step, int64_t size, int64_t full)
        : begin(size == 1 ? 0 : index * step),
          end(size == 1 ? full : smaller(index * step + step, full)),
          broadcast(size == 1) {}
  };

  static int64_t blocks(const Problem& problem) {
    const int64_t* size = problem.bias.size;
    return size[0] * size[1] * ceil_div(size[2], kRows) * ceil_div(size[3], kKeys);
  }

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const int64_t (&size)[4] = problem.bias.size;
    int64_t task = ptx::block_x();
    const int64_t key_tiles = ceil_div(size[3], kKeys), row_tiles = ceil_div(size[2], kRows);
    const Owned keys(task % key_tiles, kKeys, size[3], problem.k_len);
    task /= key_tiles;
    const Owned rows(task % row_tiles, kRows, size[2], problem.q_len);
    task /= row_tiles;
    const Owned heads(task % size[1], 1, size[1], problem.q_heads);
    const Owned batches(task / size[1], 1, size[0], problem.batch);

    float total[1][kN][4];
    clear(total);
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        ptx::bar_sync();  // the last place is nobody's any more
        const Place<true> place(problem, ptx::shared_base() + kPlace, b, h / problem.group(), 0);
        for (int64_t q = rows.begin; q < rows.end; q += kRows) {
          for (int64_t k = keys.begin; k < keys.end; k += kKeys) accumulate(params, place, h, q, k, total);
        }
      }
    }
    write(params, batches, heads, rows, keys, total);
  }

 private:
  // One query head at a time, of those that the place has.
  static FLASHX_DEVICE void accumulate(const Params& params, const Place<true>& place, int64_t head, int64_t q,
                                       int64_t k, float (&total)[1][kN][4]) {
    const Problem& problem = params.problem;
    const int64_t group = problem.group();
    const auto packed = [&](int64_t query) {
      return query < problem.q_len ? static_cast<uint32_t>(query * group + head % group) : place.rows();
    };
    const Sight sight = place.sight(packed(q), packed(smaller<int64_t>(q + kRows, problem.q_len) - 1), k, k + kKeys);
    if (!sight.seen) return;
    const uint32_t query_tile = ptx::shared_base(), grad_out_tile = query_tile + QueryTile::kBytes;
    const uint32_t key_tile = grad_out_tile + QueryTile::kBytes, value_tile = key_tile + KeyTile::kBytes;
    const RowTable row_table(ptx::shared_base() + kRowTable);
    const BackwardTensors& tensors = params.tensors;
    const Logits<true> logits(problem, place, false);
    const auto of_head = [&](const View& view, int dim, bool aligned) {
      const Rows<E> rows{view.template at<E>(place.key_batch(), head, 0),
                         view.row,
                         0,
                         1,
                         static_cast<uint32_t>(problem.q_len),
                         dim,
                         aligned};
      return rows;
    };
    ptx::bar_sync();  // the last tiles are free
    for (int r = ptx::thread(); r < kRows; r += kThreads) row_table.put(r, logits.row(packed(q + r)));
    load_tile<QueryTile, kThreads>(query_tile, of_head(tensors.query, problem.head_dim, params.query_aligned),
                                   static_cast<uint32_t>(q));
    load_tile<QueryTile, kThreads>(grad_out_tile, of_head(tensors.grad_out, problem.value_dim, params.grad_out_aligned),
                                   static_cast<uint32_t>(q));
    load_tile<KeyTile, kThreads>(key_tile, place.keys<E>(tensors.key, problem.head_dim, params.key_aligned),
                                 static_cast<uint32_t>(k));
    load_tile<KeyTile, kThreads>(value_tile, place.keys<E>(tensors.value, problem.value_dim, params.value_aligned),
                                 static_cast<uint32_t>(k));
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::bar_sync();

    const int own = ptx::warp() * 16;
    const auto row_of = [&](int r) { return row_table[own + r]; };
    const uint32_t map = logits.template look_up<false, kN>(0, static_cast<int>(k), !sight.whole, row_of);
    float s[1][kN][4], dp[1][kN][4];
    // Careful from the start: there is no second sweep here.
    multiply_rows<QueryTile, KeyTile>(s, query_tile, own, key_tile, params.exact, Pass::Finite);
    multiply_rows<QueryTile, KeyTile>(dp, grad_out_tile, own, value_tile, params.exact, Pass::Finite);
    RowEnd ends[2];
    FLASHX_UNROLL
    for (int half = 0; half < 2; ++half) {
      ends[half] = RowEnd::of(tensors, place, packed(q + own + 8 * half + ptx::lane() / 4));
    }
    differentiate<true, false, true>(
        problem, logits, s, dp, 0, static_cast<int>(k), !sight.whole, row_of, map,
        [&](int, int i) { return ends[i / 2]; }, true);
    FLASHX_UNROLL
    for (int n = 0; n < kN; ++n) {
      FLASHX_UNROLL
      for (int i = 0; i < 4; ++i) total[0][n][i] += dp[0][n][i];
    }
  }

  // total, summed over rows and keys where the bias broadcasts over them, into the contiguous gradient.
  static FLASHX_DEVICE void write(const Params& params, Owned batches, Owned heads, Owned rows, Owned keys,
                                  const float (&total)[1][kN][4]) {
    const Problem& problem = params.problem;
    const int64_t (&size)[4] = problem.bias.size;
    const uint32_t sums = ptx::shared_base();
    ptx::bar_sync();
    FLASHX_UNROLL
    for (int n = 0; n < kN; ++n) {
      FLASHX_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = ptx::warp() * 16 + i / 2 * 8 + ptx::lane() / 4, key = 8 * n + ptx::lane() % 4 * 2 + i % 2;
        ptx::st_shared(sums + (row * kKeys + key) * 4, total[0][n][i]);
      }
    }
    ptx::bar_sync();
    const int row_count = static_cast<int>(smaller<int64_t>(kRows, rows.end - rows.begin));
    const int key_count = static_cast<int>(smaller<int64_t>(kKeys, keys.end - keys.begin));
    const int out_rows = rows.broadcast ? 1 : row_count, out_keys = keys.broadcast ? 1 : key_count;
    const int64_t batch = batches.broadcast ? 0 : batches.begin, head = heads.broadcast ? 0 : heads.begin;
    for (int c = ptx::thread(); c < out_rows * out_keys; c += kThreads) {
      const int row = c / out_keys, key = c % out_keys;
      float sum = 0;
      for (int r = row; r < (rows.broadcast ? row_count : row + 1); ++r) {
        for (int k = key; k < (keys.broadcast ? key_count : key + 1); ++k) {
          sum += ptx::ld_shared<float>(sums + (r * kKeys + k) * 4);
        }
      }
      const int64_t out_row = rows.broadcast ? 0 : rows.begin + row, out_key = keys.broadcast ? 0 : keys.begin + key;
      const int64_t at = ((batch * size[1] + head) * size[2] + out_row) * size[3] + out_key;
      void* grad = params.tensors.grad_bias;
      if (problem.bias.dtype == DType::Float32) ptx::st_global(static_cast<float*>(grad) + at, sum);
      if (problem.bias.dtype == DType::Float16) ptx::st_global(static_cast<Half*>(grad) + at, to_element<Half>(sum));
      if (problem.bias.dtype == DType::BFloat16) {
        ptx::st_global(static_cast<BFloat16*>(grad) + at, to_element<BFloat16>(sum));
      }
    }
  }
};

// delta = rowsum(dO * O) - dlse: how far a row's gradient moves with its normaliser. A warp owns a query row.
template <typename E>
struct Delta {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = 1, kSharedBytes = 0;
  using Params = BackwardParams;

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const int64_t row = static_cast<int64_t>(ptx::block_x()) * kWarps + ptx::warp();
    const int64_t head = row / problem.q_rows;
    const int64_t b = head / problem.q_heads, h = head % problem.q_heads, q = row % problem.q_rows;
    if (b >= (problem.packed ? 1 : problem.batch)) return;
    const E* out = params.tensors.out.template at<E>(b, h, q);
    const E* grad_out = params.tensors.grad_out.template at<E>(b, h, q);
    float sum = 0;
    for (int d = ptx::lane(); d < problem.value_dim; d += 32) {
      sum += ptx::cvt_f32(ptx::ld_global(out + d)) * ptx::cvt_f32(ptx::ld_global(grad_out + d));
    }
    FLASHX_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shfl_bfly(sum, mask);
    if (ptx::lane() == 0) {
      if (params.tensors.grad_lse) sum -= ptx::ld_global(static_cast<const float*>(params.tensors.grad_lse) + row);
      ptx::st_global(static_cast<float*>(params.tensors.delta) + row, sum);
    }
  }
};

}  // namespace flashx::FLASHX_MACHINE
