// Tiles: matrices in shared memory, fragments in registers, and the two products that attention is made of.
//
// A product has an owner, whose 16 rows a fragment stay with a warp, and a stream, whose rows pass by:
//   multiply_rows:    s[own][stream] = own . stream, summed over the head dim       (S = Q K^T, dP = dO V^T)
//   multiply_columns: sums[own][dim] += weights[own][stream] . stream               (O += P V, dQ += dS K)
// The weights go from the first product's sums to the second's operand without leaving their registers.
#pragma once

#include <limits>

#include "core/problem.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace flashx::FLASHX_MACHINE {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Matrix multiply step: the depth of one mma is 32 bytes of a row, whatever the element.
template <typename E>
constexpr int kDepth = 32 / static_cast<int>(sizeof(E));

// [rows][dim] in shared memory, row-major in chunks of 16 bytes. The chunks of a row are permuted so that the eight
// rows of an ldmatrix phase lie in different banks.
template <typename E, int kRows_, int kDim_>
struct SharedTile {
  using Element = E;
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kChunks = kDim * static_cast<int>(sizeof(E)) / 16;
  static constexpr int kBytes = kRows * kChunks * 16;
  static_assert(kChunks % 4 == 0);

  static FLASHX_DEVICE uint32_t offset(int row, int chunk) {
    const int swizzle = kChunks % 8 == 0 ? row & 7 : (row >> 1) & 3;
    return static_cast<uint32_t>((row * kChunks + (chunk ^ swizzle)) * 16);
  }

  // The address `chunks` (even) further in its row, and `rows` (a multiple of 8) further down, from one of the first
  // two chunks of a row, in a tile at a multiple of 128: an addition and an exclusive or of constants.
  static FLASHX_DEVICE uint32_t advance(uint32_t address, int rows, int chunks) {
    constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;
    const int whole = rows * kChunks + chunks / kGroup * kGroup;
    return (address ^ static_cast<uint32_t>(chunks % kGroup * 16)) + static_cast<uint32_t>(whole * 16);
  }
};

// ---- Global memory

template <typename E>
FLASHX_DEVICE E to_element(float x) {
  if constexpr (sizeof(E) == 4) {
    return x;
  } else {
    return E{static_cast<uint16_t>(ptx::cvt_x2<E>(x, 0.0f))};
  }
}

template <typename E>
FLASHX_DEVICE void add_to(E* address, float x) {
  ptx::st_global(address, to_element<E>(ptx::cvt_f32(ptx::ld_global(address)) + x));
}

// Rows of a (batch, head, length, dim) tensor. With pack > 1, row r is query r / pack of head r % pack: the heads of a
// group (GQA) share the keys they read, and rows keep the order of their positions, which is what schedules need.
template <typename E>
struct Rows {
  using Element = E;
  E* base;
  int64_t row, head;
  uint32_t pack;
  uint32_t count;
  int dim;
  bool aligned;  // every row starts at a multiple of 16 bytes

  // See KeyRows: these are kept.
  FLASHX_DEVICE const Rows& now() const { return *this; }
  FLASHX_DEVICE E* at(uint32_t r) const {
    if (pack == 1) return base + r * row;
    return base + r / pack * row + r % pack * head;
  }
};

// Starts copying rows [first, first + kRows) into a tile; zeros past the last row and past dim. `from` is a Rows, or
// one of place.cuh's.
template <typename Tile, int kThreads, typename From>
FLASHX_DEVICE void load_tile(uint32_t tile, const From& from, uint32_t first) {
  using Element = typename Tile::Element;
  constexpr int kBytes = static_cast<int>(sizeof(Element));
  // Neighbouring threads copy neighbouring chunks of a row; a thread's rows are a multiple of 8 apart, so that they are
  // permuted alike.
  constexpr int kAcross = Tile::kChunks % 8 == 0 ? 8 : 4, kStep = kThreads / kAcross;
  static_assert(kThreads % kAcross == 0 && kStep % 8 == 0);
  const int chunk = ptx::thread() % kAcross;
  uint32_t row = ptx::thread() / kAcross;
  const int bytes = from.dim * kBytes - chunk * 16;
  if (from.aligned) {
    uint32_t to = tile + Tile::offset(row, chunk);
    // Rolled: the addresses of many rows at once would not fit the registers that the sums leave.
    FLASHX_UNROLL_BY(1)
    for (; row < Tile::kRows; row += kStep, to += kStep * Tile::kChunks * 16) {
      const bool real = first + row < from.count;
      const Element* address = from.at(real ? first + row : 0) + chunk * (16 / kBytes);
      FLASHX_UNROLL
      for (int c = 0; c < Tile::kChunks / kAcross; ++c) {
        const int rest = real ? clamp(bytes - c * kAcross * 16, 0, 16) : 0;
        ptx::cp_async_16(to + c * kAcross * 16, rest > 0 ? address + c * (kAcross * 16 / kBytes) : from.base, rest);
      }
    }
    return;
  }
  for (; row < Tile::kRows; row += kStep) {
    const bool real = first + row < from.count;
    const Element* address = from.at(real ? first + row : 0);
    for (int d = chunk * (16 / kBytes); d < Tile::kDim; d += kAcross * (16 / kBytes)) {
      const uint32_t to = tile + Tile::offset(row, d * kBytes / 16);
      for (int e = 0; e < 16 / kBytes; ++e) {
        const Element x = real && d + e < from.dim ? ptx::ld_global(address + d + e) : Element{};
        ptx::st_shared(to + e * kBytes, x);
      }
    }
  }
}

