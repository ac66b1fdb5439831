// The one matrix product of the CPU kernels: C[m][n] (+)= sum_k A(m, k) * B[k][n].
// Rows of C are broadcast from A, columns are vector lanes of B. Every product of the forward and the
// backward is written so that its lanes already lie contiguous in memory (docs/kernels.md), so nothing is
// packed or gathered for it.
#pragma once

#include "cpu/simd.h"

namespace flashx::FLASHX_ISA {

// The register block, rows x vectors: accumulators, the vectors of B and one broadcast must fit the register
// file.
constexpr int kBlockRows = FLASHX_REGISTERS >= 32 ? 8 : 4;
constexpr int kBlockVectors = FLASHX_REGISTERS >= 32 || FLASHX_VECTOR_BYTES > 16 ? 3 : 2;

// How A(m, k) lies in memory: a[m * ld + k] or a[k * ld + m].
enum class Layout { RowMajor, ColumnMajor };

template <Layout layout, int vectors, typename T>
FLASHX_CORE void multiply_block(int depth, const T* a, int64_t a_ld, const T* b, int64_t b_ld, T* c, int64_t c_ld,
                                bool accumulate) {
  constexpr int n = kLanes<T>;
  Vec<T> acc[kBlockRows][vectors] = {};
  if (accumulate) {
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[m][v] = load(c + m * c_ld + v * n);
    }
  }
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
    for (int v = 0; v < vectors; ++v) store(c + m * c_ld + v * n, acc[m][v]);
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

// Which operand holds the attention weights, whose zeros mean "hidden".
enum class Weights { InA, InB };

// As multiply with accumulate, but a weight of 0 contributes nothing whatever it meets: 0 * NaN would be NaN.
// For the rare tile that is partly hidden and holds NaN or inf.
template <Layout layout, Weights weights, typename T>
void multiply_visible(int rows, int vectors, int depth, const T* a, int64_t a_ld, const T* b, int64_t b_ld, T* c,
                      int64_t c_ld) {
  for (int m = 0; m < rows; ++m) {
    for (int v = 0; v < vectors; ++v) {
      T* sum = c + m * c_ld + v * kLanes<T>;
      Vec<T> acc = load(sum);
      for (int k = 0; k < depth; ++k) {
        const T x = layout == Layout::RowMajor ? a[m * a_ld + k] : a[k * a_ld + m];
        const Vec<T> y = load(b + k * b_ld + v * kLanes<T>);
        if (weights == Weights::InA) {
          if (x != 0) acc += x * y;
        } else {
          acc = y == 0 ? acc : acc + x * y;
        }
      }
      store(sum, acc);
    }
  }
}

}  // namespace flashx::FLASHX_ISA
