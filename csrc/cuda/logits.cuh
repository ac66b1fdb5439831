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
  // packed: the heads of a group are rows of a tile.
  FLASHX_DEVICE Logits(const Problem& problem, const Place<kGeneral>& place, bool packed = true)
      : problem_(problem),
        place_(place),
        packed_(packed),
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

  // What the block map says of a tile, for operator(): asked for before the tile's scores are computed, since it takes
  // two loads, one after the other. Arguments as there; `hides` is the same for all lanes.
  template <bool kOwnKeys, int kN, typename RowOf>
  FLASHX_DEVICE uint32_t look_up(int own, int k_begin, bool hides, RowOf row_of) const {
    if constexpr (kGeneral) {
      if (hides && problem_.blocks.map) return map_pieces<kOwnKeys, kN>(own, k_begin, row_of);
    }
    return 0;
  }

  // s[m][n][i], element (own, stream) of a tile whose keys begin at k_begin. kOwnKeys: keys own, the warp's first one
  // being `own`, and row_of(r) is the r-th streamed row; otherwise rows own, and row_of(r) is the warp's r-th. map:
  // what look_up gave. capped, if softcap is on, becomes the capped scores, whose slope the backward needs.
  template <bool kOwnKeys, int kM, int kN, typename RowOf>
  FLASHX_DEVICE void operator()(float (&s)[kM][kN][4], int own, int k_begin, bool hides, RowOf row_of, uint32_t map,
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
        if (problem_.blocks.map) hide_by_map<kOwnKeys>(s, row_of, map);
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
    // Opaque: addresses of rows are cheaper made again than kept.
    const int lane = kGeneral ? static_cast<int>(ptx::opaque(ptx::lane())) : ptx::lane(), g = lane / 4, t = lane % 4;
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) {
      if constexpr (kOwnKeys) {
        FLASHX_UNROLL
        for (int c = 0; c < 2 * kN; ++c) {
          const int n = c / 2;
          const auto f = of_row(row_of(8 * n + 2 * t + c % 2));
          FLASHX_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * half + c % 2;
            f(s[m][n][i], own + 16 * m + 8 * half + g, m, n, i);
          }
        }
      } else {
        FLASHX_UNROLL
        for (int half = 0; half < 2; ++half) {
          const auto f = of_row(row_of(16 * m + 8 * half + g));
          FLASHX_UNROLL
          for (int c = 0; c < 2 * kN; ++c) {
            const int n = c / 2, i = 2 * half + c % 2;
            f(s[m][n][i], 8 * n + 2 * t + c % 2, m, n, i);
          }
        }
      }
    }
  }

  // A block map says for a row and 16 keys which of them the row sees: a piece. Rows of one query that share a map
  // share its pieces: they are a line. A warp's lanes load the pieces of a tile, each once, and hand them round: lane i
  // has piece i of those of the tile's lines, one line after the other, and above it piece i + 32.
  template <bool kOwnKeys, int kN>
  struct Pieces {
    static constexpr int kRows = kOwnKeys ? 8 * kN : 16, kOfLine = kOwnKeys ? 1 : kN / 2, kCount = kRows * kOfLine;
    static constexpr int kOfLane = kCount > 32 ? 2 : 1;
    static_assert(kCount <= 64);
  };

  // Rows of a query. If they have one map they are a line, and lines are side by side as their queries are.
  FLASHX_DEVICE int step() const { return packed_ ? static_cast<int>(place_.step()) : 1; }
  FLASHX_DEVICE int line_rows() const { return !problem_.members && problem_.blocks.head == 0 ? step() : 1; }

  template <bool kOwnKeys, int kN, typename RowOf>
  FLASHX_DEVICE uint32_t map_pieces(int own, int k_begin, RowOf row_of) const {
    using P = Pieces<kOwnKeys, kN>;
    const BlockMap& blocks = problem_.blocks;
    const uint32_t q_block = blocks.q_block, k_block = blocks.k_block;
    const int rows = line_rows(), lines = step() / rows;  // of a query
    const int missing = row_of(0).head() % rows;          // rows of the first line, that the tile before has
    int32_t entries[P::kOfLane];
    uint32_t pieces = 0;
    FLASHX_UNROLL
    for (int i = 0; i < P::kOfLane; ++i) {
      const int at = 32 * i + ptx::lane(), line = at / P::kOfLine, r = larger(line * rows - missing, 0);
      const bool real = at < P::kCount && r < P::kRows;
      const auto row = row_of(real ? r : 0);
      const uint32_t query = row.query(), key = k_begin + own + at % P::kOfLine * 16;
      const uint32_t line_of_block = query % q_block, column = key % k_block;
      // Its block's first piece in the tile asks for the map's entry.
      const int first_line = line - smaller(static_cast<int>(line_of_block), line / lines) * lines;
      const int first = first_line * P::kOfLine + larger(at % P::kOfLine - static_cast<int>(column / 16), 0);
      entries[i] = BlockMap::kHidden;
      if (real && at == first) {
        const uint32_t heads = static_cast<uint32_t>(problem_.q_heads), head = static_cast<uint32_t>(row.head());
        entries[i] = blocks.entry(LoadGlobal{}, head / heads, head % heads, query / q_block, key / k_block);
      }
      int32_t entry = BlockMap::kHidden;
      FLASHX_UNROLL
      for (int from = 0; from <= i; ++from) {
        const int32_t other = static_cast<int32_t>(ptx::shfl_idx(static_cast<uint32_t>(entries[from]), first % 32));
        if (first / 32 == from) entry = other;
      }
      uint32_t piece = entry == BlockMap::kFull ? 0xffff : 0;
      // Not of keys past the row's last, nor of rows past the last one, which see nothing.
      if (real && entry >= BlockMap::kBitmap && static_cast<int>(key) < row.high()) {
        const int64_t line_of_bits = int64_t{entry - BlockMap::kBitmap} * q_block + line_of_block;
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(blocks.bits);  // the lower one comes first
        piece = ptx::ld_global(halves + (line_of_bits * (2 * blocks.words()) + column / 16));
      }
      pieces |= piece << 16 * i;
    }
    return pieces;
  }

  // Where the block map says so; pieces: the lane's.
  template <bool kOwnKeys, int kM, int kN, typename RowOf>
  FLASHX_DEVICE void hide_by_map(float (&s)[kM][kN][4], RowOf row_of, uint32_t pieces) const {
    static_assert(kM == 1);
    using P = Pieces<kOwnKeys, kN>;
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    const bool lines = line_rows() > 1;
    const int first_query = row_of(0).query();
    const auto line_of = [&](int r) { return lines ? row_of(r).query() - first_query : r; };
    const auto piece = [&](int at) { return ptx::shfl_idx(pieces, at % 32) >> (P::kOfLane > 1 ? at / 32 * 16 : 0); };
    if constexpr (kOwnKeys) {
      FLASHX_UNROLL
      for (int c = 0; c < 2 * kN; ++c) {
        const uint32_t bits = piece(line_of(8 * (c / 2) + 2 * t + c % 2)) >> g;
        if ((bits & 1) == 0) s[0][c / 2][c % 2] = -kInf;
        if ((bits >> 8 & 1) == 0) s[0][c / 2][2 + c % 2] = -kInf;
      }
    } else {
      FLASHX_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at = line_of(8 * half + g) * P::kOfLine;
        FLASHX_UNROLL
        for (int n = 0; n < kN; n += 2) {
          const uint32_t bits = piece(at + n / 2) >> 2 * t;
          FLASHX_UNROLL
          for (int i = 0; i < 4; ++i) {
            if ((bits >> (8 * (i / 2) + i % 2) & 1) == 0) s[0][n + i / 2][2 * half + i % 2] = -kInf;
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
  bool packed_;
  float scale_, cap_, inverse_cap_;
};

}  // namespace flashx::FLASHX_MACHINE
