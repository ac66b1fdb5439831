"""Ragged calls as data, and their oracle: naive attention, one sequence at a time. Budgets are tolerance.py's rule."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import tolerance
import torch
from tolerance import Results

from flashx import philox
from flashx.problem import accumulation_dtype


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sequences of different lengths; see cases.Case. ``top_left``: row 0 of a sequence stands at key 0."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    head_dim: int = 16
    value_dim: int | None = None
    heads: int = 2
    kv_heads: int | None = None
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    sink_tokens: int = 0
    alibi: str | None = None
    softcap: float = 0.0
    sinks: bool = False
    dropout_p: float = 0.0
    top_left: bool = False
    magnitude: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.q_lens)) + "x" + "+".join(map(str, self.k_lens))]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(field.name if value is True else f"{field.name}={value}".replace(" ", ""))
        return "-".join(parts)

    def options(self, *names: str) -> dict[str, Any]:
        """Arguments that are not tensors."""
        return {name: getattr(self, name) for name in ("causal", "window", "softcap", *names)}

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Tensors of all sequences, one after the other."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + sum(self.q_lens) * 263 + sum(self.k_lens))
        kv_heads = self.kv_heads or self.heads
        value_dim = self.value_dim or self.head_dim
        wide = accumulation_dtype(dtype)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        q_total, k_total = sum(self.q_lens), sum(self.k_lens)
        sizes = {"b": len(self.q_lens), "h": self.heads}
        return Inputs(
            (draw(q_total, self.heads, self.head_dim) * self.magnitude).to(dtype),
            draw(k_total, kv_heads, self.head_dim).to(dtype),
            draw(k_total, kv_heads, value_dim).to(dtype),
            draw(*(sizes[letter] for letter in self.alibi)).abs().to(wide) if self.alibi else None,
            (2 * draw(self.heads)).to(dtype) if self.sinks else None,
            draw(q_total, self.heads, value_dim).to(dtype),
            draw(self.heads, q_total).to(wide),
        )

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Of each sequence, its rows and keys."""
        q = k = 0
        for q_len, k_len in zip(self.q_lens, self.k_lens, strict=True):
            yield slice(q, q + q_len), slice(k, k + k_len)
            q, k = q + q_len, k + k_len


class Inputs(NamedTuple):
    """query (total, Hq, D), key, value, what shapes the logits, and the gradients that come in from above."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    grad_out: torch.Tensor
    grad_lse: torch.Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The tensors that have gradients, by name, anew."""
        named = {name: getattr(self, name) for name in ("query", "key", "value", "sinks")}
        return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in named.items() if t is not None}

    def to(self, device: str) -> Inputs:
        return Inputs(*(None if tensor is None else tensor.to(device) for tensor in self))


def starts(lens: tuple[int, ...]) -> torch.Tensor:
    """cu_seqlens."""
    return torch.tensor([0, *lens]).cumsum(0).int()


def results(out: torch.Tensor, lse: torch.Tensor, leaves: dict[str, torch.Tensor], inputs: Inputs) -> Results:
    """out (total, Hq, Dv), lse (Hq, total) and the leaves' gradients, on the CPU."""
    above = (inputs.grad_out.to(out), inputs.grad_lse.to(lse))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), above, materialize_grads=True)
    found = {"out": out.detach(), "lse": lse.detach()}
    found |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.cpu() for name, tensor in found.items()}


def naive(call: Ragged, inputs: Inputs, dtype: torch.dtype, shuffle: torch.Generator | None = None) -> Results:
    """Naive attention in dtype, forward and backward; ``shuffle`` as in tolerance.naive."""
    leaves = inputs.leaves(dtype)
    outs, lses = [], []
    for b, (rows, keys) in enumerate(call.slices()):
        out, lse = _attend(call, b, inputs, leaves, rows, keys, shuffle)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    return results(torch.cat(outs), torch.cat(lses, 1), leaves, inputs)


