"""Masks: which keys a query row may see. One meaning, shared in spirit with csrc/core/mask.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class IntervalMask:
    """Row ``q`` sees the keys ``[lo(q), hi(q))``; both limits never decrease in ``q``.

    Full, causal and sliding-window attention are this one mask (docs/architecture.md, "Masks").

    Args:
        left: keys visible to the left of the diagonal; None is unbounded.
        right: keys visible to the right of the diagonal; None is unbounded, 0 is causal.
        shift: key index on row 0's diagonal: 0 aligns top-left, ``k_len - q_len`` aligns bottom-right.
    """

    left: int | None = None
    right: int | None = None
    shift: int = 0

    def lo(self, q: int, k_len: int) -> int:
        """First key that row ``q`` may see, clamped to ``[0, k_len]``."""
        return 0 if self.left is None else min(max(q + self.shift - self.left, 0), k_len)

    def hi(self, q: int, k_len: int) -> int:
        """One past the last key that row ``q`` may see, clamped to ``[0, k_len]``."""
        return k_len if self.right is None else min(max(q + self.shift + self.right + 1, 0), k_len)

    def hides_nothing(self, q_len: int, k_len: int) -> bool:
        """True if every row sees every key."""
        return q_len == 0 or (self.lo(q_len - 1, k_len) == 0 and self.hi(0, k_len) == k_len)

    def dense(self, q_len: int, k_len: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Boolean ``(q_len, k_len)`` tensor, True where visible. For oracles and tests."""
        distance = torch.arange(k_len, device=device) - torch.arange(q_len, device=device)[:, None] - self.shift
        visible = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
        if self.left is not None:
            visible &= distance >= -self.left
        if self.right is not None:
            visible &= distance <= self.right
        return visible
