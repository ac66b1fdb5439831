"""Problem: one attention call, described before anything is dispatched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .masks import IntervalMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: the dtype of sums, lse and sinks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    """The tensors of a call, in the operator's order; shapes as in flashx.attention.

    Attributes:
        seed: dropout's, int64 scalar.
        block_map, block_bits: a BlockMask's, by query head and by query and key of the sequence.
        sequences: (B, 6) int32, for each sequence of a ragged call SEQUENCE_FIELDS. A sequence lies in its own batch
            entry of query and key, or all of them one after the other in a single one.
        members, member_begin: (B,) and (groups + 1,) int32: group g of the sequences members[member_begin[g]:
            member_begin[g + 1]] reads batch entry g of key and value. All of them have query's length.
        page_table: (B, W) int32: key i of sequence b is row i % page of batch entry page_table[b, i // page] of key.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    seed: torch.Tensor | None
    block_map: torch.Tensor | None = None
    block_bits: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    members: torch.Tensor | None = None
    member_begin: torch.Tensor | None = None
    page_table: torch.Tensor | None = None


# Columns of Inputs.sequences: first row and number of rows in query, of keys in key; the key on row 0's diagonal; keys
# that stand before key 0 in the levels above. See csrc/core/problem.h.
SEQUENCE_FIELDS = ("q_begin", "q_len", "k_begin", "k_len", "shift", "offset")


class Carry(NamedTuple):
    """States of rows whose softmax goes on in another call (csrc/core/problem.h), in the accumulation dtype.

    Attributes:
        max, sum: (B, Hq, Lq); -inf and 0 to begin with. max is in the units of the backend that wrote it.
        acc: (B, Hq, Lq, Dv), not divided by sum; 0 to begin with.
        suspend: leave the states here, instead of results in out and lse.
    """

    max: torch.Tensor
    sum: torch.Tensor
    acc: torch.Tensor
    suspend: bool


class Gradients(NamedTuple):
    """Where a backward writes; bias (bias's own shape) and sinks are None where nobody asks for them.

    ``adds_query``: query's gradient is in the accumulation dtype and added to, since other calls add to it too.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    adds_query: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything about one attention call but the addresses. It checks itself when made from tensors.

    Sizes are in elements. ``bias`` is None, torch.bool (a visibility mask) or the floating dtype of an
    additive bias. ``q_len`` and ``k_len`` are those of the longest of ``batch`` sequences; ``q_rows`` and ``k_rows`` of
    a ragged call's tensors, which the sequences share if they are ``packed``. ``block``: block sizes of a block mask.
    ``groups``: of sequences that share keys. ``page``: rows of a page of a paged cache.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    mask: IntervalMask
    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    bias: torch.dtype | None = None
    alibi: bool = False
    sinks: bool = False
    block: tuple[int, int] | None = None
    ragged: bool = False
    packed: bool = False
    q_rows: int = -1
    k_rows: int = -1
    groups: int | None = None
    page: int | None = None
    unified_max: float | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        parts = [
            f"batch {self.batch}, heads {self.q_heads}/{self.kv_heads}, length {self.q_len}x{self.k_len}, "
            f"dim {self.head_dim}/{self.value_dim}, {name} on {self.device}"
        ]
        if not self.mask.hides_nothing(self.q_len, self.k_len):
            shift = "" if self.ragged else f" shift {self.mask.shift}"
            parts.append(f"window ({self.mask.left}, {self.mask.right}){shift}")
        if self.mask.first:
            parts.append(f"sink tokens {self.mask.first}")
        if self.block is not None:
            parts.append("block mask of {} x {}".format(*self.block))
        if self.ragged:
            parts.append("packed sequences" if self.packed else "ragged sequences")
        if self.groups is not None:
            parts.append(f"keys shared in groups: {self.groups}")
        if self.page is not None:
            parts.append(f"pages of {self.page}")
        if self.bias is not None:
            parts.append("boolean mask" if self.bias == torch.bool else "bias")
        for name in ("alibi", "sinks", "softcap", "dropout_p"):
            value = getattr(self, name)
            if value:
                parts.append(name if value is True else f"{name} {value:g}")
        return "; ".join(parts)

    @classmethod
    def from_tensors(
        cls,
        inputs: Inputs,
        mask: IntervalMask,
        scale: float,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        block: tuple[int, int] = (0, 0),
        lengths: tuple[int, int] = (-1, -1),
        unified_max: float | None = None,
    ) -> Problem:
        """Check every argument against every other and describe the call.

        ``block``: sizes of the block mask's blocks. ``lengths``: of the longest sequences, if not the tensors'.

        Raises:
            ValueError, TypeError: naming the argument, the rule and the value.
        """
        query, key, value, bias, alibi_slopes, sinks, seed = inputs[:7]
        dense = inputs.sequences is None
        check_qkv(query, key, value, dense)
        rows, q_heads, q_rows, head_dim = query.shape
        _, kv_heads, k_rows, value_dim = value.shape
        check_finite("scale", scale)
        check_finite("softcap", softcap)
        if softcap < 0:
            raise ValueError(f"softcap must be >= 0 (0 switches it off), got {softcap}")
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
        if dropout_p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
            raise ValueError(f"seed must be one int64 where dropout_p > 0, got {seed}")
        batch, groups, page = rows, None, None
        k_len = k_rows
        if not dense:
            batch, groups, page = _check_tables(inputs)
            if page is not None:
                assert inputs.page_table is not None
                k_len, k_rows = inputs.page_table.shape[1] * page, key.shape[0] * page
            if bias is not None:
                raise ValueError("bias must be None for ragged sequences, got a tensor")
        q_len, k_len = (
            have if want < 0 else min(want, have) for want, have in zip(lengths, (q_rows, k_len), strict=True)
        )
        check_bias(query, bias, (batch, q_heads, q_len, k_len))
        check_per_head("alibi_slopes", query, alibi_slopes, ((q_heads,), (batch, q_heads)))
        check_per_head("sinks", query, sinks, ((q_heads,),))
        if inputs.block_map is not None:
            check_block_mask(inputs, block, (batch, q_heads, q_len, k_len))
        return cls(
            batch=batch,
            q_heads=q_heads,
            kv_heads=kv_heads,
            q_len=q_len,
            k_len=k_len,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=query.dtype,
            device=query.device.type,
            mask=mask,
            scale=scale,
            softcap=softcap,
            dropout_p=dropout_p,
            bias=None if bias is None else bias.dtype,
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            block=None if inputs.block_map is None else block,
            ragged=not dense,
            packed=rows != batch,
            q_rows=-1 if dense else q_rows,
            k_rows=-1 if dense else k_rows,
            groups=groups,
            page=page,
            unified_max=unified_max,
        )


def _check_tables(inputs: Inputs) -> tuple[int, int | None, int | None]:
    """Number of sequences, of groups, and the page size; what the tables hold is clamped by the kernels."""
    query, key, sequences, members, begin, pages = (
        inputs.query, inputs.key, inputs.sequences, inputs.members, inputs.member_begin, inputs.page_table,
    )  # fmt: skip
    assert sequences is not None
    batch = sequences.shape[0]
    for name, table, want in (
        ("sequences", sequences, (batch, len(SEQUENCE_FIELDS))),
        ("members", members, (batch,)),
        ("member_begin", begin, (key.shape[0] + 1,)),
        ("page_table", pages, (batch, 0 if pages is None or pages.dim() != 2 else pages.shape[1])),
    ):
        if table is None:
            continue
        if shape(table) != want:
            raise ValueError(f"{name} must have shape {want}, got {shape(table)}")
        if table.dtype != torch.int32 or table.device != query.device or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 on {query.device}, got {table.dtype} on {table.device}")
    if (members is None) != (begin is None) or (members is not None and pages is not None):
        raise ValueError("members and member_begin must be given together, and not with page_table")
    if query.shape[0] != batch and (query.shape[0] != 1 or members is not None):
        raise ValueError(f"query must have {batch} batch entries, or 1 for packed ones, got shape {shape(query)}")
    if pages is not None:
        if pages.shape[1] < 1 or key.shape[0] < 1 or key.shape[2] < 1:
            raise ValueError(f"page_table and pages must not be empty, got {shape(pages)} and key {shape(key)}")
    elif members is None and key.shape[0] not in (1, batch):
        raise ValueError(f"key must have {batch} batch entries, or 1 for packed ones, got shape {shape(key)}")
    return batch, None if members is None else key.shape[0], None if pages is None else key.shape[2]


def check_block_mask(inputs: Inputs, block: tuple[int, int], full: tuple[int, int, int, int]) -> None:
    """The tensors of a BlockMask over (batch, heads, q_len, k_len); entries are checked where they are used."""
    block_map, bits = inputs.block_map, inputs.block_bits
    assert block_map is not None
    for size in block:
        if size % 16 or not 16 <= size <= 256:
            raise ValueError(f"block_mask's block sizes must be multiples of 16 from 16 to 256, got {block}")
    blocks = tuple(-(-length // size) for length, size in zip(full[2:], block, strict=True))
    if block_map.dim() != 4 or any(
        have not in (1, want) for have, want in zip(block_map.shape, full[:2], strict=False)
    ):
        raise ValueError(f"block_mask must broadcast to batch and heads {full[:2]}, got a map of {shape(block_map)}")
    if shape(block_map)[2:] != blocks:
        raise ValueError(
            f"block_mask must be for lengths {full[2:]}: {blocks} blocks of {block}, got {shape(block_map)[2:]} blocks"
        )
    words = -(-block[1] // 32)
    if bits is None or bits.dim() != 3 or shape(bits)[1:] != (block[0], words):
        raise ValueError(f"block_mask's bits must have shape (n, {block[0]}, {words}), got {bits and shape(bits)}")
    for name, tensor in (("map", block_map), ("bits", bits)):
        if tensor.dtype != torch.int32 or tensor.device != inputs.query.device or not tensor.is_contiguous():
            raise ValueError(
                f"block_mask's {name} must be contiguous int32 on {inputs.query.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if inputs.members is not None:
        raise ValueError("block_mask must be None where sequences share keys, got a map")


def check_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, one_batch: bool = True) -> None:
    """query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv): one dtype, one device, GQA ratio.

    ``one_batch``: key has query's batch size.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dense(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim), got shape {shape(tensor)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
        if one_batch and tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have query's batch size {query.shape[0]}, got shape {shape(tensor)}")
    if key.shape[0] != value.shape[0]:
        raise ValueError(f"value must have key's {key.shape[0]} batch entries, got shape {shape(value)}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"value must have key's {key.shape[1]} heads, got shape {shape(value)}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"value must have key's length {key.shape[2]}, got shape {shape(value)}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have query's head dim {query.shape[3]}, got shape {shape(key)}")
    if query.shape[3] < 1:
        raise ValueError(f"query must have a head dim of at least 1, got shape {shape(query)}")
    q_heads, kv_heads = query.shape[1], key.shape[1]
    if (kv_heads == 0 and q_heads != 0) or (kv_heads != 0 and q_heads % kv_heads != 0):
        raise ValueError(f"query's heads must be a multiple of key's heads, got {q_heads} and {kv_heads}")


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """A tensor with strides: neither sparse nor nested."""
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense strided tensor, got layout {layout}")


def check_bias(query: torch.Tensor, bias: torch.Tensor | None, full: tuple[int, int, int, int]) -> None:
    """bias: bool, float32 or query's dtype; broadcastable to (B, Hq, Lq, Lk)."""
    if bias is None:
        return
    if bias.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"bias must be bool, float32 or query's dtype {query.dtype}, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"bias must be on query's device {query.device}, got {bias.device}")
    check_dense("bias", bias)
    fits = bias.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"bias must broadcast to (batch, heads, q_len, k_len) = {full}, got shape {shape(bias)}")


