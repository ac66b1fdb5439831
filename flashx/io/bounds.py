"""Lower bounds of attention's I/O, in elements, for one head. Saha and Ye, "The I/O Complexity of Attention", 2024.

For sequence length N, head dim d and a fast memory of M elements exact attention moves, up to a constant that the
theory does not give, at least

    N^2 d^2 / M        elements, if M >= d^2: FlashAttention's order, which is optimal there;
    N^2 d / sqrt(M)    elements, if M < d^2: that of a matrix product, which S = Q K^T then costs by itself.

The first holds for any way to multiply matrices, the second for the standard one. Both are N^2 at M = d^2. For all M
the inputs are read and the results written, which is 4 N d and the only part with a known constant.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Bound(NamedTuple):
    """What moves at least, in elements; ``bound`` is up to a constant, ``compulsory`` is exact.

    Attributes:
        bound: the theorem's expression, with a constant of 1.
        compulsory: Q, K and V read once and O written once.
        small: whether the fast memory is smaller than d^2.
    """

    bound: float
    compulsory: int
    small: bool

    @property
    def least(self) -> float:
        """The larger one of the two."""
        return max(self.bound, float(self.compulsory))


def lower_bound(length: int, head_dim: int, fast_elements: int, k_len: int | None = None) -> Bound:
    """Elements that exact attention of one head moves at least, up to a constant: see the module.

    Args:
        length: queries N.
        head_dim: d.
        fast_elements: M, the fast memory.
        k_len: keys, if not N of them; N^2 becomes their product.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> flashx.io.lower_bound(4096, 64, 4096).bound / 4096**2
        1.0
    """
    keys = length if k_len is None else k_len
    for name, size in (("length", length), ("head_dim", head_dim), ("fast_elements", fast_elements), ("k_len", keys)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    small = fast_elements < head_dim * head_dim
    pairs = length * keys
    bound = pairs * head_dim / math.sqrt(fast_elements) if small else pairs * head_dim**2 / fast_elements
    return Bound(bound, 2 * (length + keys) * head_dim, small)
