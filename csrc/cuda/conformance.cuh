// One small kernel per wrapper of ptx.cuh, which writes what the instruction gave. tests/test_emulator.py knows what
// that must be, from the PTX ISA document, on a GPU as on the emulator. Block i reads the i-th kIn bytes of the input
// and writes the i-th kOut bytes of the output. One translation unit per machine includes this file.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace flashx::FLASHX_MACHINE {

struct ConformanceParams {
  const char* in;
  char* out;
};

template <int kThreads_, int kIn_, int kOut_, int kSharedBytes_ = 0>
struct ConformanceKernel {
  using Params = ConformanceParams;
  static constexpr int kThreads = kThreads_, kBlocks = 1, kSharedBytes = kSharedBytes_, kIn = kIn_, kOut = kOut_;

  static Grid grid(int64_t count) { return {count, 1, 1}; }

  template <typename T>
  static FLASHX_DEVICE T in(const Params& params, int index) {
    return ptx::ld_global(reinterpret_cast<const T*>(params.in + static_cast<int64_t>(ptx::block_x()) * kIn) + index);
  }
  template <typename T>
  static FLASHX_DEVICE void out(const Params& params, int index, T value) {
    ptx::st_global(reinterpret_cast<T*>(params.out + static_cast<int64_t>(ptx::block_x()) * kOut) + index, value);
  }
};

// out[block][thread][6]
struct PlaceConformance : ConformanceKernel<64, 4, 6 * 64 * 6 * 4> {
  static Grid grid(int64_t count) { return {2, 3, count}; }

  static FLASHX_DEVICE void run(const Params& params) {
    const int block = (ptx::block_z() * 3 + ptx::block_y()) * 2 + ptx::block_x();
    int* out = reinterpret_cast<int*>(params.out) + (static_cast<int64_t>(block) * kThreads + ptx::thread()) * 6;
    ptx::st_global(out, ptx::thread());
    ptx::st_global(out + 1, ptx::lane());
    ptx::st_global(out + 2, ptx::warp());
    ptx::st_global(out + 3, ptx::block_x());
    ptx::st_global(out + 4, ptx::block_y());
    ptx::st_global(out + 5, ptx::block_z());
  }
};

// ---- Barriers, shuffles, votes: values pass through shared memory to the mirrored thread.

struct BarSyncConformance : ConformanceKernel<128, 512, 512, 512> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int thread = ptx::thread();
    ptx::st_shared(ptx::shared_base() + 4 * thread, in<uint32_t>(params, thread));
    ptx::bar_sync();
    out(params, thread, ptx::ld_shared<uint32_t>(ptx::shared_base() + 4 * (127 - thread)));
  }
};

// Each half of the block by itself, one of them oftener than the other; out: mirrored within the half, plus the rounds.
struct BarSyncIdConformance : ConformanceKernel<128, 512, 512, 512> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int thread = ptx::thread(), half = thread / 64, mirrored = half * 64 + 63 - thread % 64;
    uint32_t value = in<uint32_t>(params, thread);
    for (int round = 0; round < 1 + 2 * half; ++round) {
      ptx::st_shared(ptx::shared_base() + 4 * thread, value);
      ptx::bar_sync(1 + half, 64);
      value = ptx::ld_shared<uint32_t>(ptx::shared_base() + 4 * mirrored) + 1;
      ptx::bar_sync(1 + half, 64);
    }
    out(params, thread, value);
  }
};

// Round r asks for bit r of each thread's input; out: the answers as bits.
struct BarRedOrConformance : ConformanceKernel<128, 512, 512> {
  static FLASHX_DEVICE void run(const Params& params) {
    const uint32_t bits = in<uint32_t>(params, ptx::thread());
    uint32_t answers = 0;
    for (int round = 0; round < 32; ++round) answers |= ptx::bar_red_or(bits >> round & 1) ? 1u << round : 0;
    out(params, ptx::thread(), answers);
  }
};

struct BarWarpSyncConformance : ConformanceKernel<128, 512, 512, 512> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int thread = ptx::thread();
    ptx::st_shared(ptx::shared_base() + 4 * thread, in<uint32_t>(params, thread));
    ptx::bar_warp_sync();
    out(params, thread, ptx::ld_shared<uint32_t>(ptx::shared_base() + 4 * (thread ^ 31)));
  }
};

