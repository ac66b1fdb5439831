// Where a block works: a key head of one batch entry, the keys' or the query rows' tile that it owns, and what the two
// see of each other. Packed row r is query r / heads / members of member r / heads % members and of head r % heads,
// the heads of a group (GQA) that share their keys: rows keep the order of their positions, which is what schedules
// need.
//
// The plain kernels know dense batches only and keep their place in registers. The general ones know sequences,
// members, pages and block masks (core/problem.h) as well, and keep theirs in shared memory, for all threads of the
// block: most of it is wanted once.
#pragma once

#include "core/schedule.h"
#include "cuda/tile.cuh"

namespace flashx::FLASHX_MACHINE {

// Reads an element of a table: see Problem.
struct LoadGlobal {
  template <typename T>
  FLASHX_DEVICE T operator()(const T* address) const {
    return ptx::ld_global(address);
  }
};

// A query row, described. `row` is where it lies in its tensor.
struct QueryRow {
  int64_t sequence, head, query, row;
  Sequence lies;
};

// How a tile of keys looks to a tile of rows.
struct Sight {
  bool seen, whole;  // by some row; by all of them, wholly

  static FLASHX_DEVICE Sight of(TileKind kind) { return {kind != TileKind::Skip, kind == TileKind::Full}; }
};

template <bool kGeneral>
class Place;

template <>
class Place<false> {
 public:
  static constexpr int kSharedBytes = 0;

  // Of a block that owns rows. Last row tiles first: under a causal mask they are the longest.
  static FLASHX_DEVICE Place of_rows(const Problem& problem, uint32_t block, int64_t tiles, int tile_rows, uint32_t) {
    return Place(problem, block / tiles, static_cast<uint32_t>(tiles - 1 - block % tiles) * tile_rows);
  }
  // Of a block that owns keys.
  static FLASHX_DEVICE Place of_keys(const Problem& problem, uint32_t block, int64_t tiles, int tile_keys, uint32_t) {
    return Place(problem, block / tiles, static_cast<uint32_t>(block % tiles) * tile_keys);
  }
  // The block's again, for its end: made anew, not kept through the loop.
  static FLASHX_DEVICE Place rows_again(const Problem& problem, int64_t tiles, int tile_rows, uint32_t at) {
    return of_rows(problem, ptx::opaque(ptx::block_x()), tiles, tile_rows, at);
  }
  static FLASHX_DEVICE Place keys_again(const Problem& problem, int64_t tiles, int tile_keys, uint32_t at) {
    return of_keys(problem, ptx::opaque(ptx::block_x()), tiles, tile_keys, at);
  }

  // The first row or key of the block's.
  FLASHX_DEVICE uint32_t first() const { return first_; }
  FLASHX_DEVICE uint32_t rows() const { return rows_; }
  FLASHX_DEVICE int64_t k_len() const { return problem_.k_len; }

  FLASHX_DEVICE int64_t head(uint32_t r) const { return kv_head_ * group_ + r % group_; }
  FLASHX_DEVICE int64_t query(uint32_t r) const { return r / group_; }
  // Its number in lse and delta.
  FLASHX_DEVICE int64_t number(uint32_t r) const {
    return (batch_ * problem_.q_heads + head(r)) * problem_.q_len + query(r);
  }

  // What the rows [first, last] see together.
  FLASHX_DEVICE Limits limits(uint32_t first, uint32_t last) const {
    return mask().limits(query(first), query(last), problem_.k_len);
  }
  // How the keys [k_begin, k_end) look to the rows [first, last].
  FLASHX_DEVICE Sight sight(uint32_t first, uint32_t last, int64_t k_begin, int64_t k_end) const {
    return Sight::of(limits(first, last).kind(k_begin, k_end));
  }
  // The packed rows that see any of the keys [k_begin, k_end) lie in [begin, end).
  FLASHX_DEVICE ColumnSchedule rows_of(int64_t k_begin, int64_t k_end) const {
    ColumnSchedule schedule(mask(), problem_.q_len, k_begin, k_end);
    schedule.begin *= group_, schedule.end *= group_;
    return schedule;
  }

