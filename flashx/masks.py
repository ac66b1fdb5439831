"""Masks: which keys a query row may see. One meaning, shared in spirit with csrc/core/mask.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class IntervalMask:
    """Row ``q`` sees the keys ``[lo(q), hi(q))`` and the first keys before ``hi(q)``; limits never decrease in ``q``.

    Full, causal and sliding-window attention, with sink tokens or without, are this one mask (docs/architecture.md,
    "Masks").

    Args:
        left: keys visible to the left of the diagonal; None is unbounded.
        right: keys visible to the right of the diagonal; None is unbounded, 0 is causal.
        shift: key index on row 0's diagonal: 0 aligns top-left, ``k_len - q_len`` aligns bottom-right.
        first: keys at the beginning that stay visible however far the window is (sink tokens).
    """

    left: int | None = None
    right: int | None = None
    shift: int = 0
    first: int = 0

    def lo(self, q: int, k_len: int) -> int:
        """First key of row ``q``'s window, clamped to ``[0, k_len]``; 0 if the window reaches the first keys."""
        low = 0 if self.left is None else min(max(q + self.shift - self.left, 0), k_len)
        return 0 if low <= self.first else low

    def hi(self, q: int, k_len: int) -> int:
        """One past the last key that row ``q`` may see, clamped to ``[0, k_len]``."""
        return k_len if self.right is None else min(max(q + self.shift + self.right + 1, 0), k_len)

    def hides_nothing(self, q_len: int, k_len: int) -> bool:
        """True if every row sees every key."""
        return q_len == 0 or (self.lo(q_len - 1, k_len) == 0 and self.hi(0, k_len) == k_len)

    def dense(self, q_len: int, k_len: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Boolean ``(q_len, k_len)`` tensor, True where visible. For oracles and tests."""
        q, k = (torch.arange(length, device=device) for length in (q_len, k_len))
        return self.visible(q[:, None] + self.shift, k)

    def visible(self, diagonal: torch.Tensor, key: torch.Tensor, before: torch.Tensor | int = 0) -> torch.Tensor:
        """Whether rows see keys, element by element.

        Args:
            diagonal: the key at distance 0 of each row, its query plus its own shift (``shift`` plays no part).
            key: index of each key.
            before: keys before key 0 that ``first`` counts too.
        """
        distance = key - diagonal
        visible = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            visible &= (distance >= -self.left) | (key + before < self.first)
        if self.right is not None:
            visible &= distance <= self.right
        return visible


def dense_blocks(
    block_map: torch.Tensor, bits: torch.Tensor, block: tuple[int, int], q_len: int, k_len: int
) -> torch.Tensor:
    """What a BlockMask's tensors say, element by element: boolean (B|1, H|1, q_len, k_len). For oracles and tests.

    An entry of the map without a bitmap hides, as in the kernels.
    """
    rows, columns = block
    column = torch.arange(columns, device=bits.device)
    tiles = bits[..., column // 32] >> column % 32 & 1  # (n, rows, columns)
    kinds = torch.tensor([0, 1], dtype=tiles.dtype, device=bits.device)[:, None, None].expand(2, rows, columns)
    known = torch.where((block_map >= 0) & (block_map < 2 + len(bits)), block_map, 0).long()
    dense = torch.cat([kinds, tiles]).bool()[known]  # (B, H, q blocks, k blocks, rows, columns)
    return dense.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :q_len, :k_len]