def _attend(
    call: Ragged,
    b: int,
    inputs: Inputs,
    leaves: dict[str, torch.Tensor],
    rows: slice,
    keys: slice,
    shuffle: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: (Hq, Lq, Dv) and (Hq, Lq)."""
    q_len, k_len = call.q_lens[b], call.k_lens[b]
    group = call.heads // (call.kv_heads or call.heads)
    query = leaves["query"][rows].transpose(0, 1)
    key, value = (leaves[name][keys].transpose(0, 1).repeat_interleave(group, dim=0) for name in ("key", "value"))

    def order(size: int) -> torch.Tensor:
        return torch.arange(size) if shuffle is None else torch.randperm(size, generator=shuffle)

    dims, some = order(call.head_dim), order(q_len)
    logits = (query[:, some][..., dims] @ key[..., dims].mT)[:, some.argsort()] / math.sqrt(call.head_dim)
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    i = torch.arange(q_len)[:, None] + (0 if call.top_left else k_len - q_len)
    j = torch.arange(k_len)
    left, right = call.window or (None, None)
    visible = torch.ones(q_len, k_len, dtype=torch.bool)
    if left is not None:
        visible &= (j >= i - left) | (j < call.sink_tokens)
    if right is not None:
        visible &= j <= i + right
    if call.causal:
        visible &= j <= i
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes if inputs.alibi_slopes.dim() == 1 else inputs.alibi_slopes[b]
        logits = logits - slopes.to(logits)[:, None, None] * (i - j).abs()
    logits = logits.masked_fill(~visible, -torch.inf)
    kept = torch.ones(logits.shape, dtype=logits.dtype)
    if call.dropout_p > 0:
        sizes = (len(call.q_lens), call.heads, max(call.q_lens), max(call.k_lens))
        keep = philox.keep_mask(dropout_seed(call), call.dropout_p, *sizes)[b, :, :q_len, :k_len]
        kept = keep.to(logits) / (1 - call.dropout_p)
    # One more key with value 0: the sink, or one that is hidden.
    sinks = leaves.get("sinks", torch.full((call.heads,), -torch.inf, dtype=logits.dtype))
    logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:2], 1)], dim=-1)
    value, kept = torch.nn.functional.pad(value, (0, 0, 0, 1)), torch.nn.functional.pad(kept, (0, 1))
    those, dims = order(k_len + 1), order(value.shape[2])
    logits, value, kept = logits[..., those], value[:, those][..., dims], kept[..., those]
    if shuffle is None:
        out, lse = (tolerance._softmax(logits) * kept) @ value, tolerance._lse(logits)
    else:
        out, lse = tolerance._FromLse.apply(logits, value, kept, shuffle)
    return out[..., dims.argsort()], lse


def dropout_seed(call: Ragged) -> int:
    """The Philox seed that a call draws after torch.manual_seed(call.seed)."""
    torch.manual_seed(call.seed)
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))


@functools.lru_cache(maxsize=64)
def oracle(call: Ragged, dtype: torch.dtype) -> Results:
    """The exact results for the call's inputs in dtype."""
    return naive(call, call.inputs(dtype), torch.float64)


@functools.lru_cache(maxsize=256)
def budgets(call: Ragged, dtype: torch.dtype) -> dict[str, float]:
    """How far each result may be from the oracle's: tolerance.py's rule."""
    low = torch.float32 if dtype == torch.float64 else dtype
    shuffle = torch.Generator().manual_seed(call.seed)
    worst: dict[str, float] = {}
    for draw in range(tolerance.DRAWS):
        drawn = call if draw % 2 == 0 else replace(call, seed=call.seed + 1000 * draw)
        inputs, exact = drawn.inputs(low), oracle(drawn, low)
        measured = naive(drawn, inputs, low, shuffle)
        if low != torch.float32:
            measured["lse"] = naive(drawn, inputs, torch.float32, shuffle)["lse"]
        for name, tensor in measured.items():
            worst[name] = max(worst.get(name, 0.0), tolerance.error(tensor, exact[name]))
    scale = torch.finfo(dtype).eps / torch.finfo(low).eps
    factor = (3 if call.softcap else 2) + (dtype == torch.float64)
    return {
        name: factor * scale * worst[name]
        + tolerance.ulp(tensor, accumulation_dtype(dtype) if name == "lse" else dtype)
        for name, tensor in oracle(call, dtype).items()
    }


def check(call: Ragged, dtype: torch.dtype, found: Results) -> None:
    """Everything that was found within its budget."""
    expected, allowed = oracle(call, dtype), budgets(call, dtype)
    for name, actual in found.items():
        tolerance.compare(f"{call} {dtype} {name}", actual, expected[name], allowed[name])
