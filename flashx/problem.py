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
    """The tensors of a call, in the operator's order; shapes as in flashx.attention. seed: dropout's, int64 scalar."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    seed: torch.Tensor | None


class Gradients(NamedTuple):
    """Where a backward writes; bias (bias's own shape) and sinks are None where nobody asks for them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything about one attention call but the addresses. It checks itself when made from tensors.

    Sizes are in elements. ``bias`` is None, torch.bool (a visibility mask) or the floating dtype of an
    additive bias.
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

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        parts = [
            f"batch {self.batch}, heads {self.q_heads}/{self.kv_heads}, length {self.q_len}x{self.k_len}, "
            f"dim {self.head_dim}/{self.value_dim}, {name} on {self.device}"
        ]
        if not self.mask.hides_nothing(self.q_len, self.k_len):
            parts.append(f"window ({self.mask.left}, {self.mask.right}) shift {self.mask.shift}")
        if self.bias is not None:
            parts.append("boolean mask" if self.bias == torch.bool else "bias")
        for name in ("alibi", "sinks", "softcap", "dropout_p"):
            value = getattr(self, name)
            if value:
                parts.append(name if value is True else f"{name} {value:g}")
        return "; ".join(parts)

    @classmethod
    def from_tensors(
        cls, inputs: Inputs, mask: IntervalMask, scale: float, softcap: float, dropout_p: float
    ) -> Problem:
        """Check every argument against every other and describe the call.

        Raises:
            ValueError, TypeError: naming the argument, the rule and the value.
        """
        query, key, value, bias, alibi_slopes, sinks, seed = inputs
        check_qkv(query, key, value)
        batch, q_heads, q_len, head_dim = query.shape
        _, kv_heads, k_len, value_dim = value.shape
        check_finite("scale", scale)
        check_finite("softcap", softcap)
        if softcap < 0:
            raise ValueError(f"softcap must be >= 0 (0 switches it off), got {softcap}")
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
        if dropout_p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
            raise ValueError(f"seed must be one int64 where dropout_p > 0, got {seed}")
        check_bias(query, bias, (batch, q_heads, q_len, k_len))
        check_per_head("alibi_slopes", query, alibi_slopes, ((q_heads,), (batch, q_heads)))
        check_per_head("sinks", query, sinks, ((q_heads,),))
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
        )


def check_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv): one dtype, one device, GQA ratio."""
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
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have query's batch size {query.shape[0]}, got shape {shape(tensor)}")
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
    rows = (problem.batch, problem.q_heads, problem.q_len)
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
