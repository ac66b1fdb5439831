// Packed query rows, and the key tiles that they see.
#pragma once

#include <memory>

#include "core/problem.h"
#include "core/schedule.h"
#include "cpu/operands.h"

namespace flashx::FLASHX_ISA {

// Rows of a row block: the lanes of one register block.
template <typename W>
constexpr int kBlockLanes = Operands<W>::kVectors * kLanes<ComputeOf<W>>;

// Keys of a key tile: with 4 row blocks and head dim 128, tiles of Q, K, V and O fill half of a 1 MiB L2 cache.
constexpr int kTileKeys = 128;

// Keys that the tiles of a problem have room for.
template <typename W>
int tile_room(const Problem& problem) {
  return static_cast<int>(smaller<int64_t>(kTileKeys, round_up(problem.k_len, Operands<W>::kKeyStep)));
}

// How Problem's tables are read.
constexpr auto kLoad = [](const auto* at) { return *at; };

// One query row: of which sequence, at which query of it and which row of the tensors, of which head.
struct Row {
  int64_t b, query, tensor_row, head;
};

// Row packing: the rows of `heads` query heads, of a group of sequences, that read the same keys. Packed row r is head
// r % heads of a member's query, members inside queries: rows thereby share the key tiles they read, and keep the order
// of their positions, which is what schedules need.
struct RowPacking {
  const Problem* problem;
  int64_t key_batch, kv_head, first_head, heads;
  Group group;
  Sequence keys;  // of the first member; its keys are everybody's

  RowPacking(const Problem& p, int64_t group_index, int64_t kv_head, int64_t first_head, int64_t heads)
      : problem(&p),
        key_batch(group_index),
        kv_head(kv_head),
        first_head(first_head),
        heads(heads),
        group(p.group_of(group_index, kLoad)),
        keys(group.count ? p.sequence(p.member(group.begin, kLoad), kLoad) : Sequence{}) {}

  // Of key head index % kv_heads of group index / kv_heads.
  static RowPacking of(const Problem& p, int64_t index) {
    const int64_t kv_head = index % p.kv_heads;
    return {p, index / p.kv_heads, kv_head, kv_head * p.group(), p.group()};
  }
  // The most rows that any of a problem's packings has.
  static int64_t most(const Problem& p) {
    int64_t members = 1;
    for (int64_t g = 0; p.members && g < p.groups; ++g) members = larger(members, p.group_of(g, kLoad).count);
    return p.q_len * p.group() * members;
  }

  int64_t count() const { return keys.q_len * heads * group.count; }

  int64_t query(int64_t row) const { return row / heads / group.count; }
  Row at(int64_t row) const {
    if (heads == 1 && !problem->sequences) return {key_batch, row, row, first_head};  // no divisions
    const int64_t query = row / heads;
    if (!problem->sequences) return {key_batch, query, query, first_head + row % heads};
    const int64_t b = problem->member(group.begin + query % group.count, kLoad);
    const int64_t q = query / group.count;
    return {b, q, problem->sequence(b, kLoad).q_begin + q, first_head + row % heads};
  }
};

// True if a packing has rows and keys enough for WideProductOf: to make planes of keys takes time that many rows share.
// A sequence's own affair, since it shows in its bits: members are how many they are.
inline bool is_wide(const RowPacking& packing) {
  const Problem& problem = *packing.problem;
  const int64_t rows = packing.keys.q_len * problem.group();
  const int64_t least = problem.dtype == DType::Float32 ? 128 : 64;
  return packing.keys.k_len >= 64 && (problem.members || rows >= least);
}

// Kernels for E's packings, wide ones and others; each is made when its first one comes.
template <template <typename E, typename W> class Kernel, typename E, typename Tensors>
class ForPackings {
 public:
  using Narrow = Kernel<E, typename ProductOf<E>::Type>;
  using Wide = Kernel<E, typename WideProductOf<E>::Type>;
  static constexpr int kNarrowLanes = kBlockLanes<typename ProductOf<E>::Type>;
  static constexpr int kWideLanes = kBlockLanes<typename WideProductOf<E>::Type>;

  ForPackings(const Problem& problem, const Tensors& tensors) : problem_(problem), tensors_(tensors) {}