  template <typename E>
  FLASHX_DEVICE Rows<E> queries(const View& view, int dim, bool aligned) const {
    return {view.template at<E>(batch_, kv_head_ * group_, 0), view.row, view.head, group_, rows_, dim, aligned};
  }
  template <typename E>
  FLASHX_DEVICE Rows<E> keys(const View& view, int dim, bool aligned) const {
    return {view.template at<E>(batch_, kv_head_, 0), view.row, 0,      1,
            static_cast<uint32_t>(problem_.k_len),    dim,      aligned};
  }
  template <typename E>
  FLASHX_DEVICE Rows<E> paged_keys(const View& view, int dim, bool aligned) const {
    return keys<E>(view, dim, aligned);
  }

 private:
  FLASHX_DEVICE Place(const Problem& problem, int64_t index, uint32_t first)
      : problem_(problem),
        batch_(index / problem.kv_heads),
        kv_head_(index % problem.kv_heads),
        group_(static_cast<uint32_t>(problem.group())),
        rows_(static_cast<uint32_t>(problem.q_len) * group_),
        first_(first) {}

  // No first keys beyond the window here.
  FLASHX_DEVICE IntervalMask mask() const { return {problem_.mask.left, problem_.mask.right, problem_.mask.shift}; }

  const Problem& problem_;
  int64_t batch_, kv_head_;
  uint32_t group_, rows_, first_;
};

template <typename E>
struct QueryRows;
template <typename E>
struct KeyRows;

template <>
class Place<true> {
  // The words in shared memory; two for a Long.
  enum Word { kFirst, kRows, kKeyBatch, kKvHead, kHeads, kMember, kMembers, kQLen, kQBegin, kKLen, kKBegin, kWords };
  enum Long { kShiftMin, kShiftMax, kFirstKeysMin, kFirstKeysMax, kLongs };

 public:
  static constexpr int kSharedBytes = kWords * 4 + kLongs * 8;

  // All threads of the block come here; `at` is where in shared memory.
  static FLASHX_DEVICE Place of_rows(const Problem& problem, uint32_t block, int64_t tiles, int tile_rows,
                                     uint32_t at) {
    const uint32_t count = static_cast<uint32_t>(tiles), index = block / count, tile = count - 1 - block % count;
    const uint32_t kv_heads = static_cast<uint32_t>(problem.kv_heads);
    int64_t key_batch = index / kv_heads, first = tile;
    if (problem.members) {
      // The last group whose first tile is not behind this one.
      const int64_t rows = problem.q_len * problem.group();
      const auto first_tile = [&](int64_t group) {
        return static_cast<uint32_t>(problem.group_of(group, LoadGlobal{}).begin * rows) / tile_rows + group;
      };
      key_batch = 0;
      for (int64_t end = problem.groups; end - key_batch > 1;) {
        const int64_t middle = (key_batch + end) / 2;
        (first_tile(middle) <= tile ? key_batch : end) = middle;
      }
      first -= first_tile(key_batch);
    }
    return Place(problem, at, key_batch, problem.members ? index : index % kv_heads, first * tile_rows);
  }
  static FLASHX_DEVICE Place of_keys(const Problem& problem, uint32_t block, int64_t tiles, int tile_keys,
                                     uint32_t at) {
    const uint32_t count = static_cast<uint32_t>(tiles), index = block / count;
    const uint32_t kv_heads = static_cast<uint32_t>(problem.kv_heads);
    return Place(problem, at, index / kv_heads, index % kv_heads, int64_t{block % count} * tile_keys);
  }
  static FLASHX_DEVICE Place rows_again(const Problem& problem, int64_t, int, uint32_t at) {
    return Place(problem, at);
  }
  static FLASHX_DEVICE Place keys_again(const Problem& problem, int64_t, int, uint32_t at) {
    return Place(problem, at);
  }

  // Row tiles of all groups for a key head, if they have members. A group begins at a tile that its place among the
  // members gives, so that it is found by bisection: at most one tile a group is left empty.
  static int64_t member_tiles(const Problem& problem, int tile_rows) {
    return problem.batch * problem.q_len * problem.group() / tile_rows + problem.groups;
  }

  // Of the key head kv_head of a batch entry (of a group of members) of the keys.
  FLASHX_DEVICE Place(const Problem& problem, uint32_t at, int64_t key_batch, int64_t kv_head, int64_t first)
      : problem_(problem), at_(at) {
    if (ptx::warp() == 0) write(key_batch, kv_head, first);
    ptx::bar_sync();
  }

