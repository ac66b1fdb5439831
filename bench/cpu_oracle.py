"""The check of cpu-report's rows: some heads and rows of a large call against an oracle in float64.

    err(call) <= 2 * err(naive attention in the same dtype) + 1 ulp

Errors are maxima over what is checked, the ulp is the dtype's at the oracle's largest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Results = dict[str, torch.Tensor]

GRADIENTS = ("grad_query", "grad_key", "grad_value")

# (query, key) pairs that are in memory at a time. Over fewer than that naive attention's error is luck, and the largest
# over several draws of the inputs counts, up to DRAWS.
CHUNK_PAIRS = 2**20
DRAWS = 8
# Query rows of a head that are checked, at most.
ROWS = 128


@dataclass(frozen=True, slots=True)
class Sample:
    """One head's attention problem, or some of its query rows: what the oracle computes.

    ``query`` (rows, D), ``key`` (Lk, D), ``value`` (Lk, Dv); ``visible`` (rows, Lk), bool, None: everything. With
    ``grad_out`` (rows, Dv) the gradients are checked too. ``pick`` takes the same part out of a call's results.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None
    pick: Callable[[Results], Results]
    grad_out: torch.Tensor | None = None

    @property
    def pairs(self) -> int:
        return self.query.shape[0] * self.key.shape[0]

    def redrawn(self, seed: int) -> Sample:
        generator = torch.Generator().manual_seed(seed)

        def draw(tensor: torch.Tensor) -> torch.Tensor:
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

        grad_out = None if self.grad_out is None else draw(self.grad_out)
        return Sample(draw(self.query), draw(self.key), draw(self.value), self.visible, self.pick, grad_out)

    def computed(self, dtype: torch.dtype) -> Results:
        """Naive attention in dtype, some rows at a time; the backward starts from out and lse (FlashAttention-2)."""
        query, key, value = (tensor.to(dtype) for tensor in (self.query, self.key, self.value))
        scale, wide = query.shape[-1] ** -0.5, torch.promote_types(dtype, torch.float32)
        outs, grads = [], [torch.zeros_like(tensor, dtype=wide) for tensor in (query, key, value)]
        for rows in torch.arange(len(query)).split(max(CHUNK_PAIRS // len(key), 1)):
            logits = query[rows] @ key.mT * scale
            if self.visible is not None:
                logits = logits.masked_fill(~self.visible[rows], -torch.inf)
            outs.append(logits.softmax(-1) @ value)
            if self.grad_out is None:
                continue
            grad_out = self.grad_out[rows].to(dtype)
            weights = torch.exp(logits - logits.to(wide).logsumexp(-1, keepdim=True)).to(dtype)
            delta = (grad_out * outs[-1]).sum(-1, keepdim=True)
            grad_logits = weights * (grad_out @ value.mT - delta) * scale
            grads[0][rows] = (grad_logits @ key).to(wide)
            grads[1] += grad_logits.mT @ query[rows]
            grads[2] += weights.mT @ grad_out
        results = {"out": torch.cat(outs)}
        return results if self.grad_out is None else results | dict(zip(GRADIENTS, grads, strict=True))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The largest error of one result, and how large it may be."""

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # not if it is NaN


class Oracle:
    """The exact results of some samples, and the budgets that follow."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.expected = [sample.computed(torch.float64) for sample in samples]
        dtype = samples[0].query.dtype
        errors = dict.fromkeys(self.expected[0], 0.0)
        for draw in range(min(max(CHUNK_PAIRS // sum(sample.pairs for sample in samples), 1), DRAWS)):
            for sample, exact in zip(samples, self.expected, strict=True):
                drawn = sample.redrawn(draw) if draw else sample
                exact = drawn.computed(torch.float64) if draw else exact
                rough = drawn.computed(dtype)
                errors = {name: max(errors[name], _distance(rough[name], exact[name])) for name in errors}
        largest = {name: max(exact[name].abs().max().item() for exact in self.expected) for name in errors}
        eps = torch.finfo(dtype).eps
        self.budgets = {name: 2 * errors[name] + math.ldexp(eps, math.frexp(largest[name])[1] - 1) for name in errors}

    def check(self, results: Results, factor: float = 1) -> dict[str, Accuracy]:
        parts = [sample.pick(results) for sample in self.samples]
        return {
            name: Accuracy(
                max(_distance(part[name], exact[name]) for part, exact in zip(parts, self.expected, strict=True)),
                factor * budget,
            )
            for name, budget in self.budgets.items()
        }


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest; infinite where anything is NaN, which max() could lose."""
    worst = (actual.double() - expected).abs().max().item()
    return math.inf if math.isnan(worst) else worst


def some_rows(count: int) -> torch.Tensor:
    """The first rows, the last ones, and some in between."""
    if count <= ROWS:
        return torch.arange(count)
    edge, generator = ROWS // 8, torch.Generator().manual_seed(0)
    between = edge + torch.randperm(count - 2 * edge, generator=generator)[: ROWS - 2 * edge]
    return torch.cat([torch.arange(edge), between.sort().values, torch.arange(count - edge, count)])


def dense_samples(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: Callable[[torch.Tensor], torch.Tensor] | None = None,
    grad_out: torch.Tensor | None = None,
) -> list[Sample]:
    """The first and the last head of (B, H, L, D): some rows, or with grad_out all of them of the last head.

    ``visible`` takes row numbers (rows, 1) to what they see, (rows, Lk).
    """
    batch, heads, q_len, _ = query.shape
    group = heads // key.shape[1]
    samples = []
    for b, h in sorted({(0, 0), (batch - 1, heads - 1)})[0 if grad_out is None else -1 :]:
        rows = some_rows(q_len) if grad_out is None else torch.arange(q_len)
        shown = None if visible is None else visible(rows[:, None])

        def pick(results: Results, b: int = b, h: int = h, rows: torch.Tensor = rows) -> Results:
            key_head = {"grad_key", "grad_value"}
            return {
                name: tensor[b, h // group] if name in key_head else tensor[b, h, rows]
                for name, tensor in results.items()
            }

        above = None if grad_out is None else grad_out[b, h, rows]
        samples.append(Sample(query[b, h, rows], key[b, h // group], value[b, h // group], shown, pick, above))
    return samples
