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

  static FLASHX_DEVICE RowEnd of(const Problem& problem, const BackwardTensors& tensors, const Place& place,
                                 uint32_t packed) {
    if (packed >= place.rows) return {kInf, 0};  // weights 0
    const int64_t head = place.batch * problem.q_heads + place.head(packed);
    const int64_t at = head * problem.q_len + place.query(packed);
    return {backward_lse(ptx::ld_global(static_cast<const float*>(tensors.lse) + at)),
            ptx::ld_global(static_cast<const float*>(tensors.delta) + at)};
  }
};

// Scores and dP of a tile become, in place, the weights that multiply values and dS: the gradient of the scores, or,
// for a bias, of the logits, which softcap's slope is not yet part of.
template <bool kGeneral, bool kOwnKeys, bool kOfLogits = false, int kN, typename RowOf, typename EndOf>
FLASHX_DEVICE void differentiate(const Problem& problem, const Logits<kGeneral>& logits, float (&s)[1][kN][4],
                                 float (&dp)[1][kN][4], int own, int k_begin, bool hides, RowOf row_of, EndOf end_of,
                                 bool want_dp) {
  const float unit = logits.unit(), cap = static_cast<float>(problem.softcap);
  float capped[1][kN][4];
  logits.template operator()<kOwnKeys>(s, own, k_begin, hides, row_of, kGeneral ? capped : nullptr);
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

  static constexpr int kThreads = kTiles.warps * 32, kBlocks = 1;
  static constexpr int kEndBytes = kStream * static_cast<int>(sizeof(RowEnd));
  static constexpr int kStageBytes = 2 * StreamTile::kBytes + kEndBytes;
  static constexpr int kSharedBytes = 2 * OwnTile::kBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= sm80::kLargestShared);

  using Params = BackwardParams;

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const Place place(problem, ptx::block_x() / params.tiles);
    const int k_begin = static_cast<int>(ptx::block_x() % params.tiles) * kOwn;
    const uint32_t key_tile = ptx::shared_base(), value_tile = key_tile + OwnTile::kBytes;
    const uint32_t stages = value_tile + OwnTile::kBytes;
    const Rows<E> queries = place.queries<E>(params.tensors.query, problem.head_dim, params.query_aligned);
    const Rows<E> grad_outs = place.queries<E>(params.tensors.grad_out, problem.value_dim, params.grad_out_aligned);
    load_tile<OwnTile, kThreads>(key_tile,
                                 place.keys<E>(params.tensors.key, problem.k_len, problem.head_dim, params.key_aligned),
                                 static_cast<uint32_t>(k_begin));
    load_tile<OwnTile, kThreads>(
        value_tile, place.keys<E>(params.tensors.value, problem.k_len, problem.value_dim, params.value_aligned),
        static_cast<uint32_t>(k_begin));

    const ColumnSchedule schedule(problem.mask, problem.q_len, k_begin,
                                  smaller<int64_t>(k_begin + kOwn, problem.k_len));
    const int begin = static_cast<int>(schedule.begin * place.group / kStream);
    const int end =
        schedule.begin < schedule.end ? static_cast<int>(ceil_div(schedule.end * place.group, kStream)) : begin;
    const auto load = [&](int j) {
      if (j < end) {
        const uint32_t stage = stages + static_cast<uint32_t>((j - begin) % kStages) * kStageBytes;
        const uint32_t row = static_cast<uint32_t>(j * kStream);
        load_tile<StreamTile, kThreads>(stage, queries, row);
        load_tile<StreamTile, kThreads>(stage + StreamTile::kBytes, grad_outs, row);
        for (int r = ptx::thread(); r < kStream; r += kThreads) {
          const RowEnd row_end = RowEnd::of(problem, params.tensors, place, row + r);
          const uint32_t at = stage + 2 * StreamTile::kBytes + r * static_cast<uint32_t>(sizeof(RowEnd));
          ptx::st_shared(at, row_end.lse);
          ptx::st_shared(at + 4, row_end.delta);
        }
      }
      ptx::cp_async_commit();
    };

    const int own = ptx::warp() * 16;
    const Logits<kGeneral> logits(problem, place);
    for (Pass pass = Pass::Plain;;) {
      float grad_key[1][kKey ? kColumns : 1][4], grad_value[1][kValue ? kColumns : 1][4];
      clear(grad_key);
      clear(grad_value);
      if (kStages > 1) load(begin);
      for (int j = begin; j < end; ++j) {
        const uint32_t stage = stages + static_cast<uint32_t>((j - begin) % kStages) * kStageBytes;
        const uint32_t grad_out_tile = stage + StreamTile::kBytes, row_ends = grad_out_tile + StreamTile::kBytes;
        load(kStages > 1 ? j + 1 : j);
        ptx::cp_async_wait<kStages - 1>();
        ptx::bar_sync();  // tile j is there

        const uint32_t row = static_cast<uint32_t>(j * kStream);
        const uint32_t last = smaller(row + kStream, place.rows) - 1;
        const TileKind kind =
            problem.mask.kind(place.query(row), place.query(last), k_begin, k_begin + kOwn, problem.k_len);

        // S^T = K Q^T, dP^T = V dO^T
        float s[1][kN][4], dp[1][kN][4];
        multiply_rows<OwnTile, StreamTile>(s, key_tile, own, stage, params.exact, pass);
        if (kKey) multiply_rows<OwnTile, StreamTile>(dp, value_tile, own, grad_out_tile, params.exact, pass);

        // Opaque: rows are described anew where they are asked for, not kept in registers from use to use.
        const auto row_of = [&](int n, int c) {
          return logits.row(ptx::opaque(row + 8 * n + ptx::lane() % 4 * 2 + c));
        };
        const auto end_of = [&](int n, int i) {
          const uint32_t at = row_ends + (8 * n + ptx::lane() % 4 * 2 + i % 2) * static_cast<uint32_t>(sizeof(RowEnd));
          return RowEnd{ptx::ld_shared<float>(at), ptx::ld_shared<float>(at + 4)};
        };
        differentiate<kGeneral, true>(problem, logits, s, dp, own, k_begin, kind != TileKind::Full, row_of, end_of,
                                      kKey);

        // dV += P^T dO, dK += dS^T Q
        if constexpr (kValue) multiply_columns<StreamTile>(grad_value, s, grad_out_tile, params.exact, pass);
        if constexpr (kKey) multiply_columns<StreamTile>(grad_key, dp, stage, params.exact, pass);
        ptx::bar_sync();  // tile j's buffer is free
      }
      // Opaque: what the end needs is worked out anew, not kept through the loop.
      const Place end_place(problem, ptx::opaque(ptx::block_x()) / params.tiles);
      const uint32_t key = ptx::opaque(static_cast<uint32_t>(k_begin) + own);
      const float scale = static_cast<float>(problem.scale);
      if constexpr (kKey) {
        store_sums(grad_key, {{scale, scale}},
                   end_place.keys<E>(params.tensors.grad_key, problem.k_len, problem.head_dim, params.grad_key_aligned),
                   key, pass);
      }
      if constexpr (kValue) {
        store_sums(
            grad_value, {{1, 1}},
            end_place.keys<E>(params.tensors.grad_value, problem.k_len, problem.value_dim, params.grad_value_aligned),
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

  static constexpr int kThreads = kTiles.warps * 32, kBlocks = 1;
  static constexpr int kStageBytes = 2 * StreamTile::kBytes;
  static constexpr int kSharedBytes = 2 * OwnTile::kBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= sm80::kLargestShared);

  using Params = BackwardParams;

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    // Last row tiles first: under a causal mask they are the longest.
    const Place place(problem, ptx::block_x() / params.tiles);
    const uint32_t first = static_cast<uint32_t>(params.tiles - 1 - ptx::block_x() % params.tiles) * kOwn;
    const int q_first = static_cast<int>(place.query(first));
    const int q_last = static_cast<int>(place.query(smaller(first + kOwn, place.rows) - 1));
    const RowSchedule schedule(problem.mask, problem.k_len, q_first, q_last, kStream);
    const int begin = static_cast<int>(schedule.first()), end = static_cast<int>(schedule.last());

    const uint32_t query_tile = ptx::shared_base(), grad_out_tile = query_tile + OwnTile::kBytes;
    const uint32_t stages = grad_out_tile + OwnTile::kBytes;
    const Rows<E> keys = place.keys<E>(params.tensors.key, problem.k_len, problem.head_dim, params.key_aligned);
    const Rows<E> values = place.keys<E>(params.tensors.value, problem.k_len, problem.value_dim, params.value_aligned);
    load_tile<OwnTile, kThreads>(query_tile,
                                 place.queries<E>(params.tensors.query, problem.head_dim, params.query_aligned), first);
    load_tile<OwnTile, kThreads>(
        grad_out_tile, place.queries<E>(params.tensors.grad_out, problem.value_dim, params.grad_out_aligned), first);
    const auto load = [&](int j) {
      if (j < end) {
        const uint32_t stage = stages + static_cast<uint32_t>((j - begin) % kStages) * kStageBytes;
        load_tile<StreamTile, kThreads>(stage, keys, static_cast<uint32_t>(j * kStream));
        load_tile<StreamTile, kThreads>(stage + StreamTile::kBytes, values, static_cast<uint32_t>(j * kStream));
      }
      ptx::cp_async_commit();
    };

    const int own = ptx::warp() * 16;
    const Logits<kGeneral> logits(problem, place);
    const auto row_at = [&](int half) { return ptx::opaque(first + own + 8 * half + ptx::lane() / 4); };
    // The general logits need their rows in every tile, the plain ones where a tile is partly visible.
    LogitRow rows[2] = {};
    RowEnd ends[2];
    FLASHX_UNROLL
    for (int half = 0; half < 2; ++half) {
      if constexpr (kGeneral) rows[half] = logits.row(row_at(half));
      ends[half] = RowEnd::of(problem, params.tensors, place, row_at(half));
    }
    const auto row_of = [&](int, int half) { return kGeneral ? rows[half] : logits.row(row_at(half)); };
    const auto end_of = [&](int, int i) { return ends[i / 2]; };

    for (Pass pass = Pass::Plain;;) {
      float acc[1][kColumns][4];
      clear(acc);
      if (kStages > 1) load(begin);
      for (int j = begin; j < end; ++j) {
        const int k_begin = j * kStream;
        const uint32_t key_tile = stages + static_cast<uint32_t>((j - begin) % kStages) * kStageBytes;
        load(kStages > 1 ? j + 1 : j);
        ptx::cp_async_wait<kStages - 1>();
        ptx::bar_sync();  // tile j is there

        const TileKind kind = problem.mask.kind(q_first, q_last, k_begin, k_begin + kStream, problem.k_len);

        // S = Q K^T, dP = dO V^T
        float s[1][kN][4], dp[1][kN][4];
        multiply_rows<OwnTile, StreamTile>(s, query_tile, own, key_tile, params.exact, pass);
        multiply_rows<OwnTile, StreamTile>(dp, grad_out_tile, own, key_tile + StreamTile::kBytes, params.exact, pass);
        differentiate<kGeneral, false>(problem, logits, s, dp, 0, k_begin, kind != TileKind::Full, row_of, end_of,
                                       true);

        // dQ += dS K
        multiply_columns<StreamTile>(acc, dp, key_tile, params.exact, pass);
        ptx::bar_sync();  // tile j's buffer is free
      }
      const float scale = static_cast<float>(problem.scale);
      // Opaque: what the end needs is worked out anew, not kept through the loop.
      const Place end_place(problem, ptx::opaque(ptx::block_x()) / params.tiles);
      store_sums(acc, {{scale, scale}},
                 end_place.queries<E>(params.tensors.grad_query, problem.head_dim, params.grad_query_aligned),
                 ptx::opaque(first + own), pass);
      if (pass == Pass::NegativeUp || !ptx::bar_red_or(pass != Pass::Plain || has_nonfinite(acc))) return;
      pass = next(pass);
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
  static constexpr int kTileBytes = 2 * QueryTile::kBytes + 2 * KeyTile::kBytes;
  static constexpr int kSharedBytes = larger(kTileBytes, kSumBytes);
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
        // One query head at a time, as a group of its own.
        Place place(problem, b * problem.kv_heads + h / problem.group());
        for (int64_t q = rows.begin; q < rows.end; q += kRows) {
          for (int64_t k = keys.begin; k < keys.end; k += kKeys) accumulate(params, place, h, q, k, total);
        }
      }
    }
    write(params, batches, heads, rows, keys, total);
  }

 private:
  static FLASHX_DEVICE void accumulate(const Params& params, const Place& place, int64_t head, int64_t q, int64_t k,
                                       float (&total)[1][kN][4]) {
    const Problem& problem = params.problem;
    const TileKind kind =
        problem.mask.kind(q, smaller<int64_t>(q + kRows, problem.q_len) - 1, k, k + kKeys, problem.k_len);
    if (kind == TileKind::Skip) return;
    const uint32_t query_tile = ptx::shared_base(), grad_out_tile = query_tile + QueryTile::kBytes;
    const uint32_t key_tile = grad_out_tile + QueryTile::kBytes, value_tile = key_tile + KeyTile::kBytes;
    const BackwardTensors& tensors = params.tensors;
    const auto of_head = [&](const View& view, int dim, bool aligned) {
      return Rows<E>{view.template at<E>(place.batch, head, 0), view.row, 0,      1,
                     static_cast<uint32_t>(problem.q_len),      dim,      aligned};
    };
    ptx::bar_sync();  // the last tiles are free
    load_tile<QueryTile, kThreads>(query_tile, of_head(tensors.query, problem.head_dim, params.query_aligned),
                                   static_cast<uint32_t>(q));
    load_tile<QueryTile, kThreads>(grad_out_tile, of_head(tensors.grad_out, problem.value_dim, params.grad_out_aligned),
                                   static_cast<uint32_t>(q));
    load_tile<KeyTile, kThreads>(key_tile,
                                 place.keys<E>(tensors.key, problem.k_len, problem.head_dim, params.key_aligned),
                                 static_cast<uint32_t>(k));
    load_tile<KeyTile, kThreads>(value_tile,
                                 place.keys<E>(tensors.value, problem.k_len, problem.value_dim, params.value_aligned),
                                 static_cast<uint32_t>(k));
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::bar_sync();

    const int own = ptx::warp() * 16;
    float s[1][kN][4], dp[1][kN][4];
    // Careful from the start: there is no second sweep here.
    multiply_rows<QueryTile, KeyTile>(s, query_tile, own, key_tile, params.exact, Pass::Finite);
    multiply_rows<QueryTile, KeyTile>(dp, grad_out_tile, own, value_tile, params.exact, Pass::Finite);
    const Logits<true> logits(problem, place);
    LogitRow rows[2];
    RowEnd ends[2];
    FLASHX_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t query = q + own + 8 * half + ptx::lane() / 4;
      const uint32_t group = place.group;
      const uint32_t packed = query < problem.q_len ? static_cast<uint32_t>(query * group + head % group) : place.rows;
      rows[half] = logits.row(packed);
      ends[half] = RowEnd::of(problem, tensors, place, packed);
    }
    differentiate<true, false, true>(
        problem, logits, s, dp, 0, static_cast<int>(k), kind != TileKind::Full,
        [&](int, int half) -> const LogitRow& { return rows[half]; }, [&](int, int i) { return ends[i / 2]; }, true);
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
    if (row >= problem.batch * problem.q_heads * problem.q_len) return;
    const int64_t head = row / problem.q_len;
    const int64_t b = head / problem.q_heads, h = head % problem.q_heads, q = row % problem.q_len;
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