// ---- Fragments

// Operands of an mma: a[4] of the owner, b[4] of two times eight columns. float32 is split into two tf32 numbers, whose
// sum has 22 bits.
template <typename E>
struct Fragment {
  uint32_t hi[4];

  FLASHX_DEVICE void split() {}
};
template <>
struct Fragment<float> {
  uint32_t hi[4], lo[4];

  FLASHX_DEVICE void split() {
    FLASHX_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float x = ptx::float_of(hi[i]), high = ptx::cvt_tf32(x);
      hi[i] = ptx::bits_of(high);
      lo[i] = ptx::bits_of(x == high ? 0.0f : ptx::cvt_tf32(x - high));  // not inf - inf
    }
  }
};

// Where this lane's part of a tile begins, for the three ways to load fragments. Opaque, or the compiler computes the
// address of every fragment once and keeps it in a register.
template <typename Tile>
struct Own {  // 16 rows a fragment, from `row` on
  uint32_t at;

  FLASHX_DEVICE Own(uint32_t tile, int row)
      : at(ptx::opaque(tile + Tile::offset(row + ptx::lane() % 16, ptx::lane() / 16))) {}

  // Rows [row, row + 16), the step-th 32 bytes of each.
  FLASHX_DEVICE void load(Fragment<typename Tile::Element>& a, int row, int step) const {
    ptx::ldmatrix_x4(a.hi, Tile::advance(at, row, 2 * step));
    a.split();
  }
};

template <typename Tile>
struct Stream {  // its rows as columns
  uint32_t at;

  FLASHX_DEVICE explicit Stream(uint32_t tile)
      : at(ptx::opaque(tile + Tile::offset(ptx::lane() / 16 * 8 + ptx::lane() % 8, ptx::lane() / 8 % 2))) {}

  // Rows [row, row + 16), the step-th 32 bytes of each: two operands b[2] side by side.
  FLASHX_DEVICE void load(Fragment<typename Tile::Element>& b, int row, int step) const {
    ptx::ldmatrix_x4(b.hi, Tile::advance(at, row, 2 * step));
    b.split();
  }
};

template <typename Tile>
struct StreamRows {  // its rows as rows
  static constexpr bool kTrans = sizeof(typename Tile::Element) == 2;
  uint32_t at[kTrans ? 1 : 2];

  FLASHX_DEVICE explicit StreamRows(uint32_t tile) {
    const int lane = ptx::lane();
    if constexpr (kTrans) {
      at[0] = ptx::opaque(tile + Tile::offset(lane % 16, lane / 16));
    } else {
      // The mma's rows t and t + 4 are the tile's 2t and 2t + 1, as in weights_as_own.
      for (int i = 0; i < 2; ++i) {
        at[i] = ptx::opaque(tile + Tile::offset(lane % 4 * 2 + i, lane / 16) + lane / 4 % 4 * 4);
      }
    }
  }

  // Rows [row, row + depth), columns [16 pair, 16 pair + 16): two operands b[2] side by side.
  FLASHX_DEVICE void load(Fragment<typename Tile::Element>& b, int row, int pair) const {
    if constexpr (kTrans) {
      ptx::ldmatrix_x4_trans(b.hi, Tile::advance(at[0], row, 2 * pair));
    } else {
      FLASHX_UNROLL
      for (int i = 0; i < 4; ++i) {
        b.hi[i] = ptx::ld_shared<uint32_t>(Tile::advance(at[i % 2], row, 4 * pair + i / 2 * 2));
      }
    }
    b.split();
  }
};

