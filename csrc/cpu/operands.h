// What products run in, and how operands are brought into that form. Three types meet in a kernel: E, stored; W, of a
// product's operands; T, of its sums and of everything between products. W is T unless the instruction set multiplies
// 16-bit floats itself: bfloat16 then stays bfloat16, and the softmax weights are rounded to it for the second product;
// and where it does so many times faster than in T, wider floats are sums of bfloat16 (planes.h).
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

// The same where there are rows and keys enough to fill the units that multiply planes.
template <typename E>
struct WideProductOf : ProductOf<E> {};
#if FLASHX_BF16 == 2
template <>
struct WideProductOf<float> {
  using Type = Planes<3>;
};
template <>
struct WideProductOf<Half> {
  using Type = Planes<2>;
};
#endif

// Products in T itself: every operand is used as it lies.
template <typename W>
struct Operands {
  using T = W;
  using Unit = struct {};  // what a thread must set up before it multiplies
  static constexpr bool kDirect = true;
  static constexpr bool kBeside = false;          // products are long, and leave the vector units free
  static constexpr int kForwardKeys = 128;        // of the forward's tiles, unless rows are a few
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
  // From a computed tile [key][lane]: B with the keys, or A(key, lane), to be summed over. infinite: elements may be.
  static const W* right_from_tile(const T* tile, int64_t /*ld*/, int /*keys*/, int /*vectors*/, W* /*to*/,
                                  bool /*infinite*/) {
    return tile;
  }
  static const W* left_from_tile(const T* tile, int64_t /*ld*/, int /*keys*/, int /*vectors*/, W* /*to*/,
                                 bool /*infinite*/) {
    return tile;
  }
  // Elements of memory that the three above need, for so many rows and columns.
  static constexpr int64_t room(int64_t /*rows*/, int64_t /*columns*/) { return 0; }

  // a_rows, b_columns: outliers (planes.h), if there are any. work: called now and then, if kBeside.
  template <Layout layout, typename Work = NoWork>
  static void multiply(int rows, int vectors, int depth, const W* a, int64_t a_ld, const W* b, int64_t b_ld, T* c,
                       int64_t c_ld, bool accumulate, const bool* /*a_rows*/ = nullptr,
                       const bool* /*b_columns*/ = nullptr, Work&& /*work*/ = Work()) {
    FLASHX_ISA::multiply<layout>(rows, vectors, depth, a, a_ld, b, b_ld, c, c_ld, accumulate);
  }
};

#if FLASHX_BF16

// Products of bfloat16 pairs: A row-major, B with pairs of consecutive k side by side (gemm.h), both in planes.
// Everything comes from two moves: pairing two rows, and transposing 32-bit words that are pairs.
template <typename W_>
struct PairOperands {
  using W = W_;
  using T = float;
  using Unit = PairUnit;
  static constexpr bool kDirect = false;
  static constexpr bool kBeside = FLASHX_BF16 == 2 && kPlanes<W> > 1;
  static constexpr int kForwardKeys = kBeside ? 128 : 64;  // K, V, scores and weights of 64 fit the L1 cache together
  static constexpr int kVectors = 2;
  static constexpr int kVectorStep = 2;
  static constexpr int kKeyStep = 32;
  static constexpr int kPad = 32;
  static constexpr Layout kTransposed = Layout::RowMajor;

  static constexpr int64_t right_ld(int64_t columns) { return 2 * columns; }
  static constexpr int depth(int /*count*/, int padded) { return padded; }

  static void right_from_columns(const W* rows, int64_t ld, int n, int k, W* to, int64_t lanes) {
    for (int r = 0; r < n; r += kWords) {
      for (int c = 0; c < k; c += kPlaneBlock) {
        for (int p = 0; p < kPlanes<W>; ++p) {
          transpose(words(rows + r * ld + c, p), ld * kPlanes<W> / 2, kWords, kWords, words(to + c * lanes + 2 * r, p),
                    lanes * kPlanes<W>);
        }
      }
    }
  }
  static const W* right_from_rows(const W* rows, int64_t ld, int k, int n, W* to) {
    for (int i = 0; i < k; i += 2) {
      for (int c = 0; c < n; c += kWords) {
        for (int p = 0; p < kPlanes<W>; ++p) {
          store(words(to + i * n + 2 * c, p),
                pair(half_block(rows + i * ld, c, p), half_block(rows + (i + 1) * ld, c, p)));
        }
      }
    }
    return to;
  }
  static const W* left_from_columns(const W* rows, int64_t ld, int k, int m, W* to, int64_t to_ld) {
    for (int first = 0; first < k; first += kPlaneBlock) {
      for (int c = 0; c < m; c += kWords) {
        for (int p = 0; p < kPlanes<W>; ++p) {
          Vec<T> v[kWords];
#pragma GCC unroll 16
          for (int i = 0; i < kWords; ++i) {
            const W* const even = rows + (first + 2 * i) * ld;
            v[i] = pair(half_block(even, c, p), half_block(even + ld, c, p));
          }
          transpose_registers<T>(v);
#pragma GCC unroll 16
          for (int i = 0; i < kWords; ++i) store(words(to + (c + i) * to_ld + first, p), v[i]);
        }
      }
    }
    return to;
  }
  static constexpr int64_t left_ld(int64_t /*ld*/, int64_t room) { return room; }
  static constexpr int64_t left_offset(int64_t k, int64_t /*ld*/) { return k; }