  // f(kernel)
  template <typename F>
  void operator()(const RowPacking& packing, F f) {
    if (!std::is_same_v<Narrow, Wide> && is_wide(packing)) {
      f(made(wide_));
    } else {
      f(made(narrow_));
    }
  }

 private:
  template <typename Made>
  Made& made(std::unique_ptr<Made>& kernel) const {
    if (!kernel) kernel = std::make_unique<Made>(problem_, tensors_);
    return *kernel;
  }

  const Problem& problem_;
  const Tensors& tensors_;
  std::unique_ptr<Narrow> narrow_;
  std::unique_ptr<Wide> wide_;
};

// Where a packing's keys lie.
class KeyRows {
 public:
  explicit KeyRows(const RowPacking& packing) : packing_(packing) {}

  template <typename E>
  E* at(const View& view, int64_t key) const {
    const Problem& problem = *packing_.problem;
    if (!problem.pages.table) return view.at<E>(packing_.key_batch, packing_.kv_head, packing_.keys.k_begin + key);
    return view.at<E>(problem.page(packing_.key_batch, key, kLoad), packing_.kv_head, key % problem.pages.size);
  }

 private:
  const RowPacking& packing_;
};

// Up to kTileKeys keys in order, in pieces of 16 neighbours; only the last piece may be shorter. The pieces of a
// gathered tile need not be neighbours: it holds what a block mask or a window leaves, and nothing else.
struct Tile {
  static constexpr int kPiece = BlockMap::kPiece, kPieces = kTileKeys / kPiece;

  int count = 0;  // keys that exist
  int pieces = 0;
  bool gathered = false;
  bool partial = false;  // the block mask hides some of the elements
  int64_t first_key[kPieces];

  static Tile of(int64_t begin, int64_t end) {
    Tile tile;
    tile.count = static_cast<int>(end - begin);
    for (int64_t k = begin; k < end; k += kPiece) tile.first_key[tile.pieces++] = k;
    return tile;
  }

  int64_t key(int i) const { return first_key[i / kPiece] + i % kPiece; }
  // Keys of the tile before key k.
  int before(int64_t k) const {
    if (!gathered) return static_cast<int>(clamp<int64_t>(k - first_key[0], 0, count));
    int i = 0;
    while (i < pieces && first_key[i] + kPiece <= k) ++i;
    const int64_t within = i < pieces ? clamp<int64_t>(k - first_key[i], 0, kPiece) : 0;
    return static_cast<int>(smaller<int64_t>(i * kPiece + within, count));
  }
  // f(index, key, count) for each run of neighbouring keys among the tile's [offset, offset + count).
  template <typename F>
  void runs(int offset, int count, F f) const {
    for (int i = offset; i < offset + count;) {
      int end = i / kPiece + 1;  // of the pieces that follow each other
      while (end < pieces && first_key[end] == first_key[end - 1] + kPiece) ++end;
      const int n = smaller(end * kPiece, offset + count) - i;
      f(i, key(i), n);
      i += n;
    }
  }
};

// What some rows see of a block mask: rows of the queries [q_first, q_last], of heads [head, head + heads).
struct BlockSight {
  const BlockMap* blocks;
  int64_t b, head, heads, q_first, q_last;

  // Of the packed rows [first, last]; a block mask's groups have one member.
  BlockSight(const RowPacking& packing, int64_t first, int64_t last)
      : blocks(&packing.problem->blocks),
        b(packing.problem->member(packing.group.begin, kLoad)),
        head(packing.first_head),
        heads(blocks->head == 0 ? 1 : packing.heads),
        q_first(packing.query(first) / blocks->q_block),
        q_last(packing.query(last) / blocks->q_block) {}