// Sums of a product as the owner's operand of the next.
template <typename E, int kN>
FLASHX_DEVICE void weights_as_own(Fragment<E>& a, const float (&s)[kN][4], int step) {
  if constexpr (sizeof(E) == 2) {
    FLASHX_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&two)[4] = s[2 * step + i / 2];
      a.hi[i] = ptx::cvt_x2<E>(two[i % 2 * 2], two[i % 2 * 2 + 1]);
    }
  } else {
    FLASHX_UNROLL
    for (int i = 0; i < 4; ++i) a.hi[i] = ptx::bits_of(s[step][i % 2 * 2 + i / 2]);
    a.split();
  }
}

// How float32 is multiplied: as one product of tf32 numbers, or as three; the careful three keep 0 * inf out where one
// of the numbers has no lower part. 16-bit elements know nothing of this.
enum class Precision { Tf32, Exact, Careful };

FLASHX_DEVICE uint32_t finite_or_zero(uint32_t x) { return (x & 0x7f800000) == 0x7f800000 ? 0 : x; }

// d += a b for columns 8 half .. 8 half + 7 of b.
template <Precision kPrecision, typename E>
FLASHX_DEVICE void multiply(float (&d)[4], const Fragment<E>& a, const Fragment<E>& b, int half) {
  const uint32_t high[2] = {b.hi[2 * half], b.hi[2 * half + 1]};
  if constexpr (sizeof(E) == 4 && kPrecision != Precision::Tf32) {
    const uint32_t low[2] = {b.lo[2 * half], b.lo[2 * half + 1]};
    if constexpr (kPrecision == Precision::Careful) {
      const uint32_t finite_high[2] = {finite_or_zero(high[0]), finite_or_zero(high[1])};
      uint32_t finite_a[4];
      FLASHX_UNROLL
      for (int i = 0; i < 4; ++i) finite_a[i] = finite_or_zero(a.hi[i]);
      ptx::mma<E>(d, a.lo, finite_high);
      ptx::mma<E>(d, finite_a, low);
    } else {
      ptx::mma<E>(d, a.lo, high);
      ptx::mma<E>(d, a.hi, low);
    }
  }
  ptx::mma<E>(d, a.hi, high);
}

// ---- NaN and inf in what some owners must not see

// 0 * NaN is NaN, so a hidden NaN would leak through its weight of 0. Sums that are not finite at the end of a sweep
// are therefore made again, in passes: first with NaN and inf taken out of the stream, then, for each way in which they
// give inf or -inf, as a count of the weights other than 0 that meet them. NaN is both inf and -inf.
enum class Pass { Plain, Finite, PositiveUp, NegativeDown, PositiveDown, NegativeUp };

// What a pass after Finite adds to the sums whose count is not 0.
FLASHX_DEVICE float what_counts(Pass pass) {
  return pass == Pass::PositiveUp || pass == Pass::NegativeDown ? kInf : -kInf;
}

template <typename E>
struct Bits;
template <>
struct Bits<Half> {
  static constexpr uint32_t kInf = 0x7c00, kSign = 0x8000, kOne = 0x3c00;
};
template <>
struct Bits<BFloat16> {
  static constexpr uint32_t kInf = 0x7f80, kSign = 0x8000, kOne = 0x3f80;
};
template <>
struct Bits<float> {
  static constexpr uint32_t kInf = 0x7f800000, kSign = 0x80000000, kOne = 0x3f800000;
};

// f of the bits of each element of a register.
template <typename E, typename F>
FLASHX_DEVICE uint32_t map_elements(uint32_t x, F f) {
  if constexpr (sizeof(E) == 4) {
    return f(x);
  } else {
    return f(x & 0xffff) | f(x >> 16) << 16;
  }
}

template <typename E>
FLASHX_DEVICE void weights_of_pass(Fragment<E>& a, Pass pass) {
  using B = Bits<E>;
  if (pass == Pass::Finite) return;
  const uint32_t sign = pass == Pass::PositiveUp || pass == Pass::PositiveDown ? 0 : B::kSign;
  FLASHX_UNROLL
  for (int i = 0; i < 4; ++i) {
    // Sign as wanted, and neither 0 nor NaN, which needs no help.
    a.hi[i] = map_elements<E>(a.hi[i], [=](uint32_t x) { return (x ^ sign) - 1 < B::kInf ? B::kOne : 0u; });
    if constexpr (sizeof(E) == 4) a.lo[i] = 0;
  }
}

