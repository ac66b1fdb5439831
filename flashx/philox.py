"""Dropout's random bits: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).

The bits of weight (b, h, i, j) depend on the seed and on (b, h, i, j) alone, so every backend and every tiling
draws the same mask. csrc/core/philox.h is the same function for the kernels.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32-bit words of a * b, for 32-bit words held in int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def words(seed: int, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The four 32-bit outputs (in int64) for a key of 64 bits and a counter of four broadcastable words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(seed: int, dropout_p: float, batch: int, heads: int, q_len: int, k_len: int) -> torch.Tensor:
    """(batch, heads, q_len, k_len) bool on the CPU: True where the weight survives dropout.

    Word ``j % 4`` of counter ``(j // 4, i, b * heads + h, 0)``; kept if it is >= ``floor(dropout_p * 2**32 + 0.5)``.
    """
    column = torch.arange((k_len + 3) // 4)
    row = torch.arange(q_len)[:, None]
    head = torch.arange(batch * heads).view(batch, heads, 1, 1)
    four = torch.stack(words(seed, (column, row, head, torch.zeros((), dtype=torch.int64))), dim=-1)
    return four.flatten(-2)[..., :k_len] >= int(dropout_p * 2**32 + 0.5)
