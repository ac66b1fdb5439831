"""What a shared prefix costs, in bytes moved and launches, and which form of a call is the cheaper one.

What is shared costs less to read, and the states cost something to carry: ``plan`` counts both.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from .attention import Explanation
from .problem import accumulation_dtype

# What a launch costs, in the bytes that memory moves meanwhile: 2 us at 4 TB/s, 6 us at 40 GB/s.
LAUNCH_BYTES = {"cuda": 2**23, "cpu": 2**18}
# Launches beside the attention kernel over all keys. Levels: position tables, initial states, and the other kernel; on
# the CPU calls that repeat keep their tables (quick.py).
LEVEL_LAUNCHES = {"cuda": 12, "cpu": 3}
TREE_LAUNCHES = 12  # for each level
COPY_LAUNCHES = 2  # key and value


def launch_bytes(device: str) -> int:
    """LAUNCH_BYTES of a type of device; the CPU's, if it has none of its own."""
    return LAUNCH_BYTES.get(device, LAUNCH_BYTES["cpu"])


class SharedPrefixPlan(NamedTuple):
    """How ``shared_prefix_attention`` runs a call; made by ``plan``. Costs are those of the forward.

    Attributes:
        form: "levels" reads the prefix once per group, "concatenated" makes each sequence its own copy of it, and
            "plain" is attention to the suffix, where there is no prefix.
        reason: why.
        shared_bytes: what levels move: keys and values, and the rows' states.
        concatenated_bytes: what the other form moves: keys and values, copied and read again.
        unshared_bytes: keys and values of attention to keys that are already concatenated.
        shared_launches, concatenated_launches: launches beside one attention kernel; LAUNCH_BYTES each.
        device: type of the device.
    """

    form: Literal["levels", "concatenated", "plain"]
    reason: str
    shared_bytes: int
    concatenated_bytes: int
    unshared_bytes: int
    shared_launches: int
    concatenated_launches: int
    device: str

    def __str__(self) -> str:
        launch = launch_bytes(self.device)
        lines = [f"runs as: {self.form} ({self.reason})"]
        for name, moved, launches in (
            ("levels", self.shared_bytes, self.shared_launches),
            ("concatenated", self.concatenated_bytes, self.concatenated_launches),
        ):
            lines.append(
                f"  {name}: {_readable(moved)} moved + {launches} launches (as {_readable(launches * launch)})"
            )
        return "\n".join([*lines, f"  without sharing, keys concatenated beforehand: {_readable(self.unshared_bytes)}"])


class SharedPrefixExplanation(NamedTuple):
    """What ``shared_prefix_attention`` would run; print it.

    Attributes:
        plan: the form of the call, and the costs that decided.
        levels: problem, backend and kernel of each launch, in order.
    """

    plan: SharedPrefixPlan
    levels: tuple[Explanation, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.plan), *map(str, self.levels)])


class TreeExplanation(NamedTuple):
    """What ``tree_attention`` would run; print it.

    Attributes:
        levels: problem, backend and kernel of each launch, in order.
    """

    levels: tuple[Explanation, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.levels))


def plan(
    batch: int,
    groups: int,
    q_heads: int,
    kv_heads: int,
    q_len: int,
    prefix_len: int,
    suffix_len: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    *,
    block_mask: bool = False,
) -> SharedPrefixPlan:
    """The cheaper form of a shared-prefix call: bytes moved, launches counted as LAUNCH_BYTES.

    A pure function of shapes: what a sequence's results are rounded like does not depend on tensors' values.

    Args:
        batch: sequences, in ``groups`` groups of equal size.
        q_len, prefix_len, suffix_len: rows and keys of a sequence; the longest suffix.
        device: "cuda" or "cpu".
        block_mask: the call has one, over the suffix; only levels and the plain form keep the suffix apart.

    Example:
        >>> flashx.prefix_plan.plan(64, 1, 32, 8, 1, 4096, 128, 128, 128).form
        'levels'
        >>> flashx.prefix_plan.plan(1, 1, 32, 8, 1, 128, 16, 128, 128).form
        'concatenated'
    """
    key_bytes = kv_heads * (head_dim + value_dim) * dtype.itemsize
    state_bytes = batch * q_heads * q_len * (value_dim + 2) * accumulation_dtype(dtype).itemsize
    shared = (groups * prefix_len + batch * suffix_len) * key_bytes
    unshared = batch * (prefix_len + suffix_len) * key_bytes
    # States are initialised, and loaded and stored on either side of the boundary.
    levels, concatenated = shared + 4 * state_bytes, shared + 2 * unshared
    launch, level_launches = launch_bytes(device), LEVEL_LAUNCHES.get(device, LEVEL_LAUNCHES["cpu"])
    if device == "cpu" and groups == batch:
        level_launches = 1  # levels that nobody shares are one call
    form: Literal["levels", "concatenated", "plain"]
    if prefix_len == 0 or batch == 0:
        form, reason = "plain", "no prefix"
    elif suffix_len == 0 and groups == batch and not block_mask:
        form, reason = "plain", "no suffix, and nobody shares"
    elif block_mask:
        form, reason = "levels", "the block mask is the suffix's alone"
    elif levels + level_launches * launch <= concatenated + COPY_LAUNCHES * launch:
        form, reason = "levels", f"{groups} of {batch} prefixes are read, and nothing is copied"
    else:
        form, reason = "concatenated", "copying so few keys costs less than carrying states and more launches"
    return SharedPrefixPlan(
        form, reason, levels, concatenated, unshared, level_launches, COPY_LAUNCHES, device
    )  # fmt: skip


def _readable(count: int) -> str:
    """Bytes, for people."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