template <typename E>
FLASHX_DEVICE void stream_of_pass(Fragment<E>& b, Pass pass) {
  using B = Bits<E>;
  const uint32_t other = pass == Pass::PositiveUp || pass == Pass::NegativeUp ? B::kSign | B::kInf : B::kInf;
  FLASHX_UNROLL
  for (int i = 0; i < 4; ++i) {
    b.hi[i] = map_elements<E>(b.hi[i], [=](uint32_t x) {
      const bool finite = (x & B::kInf) != B::kInf;
      return pass == Pass::Finite ? (finite ? x : 0u) : (!finite && x != other ? B::kOne : 0u);
    });
    if constexpr (sizeof(E) == 4) {
      // lo of NaN or inf is NaN or 0.
      b.lo[i] = pass == Pass::Finite && (b.lo[i] & B::kInf) != B::kInf ? b.lo[i] : 0u;
    }
  }
}

// ---- Products

template <int kM, int kN>
FLASHX_DEVICE void clear(float (&sums)[kM][kN][4]) {
  FLASHX_UNROLL
  for (int i = 0; i < kM * kN * 4; ++i) sums[i / (kN * 4)][i / 4 % kN][i % 4] = 0;
}

template <Precision kPrecision, typename OwnTile, typename StreamTile, int kM, int kN>
FLASHX_DEVICE void multiply_rows(float (&s)[kM][kN][4], uint32_t own, int row, uint32_t stream) {
  using E = typename OwnTile::Element;
  clear(s);
  const Own<OwnTile> rows(own, row);
  const Stream<StreamTile> columns(stream);
  FLASHX_UNROLL_BY(sizeof(E) == 2 ? 64 : 2)
  for (int step = 0; step < OwnTile::kDim / kDepth<E>; ++step) {
    Fragment<E> a[kM];
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) rows.load(a[m], 16 * m, step);
    FLASHX_UNROLL
    for (int n = 0; n < kN; n += 2) {
      Fragment<E> b;
      columns.load(b, 8 * n, step);
      FLASHX_UNROLL
      for (int m = 0; m < kM; ++m) {
        multiply<kPrecision>(s[m][n], a[m], b, 0);
        multiply<kPrecision>(s[m][n + 1], a[m], b, 1);
      }
    }
  }
}

template <Precision kPrecision, bool kPass, typename StreamTile, int kM, int kN, int kColumns>
FLASHX_DEVICE void multiply_columns(float (&sums)[kM][kColumns][4], const float (&weights)[kM][kN][4], uint32_t stream,
                                    Pass pass) {
  using E = typename StreamTile::Element;
  const StreamRows<StreamTile> rows(stream);
  FLASHX_UNROLL
  for (int step = 0; step < kN * 8 / kDepth<E>; ++step) {
    Fragment<E> a[kM];
    FLASHX_UNROLL
    for (int m = 0; m < kM; ++m) {
      weights_as_own<E>(a[m], weights[m], step);
      if constexpr (kPass) weights_of_pass(a[m], pass);
    }
    FLASHX_UNROLL
    for (int pair = 0; pair < kColumns / 2; ++pair) {
      Fragment<E> b;
      rows.load(b, step * kDepth<E>, pair);
      if constexpr (kPass) stream_of_pass(b, pass);
      FLASHX_UNROLL
      for (int m = 0; m < kM; ++m) {
        multiply<kPrecision>(sums[m][2 * pair], a[m], b, 0);
        multiply<kPrecision>(sums[m][2 * pair + 1], a[m], b, 1);
      }
    }
  }
}

// s[m][n] = rows [row + 16 m, + 16) of own, times rows [8 n, 8 n + 8) of stream, summed over the head dim.
template <typename OwnTile, typename StreamTile, int kM, int kN>
FLASHX_DEVICE void multiply_rows(float (&s)[kM][kN][4], uint32_t own, int row, uint32_t stream, bool exact, Pass pass) {
  if (sizeof(typename OwnTile::Element) == 2) {
    multiply_rows<Precision::Exact, OwnTile, StreamTile>(s, own, row, stream);
  } else if (pass != Pass::Plain) {
    multiply_rows<Precision::Careful, OwnTile, StreamTile>(s, own, row, stream);
  } else if (exact) {
    multiply_rows<Precision::Exact, OwnTile, StreamTile>(s, own, row, stream);
  } else {
    multiply_rows<Precision::Tf32, OwnTile, StreamTile>(s, own, row, stream);
  }
}

