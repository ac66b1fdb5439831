// Every instruction that the kernels use beyond plain arithmetic, one wrapper each, under its PTX name; no asm
// elsewhere. Kernels touch memory through these alone: built with FLASHX_EMULATED, the same names come from
// csrc/emulator, which runs the kernels on the CPU and checks each access. References are to the PTX ISA document.
//
// Shared memory is addressed in bytes, as in PTX; a block's own begins at shared_base(). In fragments, g = lane / 4 and
// t = lane % 4.
#pragma once

#include "core/problem.h"

#if defined(FLASHX_EMULATED)
#include "emulator/ptx.h"

#define FLASHX_UNROLL_BY(n)

namespace flashx::ptx {
FLASHX_DEVICE uint32_t opaque(uint32_t x) { return x; }
}  // namespace flashx::ptx

#else

#define FLASHX_DEVICE __device__ __forceinline__
#define FLASHX_UNROLL _Pragma("unroll")
#define FLASHX_UNROLL_BY(n) _Pragma(FLASHX_TEXT(unroll(n)))
#define FLASHX_TEXT(x) #x

namespace flashx::ptx {

// ---- Where this thread is

FLASHX_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FLASHX_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
FLASHX_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }
FLASHX_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FLASHX_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FLASHX_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

extern __shared__ __align__(128) unsigned char shared_memory[];
FLASHX_DEVICE uint32_t shared_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)); }

// ---- Barriers, shuffles, votes

// barrier.sync 0: all threads of the block; orders their accesses to memory.
FLASHX_DEVICE void bar_sync() { __syncthreads(); }
// barrier.sync id: `threads` of them, whole warps.
FLASHX_DEVICE void bar_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// barrier.red.or 0: bar_sync, and whether any thread said true.
FLASHX_DEVICE bool bar_red_or(bool value) { return __syncthreads_or(value); }
// bar.warp.sync: the warp's threads; orders their accesses to memory.
FLASHX_DEVICE void bar_warp_sync() { __syncwarp(); }
// shfl.sync.bfly: the value of lane ^ mask.
FLASHX_DEVICE float shfl_bfly(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// shfl.sync.idx: the value of lane `lane` % 32.
FLASHX_DEVICE uint32_t shfl_idx(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// vote.sync.ballot: bit i is lane i's value.
FLASHX_DEVICE uint32_t vote_ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
// redux.sync.min.s32, redux.sync.max.s32: of the warp's lanes.
FLASHX_DEVICE int redux_min(int value) { return __reduce_min_sync(0xffffffffu, value); }
FLASHX_DEVICE int redux_max(int value) { return __reduce_max_sync(0xffffffffu, value); }

// ---- Memory. T has 1, 2, 4, 8 or 16 bytes, and its address is a multiple of them.

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

// ld.global, st.global
template <typename T>
FLASHX_DEVICE T ld_global(const T* address) {
  return *address;
}
template <typename T>
FLASHX_DEVICE void st_global(T* address, T value) {
  *address = value;
}

// ld.shared, st.shared: 2 or 4 bytes.
template <typename T>
FLASHX_DEVICE T ld_shared(uint32_t address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
    return *reinterpret_cast<T*>(&bits);
  } else {
    uint32_t bits;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
    return *reinterpret_cast<T*>(&bits);
  }
}
template <typename T>
FLASHX_DEVICE void st_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(*reinterpret_cast<uint16_t*>(&value)) : "memory");
  } else {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(*reinterpret_cast<uint32_t*>(&value)) : "memory");
  }
}

// cp.async.cg.shared.global, 16 bytes: the first `bytes` of them from global memory, zeros for the rest. Both addresses
// are multiples of 16. Nothing is read for bytes = 0.
FLASHX_DEVICE void cp_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
               "r"(bytes)
               : "memory");
}
// cp.async.commit_group: this thread's copies since the last commit become a group.
FLASHX_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// cp.async.wait_group: until at most the N latest of this thread's groups are under way. Other threads see what arrived
// after a barrier.
template <int N>
FLASHX_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Matrices

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four 8 x 8 matrices of 16-bit elements. Lane i gives the address of row
// i % 8 of matrix i / 8 (16 bytes, aligned to them); d[m] is elements 2t and 2t + 1 of row g of matrix m.
FLASHX_DEVICE void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}
// ldmatrix.trans: d[m] is elements 2t and 2t + 1 of column g of matrix m.
FLASHX_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// mma.sync.aligned.row.col, d += a b with float32 sums d (16 x 8): d[0], d[1] are columns 2t, 2t + 1 of row g; d[2],
// d[3] of row g + 8.
template <typename E>
FLASHX_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// m16n8k16, 16-bit elements, two to a register, the lower column or row in the lower half. a (16 x 16): a[0] row g,
// columns 2t, 2t + 1; a[1] row g + 8; a[2], a[3] the same, 8 columns on. b (16 x 8): b[0] rows 2t, 2t + 1 of column g;
// b[1] 8 rows on.
template <>
FLASHX_DEVICE void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FLASHX_DEVICE void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// m16n8k8, tf32 elements (float32 bits whose low 13 are ignored). a (16 x 8): a[0] row g, column t; a[1] row g + 8;
// a[2], a[3] the same, 4 columns on. b (8 x 8): b[0] row t of column g; b[1] 4 rows on.
template <>
FLASHX_DEVICE void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Numbers

// ex2.approx.ftz.f32
FLASHX_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// cvt.rna.tf32.f32: rounded to tf32 (10 bits of mantissa), nearest, ties away from 0; as float32.
FLASHX_DEVICE float cvt_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}
// cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32: two numbers rounded to E, `low` in the lower half.
template <typename E>
FLASHX_DEVICE uint32_t cvt_x2(float low, float high);
template <>
FLASHX_DEVICE uint32_t cvt_x2<Half>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
FLASHX_DEVICE uint32_t cvt_x2<BFloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// cvt.f32.f16, cvt.f32.bf16 (a shift)
FLASHX_DEVICE float cvt_f32(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
FLASHX_DEVICE float cvt_f32(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FLASHX_DEVICE float cvt_f32(float x) { return x; }

// x, of which the compiler knows nothing: what depends on it stays where it is written.
FLASHX_DEVICE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// clz.b32: zeros above the highest bit that is set; 32 for 0.
FLASHX_DEVICE int clz(uint32_t x) { return __clz(static_cast<int>(x)); }

// mov.b32
FLASHX_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FLASHX_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }

}  // namespace flashx::ptx

#endif
