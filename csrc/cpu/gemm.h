// The one matrix product of the CPU kernels: C[m][n] (+)= sum_k A(m, k) * B[k][n].
// Rows of C are broadcast from A, columns are vector lanes of B. Every product of the forward and the backward is
// written so that its lanes already lie contiguous in memory (docs/kernels.md). Where the machine multiplies bfloat16
// itself, the same product exists for operands of pairs, in planes (planes.h): A(m, k) at a[m * ld + k], B[k][n] at
// b[k / 2 * ld + 2 * n + k % 2].
#pragma once

#include <vector>

#include "cpu/planes.h"
#include "cpu/simd.h"

namespace flashx::FLASHX_ISA {

// The register block, rows x vectors: accumulators, the vectors of B and one broadcast must fit the register
// file.
constexpr int kBlockRows = FLASHX_REGISTERS >= 32 ? 8 : 4;
constexpr int kBlockVectors = FLASHX_REGISTERS >= 32 || FLASHX_VECTOR_BYTES > 16 ? 3 : 2;

// What a product does meanwhile, in pieces: nothing.
struct NoWork {
  void operator()() const {}
};

// Pieces of work that a product of so many rows, 32 columns and such a depth has time for.
template <typename W>
constexpr int pieces_of_work(int rows, int depth) {
  constexpr int kProducts = kPlanes<W> == 1 ? 1 : kPlanes<W> == 2 ? 4 : 6;
  return rows / 32 * (depth / 32) * kProducts;
}

// How A(m, k) lies in memory: a[m * ld + k] or a[k * ld + m].
enum class Layout { RowMajor, ColumnMajor };

template <Layout layout, int vectors, typename T>
FLASHX_CORE void multiply_block(int depth, const T* a, int64_t a_ld, const T* b, int64_t b_ld, T* c, int64_t c_ld,
                                bool accumulate) {
  constexpr int n = kLanes<T>;
  Vec<T> acc[kBlockRows][vectors] = {};
  for (int k = 0; k < depth; ++k) {
    Vec<T> row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[v] = load(b + k * b_ld + v * n);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) {
      const Vec<T> x = broadcast(layout == Layout::RowMajor ? a[m * a_ld + k] : a[k * a_ld + m]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* at = c + m * c_ld + v * n;
      // Added last: long sums are then sums of tiles' sums, which round less than one running sum.
      store(at, accumulate ? load(at) + acc[m][v] : acc[m][v]);
    }
  }
}

// `rows` of C, a multiple of kBlockRows; `vectors` lanes of B and C; `depth` summands.
template <Layout layout, typename T>
void multiply(int rows, int vectors, int depth, const T* a, int64_t a_ld, const T* b, int64_t b_ld, T* c, int64_t c_ld,
              bool accumulate) {
  const int blocks = (vectors + kBlockVectors - 1) / kBlockVectors;
  for (int i = 0, v = 0; i < blocks; ++i) {
    // Even shares: four vectors go as 2 + 2, not 3 + 1.
    const int width = (vectors - v + blocks - i - 1) / (blocks - i);
    for (int m = 0; m < rows; m += kBlockRows) {
      const T* a_block = a + (layout == Layout::RowMajor ? m * a_ld : m);
      const T* b_block = b + v * kLanes<T>;
      T* c_block = c + m * c_ld + v * kLanes<T>;
      if (width == 1) multiply_block<layout, 1>(depth, a_block, a_ld, b_block, b_ld, c_block, c_ld, accumulate);
      if (width == 2) multiply_block<layout, 2>(depth, a_block, a_ld, b_block, b_ld, c_block, c_ld, accumulate);
      if constexpr (kBlockVectors >= 3) {
        if (width == 3) multiply_block<layout, 3>(depth, a_block, a_ld, b_block, b_ld, c_block, c_ld, accumulate);
      }
    }
    v += width;
  }
}

#if FLASHX_BF16 == 1

struct PairUnit {};

template <int vectors>
FLASHX_CORE void multiply_pairs_block(int depth, const BFloat16* a, int64_t a_ld, const BFloat16* b, int64_t b_ld,
                                      float* c, int64_t c_ld, bool accumulate) {
  constexpr int n = kLanes<float>;
  __m512 acc[kBlockRows][vectors];
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      acc[m][v] = accumulate ? _mm512_loadu_ps(c + m * c_ld + v * n) : _mm512_setzero_ps();
    }
  }
  for (int k = 0; k < depth; k += 2) {
    __m512bh pairs[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) pairs[v] = (__m512bh)_mm512_loadu_si512(b + k / 2 * b_ld + 2 * v * n);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + m * a_ld + k, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], x, pairs[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(c + m * c_ld + v * n, acc[m][v]);
  }
}