def check_per_head(
    name: str, query: torch.Tensor, tensor: torch.Tensor | None, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """One value per query head, in the accumulation dtype, on query's device."""
    if tensor is None:
        return
    if tensor.dtype != accumulation_dtype(query.dtype):
        raise TypeError(f"{name} must be {accumulation_dtype(query.dtype)}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if shape(tensor) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {shape(tensor)}")


def check_backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    bias_grad: bool,
    sinks_grad: bool,
) -> None:
    """What the backward takes beside the inputs has the shapes and dtypes of the forward's results."""
    rows = shape(inputs.query)[:3]
    for name, tensor, want, dtype in (
        ("out", out, (*rows, problem.value_dim), problem.dtype),
        ("grad_out", grad_out, (*rows, problem.value_dim), problem.dtype),
        ("lse", lse, rows, accumulation_dtype(problem.dtype)),
        ("grad_lse", grad_lse, rows, accumulation_dtype(problem.dtype)),
    ):
        if tensor is None:
            continue
        if shape(tensor) != want:
            raise ValueError(f"{name} must have shape {want}, got {shape(tensor)}")
        if tensor.dtype != dtype or tensor.device != inputs.query.device:
            raise TypeError(f"{name} must be {dtype} on {inputs.query.device}, got {tensor.dtype} on {tensor.device}")
    if bias_grad and (inputs.bias is None or inputs.bias.dtype == torch.bool):
        raise ValueError("bias_grad needs a floating bias, got bias_grad=True")
    if sinks_grad and inputs.sinks is None:
        raise ValueError("sinks_grad needs sinks, got sinks_grad=True")


def check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """tensor.shape as a plain tuple, for messages."""
    return tuple(tensor.shape)
