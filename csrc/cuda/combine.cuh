// Split-KV's second step: out = sum_i w_i out_i, lse = log sum_i exp(lse_i), with w_i = exp(lse_i - lse) (Dao et al.,
// "Flash-Decoding for long-context inference"). The state that an earlier call has left is one more part, and a state
// may be the result. A warp owns a query row, its lanes the columns.
#pragma once

#include "core/softmax.h"
#include "cuda/place.cuh"

namespace flashx::FLASHX_MACHINE {

template <typename E>
struct Combine {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = 1, kSharedBytes = 0;

  struct Params {
    Problem problem;
    View out;
    float* lse;
    Carry carry;
    const float *partial_out, *partial_lse;
    int64_t rows;  // as Problem::row counts them
    int splits;
  };

  static FLASHX_DEVICE void run(const Params& params) {
    const Problem& problem = params.problem;
    const LoadGlobal load;
    const int64_t index = static_cast<int64_t>(ptx::block_x()) * kWarps + ptx::warp();
    const int64_t query = index % problem.q_len, heads = index / problem.q_len, head = heads % problem.q_heads;
    const int64_t member = heads / problem.q_heads;
    if (member >= problem.batch) return;
    // Sequences that are nobody's members have no parts.
    if (problem.members &&
        (member < load(problem.member_begin) || member >= load(problem.member_begin + problem.groups))) {
      return;
    }
    const int64_t sequence = problem.member(member, load);
    const Sequence lies = problem.sequence(sequence, load);
    if (query < lies.q_len) combine(params, sequence, head, lies.q_begin + query);
  }

 private:
  static FLASHX_DEVICE void combine(const Params& params, int64_t sequence, int64_t head, int64_t query) {
    const Problem& problem = params.problem;
    const int64_t row = problem.row(sequence, head, query), dim = problem.value_dim;
    const float* lse = params.partial_lse + row;
    float *max = static_cast<float*>(params.carry.max), *sum = static_cast<float*>(params.carry.sum);
    float* acc = static_cast<float*>(params.carry.acc) + row * dim;
    constexpr float log2e = static_cast<float>(kLog2e);
    const float carried = max ? ptx::ld_global(max + row) : -kInf;
    float highest = carried;
    for (int i = 0; i < params.splits; ++i) highest = fmaxf(highest, ptx::ld_global(lse + i * params.rows));
    const float shift = highest == -kInf ? 0.0f : highest;
    const float rescale = ptx::ex2((carried - shift) * log2e);
    float total = max ? ptx::ld_global(sum + row) * rescale : 0.0f;
    for (int i = 0; i < params.splits; ++i) {
      total += ptx::ex2((ptx::ld_global(lse + i * params.rows) - shift) * log2e);
    }
    const RowResult<float> result = RowResult<float>::from(highest, total, 1);
    const bool suspend = params.carry.suspend;
    E* out = params.out.template at<E>(sequence, head, query);
    for (int d = ptx::lane(); d < dim; d += 32) {
      float x = rescale == 0 ? 0.0f : rescale * ptx::ld_global(acc + d);
      for (int i = 0; i < params.splits; ++i) {
        const float weight = ptx::ex2((ptx::ld_global(lse + i * params.rows) - shift) * log2e);
        // A part that saw nothing has no say, whatever it holds.
        if (weight != 0) x += weight * ptx::ld_global(params.partial_out + (i * params.rows + row) * dim + d);
      }
      if (suspend) {
        ptx::st_global(acc + d, x);
      } else {
        ptx::st_global(out + d, to_element<E>(x * result.out_scale));
      }
    }
    ptx::bar_warp_sync();  // all lanes have read the state
    if (ptx::lane() != 0) return;
    if (suspend) {
      ptx::st_global(max + row, highest);
      ptx::st_global(sum + row, total);
    } else {
      ptx::st_global(params.lse + row, result.lse);
    }
  }
};

}  // namespace flashx::FLASHX_MACHINE
