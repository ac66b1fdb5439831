// What products run in, and how operands are brought into that form. Three types meet in a kernel: E, stored; W, of a
// product's operands; T, of its sums and of everything between products. W is T unless the instruction set multiplies
// 16-bit floats itself: bfloat16 then stays bfloat16, and the softmax weights are rounded to it for the second product.
#pragma once

#include "cpu/gemm.h"

namespace flashx::FLASHX_ISA {

template <typename E>
struct ProductOf {
  using Type = ComputeOf<E>;
};
#if FLASHX_BF16
template <>
struct ProductOf<BFloat16> {
  using Type = BFloat16;
};
#endif

// Products in T itself: every operand is used as it lies.
template <typename W>
struct Operands {
  using T = W;
  using Unit = struct {};  // what a thread must set up before it multiplies
  static constexpr bool kDirect = true;
  static constexpr int kVectors = kBlockVectors;  // of a row block
  static constexpr int kVectorStep = 1;           // which a count of them is a multiple of
  static constexpr int kKeyStep = kBlockRows;     // keys computed are a multiple of this
  static constexpr int kPad = kLanes<T> > kBlockRows ? kLanes<T> : kBlockRows;  // padded dims are
  static constexpr Layout kTransposed = Layout::ColumnMajor;

  // Leading dimension of a right operand with `columns` columns.
  static constexpr int64_t right_ld(int64_t columns) { return columns; }
  // Summands to go through, of `count` that there are and `padded` that there is room for.
  static constexpr int depth(int count, int /*padded*/) { return count; }

  // B[k][n] from rows[n][k]; rows and columns are padded.
  static void right_from_columns(const W* rows, int64_t ld, int n, int k, W* to, int64_t lanes) {
    transpose(rows, ld, n, k, to, lanes);
  }
  // B[k][n] from rows[k][n]. The memory to write to, if any is needed, is in the last argument; so below.
  static const W* right_from_rows(const W* rows, int64_t /*ld*/, int /*k*/, int /*n*/, W* /*to*/) { return rows; }
  // A(m, k) from rows[k][m], in the layout kTransposed; its leading dimension is left_ld(ld, room for k).
  static const W* left_from_columns(const W* rows, int64_t /*ld*/, int /*k*/, int /*m*/, W* /*to*/, int64_t /*to_ld*/) {
    return rows;
  }
  static constexpr int64_t left_ld(int64_t ld, int64_t /*room*/) { return ld; }
  // Where in that operand summand k starts.
  static constexpr int64_t left_offset(int64_t k, int64_t ld) { return k * ld; }
  // From a computed tile [key][lane]: B with the keys, or A(key, lane), to be summed over.
  static const W* right_from_tile(const T* tile, int64_t /*ld*/, int /*keys*/, int /*vectors*/, W* /*to*/) {
    return tile;
  }
  static const W* left_from_tile(const T* tile, int64_t /*ld*/, int /*keys*/, int /*vectors*/, W* /*to*/) {
    return tile;
  }
  // Elements of memory that the three above need, for so many rows and columns.
  static constexpr int64_t room(int64_t /*rows*/, int64_t /*columns*/) { return 0; }
};

#if FLASHX_BF16

// Products of bfloat16 pairs: A row-major, B with pairs of consecutive k side by side (gemm.h). Everything comes from
// two moves: pairing two rows, and transposing 32-bit words that are pairs.
template <>
struct Operands<BFloat16> {
  using W = BFloat16;
  using T = float;
  using Unit = PairUnit;
  static constexpr bool kDirect = false;
  static constexpr int kVectors = 2;  // scores, weights, sums and values of a tile then fit the L1 cache together
  static constexpr int kVectorStep = 2;
  static constexpr int kKeyStep = 32;
  static constexpr int kPad = 32;
  static constexpr Layout kTransposed = Layout::RowMajor;

  static constexpr int64_t right_ld(int64_t columns) { return 2 * columns; }
  static constexpr int depth(int /*count*/, int padded) { return padded; }

  static void right_from_columns(const W* rows, int64_t ld, int n, int k, W* to, int64_t lanes) {
    transpose(words(rows), ld / 2, n, k / 2, words(to), lanes);
  }
  static const W* right_from_rows(const W* rows, int64_t ld, int k, int n, W* to) {
    pair_rows(rows, ld, k, n, to, right_ld(n));
    return to;
  }
  static const W* left_from_columns(const W* rows, int64_t ld, int k, int m, W* to, int64_t to_ld) {
    // Through pairs of rows: [k/2][m] words, transposed to [m][k/2] words. A block of rows at a time stays in L1.
    alignas(64) W pairs[2 * kLanes<T> * kMaxColumns];
    for (int first = 0; first < k; first += 2 * kLanes<T>) {
      pair_rows(rows + first * ld, ld, 2 * kLanes<T>, m, pairs, right_ld(m));
      transpose(words(pairs), m, kLanes<T>, m, words(to + first), to_ld / 2);
    }
    return to;
  }
  static constexpr int64_t left_ld(int64_t /*ld*/, int64_t room) { return room; }
  static constexpr int64_t left_offset(int64_t k, int64_t /*ld*/) { return k; }

  static const W* right_from_tile(const T* tile, int64_t ld, int keys, int vectors, W* to) {
    for (int j = 0; j < keys; j += 2) {
      for (int v = 0; v < vectors; ++v) {
        const T* at = tile + j * ld + v * kLanes<T>;
        store_pair(load(at), load(at + ld), ld, j, v, to);
      }
    }
    return to;
  }
  // Vector v of rows j and j + 1 of such a tile.
  static FLASHX_CORE void store_pair(Vec<T> even, Vec<T> odd, int64_t ld, int j, int v, W* to) {
    store(words(to) + (j / 2) * ld + v * kLanes<T>, round_pair(even, odd));
  }
  static const W* left_from_tile(const T* tile, int64_t ld, int keys, int vectors, W* to) {
    for (int j = 0; j < keys; ++j) {
      for (int v = 0; v < vectors; ++v) {
        store_as(to + j * ld + v * kLanes<T>, load(tile + j * ld + v * kLanes<T>));
      }
    }
    return to;
  }
  static constexpr int64_t room(int64_t rows, int64_t columns) { return rows * columns; }

 private:
  static constexpr int kMaxColumns = 256;

  // Pairs as 32-bit words, moved around as floats.
  static float* words(W* p) { return reinterpret_cast<float*>(p); }
  static const float* words(const W* p) { return reinterpret_cast<const float*>(p); }

  static void pair_rows(const W* rows, int64_t ld, int k, int n, W* to, int64_t to_ld) {
    for (int i = 0; i < k; i += 2) {
      for (int c = 0; c < n; c += kLanes<T>) {
        const WordBits even = widen(&rows[i * ld + c].bits), odd = widen(&rows[(i + 1) * ld + c].bits);
        store(reinterpret_cast<uint32_t*>(to + i / 2 * to_ld + 2 * c), even | (odd << 16));
      }
    }
  }

  static Vec<float> round_pair(Vec<float> even, Vec<float> odd) {
    const __m512bh both =
        _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // even's 16 in the low half, odd's in the high
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                  22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return bit_cast<Vec<float>>(_mm512_permutexvar_epi16(side_by_side, (__m512i)both));
  }
};

#endif  // FLASHX_BF16

}  // namespace flashx::FLASHX_ISA