// out[mask][lane]
struct ShflBflyConformance : ConformanceKernel<32, 128, 32 * 128> {
  static FLASHX_DEVICE void run(const Params& params) {
    const float value = in<float>(params, ptx::lane());
    for (int mask = 0; mask < 32; ++mask) out(params, mask * 32 + ptx::lane(), ptx::shfl_bfly(value, mask));
  }
};

// Round r asks lane i for the value of lane (i * r + r) % 64, which counts as one of 32. out[round][lane]
struct ShflIdxConformance : ConformanceKernel<32, 128, 32 * 128> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int lane = ptx::lane();
    const uint32_t value = in<uint32_t>(params, lane);
    for (int round = 0; round < 32; ++round) {
      out(params, round * 32 + lane, ptx::shfl_idx(value, (lane * round + round) % 64));
    }
  }
};

// Round r asks for bit r of each lane's input. out[round][lane]
struct VoteBallotConformance : ConformanceKernel<32, 128, 32 * 128> {
  static FLASHX_DEVICE void run(const Params& params) {
    const uint32_t bits = in<uint32_t>(params, ptx::lane());
    for (int round = 0; round < 32; ++round) {
      out(params, round * 32 + ptx::lane(), ptx::vote_ballot(bits >> round & 1));
    }
  }
};

// out[2][lane]: the least and the largest of the warp's.
struct ReduxConformance : ConformanceKernel<32, 128, 256> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int value = in<int>(params, ptx::lane());
    out(params, ptx::lane(), ptx::redux_min(value));
    out(params, 32 + ptx::lane(), ptx::redux_max(value));
  }
};

// ---- Memory

template <typename T>
struct GlobalConformance : ConformanceKernel<32, 32 * static_cast<int>(sizeof(T)), 32 * static_cast<int>(sizeof(T))> {
  using Base = ConformanceKernel<32, 32 * static_cast<int>(sizeof(T)), 32 * static_cast<int>(sizeof(T))>;
  static FLASHX_DEVICE void run(const ConformanceParams& params) {
    Base::out(params, ptx::lane(), Base::template in<T>(params, 31 - ptx::lane()));
  }
};

template <typename T>
struct SharedConformance : ConformanceKernel<128, 128 * static_cast<int>(sizeof(T)), 128 * static_cast<int>(sizeof(T)),
                                             128 * static_cast<int>(sizeof(T))> {
  using Base = ConformanceKernel<128, 128 * static_cast<int>(sizeof(T)), 128 * static_cast<int>(sizeof(T)),
                                 128 * static_cast<int>(sizeof(T))>;
  static FLASHX_DEVICE void run(const ConformanceParams& params) {
    constexpr uint32_t kBytes = sizeof(T);
    const uint32_t thread = static_cast<uint32_t>(ptx::thread());
    ptx::st_shared(ptx::shared_base() + kBytes * (thread * 5 % 128), Base::template in<T>(params, ptx::thread()));
    ptx::bar_sync();
    Base::out(params, ptx::thread(), ptx::ld_shared<T>(ptx::shared_base() + kBytes * thread));
  }
};

// Lane i copies i % 17 bytes. out: its 16 bytes of shared memory, which held ones before.
struct CpAsyncConformance : ConformanceKernel<32, 512, 512, 512> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int lane = ptx::lane();
    const uint32_t mine = ptx::shared_base() + 16 * lane;
    for (int i = 0; i < 4; ++i) ptx::st_shared(mine + 4 * i, 0xffffffffu);
    const char* from = params.in + static_cast<int64_t>(ptx::block_x()) * kIn + 16 * lane;
    ptx::cp_async_16(mine, from, lane % 17);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out(params, 4 * lane + i, ptx::ld_shared<uint32_t>(mine + 4 * i));
  }
};

