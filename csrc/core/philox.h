// Dropout's random bits: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).
// The bits of weight (b, h, i, j) are word j % 4 of counter (j / 4, i, b * heads + h, 0) under the seed: they
// depend on nothing else, so every backend and every tiling draws the same mask. flashx/philox.py is the same
// function.
#pragma once

#include "core/config.h"

namespace flashx {

struct Philox {
  uint32_t key[2];

  FLASHX_CORE explicit Philox(uint64_t seed) : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)} {}

  FLASHX_CORE void operator()(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t (&out)[4]) const {
    uint32_t c3 = 0, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0;
      const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }
};

// A weight is kept if its word is at least this.
FLASHX_CORE uint64_t dropout_threshold(double p) { return static_cast<uint64_t>(p * 4294967296.0 + 0.5); }

}  // namespace flashx
