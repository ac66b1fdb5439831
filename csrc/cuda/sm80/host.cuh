// What the host code of the instances shares: extents, alignment, names.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/place.cuh"
#include "cuda/sm80/config.h"

namespace flashx::FLASHX_MACHINE {

template <typename E>
constexpr const char* kElementName = sizeof(E) == 4 ? "float32" : "float16";
template <>
constexpr const char* kElementName<BFloat16> = "bfloat16";

// A (batch, heads, length, dim) tensor's sizes.
struct Sizes {
  int64_t batch, heads, length, dim;

  bool empty() const { return batch == 0 || heads == 0 || length == 0 || dim == 0; }
};

// True if every row starts at a multiple of 16 bytes, which is what cp.async copies.
inline bool is_aligned(const View& view, const Sizes& sizes, int64_t element_bytes) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride * element_bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && fits(sizes.batch, view.batch) &&
         fits(sizes.heads, view.head) && fits(sizes.length, view.row);
}

inline Buffer buffer(const char* name, const View& view, const Sizes& sizes, int64_t element_bytes, bool writable) {
  const int64_t last = (sizes.batch - 1) * view.batch + (sizes.heads - 1) * view.head + (sizes.length - 1) * view.row;
  return {name, view.data, sizes.empty() ? 0 : (last + sizes.dim) * element_bytes, writable};
}

// Packed sequences have strides of 0 for the batch.
inline Sizes query_sizes(const Problem& p, int dim) { return {p.batch, p.q_heads, p.q_rows, dim}; }
inline Sizes key_sizes(const Problem& p, int dim) {
  if (p.pages.table) return {p.pages.count, p.kv_heads, p.pages.size, dim};
  return {p.key_groups(), p.kv_heads, p.k_rows, dim};
}

// Rows that have a number: see Problem::row.
inline int64_t numbered_rows(const Problem& p) {
  return (p.packed ? smaller<int64_t>(p.batch, 1) : p.batch) * p.q_heads * p.q_rows;
}
inline View numbered_view(const Problem& p, void* data, int64_t dim) {
  return {data, p.packed ? 0 : p.q_heads * p.q_rows * dim, p.q_rows * dim, dim};
}

// The operands that shape the logits, and the tables.
inline void add_logit_buffers(const Problem& p, std::vector<Buffer>& buffers) {
  if (p.bias.data) {
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) last += larger<int64_t>(p.bias.size[i] - 1, 0) * p.bias.stride[i];
    const int64_t bytes = p.bias.dtype == DType::Bool ? 1 : p.bias.dtype == DType::Float32 ? 4 : 2;
    const bool empty = p.bias.size[0] * p.bias.size[1] * p.bias.size[2] * p.bias.size[3] == 0;
    buffers.push_back({"bias", p.bias.data, empty ? 0 : (last + 1) * bytes, false});
  }
  const int64_t heads = p.q_heads * static_cast<int64_t>(sizeof(float));
  if (p.alibi_slopes) {
    buffers.push_back({"alibi_slopes", p.alibi_slopes, p.alibi_batch_stride == 0 ? heads : heads * p.batch, false});
  }
  if (p.sinks) buffers.push_back({"sinks", p.sinks, heads, false});
  const BlockMap& blocks = p.blocks;
  if (blocks.map) {
    const int64_t last = (p.batch - 1) * blocks.batch + (p.q_heads - 1) * blocks.head;
    buffers.push_back({"block_map", blocks.map, (last + blocks.q_blocks * blocks.k_blocks) * 4, false});
    buffers.push_back({"block_bits", blocks.bits, blocks.bitmaps * blocks.q_block * blocks.words() * 4, false});
  }
  if (p.sequences) buffers.push_back({"sequences", p.sequences, p.batch * Problem::kSequenceFields * 4, false});
  if (p.members) {
    buffers.push_back({"members", p.members, p.batch * 4, false});
    buffers.push_back({"member_begin", p.member_begin, (p.groups + 1) * 4, false});
  }
  if (p.pages.table) buffers.push_back({"page_table", p.pages.table, p.batch * p.pages.width * 4, false});
}

inline int split_keys(const Problem& p) { return p.members ? sm80::kMemberSplitKeys : sm80::kSplitKeys; }

// Packed rows of a sequence.
inline int64_t query_rows(const Problem& p) { return p.q_len * p.group(); }

// Row tiles of a key head of a batch entry, and the blocks that own them.
inline int64_t row_tiles(const Problem& p, int tile_rows) {
  return p.members ? Place<true>::member_tiles(p, tile_rows) : ceil_div(query_rows(p), tile_rows);
}
inline int64_t row_blocks(const Problem& p, int tile_rows) {
  return row_tiles(p, tile_rows) * p.kv_heads * (p.members ? 1 : p.batch);
}

// The problem, as messages have it.
inline std::string describe(const Problem& p) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  return " (batch " + text(p.batch) + ", heads " + text(p.q_heads) + ":" + text(p.kv_heads) + ", lengths " +
         text(p.q_len) + " x " + text(p.k_len) + ", dims " + text(p.head_dim) + ":" + text(p.value_dim) + ")";
}

// What makes a launch's name: sm80/forward<float16, 128> (batch 1, ...).
template <typename E>
auto kernel_name(const Problem& problem, const char* pass, int dim) {
  return [&problem, pass, dim] {
    return std::string("sm80/") + pass + "<" + kElementName<E> + ", " + std::to_string(dim) + ">" + describe(problem);
  };
}

}  // namespace flashx::FLASHX_MACHINE
