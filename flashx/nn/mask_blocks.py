"""Boolean masks of the drop-in as block masks, where that pays."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..block_mask import BlockMask

# Fewer elements than this are read sooner than their blocks are looked at.
_LARGE = 2**20
# Making the blocks costs about what one head's attention does; so many heads must share the mask.
_SHARING = 4
# A block mask is used where it hides at least this part of the blocks.
_HIDDEN = 0.25
# Elements looked at first: every so many rows and columns.
_SAMPLE = 61

# By mask: its version when it was looked at, and its blocks, or None where they do not pay.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def block_mask_of(mask: Tensor, batch: int, heads: int, q_len: int, k_len: int) -> BlockMask | None:
    """The mask (broadcastable to (batch, heads, q_len, k_len)) by its blocks; None where the mask itself is cheaper.

    A mask is looked at once, and again when it was written to.
    """
    if (
        mask.dtype != torch.bool
        or type(mask) is not Tensor
        or mask.dim() < 2
        or q_len * k_len < _LARGE
        or mask.shape[-2:] != (q_len, k_len)
        or not mask.is_cpu
        or mask.is_inference()
    ):
        return None
    own = mask.numel() // (q_len * k_len)
    if batch * heads < _SHARING * own:
        return None
    version, blocks = _known.get(mask, (None, None))
    if version != mask._version:
        blocks = _blocks(mask)
        _known[mask] = (mask._version, blocks)
    return blocks


def _blocks(mask: Tensor) -> BlockMask | None:
    sample = mask[..., ::_SAMPLE, ::_SAMPLE]
    if float(sample.sum()) > (1 - _HIDDEN / 2) * sample.numel():
        return None
    blocks = BlockMask.from_dense(mask)
    return blocks if blocks.block_density <= 1 - _HIDDEN else None
