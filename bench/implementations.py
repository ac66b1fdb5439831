"""The implementations that are compared: a registry that tests and later peers add to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

# By name: flashx.patch() changes torch.nn.functional, and flashx must not be compared with itself.
from torch.nn.functional import scaled_dot_product_attention as sdpa

import flashx
from flashx import dispatch

from .cases import DTYPES, Case, Inputs

# (query, key, value) -> out, shapes as in flashx.attention; autograd gives the gradients.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Naive attention keeps a handful of (B, H, Lq, Lk) matrices; above this size for one of them it is left out.
NAIVE_LIMIT = 2**30


class Implementation(Protocol):
    """One way to compute attention."""

    def why_not(self, case: Case) -> list[str]:
        """Reasons why it cannot run the case; empty if it can."""

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        """What is timed; masks and other things that a model makes once are made here, outside the timing."""


class Flashx:
    """flashx.attention with the backend that dispatch chooses."""

    def why_not(self, case: Case) -> list[str]:
        problem = case.problem()
        # The reference takes everything, but it is naive attention, which has a row of its own.
        kernels = [backend for backend in dispatch.BACKENDS.values() if backend.AUTOMATIC and backend.DEVICE == "cpu"]
        refusals = {backend.NAME: backend.why_not(problem) for backend in kernels}
        if any(not reasons for reasons in refusals.values()):
            return []
        return [f"{name}: {reason}" for name, reasons in refusals.items() for reason in reasons]

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        return lambda query, key, value: flashx.attention(query, key, value, window=case.window)


class Torch:
    """torch.nn.functional.scaled_dot_product_attention, told as much about the mask as its signature allows."""

    def why_not(self, case: Case) -> list[str]:
        return []

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        mask, gqa = case.mask, case.q_heads != case.kv_heads
        if mask.hides_nothing(case.q_len, case.k_len):
            return lambda query, key, value: sdpa(query, key, value, enable_gqa=gqa)
        # torch aligns is_causal top-left, flashx bottom-right: the two agree where the lengths do.
        if case.window[1] == 0 and mask.shift == 0 and mask.lo(case.q_len - 1, case.k_len) == 0:
            return lambda query, key, value: sdpa(query, key, value, is_causal=True, enable_gqa=gqa)
        visible = mask.dense(case.q_len, case.k_len)
        return lambda query, key, value: sdpa(query, key, value, attn_mask=visible, enable_gqa=gqa)


class Naive:
    """Softmax of the whole score matrix, in the case's dtype: the textbook formula line by line."""

    def why_not(self, case: Case) -> list[str]:
        size = case.batch * case.q_heads * case.q_len * case.k_len * DTYPES[case.dtype].itemsize
        if size <= NAIVE_LIMIT:
            return []
        return [f"a score matrix takes {size / 2**30:.1f} GiB, more than {NAIVE_LIMIT / 2**30:.0f}"]

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        visible = None if case.mask.hides_nothing(case.q_len, case.k_len) else case.mask.dense(case.q_len, case.k_len)
        return lambda query, key, value: naive(query, key, value, visible)


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Naive attention; visible (Lq, Lk) is True where a row sees a key, None if everywhere."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) if group > 1 else tensor for tensor in (key, value))
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if visible is None:
        return logits.softmax(-1) @ value
    hidden = ~visible
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    # A row that sees no key has 0 / 0 everywhere; its output is 0.
    return weights.masked_fill(hidden.all(-1, keepdim=True), 0) @ value


IMPLEMENTATIONS: dict[str, Implementation] = {"flashx": Flashx(), "torch": Torch(), "naive": Naive()}
