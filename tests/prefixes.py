"""Cases of shared prefixes and prefix trees, and attention over each sequence's concatenated keys, spelled out."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import tolerance
import torch
from cases import NAN

import flashx
from flashx import PrefixLevel, shared_prefix_attention, tree_attention
from flashx.problem import accumulation_dtype

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Level:
    """node: of each sequence; lens: of each node, or all keys of each."""

    nodes: int
    length: int
    node: tuple[int, ...]
    lens: tuple[int, ...] | None = None

    def valid(self, node: int) -> int:
        return 0 if node < 0 else self.length if self.lens is None else self.lens[node]


@dataclass(frozen=True)
class Case:
    """A batch with a prefix tree; ``groups`` > 0 if it is one prefix level for shared_prefix_attention."""

    batch: int
    levels: tuple[Level, ...]
    suffix: int
    suffix_lens: tuple[int, ...] | None = None
    q_len: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    value_dim: int = 16
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    sink_tokens: int = 0
    alibi: str | None = None
    softcap: float = 0.0
    sinks: bool = False
    scale: float | None = None
    blocks: str | None = None
    groups: int = 0
    seed: int = 0

    def __str__(self) -> str:
        levels = "+".join(f"{level.nodes}x{level.length}{'' if level.lens is None else 'r'}" for level in self.levels)
        parts = [f"b{self.batch}q{self.q_len}-{levels}+{self.suffix}{'' if self.suffix_lens is None else 'r'}"]
        for field in fields(self)[5:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(field.name if value is True else f"{field.name}={value}".replace(" ", ""))
        return "-".join(parts)

    def options(self) -> dict[str, Any]:
        names = ("causal", "window", "sink_tokens", "softcap", "scale")
        return {name: getattr(self, name) for name in names}

    def own(self, b: int) -> int:
        return self.suffix if self.suffix_lens is None else self.suffix_lens[b]

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """What has gradients: query, key, value, and key0, value0, ... of the levels, sinks."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        tensors = {
            "query": draw(self.batch, self.heads, self.q_len, self.head_dim),
            "key": draw(self.batch, self.kv_heads, self.suffix, self.head_dim),
            "value": draw(self.batch, self.kv_heads, self.suffix, self.value_dim),
        }
        for i, level in enumerate(self.levels):
            tensors[f"key{i}"] = draw(level.nodes, self.kv_heads, level.length, self.head_dim)
            tensors[f"value{i}"] = draw(level.nodes, self.kv_heads, level.length, self.value_dim)
        if self.sinks:
            tensors["sinks"] = 2 * draw(self.heads)
        return tensors

    def above(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of out and lse."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        rows = (self.batch, self.heads, self.q_len)
        grad_out = torch.randn((*rows, self.value_dim), generator=generator, dtype=torch.float64)
        return grad_out.to(dtype), torch.randn(rows, generator=generator, dtype=torch.float64).to(torch.float32)

    def slopes(self) -> torch.Tensor | None:
        if self.alibi is None:
            return None
        shape = (self.batch, self.heads) if self.alibi == "bh" else (self.heads,)
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed + 2)) / 4

    def seen(self) -> torch.Tensor | None:
        """The block mask, dense; its shape's letters are those of ``blocks``."""
        if self.blocks is None:
            return None
        leading = {"1": 1, "b": self.batch, "h": self.heads}
        shape = (*(leading[letter] for letter in self.blocks), self.q_len, self.suffix)
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed + 3)) < 0.5


