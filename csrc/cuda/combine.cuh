// Split-KV's second step: out = sum_i w_i out_i, lse = log sum_i exp(lse_i), with w_i = exp(lse_i - lse) (Dao et al.,
// "Flash-Decoding for long-context inference"). A warp owns a query row, its lanes the columns.
#pragma once

#include "core/softmax.h"
#include "cuda/tile.cuh"

namespace flashx::FLASHX_MACHINE {

template <typename E>
struct Combine {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = 1, kSharedBytes = 0;

  struct Params {
    Problem problem;
    View out;
    float* lse;
    const float *partial_out, *partial_lse;
    int splits;
  };

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const int64_t rows = problem.batch * problem.q_heads * problem.q_len;
    const int64_t row = static_cast<int64_t>(ptx::block_x()) * kWarps + ptx::warp();
    if (row >= rows) return;
    constexpr float log2e = static_cast<float>(kLog2e);
    float highest = -kInf, total = 0;
    for (int i = 0; i < params.splits; ++i)
      highest = fmaxf(highest, ptx::ld_global(params.partial_lse + i * rows + row));
    const float shift = highest == -kInf ? 0.0f : highest;
    for (int i = 0; i < params.splits; ++i) {
      total += ptx::ex2((ptx::ld_global(params.partial_lse + i * rows + row) - shift) * log2e);
    }
    const RowResult<float> result = RowResult<float>::from(highest, total, 1);
    if (ptx::lane() == 0) ptx::st_global(params.lse + row, result.lse);
    const int64_t head = row / problem.q_len;
    E* out = params.out.template at<E>(head / problem.q_heads, head % problem.q_heads, row % problem.q_len);
    for (int d = ptx::lane(); d < problem.value_dim; d += 32) {
      float x = 0;
      for (int i = 0; i < params.splits; ++i) {
        const float weight = ptx::ex2((ptx::ld_global(params.partial_lse + i * rows + row) - shift) * log2e);
        // A part that saw nothing has no say, whatever it holds.
        if (weight != 0) x += weight * ptx::ld_global(params.partial_out + (i * rows + row) * problem.value_dim + d);
      }
      ptx::st_global(out + d, to_element<E>(x * result.out_scale));
    }
  }
};

}  // namespace flashx::FLASHX_MACHINE
