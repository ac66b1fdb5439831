// What the host code of the instances shares: extents, alignment, names.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
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

inline Sizes query_sizes(const Problem& p, int dim) { return {p.batch, p.q_heads, p.q_len, dim}; }
inline Sizes key_sizes(const Problem& p, int dim) { return {p.batch, p.kv_heads, p.k_len, dim}; }

// The operands that shape the logits.
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
}

inline int64_t query_rows(const Problem& p) { return p.q_len * p.group(); }

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
