"""Dropout's random bits, the twin of csrc/core/philox.h: Philox4x32-10 (Salmon et al., SC'11)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, key0, key1):
    """The four words of counter (c0, c1, c2, 0); all uint32, c0, c1 and c2 of one shape."""
    c3 = c2 * 0
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(o_h, o_q, k_begin, key0, key1, N: tl.constexpr):
    """Each weight's word, of rows (o_h, o_q) and keys [k_begin, k_begin + N): j % 4 of counter (j // 4, i, head, 0)."""
    o_c = k_begin // 4 + tl.arange(0, N // 4)
    zero = (o_q[:, None] * 0 + o_c[None, :] * 0).to(tl.uint32)  # [M, N / 4]
    c0 = zero + o_c[None, :].to(tl.uint32)
    c1 = zero + o_q[:, None].to(tl.uint32)
    c2 = zero + o_h[:, None].to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True))
    # The innermost dimension of a join is the joined one: [M, N / 4, 2, 2] in the order 0, 1, 2, 3.
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (o_q.shape[0], N))