// rows is a multiple of kBlockRows, depth and vectors of 2.
inline void multiply_pairs(int rows, int vectors, int depth, const BFloat16* a, int64_t a_ld, const BFloat16* b,
                           int64_t b_ld, float* c, int64_t c_ld, bool accumulate, const NoWork&) {
  for (int v = 0; v < vectors; v += 2) {
    for (int m = 0; m < rows; m += kBlockRows) {
      multiply_pairs_block<2>(depth, a + m * a_ld, a_ld, b + 2 * v * kLanes<float>, b_ld,
                              c + m * c_ld + v * kLanes<float>, c_ld, accumulate);
    }
  }
}

#elif FLASHX_BF16 == 2

// AMX: a tile is 16 rows of 64 bytes; registers 0-3 hold a 32 x 32 block of C, 4-5 of A, 6-7 of B.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct PairUnit {
  PairUnit() {
    // Static, since the compiler takes the instruction to read no more than its first bytes.
    alignas(64) static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~PairUnit() { _tile_release(); }
  PairUnit(const PairUnit&) = delete;
  PairUnit& operator=(const PairUnit&) = delete;
};

// c[0..3] += a's planes * b's planes, but for the first ones', which are in their own place if there are three: what is
// small is summed up before what is large, and rounds less. Of neighbouring products one operand stays loaded.
template <int n, typename Work>
FLASHX_CORE void multiply_planes(const uint16_t* left, int64_t left_next, int64_t a_bytes, const uint16_t* right,
                                 int64_t b_bytes, int of, Work& work) {
  const auto load_left = [&](int p) {
    _tile_loadd(4, left + p * kPlaneBlock, a_bytes);
    _tile_loadd(5, left + left_next + p * kPlaneBlock, a_bytes);
  };
  const auto load_right = [&](int p) {
    _tile_loadd(6, right + p * kPlaneBlock, b_bytes);
    _tile_loadd(7, right + (of + p) * kPlaneBlock, b_bytes);
  };
  const auto multiply = [&] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    work();
  };
  if constexpr (n == 1) {
    _tile_loadd(6, right, b_bytes);
    _tile_loadd(4, left, a_bytes);
    _tile_loadd(7, right + of * kPlaneBlock, b_bytes);
    _tile_loadd(5, left + left_next, a_bytes);
    multiply();
  } else if constexpr (n == 2) {
    load_left(0), load_right(1), multiply();
    load_left(1), multiply();
    load_right(0), multiply();
    load_left(0), multiply();
  } else {
    static_assert(n == 3);
    load_left(0), load_right(2), multiply();
    load_right(1), multiply();
    load_left(1), multiply();
    load_right(0), multiply();
    load_left(2), multiply();
  }
}