  static const W* right_from_tile(const T* tile, int64_t ld, int keys, int vectors, W* to, bool infinite) {
    const auto pairs = [&](auto guarded) {
      for (int j = 0; j < keys; j += 2) {
        for (int v = 0; v < vectors; ++v) {
          const T* at = tile + j * ld + v * kWords;
          store_pair<decltype(guarded)::value>(load(at), load(at + ld), ld, j, v, to);
        }
      }
    };
    infinite ? pairs(std::true_type{}) : pairs(std::false_type{});
    return to;
  }
  // Vector v of rows j and j + 1 of such a tile, as that operand; `guarded` if some may be infinite.
  template <bool guarded = false>
  static FLASHX_CORE void store_pair(Vec<T> even, Vec<T> odd, int64_t ld, int j, int v, W* to) {
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes<W>; ++p) {
      float* const at = words(to + j * ld + 2 * v * kWords, p);
      if (p + 1 == kPlanes<W>) {
        store(at, p == 2 ? cut_pair(even, odd) : round_pair(even, odd));  // a third one is exact
      } else {
        store(at, cut_pair(even, odd));
        even = rest<guarded>(even), odd = rest<guarded>(odd);
      }
    }
  }
  static const W* left_from_tile(const T* tile, int64_t ld, int keys, int vectors, W* to, bool infinite) {
    const auto rows = [&](auto guarded) {
      constexpr bool kGuarded = decltype(guarded)::value;
      for (int j = 0; j < keys; ++j) {
        for (int v = 0; v < vectors; v += 2) {
          Vec<T> low = load(tile + j * ld + v * kWords), high = load(tile + j * ld + (v + 1) * kWords);
#pragma GCC unroll 4
          for (int p = 0; p < kPlanes<W>; ++p) {
            uint16_t* const at = plane(to + j * ld + v * kWords, p);
            if (p + 1 == kPlanes<W> && p != 2) {
              _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
            } else {
              _mm512_storeu_si512(at, _mm512_permutexvar_epi16(apart(), (__m512i)cut_pair(low, high)));
              low = rest<kGuarded>(low), high = rest<kGuarded>(high);
            }
          }
        }
      }
    };
    infinite ? rows(std::true_type{}) : rows(std::false_type{});
    return to;
  }
  static constexpr int64_t room(int64_t rows, int64_t columns) { return rows * columns; }

  template <Layout layout, typename Work = NoWork>
  static void multiply(int rows, int vectors, int depth, const W* a, int64_t a_ld, const W* b, int64_t b_ld, T* c,
                       int64_t c_ld, bool accumulate, const bool* a_rows = nullptr, const bool* b_columns = nullptr,
                       Work&& work = Work()) {
    static_assert(layout == Layout::RowMajor);
    if constexpr (kPlanes<W> > 1) {
      if (a_rows || b_columns) {
        return multiply_outliers(rows, vectors, depth, a, a_ld, b, b_ld, c, c_ld, accumulate, a_rows, b_columns);
      }
    }
    multiply_pairs(rows, vectors, depth, a, a_ld, b, b_ld, c, c_ld, accumulate, work);
  }

 private:
  static constexpr int kWords = kLanes<T>;

  // Pairs as 32-bit words, moved around as floats: those of plane p, from an element that a block begins with.
  static float* words(W* p, int index) { return reinterpret_cast<float*>(plane(p, index)); }
  static const float* words(const W* p, int index) { return reinterpret_cast<const float*>(plane(p, index)); }

  // A plane's elements [c, c + kWords) of a row.
  static WordBits half_block(const W* row, int c, int p) {
    return widen(plane(row + c / kPlaneBlock * kPlaneBlock, p) + c % kPlaneBlock);
  }
  static Vec<T> pair(WordBits even, WordBits odd) { return bit_cast<Vec<T>>(even | (odd << 16)); }

  // What a plane that is cut off leaves; infinities leave nothing.
  template <bool guarded>
  static FLASHX_CORE Vec<T> rest(Vec<T> x) {
    const Vec<T> left = x - bit_cast<Vec<T>>(bit_cast<WordBits>(x) & 0xffff0000u);
    return guarded ? (left == left ? left : Vec<T>{}) : left;
  }
  // Two vectors' upper halves side by side: cut off, or rounded.
  static FLASHX_CORE Vec<T> cut_pair(Vec<T> even, Vec<T> odd) {
    return pair(bit_cast<WordBits>(even) >> 16, bit_cast<WordBits>(odd) >> 16);
  }
  static FLASHX_CORE Vec<T> round_pair(Vec<T> even, Vec<T> odd) {
    const __m512bh both =
        _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // even's 16 in the low half, odd's in the high
    return (Vec<T>)_mm512_permutexvar_epi16(side_by_side(), (__m512i)both);
  }
  static __m512i side_by_side() {
    return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                            19, 3, 18, 2, 17, 1, 16, 0);
  }
  static __m512i apart() {
    return _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22, 20, 18, 16,
                            14, 12, 10, 8, 6, 4, 2, 0);
  }
};

template <>
struct Operands<BFloat16> : PairOperands<BFloat16> {};
#if FLASHX_BF16 == 2
template <int n>
struct Operands<Planes<n>> : PairOperands<Planes<n>> {};
#endif

#endif  // FLASHX_BF16

}  // namespace flashx::FLASHX_ISA
