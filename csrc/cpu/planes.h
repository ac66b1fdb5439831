// Floats as sums of bfloat16: a float is the sum of 3 of them, a half that of 2, exactly. A product of two such sums is
// 6 products of bfloat16, those of planes whose indices add up to less than 3, or for halves all 4; what is left out is
// below the last bit. The machine's tiles do them all in half the time of the multiply-adds that they replace.
//
// In memory, an array's elements come in blocks of kPlaneBlock, and a block holds its planes one after the other: a row
// of whole blocks is as long as its elements are wide, so that pointers to blocks are plain pointers to elements.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace flashx::FLASHX_ISA {

constexpr int kPlaneBlock = 32;

// An element's share of a block. Only whole blocks mean anything.
template <int n>
struct Planes {
  uint16_t bits[n];
};

template <typename W>
constexpr int kPlanes = 1;
template <int n>
constexpr int kPlanes<Planes<n>> = n;

// Plane p of the block that begins at an element.
template <typename W>
uint16_t* plane(W* block, int p) {
  return reinterpret_cast<uint16_t*>(block) + p * kPlaneBlock;
}
template <typename W>
const uint16_t* plane(const W* block, int p) {
  return reinterpret_cast<const uint16_t*>(block) + p * kPlaneBlock;
}

// Magnitudes from which on a multiplication might lose planes: an infinity times a plane of 0 would be NaN, and the
// tiles take denormals for 0. What products of smaller ones become, gradients of logits too, is finite. Upper 16 bits.
constexpr uint16_t kLargestPlain = (59 + 127) << 7, kSmallestPlain = (127 - 90) << 7;

constexpr float kSmallestOfPlanes = 0x1p-90f;

// Of an operand's rows or columns, those with elements that planes might lose.
struct Outliers {
  static constexpr int kMost = 256;
  bool any = false;
  bool at[kMost];

  void clear(bool all = false) {
    any = all;
    if (all) std::fill_n(at, kMost, true);
  }
  // From an index on; null if there are none.
  const bool* from(int index) const { return any ? at + index : nullptr; }
};

#if FLASHX_BF16 == 2

// A block of floats as planes. Each rounds what the ones before leave, so that the largest product that is left out is
// as likely too large as too small.
template <int n>
FLASHX_CORE void split(Vec<float> low, Vec<float> high, uint16_t* to) {
#pragma GCC unroll 4
  for (int p = 0; p < n; ++p) {
    uint16_t* const at = to + p * kPlaneBlock;
    _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    if (p + 1 == n) break;
    low -= bit_cast<Vec<float>>(widen(at) << 16);
    high -= bit_cast<Vec<float>>(widen(at + kPlaneBlock / 2) << 16);
  }
}

// The same planes one by one, and an exact sum for all floats: infinities, NaN, denormals, what would round to
// infinity.
template <int n>
void split_exactly(const float* from, uint16_t* to) {
  for (int i = 0; i < kPlaneBlock; ++i) {
    float x = from[i];
    for (int p = 0; p < n; ++p) {
      const uint32_t bits = bit_cast<uint32_t>(x);
      uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
      if ((rounded & 0x7f800000u) == 0x7f800000u) rounded = (bits & 0xffff0000u) | (x != x ? 0x400000u : 0u);
      to[p * kPlaneBlock + i] = static_cast<uint16_t>(rounded >> 16);
      x = x - x == 0 ? x - bit_cast<float>(rounded) : 0;
    }
  }
}

// The floats of one plane's words, even elements of pairs or odd ones.
FLASHX_CORE Vec<float> half_of_words(const uint16_t* words, bool odd) {
  const WordBits bits = load(reinterpret_cast<const uint32_t*>(words));
  return bit_cast<Vec<float>>(odd ? bits & 0xffff0000u : bits << 16);
}

// Elements one by one, by their index from a block's beginning: for what is rare.
template <int n>
float get(const Planes<n>* from, int64_t i) {
  float sum = 0;
  for (int p = n; p-- > 0;) {
    const uint32_t bits = static_cast<uint32_t>(plane(from + i / kPlaneBlock * kPlaneBlock, p)[i % kPlaneBlock]) << 16;
    sum += bit_cast<float>(bits);
  }
  return sum;
}
template <int n>
void set_zero(Planes<n>* to, int64_t i) {
  for (int p = 0; p < n; ++p) plane(to + i / kPlaneBlock * kPlaneBlock, p)[i % kPlaneBlock] = 0;
}

template <int n>
void negate(Planes<n>* p, int64_t count) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(p);
  for (int64_t i = 0; i < count * n / 2; i += kLanes<uint32_t>) store(words + i, load(words + i) ^ 0x80008000u);
}

// The largest magnitude's upper 16 bits, of whole blocks.
template <int n>
uint16_t largest_bits(const Planes<n>* from, int64_t count) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kPlaneBlock) {
    const __m512i bits = _mm512_loadu_si512(plane(from + i, 0));
    top = _mm512_max_epu16(top, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
  }
  uint16_t lanes[kPlaneBlock], largest = 0;
  _mm512_storeu_si512(lanes, top);
  for (const uint16_t bits : lanes) largest = larger(largest, bits);
  return largest;
}

template <int n>
bool has_nonfinite(const Planes<n>* from, int64_t count) {
  return largest_bits(from, count) >= 0x7f80;
}
// True if some elements' planes might be lost, of elements that are finite.
template <int n>
bool has_outliers(const Planes<n>* from, int64_t count) {
  const uint16_t largest = largest_bits(from, count);
  return largest != 0 && (largest < kSmallestPlain || largest >= kLargestPlain);
}

// Fills `rows` rows of ld elements by fill(exactly), and finds those that have outliers. Whether a row is one is its
// own affair, but for small ones beside larger ones, whose products nobody misses.
template <int n, typename F>
void fill_planes(const Planes<n>* to, int rows, int64_t ld, Outliers& outliers, F fill) {
  fill(false);
  outliers.clear();
  uint16_t largest = largest_bits(to, rows * ld);
  if (largest >= kSmallestPlain && largest < kLargestPlain) return;
  fill(true);
  largest = largest_bits(to, rows * ld);
  std::fill_n(outliers.at, Outliers::kMost, false);
  for (int r = 0; r < rows; ++r) {
    const uint16_t its = largest_bits(to + r * ld, ld);
    outliers.at[r] = its >= kLargestPlain || (its != 0 && largest < kSmallestPlain);
    outliers.any |= outliers.at[r];
  }
}

#endif  // FLASHX_BF16 == 2

}  // namespace flashx::FLASHX_ISA