  FLASHX_DEVICE uint32_t first() const { return word(kFirst); }
  FLASHX_DEVICE uint32_t rows() const { return word(kRows); }
  FLASHX_DEVICE int64_t k_len() const { return word(kKLen); }
  FLASHX_DEVICE int64_t key_batch() const { return word(kKeyBatch); }
  // Rows of a query.
  FLASHX_DEVICE uint32_t step() const { return heads() * word(kMembers); }

  FLASHX_DEVICE int64_t head(uint32_t r) const {
    const uint32_t count = heads();
    return word(kKvHead) * count + r % count;
  }
  FLASHX_DEVICE int64_t query(uint32_t r) const { return r / heads() / word(kMembers); }
  FLASHX_DEVICE QueryRow row(uint32_t r) const {
    const uint32_t members = word(kMembers), others = r / heads();
    const int64_t sequence = problem_.members ? member(others % members) : int64_t{word(kKeyBatch)};
    const Sequence lies = problem_.sequence(sequence, LoadGlobal{});
    const int64_t query = others / members;
    return {sequence, head(r), query, lies.q_begin + query, lies};
  }
  FLASHX_DEVICE int64_t number(const QueryRow& its) const { return problem_.row(its.sequence, its.head, its.row); }
  FLASHX_DEVICE int64_t number(uint32_t r) const { return number(row(r)); }

  FLASHX_DEVICE Limits limits(uint32_t first, uint32_t last) const {
    const IntervalMask early = earliest(), late = latest();
    const int64_t q_first = query(first), q_last = query(last), keys = k_len();
    return {early.lo(q_first, keys), late.lo(q_last, keys), early.hi(q_first, keys), late.hi(q_last, keys),
            smaller(early.first, keys)};
  }
  FLASHX_DEVICE Sight sight(uint32_t first, uint32_t last, int64_t k_begin, int64_t k_end) const {
    Sight sight = Sight::of(limits(first, last).kind(k_begin, k_end));
    const BlockMap& map = problem_.blocks;
    if (!map.map || !sight.seen) return sight;
    sight.seen = false;
    const uint32_t q_block = map.q_block, k_block = map.k_block;
    const uint32_t q_begin = static_cast<uint32_t>(query(first)) / q_block;
    const uint32_t q_last = static_cast<uint32_t>(query(last)) / q_block;
    const uint32_t k_last = static_cast<uint32_t>(smaller(k_end, k_len()) - 1) / k_block;
    const uint32_t maps = map.head == 0 ? 1 : heads();
    const uint32_t all = map.batch == 0 ? maps : maps * word(kMembers);
    for (uint32_t m = 0; m < all; ++m) {
      const int64_t b = map.batch == 0 ? 0 : problem_.members ? member(m / maps) : int64_t{word(kKeyBatch)};
      for (uint32_t i = q_begin; i <= q_last; ++i) {
        for (uint32_t k = static_cast<uint32_t>(k_begin) / k_block; k <= k_last; ++k) {
          const int32_t entry = map.entry(LoadGlobal{}, b, head(m % maps), i, k);
          sight.seen |= entry != BlockMap::kHidden;
          sight.whole &= entry == BlockMap::kFull;
          if (sight.seen && !sight.whole) return sight;
        }
      }
    }
    return sight;
  }
  FLASHX_DEVICE ColumnSchedule rows_of(int64_t k_begin, int64_t k_end) const {
    const int64_t q_len = word(kQLen);
    ColumnSchedule schedule(latest(), q_len, k_begin, k_end);
    schedule.begin *= step();
    schedule.end = earliest().end_row(k_begin, k_end, q_len) * step();
    return schedule;
  }

  template <typename E>
  FLASHX_DEVICE QueryRows<E> queries(const View& view, int dim, bool aligned) const;
  template <typename E>
  FLASHX_DEVICE Rows<E> keys(const View& view, int dim, bool aligned) const {
    return {
        view.template at<E>(word(kKeyBatch), word(kKvHead), word(kKBegin)), view.row, 0, 1, word(kKLen), dim, aligned};
  }
  template <typename E>
  FLASHX_DEVICE KeyRows<E> paged_keys(const View& view, int dim, bool aligned) const;

 private:
  FLASHX_DEVICE Place(const Problem& problem, uint32_t at) : problem_(problem), at_(at) {}