// Groups of one, two, no and one copy of a thread, read by the mirrored thread after the wait that covers them.
struct CpAsyncGroupsConformance : ConformanceKernel<128, 4 * 2048, 4 * 2048, 4 * 2048> {
  static FLASHX_DEVICE void run(const Params& params) {
    copy(params, 0);
    ptx::cp_async_commit();
    copy(params, 1);
    copy(params, 2);
    ptx::cp_async_commit();
    ptx::cp_async_commit();
    copy(params, 3);
    ptx::cp_async_commit();
    ptx::cp_async_wait<3>();
    ptx::bar_sync();
    read(params, 0);
    ptx::cp_async_wait<2>();
    ptx::bar_sync();
    read(params, 1);
    read(params, 2);
    ptx::cp_async_wait<0>();
    ptx::bar_sync();
    read(params, 3);
  }

 private:
  static FLASHX_DEVICE void copy(const Params& params, int slice) {
    const int offset = slice * 2048 + ptx::thread() * 16;
    ptx::cp_async_16(ptx::shared_base() + offset, params.in + static_cast<int64_t>(ptx::block_x()) * kIn + offset, 16);
  }
  static FLASHX_DEVICE void read(const Params& params, int slice) {
    const int offset = slice * 2048 + (127 - ptx::thread()) * 16;
    for (int i = 0; i < 4; ++i) {
      out(params, offset / 4 + i, ptx::ld_shared<uint32_t>(ptx::shared_base() + offset + 4 * i));
    }
  }
};

// ---- Matrices

// in: 2048 bytes for shared memory, then each lane's offset in it. out[lane][4]
template <bool kTransposed>
struct LdMatrixConformance : ConformanceKernel<32, 2048 + 128, 512, 2048> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int lane = ptx::lane();
    for (int i = lane; i < 512; i += 32) ptx::st_shared(ptx::shared_base() + 4 * i, in<uint32_t>(params, i));
    ptx::bar_sync();
    const uint32_t address = ptx::shared_base() + in<uint32_t>(params, 512 + lane);
    uint32_t d[4];
    if constexpr (kTransposed) {
      ptx::ldmatrix_x4_trans(d, address);
    } else {
      ptx::ldmatrix_x4(d, address);
    }
    for (int r = 0; r < 4; ++r) out(params, 4 * lane + r, d[r]);
  }
};

// in: d[lane][4], a[lane][4], b[lane][2]. out: d[lane][4]
template <typename E>
struct MmaConformance : ConformanceKernel<32, 32 * (4 + 4 + 2) * 4, 512> {
  static FLASHX_DEVICE void run(const Params& params) {
    const int lane = ptx::lane();
    float d[4];
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; ++r) d[r] = in<float>(params, 4 * lane + r);
    for (int r = 0; r < 4; ++r) a[r] = in<uint32_t>(params, 128 + 4 * lane + r);
    for (int r = 0; r < 2; ++r) b[r] = in<uint32_t>(params, 256 + 2 * lane + r);
    ptx::mma<E>(d, a, b);
    for (int r = 0; r < 4; ++r) out(params, 4 * lane + r, d[r]);
  }
};

// ---- Numbers: f(in[i]) for 32 elements a block.

template <typename In, typename Out, Out (*kFunction)(In)>
struct NumbersConformance
    : ConformanceKernel<32, 32 * static_cast<int>(sizeof(In)), 32 * static_cast<int>(sizeof(Out))> {
  using Base = ConformanceKernel<32, 32 * static_cast<int>(sizeof(In)), 32 * static_cast<int>(sizeof(Out))>;
  static FLASHX_DEVICE void run(const ConformanceParams& params) {
    Base::out(params, ptx::lane(), kFunction(Base::template in<In>(params, ptx::lane())));
  }
};

template <typename E>
FLASHX_DEVICE uint32_t convert_pair(ptx::Words2 pair) {
  return ptx::cvt_x2<E>(ptx::float_of(pair.w[0]), ptx::float_of(pair.w[1]));
}

// ---- By name