  // Of a column of blocks.
  TileKind kind(int64_t column) const {
    bool all = true, any = false;
    for (int64_t h = head; h < head + heads; ++h) {
      for (int64_t q = q_first; q <= q_last; ++q) {
        const int32_t entry = blocks->entry(kLoad, b, h, q, column);
        all &= entry == BlockMap::kFull, any |= entry != BlockMap::kHidden;
      }
    }
    return all ? TileKind::Full : any ? TileKind::Partial : TileKind::Skip;
  }
};

// The key tiles that the packed rows [first, last], with these limits, see, of the keys [begin, end): up to `most` keys
// each, at most kTileKeys. begin is a multiple of kTileKeys.
class KeyWalk {
 public:
  KeyWalk(const RowPacking& packing, int64_t first, int64_t last, const Limits& limits, int64_t begin, int64_t end,
          int most = kTileKeys)
      : k_len_(packing.keys.k_len),
        gathers_(packing.problem->blocks.map || packing.problem->mask.first > 0),
        pieces_(most / Tile::kPiece),
        step_(gathers_ ? Tile::kPiece : most),
        schedule_(limits, k_len_, step_),
        last_(smaller(schedule_.last(), ceil_div(end, step_))),
        blocks_(packing.problem->blocks.map ? &packing.problem->blocks : nullptr),
        sight_(packing, first, last),
        next_(schedule_.next(begin / step_)) {}

  // Fills the tile; false if there is none left.
  bool next(Tile& tile) {
    if (!gathers_) {
      if (next_ >= last_) return false;
      const KeyTile at = schedule_.tile(next_);
      tile = Tile::of(at.begin, at.end);
      next_ = schedule_.next(next_ + 1);
      return true;
    }
    tile.count = tile.pieces = 0;
    tile.gathered = true, tile.partial = false;
    while (tile.pieces < pieces_ && next_ < last_) {
      const int64_t key = next_ * Tile::kPiece;
      if (blocks_) {
        const int64_t column = key / blocks_->k_block;
        if (column != column_) column_ = column, kind_ = sight_.kind(column);
        if (kind_ == TileKind::Skip) {
          next_ = schedule_.next((column + 1) * blocks_->k_block / Tile::kPiece);
          continue;
        }
        tile.partial |= kind_ == TileKind::Partial;
      }
      tile.first_key[tile.pieces++] = key;
      tile.count += static_cast<int>(smaller<int64_t>(Tile::kPiece, k_len_ - key));
      next_ = schedule_.next(next_ + 1);
    }
    return tile.pieces > 0;
  }

 private:
  int64_t k_len_;
  bool gathers_;
  int pieces_;  // of a tile that is gathered
  int64_t step_;
  RowSchedule schedule_;
  int64_t last_;
  const BlockMap* blocks_;
  BlockSight sight_;
  int64_t next_, column_ = -1;
  TileKind kind_ = TileKind::Skip;  // of column_
};

// Packed rows of a row tile, at most `most`. A block mask's row tiles are rows of its blocks, or even parts of them, so
// that none reads what another one needs.
inline int64_t tile_rows(const Problem& problem, int64_t most, int64_t block_lanes) {
  if (!problem.blocks.map) return most;
  const int64_t heads = problem.group();
  int64_t queries = problem.blocks.q_block;
  while (queries > 1 && queries * heads > most) queries /= 2;
  const int64_t whole = problem.blocks.q_block * heads;
  return whole < block_lanes ? block_lanes / whole * whole : smaller(queries * heads, most);
}

// A problem's rows as tasks, a tile of a packing's rows each. The last tiles come first: under a causal mask they are
// the longest.
template <typename Kernels>
class RowTiles {
 public:
  explicit RowTiles(const Problem& problem)
      : narrow_(tile_rows(problem, Kernels::Narrow::kRows, Kernels::kNarrowLanes)),
        wide_(tile_rows(problem, Kernels::Wide::kRows, Kernels::kWideLanes)),
        tiles_(ceil_div(RowPacking::most(problem), smaller(narrow_, wide_))),
        packings_(problem.key_groups() * problem.kv_heads) {}

  int64_t packings() const { return packings_; }
  int64_t tasks() const { return tiles_ * packings_; }

  // f(kernel, packing, first, count) for a task of the packing task % packings(), if that has so many rows.
  template <typename F>
  void operator()(const RowPacking& packing, int64_t task, Kernels& kernels, F f) const {
    const int64_t rows = is_wide(packing) ? wide_ : narrow_, first = (tiles_ - 1 - task / packings_) * rows;
    if (first >= packing.count()) return;
    kernels(packing, [&](auto& kernel) { f(kernel, packing, first, smaller(rows, packing.count() - first)); });
  }