// rows and depth are multiples of 32, vectors of 2. The tile unit takes its time for each product, in which the vector
// units can do some of `work`.
template <typename W, typename Work>
void multiply_pairs(int rows, int vectors, int depth, const W* a, int64_t a_ld, const W* b, int64_t b_ld, float* c,
                    int64_t c_ld, bool accumulate, Work& work) {
  constexpr int n = 16;
  constexpr int64_t kBytes = sizeof(W);
  constexpr bool kAddedLast = kPlanes<W> == 3;  // a long sum of tiles' sums rounds less than a running one
  const int64_t c_bytes = c_ld * 4;
  for (int v = 0; v < vectors; v += 2) {
    for (int m = 0; m < rows; m += 2 * n) {
      float* top = c + m * c_ld + v * n;
      float* bottom = top + n * c_ld;
      if (accumulate && !kAddedLast) {
        _tile_loadd(0, top, c_bytes);
        _tile_loadd(1, top + n, c_bytes);
        _tile_loadd(2, bottom, c_bytes);
        _tile_loadd(3, bottom + n, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const auto steps = [&](auto planes) {
        constexpr int kOf = kPlanes<W>;
        for (int k = 0; k < depth; k += 2 * n) {
          multiply_planes<decltype(planes)::value>(plane(a + m * a_ld + k, 0), n * a_ld * kOf, a_ld * kBytes,
                                                   plane(b + k / 2 * b_ld + 2 * v * n, 0), b_ld * kBytes, kOf, work);
        }
      };
      steps(std::integral_constant<int, kPlanes<W>>{});
      if constexpr (kPlanes<W> == 3) steps(std::integral_constant<int, 1>{});
      if (accumulate && kAddedLast) {
        alignas(64) float sums[4 * n * n];
        _tile_stored(0, sums, 8 * n);
        _tile_stored(1, sums + n, 8 * n);
        _tile_stored(2, sums + 2 * n * n, 8 * n);
        _tile_stored(3, sums + 2 * n * n + n, 8 * n);
        for (int r = 0; r < 2 * n; ++r) {
          for (int h = 0; h < 2 * n; h += n) {
            float* const at = top + r * c_ld + h;
            store(at, load(at) + load(sums + r * 2 * n + h));
          }
        }
        continue;
      }
      _tile_stored(0, top, c_bytes);
      _tile_stored(1, top + n, c_bytes);
      _tile_stored(2, bottom, c_bytes);
      _tile_stored(3, bottom + n, c_bytes);
    }
  }
}

// The same, and again with the floats that the planes add up to, for the outliers among a's rows and b's columns.
template <int planes>
void multiply_outliers(int rows, int vectors, int depth, const Planes<planes>* a, int64_t a_ld, const Planes<planes>* b,
                       int64_t b_ld, float* c, int64_t c_ld, bool accumulate, const bool* a_rows,
                       const bool* b_columns) {
  constexpr int n = kLanes<float>;
  std::vector<float> before;
  for (int m = 0; accumulate && m < rows; ++m) before.insert(before.end(), c + m * c_ld, c + m * c_ld + vectors * n);
  const NoWork none;
  multiply_pairs(rows, vectors, depth, a, a_ld, b, b_ld, c, c_ld, accumulate, none);
  for (int m = 0; m < rows; ++m) {
    for (int v = 0; v < vectors; ++v) {
      Mask<float> wanted;
      for (int i = 0; i < n; ++i) wanted[i] = (a_rows && a_rows[m]) || (b_columns && b_columns[v * n + i]) ? -1 : 0;
      if (!any(wanted)) continue;
      Vec<float> sum = {};
      for (int k = 0; k < depth; ++k) {
        Vec<float> y = {};
        for (int p = planes; p-- > 0;) y += half_of_words(plane(b + k / 2 * b_ld + 2 * v * n, p), k % 2 == 1);
        sum += get(a + m * a_ld, k) * y;
      }
      float* const at = c + m * c_ld + v * n;
      if (accumulate) sum += load(before.data() + (m * vectors + v) * n);
      store(at, wanted ? sum : load(at));
    }
  }
}

#endif

}  // namespace flashx::FLASHX_ISA