namespace {

struct Conformance {
  const char* name;
  void (*run)(const std::string&, const void*, int64_t, void*, int64_t, const CudaCall&);
};

template <typename Kernel>
void run_conformance(const std::string& name, const void* in, int64_t in_bytes, void* out, int64_t out_bytes,
                     const CudaCall& call) {
  const int64_t count = in_bytes / Kernel::kIn;
  if (count < 1 || in_bytes != count * Kernel::kIn || out_bytes != count * Kernel::kOut) {
    throw std::invalid_argument(name + " takes multiples of " + std::to_string(Kernel::kIn) + " bytes and gives " +
                                std::to_string(Kernel::kOut) + " for each, got " + std::to_string(in_bytes) + " and " +
                                std::to_string(out_bytes));
  }
  launch<Kernel>(name, Kernel::grid(count), {static_cast<const char*>(in), static_cast<char*>(out)}, call,
                 {{"in", in, in_bytes, false}, {"out", out, out_bytes, true}});
}

const Conformance kConformance[] = {
    {"place", run_conformance<PlaceConformance>},
    {"bar_sync", run_conformance<BarSyncConformance>},
    {"bar_sync_id", run_conformance<BarSyncIdConformance>},
    {"bar_red_or", run_conformance<BarRedOrConformance>},
    {"bar_warp_sync", run_conformance<BarWarpSyncConformance>},
    {"shfl_bfly", run_conformance<ShflBflyConformance>},
    {"shfl_idx", run_conformance<ShflIdxConformance>},
    {"vote_ballot", run_conformance<VoteBallotConformance>},
    {"redux", run_conformance<ReduxConformance>},
    {"global_1", run_conformance<GlobalConformance<uint8_t>>},
    {"global_2", run_conformance<GlobalConformance<uint16_t>>},
    {"global_4", run_conformance<GlobalConformance<uint32_t>>},
    {"global_8", run_conformance<GlobalConformance<ptx::Words2>>},
    {"global_16", run_conformance<GlobalConformance<ptx::Words4>>},
    {"shared_2", run_conformance<SharedConformance<Half>>},
    {"shared_4", run_conformance<SharedConformance<float>>},
    {"cp_async", run_conformance<CpAsyncConformance>},
    {"cp_async_groups", run_conformance<CpAsyncGroupsConformance>},
    {"ldmatrix_x4", run_conformance<LdMatrixConformance<false>>},
    {"ldmatrix_x4_trans", run_conformance<LdMatrixConformance<true>>},
    {"mma_f16", run_conformance<MmaConformance<Half>>},
    {"mma_bf16", run_conformance<MmaConformance<BFloat16>>},
    {"mma_tf32", run_conformance<MmaConformance<float>>},
    {"ex2", run_conformance<NumbersConformance<float, float, ptx::ex2>>},
    {"cvt_tf32", run_conformance<NumbersConformance<float, float, ptx::cvt_tf32>>},
    {"cvt_f16x2", run_conformance<NumbersConformance<ptx::Words2, uint32_t, convert_pair<Half>>>},
    {"cvt_bf16x2", run_conformance<NumbersConformance<ptx::Words2, uint32_t, convert_pair<BFloat16>>>},
    {"cvt_f32_f16", run_conformance<NumbersConformance<Half, float, ptx::cvt_f32>>},
    {"cvt_f32_bf16", run_conformance<NumbersConformance<BFloat16, float, ptx::cvt_f32>>},
    {"clz", run_conformance<NumbersConformance<uint32_t, int, ptx::clz>>},
    {"bits_of", run_conformance<NumbersConformance<float, uint32_t, ptx::bits_of>>},
    {"float_of", run_conformance<NumbersConformance<uint32_t, float, ptx::float_of>>},
};

}  // namespace

std::vector<std::string> conformance_names() {
  std::vector<std::string> names;
  for (const Conformance& c : kConformance) names.push_back(c.name);
  return names;
}

// Runs the kernel of this name; throws std::invalid_argument for names and sizes that do not fit.
void conformance(const std::string& name, const void* input, int64_t input_bytes, void* output, int64_t output_bytes,
                 const CudaCall& call) {
  for (const Conformance& c : kConformance) {
    if (name == c.name) return c.run(name, input, input_bytes, output, output_bytes, call);
  }
  throw std::invalid_argument("no conformance kernel is called " + name);
}

}  // namespace flashx::FLASHX_MACHINE