def one_prefix(batch: int, groups: int, prefix: int, suffix: int, *lens: int, **options: Any) -> Case:
    """For shared_prefix_attention; ``lens``: of the suffixes."""
    level = Level(groups, prefix, tuple(b * groups // batch for b in range(batch)))
    return Case(batch, (level,), suffix, lens or None, groups=groups, **options)


def naive(case: Case, tensors: Tensors, dtype: torch.dtype, shuffle: torch.Generator | None = None) -> Tensors:
    """Attention of one sequence after the other to its concatenated keys; ``shuffle`` as in tolerance.naive."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    ratio = case.heads // case.kv_heads

    def order(size: int) -> torch.Tensor:
        return torch.arange(size) if shuffle is None else torch.randperm(size, generator=shuffle)

    left, right = case.window or (None, None)
    slopes, seen = case.slopes(), case.seen()
    outs, lses = [], []
    for b in range(case.batch):
        parts = [(f"{i}", level.node[b], level.valid(level.node[b])) for i, level in enumerate(case.levels)]
        parts = [part for part in parts if part[1] >= 0] + [("", b, case.own(b))]
        key, value = (
            torch.cat([leaves[name + which][node, :, :n] for which, node, n in parts], 1).repeat_interleave(ratio, 0)
            for name in ("key", "value")
        )
        total = key.shape[1]
        i, j = torch.arange(case.q_len)[:, None] + total - case.q_len, torch.arange(total)
        visible = torch.ones(case.heads, case.q_len, total, dtype=torch.bool)
        if case.causal:
            visible &= j <= i
        if left is not None:
            visible &= (j >= i - left) | (j < case.sink_tokens)
        if right is not None:
            visible &= j <= i + right
        if seen is not None:
            own = case.own(b)
            mask = seen.expand(case.batch, case.heads, -1, -1)[b, :, :, :own]
            visible[..., total - own :] &= mask
        dims, rows = order(case.head_dim), order(case.q_len)
        logits = leaves["query"][b][:, rows][..., dims] @ key[..., dims].mT
        logits = logits[:, rows.argsort()] * (case.head_dim**-0.5 if case.scale is None else case.scale)
        if case.softcap:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        if slopes is not None:
            logits = logits - slopes.expand(case.batch, -1)[b, :, None, None].to(dtype) * (i - j).abs()
        logits = logits.masked_fill(~visible, -torch.inf)

        sinks = leaves.get("sinks", torch.full((case.heads,), -torch.inf, dtype=dtype))
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, case.q_len, 1)], dim=-1)
        keys, dims = order(total + 1), order(case.value_dim)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))[:, keys][..., dims]
        logits = logits[..., keys]
        if shuffle is None:
            out, lse = tolerance._softmax(logits) @ value, tolerance._lse(logits)
        else:
            out, lse = tolerance._FromLse.apply(logits, value, torch.ones_like(logits), shuffle)
        outs.append(out[..., dims.argsort()])
        lses.append(lse)
    return results(case, torch.stack(outs), torch.stack(lses), leaves)


def results(case: Case, out: torch.Tensor, lse: torch.Tensor, leaves: Tensors) -> Tensors:
    grad_out, grad_lse = case.above(leaves["query"].dtype)
    above = (grad_out.to(out), grad_lse.to(lse))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), above, materialize_grads=True)
    named = {"out": out, "lse": lse} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


@functools.lru_cache(maxsize=64)
def oracle(case: Case, dtype: torch.dtype) -> Tensors:
    return naive(case, case.tensors(dtype), torch.float64)


@functools.lru_cache(maxsize=64)
def yardstick(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """As tolerance.yardstick."""
    low = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(low).eps
    shuffle, worst = torch.Generator().manual_seed(case.seed), {}
    for n in range(tolerance.DRAWS):
        drawn = case if n % 2 == 0 else replace(case, seed=case.seed + 1000 * n)
        tensors, exact = drawn.tensors(low), oracle(drawn, low)
        measured = naive(drawn, tensors, low, shuffle)
        if low != torch.float32:
            measured["lse"] = naive(drawn, tensors, torch.float32, shuffle)["lse"]
        for name, tensor in measured.items():
            worst[name] = max(worst.get(name, 0.0), scale * tolerance.error(tensor, exact[name]))
    return worst


def check(case: Case, dtype: torch.dtype, actual: Tensors) -> None:
    factor = (3 if case.softcap else 2) + (dtype == torch.float64)
    expected, allowed = oracle(case, dtype), yardstick(case, dtype)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        own = accumulation_dtype(dtype) if name == "lse" else dtype
        assert tensor.dtype == own, f"{name} is {tensor.dtype}"
        budget = factor * allowed[name] + tolerance.ulp(expected[name], own)
        tolerance.compare(f"{case} {dtype} {name}", tensor, expected[name], budget)


def poisoned(case: Case, tensors: Tensors, poison: float = NAN) -> Tensors:
    """The same with NaN where no key is: past the lengths, and in nodes that no sequence passes through."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("key", "value"):
        for b in range(case.batch):
            tensors[name][b, :, case.own(b) :] = poison
        for i, level in enumerate(case.levels):
            for node in range(level.nodes):
                tensors[f"{name}{i}"][node, :, level.valid(node) if node in level.node else 0 :] = poison
    return tensors


def attend(case: Case, tensors: Tensors, backend: str | None) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """out, lse and the leaves that they come from."""
    device = tolerance.device_of(backend or "")
    leaves = {name: tensor.detach().to(device).requires_grad_() for name, tensor in tensors.items()}
    seen, slopes = case.seen(), case.slopes()

    def integers(values: tuple[int, ...] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int64, device=device)

    options = {
        **case.options(),
        "suffix_lens": integers(case.suffix_lens),
        "block_mask": None if seen is None else flashx.BlockMask.from_dense(seen.to(device), (16, 16)),
        "alibi_slopes": None if slopes is None else slopes.to(device),
        "sinks": leaves.get("sinks"),
        "return_lse": True,
        "backend": backend,
    }
    query, key, value = (leaves[name] for name in ("query", "key", "value"))
    if case.groups:
        prefix = [leaves[name] if case.groups > 1 else leaves[name][0] for name in ("key0", "value0")]
        return *shared_prefix_attention(query, *prefix, key, value, **options), leaves
    levels = []
    for i, level in enumerate(case.levels):
        node = integers(level.node)
        assert node is not None
        levels.append(PrefixLevel(leaves[f"key{i}"], leaves[f"value{i}"], node, integers(level.lens)))
    return *tree_attention(query, levels, key, value, **options), leaves


def run(case: Case, tensors: Tensors, backend: str | None) -> Tensors:
    return results(case, *attend(case, tensors, backend))