  // By the first warp.
  FLASHX_DEVICE void write(int64_t key_batch, int64_t kv_head, int64_t first) {
    const Group group = problem_.group_of(key_batch, LoadGlobal{});
    Sequence lies{};
    int64_t shift[2] = {problem_.mask.shift, problem_.mask.shift};
    int64_t first_keys[2] = {problem_.mask.first, problem_.mask.first};
    if (group.count > 0) {
      lies = problem_.sequence(problem_.member(group.begin, LoadGlobal{}), LoadGlobal{});
      if (problem_.sequences) {
        // Their shifts and offsets have 32 bits; the rest of the lanes repeat the first member.
        int ends[4] = {INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN};
        for (int64_t i = 0; i < group.count; i += 32) {
          const int64_t m = i + ptx::lane() < group.count ? i + ptx::lane() : 0;
          const Sequence its = problem_.sequence(problem_.member(group.begin + m, LoadGlobal{}), LoadGlobal{});
          ends[0] = smaller(ends[0], static_cast<int>(its.shift)),
          ends[1] = larger(ends[1], static_cast<int>(its.shift));
          ends[2] = smaller(ends[2], static_cast<int>(its.offset));
          ends[3] = larger(ends[3], static_cast<int>(its.offset));
        }
        shift[0] = ptx::redux_min(ends[0]), shift[1] = ptx::redux_max(ends[1]);
        first_keys[0] = larger<int64_t>(problem_.mask.first - ptx::redux_max(ends[3]), 0);
        first_keys[1] = larger<int64_t>(problem_.mask.first - ptx::redux_min(ends[2]), 0);
      }
    }
    if (ptx::lane() != 0) return;
    const int64_t heads = problem_.group(), rows = lies.q_len * heads * group.count;
    put(kFirst, smaller(first, int64_t{UINT32_MAX})), put(kRows, rows);
    put(kKeyBatch, key_batch), put(kKvHead, kv_head), put(kHeads, heads);
    put(kMember, group.begin), put(kMembers, group.count);
    put(kQLen, lies.q_len), put(kQBegin, lies.q_begin), put(kKLen, lies.k_len), put(kKBegin, lies.k_begin);
    put(kShiftMin, shift[0]), put(kShiftMax, shift[1]);
    put(kFirstKeysMin, first_keys[0]), put(kFirstKeysMax, first_keys[1]);
  }

  FLASHX_DEVICE uint32_t word(Word which) const { return ptx::ld_shared<uint32_t>(at_ + which * 4); }
  FLASHX_DEVICE int64_t word(Long which) const {
    const uint32_t at = at_ + kWords * 4 + which * 8;
    return static_cast<int64_t>(ptx::ld_shared<uint32_t>(at) | static_cast<uint64_t>(ptx::ld_shared<uint32_t>(at + 4))
                                                                   << 32);
  }
  FLASHX_DEVICE void put(Word which, int64_t value) const {
    ptx::st_shared(at_ + which * 4, static_cast<uint32_t>(value));
  }
  FLASHX_DEVICE void put(Long which, int64_t value) const {
    const uint32_t at = at_ + kWords * 4 + which * 8;
    ptx::st_shared(at, static_cast<uint32_t>(value));
    ptx::st_shared(at + 4, static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32));
  }

  FLASHX_DEVICE uint32_t heads() const { return word(kHeads); }
  FLASHX_DEVICE int64_t member(uint32_t index) const {
    return problem_.member(int64_t{word(kMember)} + index, LoadGlobal{});
  }
  // The mask of the row among the members that sees the earliest keys, and of the one that sees the latest.
  FLASHX_DEVICE IntervalMask earliest() const {
    return {problem_.mask.left, problem_.mask.right, word(kShiftMin), word(kFirstKeysMax)};
  }
  FLASHX_DEVICE IntervalMask latest() const {
    return {problem_.mask.left, problem_.mask.right, word(kShiftMax), word(kFirstKeysMin)};
  }

  const Problem& problem_;
  uint32_t at_;

  template <typename E>
  friend struct QueryRows;
  template <typename E>
  friend struct KeyRows;
};

