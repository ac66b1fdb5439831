// A few rows against many keys (decoding). Memory is the limit then: keys and values are read once, in order, where
// they lie, and dims are the vector lanes, so that no lane is wasted on rows that do not exist. Sums are in T whatever
// the tensors' dtype.
#pragma once

#include "cpu/simd.h"

namespace flashx::FLASHX_ISA {

// As many rows as are faster this way round than as lanes.
constexpr int kFewRows = 8;

// Rows that share the loads of a key: with an accumulator for every row and key they fit the registers.
template <typename T>
constexpr int kRowGroup = kLanes<T> / 2;

// Lane i becomes the sum of v[i]'s lanes.
template <typename T, int d = 1>
FLASHX_CORE Vec<T> sum_registers(Vec<T> (&v)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  if constexpr (d < n) {
    const Mask<T> first = exchange_lanes<T, d, false>(std::make_index_sequence<n>{});
    const Mask<T> second = exchange_lanes<T, d, true>(std::make_index_sequence<n>{});
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2 * d)
      v[i] = __builtin_shuffle(v[i], v[i + d], first) + __builtin_shuffle(v[i], v[i + d], second);
    return sum_registers<T, 2 * d>(v);
  } else {
    return v[0];
  }
}

template <typename T>
FLASHX_CORE T sum(Vec<T> v) {
  T total = v[0];
  for (int i = 1; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <typename T>
FLASHX_CORE T largest(Vec<T> v) {
  T top = v[0];
  for (int i = 1; i < kLanes<T>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// scores[r * ld + k] = query row r . keys[k], for kRows rows. dim is a multiple of a vector; keys up to the next
// multiple of a vector can be read, and their scores be written. This form sums over the dims in their order, as gemm.h
// does: the backward, whose weights are exp(score - lse), recomputes the very same scores.
template <int kRows, typename T>
FLASHX_CORE void dot_keys(const T* query, int dim, const T* const* keys, int count, T* scores, int64_t ld) {
  constexpr int n = kLanes<T>;
  for (int k = 0; k < count; k += n) {
    Vec<T> acc[kRows] = {};
    for (int d = 0; d < dim; d += n) {
      Vec<T> x[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) x[i] = load(keys[k + i] + d);
      transpose_registers<T>(x);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r] += broadcast(query[r * dim + d + i]) * x[i];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(scores + r * ld + k, acc[r]);
  }
}

// The same for 16-bit keys, whose own roundings hide in which order sums are made: dims are lanes to the end.
template <int kRows, typename E, typename T>
FLASHX_CORE void dot_keys(const T* query, int dim, const E* const* keys, int count, T* scores, int64_t ld) {
  constexpr int n = kLanes<T>, kKeys = n / kRows;
  for (int k = 0; k < count; k += kKeys) {
    Vec<T> acc[n] = {};
    for (int d = 0; d < dim; d += n) {
      Vec<T> q[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) q[r] = load(query + r * dim + d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec<T> x = load_as(keys[k + i] + d, T{});
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] += q[r] * x;
      }
    }
    T sums[n];
    store(sums, sum_registers<T>(acc));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * ld + k, sums + r * kKeys, kKeys * sizeof(T));
  }
}

// sums[r][d] += sum over k of weights[r * ld + k] * values[k][d], for kRows rows and kVectors vectors of dims.
template <int kRows, int kVectors, typename E, typename T>
FLASHX_CORE void add_values(const T* weights, int64_t ld, const E* const* values, int offset, int count, T* sums,
                            int64_t sums_ld) {
  constexpr int n = kLanes<T>;
  Vec<T> acc[kRows][kVectors] = {};
  for (int k = 0; k < count; ++k) {
    Vec<T> x[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) x[v] = load_as(values[k] + offset + v * n, T{});
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> weight = broadcast(weights[r * ld + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] += weight * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      // Added last, as in gemm.h.
      T* at = sums + r * sums_ld + v * n;
      store(at, load(at) + acc[r][v]);
    }
  }
}

// f(first row, std::integral_constant of a number of rows) until `rows` are done; that may be a few rows too many.
template <typename T, typename F>
FLASHX_CORE void for_row_groups(int rows, F f) {
  constexpr int kMost = kRowGroup<T>;
  for (int r = 0; r < rows;) {
    const int left = rows - r;
    if (kMost >= 8 && left > 4) {
      f(r, std::integral_constant < int, kMost<8 ? kMost : 8>{}), r += 8;
    } else if (kMost >= 4 && left > 2) {
      f(r, std::integral_constant < int, kMost<4 ? kMost : 4>{}), r += 4;
    } else if (kMost >= 2 && left > 1) {
      f(r, std::integral_constant < int, kMost<2 ? kMost : 2>{}), r += 2;
    } else {
      f(r, std::integral_constant<int, 1>{}), r += 1;
    }
  }
}

// Asks for the rows [from, from + count) of `dim` elements that come next: the hardware's own prefetch ends with a
// page.
template <typename E>
FLASHX_CORE void prefetch(const E* const* rows, int from, int count, int dim) {
  for (int i = from; i < from + count; ++i) {
    for (int d = 0; d < dim; d += 64 / static_cast<int>(sizeof(E))) __builtin_prefetch(rows[i] + d);
  }
}

// All rows' scores; query and scores have room for kFewRows rows, ld and count as in dot_keys.
template <typename E, typename T>
void few_scores(int rows, const T* query, int dim, const E* const* keys, int count, T* scores, int64_t ld) {
  constexpr int n = kLanes<T>;
  for (int k = 0; k < count; k += n) {
    if (k + 2 * n <= count) prefetch(keys, k + n, n, dim);
    for_row_groups<T>(rows, [&](int r, auto group) {
      dot_keys<decltype(group)::value>(query + r * dim, dim, keys + k, n, scores + r * ld + k, ld);
    });
  }
}

// All rows' sums += weights * values; rows past the last are added to as well.
template <typename E, typename T>
void few_values(int rows, const T* weights, int64_t ld, const E* const* values, int count, T* sums, int dim) {
  constexpr int n = kLanes<T>, kKeys = 16;
  for (int k = 0; k < count; k += kKeys) {  // a block of keys stays in L1 while groups of rows go over it
    const int keys = count - k < kKeys ? count - k : kKeys;
    if (k + 2 * kKeys <= count) prefetch(values, k + kKeys, kKeys, dim);
    for_row_groups<T>(rows, [&](int r, auto group) {
      constexpr int kRows = decltype(group)::value, kMost = FLASHX_REGISTERS / 2 / kRows,
                    kVectors = kMost < 8 ? kMost : 8;
      int d = 0;
      for (; d + kVectors * n <= dim; d += kVectors * n) {
        add_values<kRows, kVectors>(weights + r * ld + k, ld, values + k, d, keys, sums + r * dim + d, dim);
      }
      for (; d < dim; d += n)
        add_values<kRows, 1>(weights + r * ld + k, ld, values + k, d, keys, sums + r * dim + d, dim);
    });
  }
}

}  // namespace flashx::FLASHX_ISA
