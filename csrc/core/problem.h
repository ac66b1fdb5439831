// Problem: one attention call, described. Knows addresses and strides, not torch.
#pragma once

#include <cmath>

#include "core/mask.h"

namespace flashx {

enum class DType : int { Float32, Float16, BFloat16, Float64, Bool };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// A (batch, heads, length, dim) tensor: strides in elements, last dimension contiguous.
struct View {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  template <typename E>
  FLASHX_CORE E* at(int64_t b, int64_t h, int64_t i) const {
    return static_cast<E*>(data) + (b * batch + h * head + i * row);
  }
};

// What is added to the logits, or, for DType::Bool, what hides them; broadcast dimensions have stride 0.
struct Bias {
  const void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride[4] = {0, 0, 0, 0};  // batch, head, query, key; in elements
  int64_t size[4] = {1, 1, 1, 1};    // of the tensor itself: 1 where it broadcasts
};

// One sequence of a batch: its rows and keys in their tensors, and how they stand to each other.
struct Sequence {
  int64_t q_begin, q_len;
  int64_t k_begin, k_len;
  int64_t shift;   // the key on row 0's diagonal
  int64_t offset;  // keys before key 0 in the levels above: the first keys (IntervalMask) are counted with these
};

// Sequences that read the same keys: members [begin, begin + count) of Problem::members. Without members every sequence
// is a group of its own.
struct Group {
  int64_t begin, count;
};

// A paged cache: key i of a sequence is row i % size of page table[sequence][i / size].
struct Pages {
  const int32_t* table = nullptr;  // (batch, width)
  int64_t width = 0, size = 1, count = 0;
};

// A dense call has batch sequences of q_len rows and k_len keys. With `sequences` these are the longest ones, and each
// sequence says where it lies; what the tables hold is clamped to what the tensors have.
struct Problem {
  DType dtype = DType::Float32;
  int64_t batch = 0, q_heads = 0, kv_heads = 0, q_len = 0, k_len = 0;
  int64_t q_rows = 0, k_rows = 0;  // lengths of the tensors; of a paged cache, of all its pages
  bool packed = false;             // the sequences' rows lie one after the other in one batch entry
  int head_dim = 0, value_dim = 0;
  double scale = 1, softcap = 0;
  IntervalMask mask;
  Bias bias;
  // Accumulation dtype, like sinks: one slope per head, per batch entry too if alibi_batch_stride is not 0.
  const void* alibi_slopes = nullptr;
  int64_t alibi_batch_stride = 0;
  const void* sinks = nullptr;
  double dropout_p = 0;
  uint64_t seed = 0;

  BlockMap blocks;
  const int32_t* sequences = nullptr;     // (batch, kSequenceFields)
  const int32_t* members = nullptr;       // (batch)
  const int32_t* member_begin = nullptr;  // (groups + 1)
  int64_t groups = 0;
  Pages pages;
  // Decoding: softmax weights relative to this logit instead of a running maximum, unless a row shows that they do not
  // fit (Hong et al., "FlashDecoding++", section 3). NaN is off. Not together with a carry.
  double unified_max = NAN;

  static constexpr int kSequenceFields = 6;

  // Query heads that read one key head.
  FLASHX_CORE int64_t group() const { return kv_heads == 0 ? 1 : q_heads / kv_heads; }
  FLASHX_CORE int64_t key_groups() const { return members ? groups : batch; }

  // Where row q of a sequence stands in arrays with a number for each row: lse, delta, carried states.
  FLASHX_CORE int64_t row(int64_t b, int64_t head, int64_t q_row) const {
    return ((packed ? 0 : b) * q_heads + head) * q_rows + q_row;
  }

  // `load` reads an element of a table.
  template <typename Load>
  FLASHX_CORE Sequence sequence(int64_t b, Load load) const {
    if (!sequences) return {0, q_len, 0, k_len, mask.shift, 0};
    const int32_t* at = sequences + b * kSequenceFields;
    // The members of a group are packed row by row: they have all of query's rows.
    const int64_t q_begin = members ? 0 : clamp<int64_t>(load(at), 0, q_rows);
    const int64_t longest = smaller(q_len, q_rows - q_begin), k_begin = clamp<int64_t>(load(at + 2), 0, k_rows);
    return {q_begin,      members ? longest : clamp<int64_t>(load(at + 1), 0, longest),
            k_begin,      clamp<int64_t>(load(at + 3), 0, smaller(k_len, k_rows - k_begin)),
            load(at + 4), larger<int64_t>(load(at + 5), 0)};
  }
  // The interval mask of a sequence.
  FLASHX_CORE IntervalMask mask_of(const Sequence& sequence) const {
    IntervalMask its = mask;
    its.shift = sequence.shift;
    its.first = larger<int64_t>(mask.first - sequence.offset, 0);
    return its;
  }
  template <typename Load>
  FLASHX_CORE Group group_of(int64_t index, Load load) const {
    if (!members) return {index, 1};
    const int64_t begin = clamp<int64_t>(load(member_begin + index), 0, batch);
    return {begin, clamp<int64_t>(load(member_begin + index + 1), begin, batch) - begin};
  }
  template <typename Load>
  FLASHX_CORE int64_t member(int64_t index, Load load) const {
    return members ? clamp<int64_t>(load(members + index), 0, batch - 1) : index;
  }
  // The row of the key tensor (the batch entry of a paged one: its page) that key i of a sequence lies in.
  template <typename Index, typename Load>
  FLASHX_CORE int64_t page(int64_t b, Index i, Load load) const {
    const int64_t index = clamp<int64_t>(i / static_cast<Index>(pages.size), 0, pages.width - 1);
    return clamp<int64_t>(load(pages.table + b * pages.width + index), 0, pages.count - 1);
  }
};

// The states of rows whose softmax goes on in another call (a level of a prefix tree): running max in the kernel's own
// units, running sum, and the accumulator that is not yet divided by it; accumulation dtype, Problem::row's order.
struct Carry {
  void* max = nullptr;
  void* sum = nullptr;
  void* acc = nullptr;   // (rows, value_dim)
  bool suspend = false;  // leave the states here, instead of results in out and lse
};

struct ForwardTensors {
  View query, key, value, out;
  void* lse;  // (batch, q_heads, q_len), accumulation dtype; on the CPU null if nobody wants it
  Carry carry = {};
};

// A forward, or one of several that follow each other: levels of keys for the same rows, each a problem by itself.
struct ForwardCall {
  Problem problem;
  ForwardTensors tensors;
};

struct BackwardTensors {
  View query, key, value, out, grad_out;
  const void* lse;
  const void* grad_lse;  // may be null
  void* delta;           // out: rowsum(grad_out * out) - grad_lse, (batch, q_heads, q_len)
  View grad_query, grad_key, grad_value;
  void* grad_bias;  // contiguous, bias's own size and dtype; may be null
  // grad_query is in the accumulation dtype and added to: the call is one of several that share the queries.
  bool adds_grad_query = false;
};

}  // namespace flashx