 private:
  int64_t narrow_, wide_;  // rows of a tile
  int64_t tiles_, packings_;
};

// Up to kBlockLanes packed rows and what their positions mean.
template <typename W>
struct RowBlock {
  using T = ComputeOf<W>;
  static constexpr int ld = kBlockLanes<W>;

  int64_t first;  // packed row of lane 0
  int count, vectors;
  Limits limits;
  Row rows[ld];
  int64_t lo[ld], hi[ld], leading[ld];  // lane sees [lo, hi) and [0, leading); lanes past count nothing
  int64_t diagonal[ld];                 // key at distance 0
  T slope[ld];                          // ALiBi

  void place(const Problem& problem, const RowPacking& packing, int64_t first_row, int row_count) {
    first = first_row, count = row_count;
    vectors = static_cast<int>(round_up(ceil_div(row_count, kLanes<T>), Operands<W>::kVectorStep));
    limits = Limits::none();
    const int64_t k_len = packing.keys.k_len;
    IntervalMask mask = problem.mask;
    for (int lane = 0; lane < vectors * kLanes<T>; ++lane) {
      if (lane >= count) {
        lo[lane] = hi[lane] = leading[lane] = diagonal[lane] = 0;
        slope[lane] = 0;
        continue;
      }
      const Row row = rows[lane] = packing.at(first + lane);
      if (problem.sequences) mask = problem.mask_of(problem.sequence(row.b, kLoad));
      lo[lane] = mask.lo(row.query, k_len), hi[lane] = mask.hi(row.query, k_len);
      leading[lane] = smaller(mask.first, hi[lane]);
      diagonal[lane] = row.query + mask.shift;
      limits.add(lo[lane], hi[lane], leading[lane]);
      slope[lane] = 0;
      if (problem.alibi_slopes) {
        slope[lane] = static_cast<const T*>(problem.alibi_slopes)[row.b * problem.alibi_batch_stride + row.head];
      }
    }
  }
};

// The part of a key tile that a row block sees, from `offset` in the tile on.
struct KeyRange {
  int offset;
  int count;   // keys that exist
  int padded;  // keys computed; like offset, a multiple of the operands' key step
  bool full;   // every row sees every computed key

  KeyRange() = default;
  template <typename W>
  static KeyRange of(const RowBlock<W>& block, const Tile& tile) {
    return KeyRange(block.limits, tile, 0, tile.count, Operands<W>::kKeyStep);
  }
  // Of an owned key tile: the pieces that the block mask lets these rows see, from the first to the last.
  template <typename W>
  static KeyRange of(const RowBlock<W>& block, Tile& tile, const RowPacking& packing) {
    const BlockMap& blocks = packing.problem->blocks;
    if (!blocks.map) return of(block, tile);
    const BlockSight sight(packing, block.first, block.first + block.count - 1);
    int begin = tile.count, end = 0;
    tile.partial = false;
    for (int i = 0; i < tile.pieces; ++i) {
      const TileKind kind = sight.kind(tile.first_key[i] / blocks.k_block);
      tile.partial |= kind != TileKind::Full;
      if (kind == TileKind::Skip) continue;
      begin = smaller(begin, i * Tile::kPiece), end = smaller((i + 1) * Tile::kPiece, tile.count);
    }
    return KeyRange(block.limits, tile, begin, end, Operands<W>::kKeyStep);
  }

 private:
  // Of the tile's keys [begin, end).
  KeyRange(const Limits& limits, const Tile& tile, int begin, int end, int step) {
    const bool leading = tile.first_key[0] < smaller(limits.first, limits.hi_max);
    const int lo = larger(leading ? 0 : tile.before(limits.lo_min), begin);
    const int hi = smaller(tile.before(limits.hi_max), end);
    offset = lo / step * step;
    padded = hi > lo ? static_cast<int>(round_up(hi - offset, step)) : 0;
    count = smaller(padded, tile.count - offset);
    full = !tile.partial && count == padded && tile.before(limits.lo_max) <= offset &&
           tile.before(limits.hi_min) >= offset + padded;
  }
};

}  // namespace flashx::FLASHX_ISA