// sums[m][n] += weights[m] times columns [8 n, 8 n + 8) of stream, summed over its rows.
template <typename StreamTile, int kM, int kN, int kColumns>
FLASHX_DEVICE void multiply_columns(float (&sums)[kM][kColumns][4], const float (&weights)[kM][kN][4], uint32_t stream,
                                    bool exact, Pass pass) {
  if (pass != Pass::Plain) {
    multiply_columns<Precision::Exact, true, StreamTile>(sums, weights, stream, pass);
  } else if (sizeof(typename StreamTile::Element) == 2 || exact) {
    multiply_columns<Precision::Exact, false, StreamTile>(sums, weights, stream, pass);
  } else {
    multiply_columns<Precision::Tf32, false, StreamTile>(sums, weights, stream, pass);
  }
}

// True if any sum is NaN or inf.
template <int kM, int kN>
FLASHX_DEVICE bool has_nonfinite(const float (&sums)[kM][kN][4]) {
  float zero = 0;
  FLASHX_UNROLL
  for (int i = 0; i < kM * kN * 4; ++i) {
    const float x = sums[i / (kN * 4)][i / 4 % kN][i % 4];
    zero += x - x;
  }
  return zero != 0;
}

// Writes sums[m] times factor[m][half] to rows [first + 16 m, + 16) of a tensor, or adds it to what is there; in a pass
// that counts, adds inf or -inf to what the count names.
template <int kM, int kN, typename To>
FLASHX_DEVICE void store_sums(const float (&sums)[kM][kN][4], const float (&factor)[kM][2], const To& to,
                              uint32_t first, Pass pass, bool adds = false) {
  using E = typename To::Element;
  struct alignas(2 * sizeof(E)) Pair {
    E x[2];
  };
  const int lane = ptx::lane();
  FLASHX_UNROLL
  for (int m = 0; m < kM; ++m) {
    FLASHX_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t r = ptx::opaque(first + 16 * m + 8 * half + lane / 4);
      if (r >= to.count) continue;
      E* row = to.at(r);
      FLASHX_UNROLL
      for (int n = 0; n < kN; ++n) {
        const int column = 8 * n + lane % 4 * 2;
        const float x = sums[m][n][2 * half], y = sums[m][n][2 * half + 1], f = factor[m][half];
        if (pass > Pass::Finite) {
          const float more = what_counts(pass) * f;
          if (column < to.dim && x > 0) add_to(row + column, more);
          if (column + 1 < to.dim && y > 0) add_to(row + column + 1, more);
        } else if (adds) {
          if (column < to.dim) add_to(row + column, x * f);
          if (column + 1 < to.dim) add_to(row + column + 1, y * f);
        } else if (to.aligned && column + 1 < to.dim) {
          ptx::st_global(reinterpret_cast<Pair*>(row + column), Pair{{to_element<E>(x * f), to_element<E>(y * f)}});
        } else {
          if (column < to.dim) ptx::st_global(row + column, to_element<E>(x * f));
          if (column + 1 < to.dim) ptx::st_global(row + column + 1, to_element<E>(y * f));
        }
      }
    }
  }
}

// The sums that lie in rows [first + 16 m, + 16) of a tensor of floats; zeros past its rows and dim.
template <int kM, int kN, typename From>
FLASHX_DEVICE void load_sums(float (&sums)[kM][kN][4], const From& from, uint32_t first) {
  const int lane = ptx::lane();
  FLASHX_UNROLL
  for (int m = 0; m < kM; ++m) {
    FLASHX_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t r = first + 16 * m + 8 * half + lane / 4;
      const bool real = r < from.count;
      const float* row = from.at(real ? r : 0);
      FLASHX_UNROLL
      for (int i = 0; i < 2 * kN; ++i) {
        const int column = 8 * (i / 2) + lane % 4 * 2 + i % 2;
        sums[m][i / 2][2 * half + i % 2] = real && column < from.dim ? ptx::ld_global(row + column) : 0.0f;
      }
    }
  }
}

}  // namespace flashx::FLASHX_MACHINE