// Packed rows of a (batch, head, length, dim) tensor of queries.
template <typename E>
struct QueryRows {
  using Element = E;
  E* base;  // of the first row, if one sequence has them all
  const Problem& problem;
  Place<true> place;
  View view;
  uint32_t count;
  int dim;
  bool aligned;  // every row starts at a multiple of 16 bytes

  FLASHX_DEVICE E* at(uint32_t r) const {
    if (problem.members) {
      const QueryRow its = place.row(r);
      return view.template at<E>(its.sequence, its.head, its.row);
    }
    const uint32_t heads = place.heads();
    return base + r / heads * view.row + r % heads * view.head;
  }
};

template <typename E>
FLASHX_DEVICE QueryRows<E> Place<true>::queries(const View& view, int dim, bool aligned) const {
  const int64_t batch = problem_.members ? 0 : int64_t{word(kKeyBatch)};
  return {view.template at<E>(batch, word(kKvHead) * heads(), word(kQBegin)),
          problem_,
          *this,
          view,
          word(kRows),
          dim,
          aligned};
}

// Rows of a (batch, head, length, dim) tensor of keys, or, with pages, of a (page, head, row of the page, dim) one.
template <typename E>
struct KeyRows {
  using Element = E;
  E* base;
  const Problem& problem;
  Place<true> place;
  View view;
  uint32_t sequence;
  uint32_t count;
  int dim;
  bool aligned;

  // The same, made anew.
  FLASHX_DEVICE KeyRows now() const { return place.template paged_keys<E>(view, dim, aligned); }
  FLASHX_DEVICE E* at(uint32_t r) const {
    if (!problem.pages.table) return base + r * view.row;
    return base + problem.page(sequence, r, LoadGlobal{}) * view.batch +
           r % static_cast<uint32_t>(problem.pages.size) * view.row;
  }
};

template <typename E>
FLASHX_DEVICE KeyRows<E> Place<true>::paged_keys(const View& view, int dim, bool aligned) const {
  const bool paged = problem_.pages.table != nullptr;
  return {view.template at<E>(paged ? 0 : word(kKeyBatch), word(kKvHead), paged ? 0 : word(kKBegin)),
          problem_,
          *this,
          view,
          word(kKeyBatch),
          word(kKLen),
          dim,
          aligned};
}

// The tiles from `begin` to `end` that are seen, one after the other:
//   for (int j = walk.next(begin), upcoming; j < end; j = upcoming) { ... walk.whole(j) ... upcoming = walk.next(j + 1)
//   }
// sight(j) is how tile j looks; jump(j) skips, if it can, tiles from j on that are not seen. A warp looks at 32 tiles
// at a time, a lane at each, and all warps see the same.
template <bool kGeneral, typename SightOf, typename Jump>
class Walk {
 public:
  FLASHX_DEVICE Walk(int end, SightOf sight, Jump jump) : end_(end), sight_(sight), jump_(jump) {}

  FLASHX_DEVICE int next(int j) {
    if constexpr (kGeneral) {
      while (j < end_) {
        if (j / 32 != chunk_) {
          j = jump_(j);
          if (j >= end_) break;
          if (j / 32 != chunk_) look(j / 32);
        }
        const uint32_t left = seen_ >> j % 32;
        if (left != 0) return smaller(j + 31 - ptx::clz(left & (0 - left)), end_);
        j = (chunk_ + 1) * 32;
      }
      return end_;
    } else {
      return j;
    }
  }

  // Whether every row sees all of tile j: asked before what is next.
  FLASHX_DEVICE bool whole(int j) const {
    if constexpr (kGeneral) {
      return whole_ >> j % 32 & 1;
    } else {
      return sight_(j).whole;
    }
  }

 private:
  FLASHX_DEVICE void look(int chunk) {
    const Sight sight = sight_(chunk * 32 + ptx::lane());
    chunk_ = chunk, seen_ = ptx::vote_ballot(sight.seen), whole_ = ptx::vote_ballot(sight.whole);
  }

  int end_;
  SightOf sight_;
  Jump jump_;
  int chunk_ = -1;  // of 32 tiles
  uint32_t seen_ = 0, whole_ = 0;
};

template <bool kGeneral, typename SightOf, typename Jump>
FLASHX_DEVICE Walk<kGeneral, SightOf, Jump> make_walk(int end, SightOf sight, Jump jump) {
  return {end, sight, jump};
}

}  // namespace flashx::FLASHX_MACHINE
