// Problem: one attention call, described. Knows addresses and strides, not torch.
#pragma once

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

struct Problem {
  DType dtype = DType::Float32;
  int64_t batch = 0, q_heads = 0, kv_heads = 0, q_len = 0, k_len = 0;
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

  // Query heads that read one key head.
  FLASHX_CORE int64_t group() const { return kv_heads == 0 ? 1 : q_heads / kv_heads; }
};

struct ForwardTensors {
  View query, key, value, out;
  void* lse;  // (batch, q_heads, q_len), accumulation dtype
};

struct BackwardTensors {
  View query, key, value, out, grad_out;
  const void* lse;
  const void* grad_lse;  // may be null
  void* delta;           // out: rowsum(grad_out * out) - grad_lse, (batch, q_heads, q_len)
  View grad_query, grad_key, grad_value;
  void* grad_bias;  // contiguous, bias's own size and dtype; may be null
};

}  // namespace flashx
