"""The check that comes before the clock: every result against an oracle in float64.

    err(implementation) <= 2 * err(naive attention in the same dtype) + 1 ulp

Errors are maxima over a tensor, the ulp is the dtype's at the oracle's largest value; flashx's tests have the same
budget. Large cases are checked on some of their heads: the outputs are those of the full-size call, only the comparison
looks at a part. In small ones naive attention's error is the largest over several draws of the inputs, since over a few
elements an error is luck. float64 has no more exact oracle: there float32's naive error serves, scaled by the ratio of
the epsilons, and the oracle's own error is one more of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import flashx
from flashx.masks import IntervalMask
from flashx.problem import accumulation_dtype

from .cases import DTYPES, Case, Inputs
from .implementations import Attend

# "out" and the gradients "grad_query", "grad_key", "grad_value", as far as the case's direction has them.
Results = dict[str, torch.Tensor]

GRADIENTS = ("grad_query", "grad_key", "grad_value")

# (query, key) pairs over all heads: the most that are compared (but always a whole group of query heads), and the most
# that are in memory at a time.
CHECKED_PAIRS = 2**22
CHUNK_PAIRS = 2**20
# A case of fewer pairs gets its budget from several draws, up to DRAWS.
ENOUGH_PAIRS = 2**20
DRAWS = 8


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Largest error of one tensor and how large it may be."""

    error: float
    budget: float

    @property
    def share(self) -> float:
        """The error as a share of the budget; infinite if the error is NaN."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.budget if self.budget else self.error and math.inf

    @property
    def ok(self) -> bool:
        return self.share <= 1


class Oracle:
    """A case's exact results on some of its heads, and the budgets that follow."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        total, group = case.batch * case.kv_heads, case.q_heads // case.kv_heads
        pairs = max(group * case.q_len * case.k_len, 1)
        count = min(max(CHECKED_PAIRS // pairs, 1), total)
        # Spread over batch and heads, and with the last one, where wrong strides show.
        self.heads = [total - 1 - index * total // count for index in range(count)]
        self.kv_heads = case.kv_heads
        self.expected = _by_rows(case, self._parts(inputs, torch.float64), _exact)

        dtype = DTYPES[case.dtype]
        low = torch.float32 if dtype == torch.float64 else dtype
        factor = 3 * torch.finfo(dtype).eps / torch.finfo(low).eps if dtype == torch.float64 else 2
        errors = dict.fromkeys(self.expected, 0.0)
        for draw in range(min(max(ENOUGH_PAIRS // (count * pairs), 1), DRAWS)):
            drawn = Inputs(*(t.to(inputs.query.device) for t in case.inputs(seed=draw))) if draw else inputs
            exact = _by_rows(case, self._parts(drawn, torch.float64), _exact) if draw else self.expected
            rough = _by_rows(case, self._parts(drawn, low), _naive)
            errors = {name: max(errors[name], error(rough[name], exact[name])) for name in errors}
        self.budgets = {name: factor * errors[name] + _ulp(expected, dtype) for name, expected in self.expected.items()}

    def check(self, results: Results) -> dict[str, Accuracy]:
        """The accuracy of each result of a full-size call."""
        return {
            name: Accuracy(error(self._part(results[name]), expected), self.budgets[name])
            for name, expected in self.expected.items()
        }

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, H, L, D) -> (heads checked, H / Hkv, L, D): a key head with its query heads is a batch of its own."""
        return tensor.unflatten(1, (self.kv_heads, -1)).flatten(0, 1)[self.heads]

    def _parts(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        return Inputs(*(self._part(tensor).to(dtype) for tensor in inputs))


def run(case: Case, attend: Attend, inputs: Inputs) -> Callable[[], Results]:
    """The call to check and to time: attend in the case's direction."""
    query, key, value, grad_out = inputs
    if case.direction == "fwd":
        return lambda: {"out": attend(query, key, value)}
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (query, key, value))

    def backward(out: torch.Tensor, retain_graph: bool) -> Results:
        grads = torch.autograd.grad(out, leaves, grad_out, retain_graph=retain_graph)
        return {"out": out.detach(), **dict(zip(GRADIENTS, grads, strict=True))}

    if case.direction == "both":
        return lambda: backward(attend(*leaves), retain_graph=False)
    out = attend(*leaves)
    return lambda: backward(out, retain_graph=True)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance; NaN if anything is NaN."""
    return (actual.double() - expected).abs().max().item() if expected.numel() else 0.0


# What _by_rows does with some query rows: (inputs, visible (rows, Lk), whether to differentiate) -> results.
_Step = Callable[[Inputs, torch.Tensor, bool], Results]


def _by_rows(case: Case, inputs: Inputs, step: _Step) -> Results:
    """The case in its direction, some query rows at a time, so that the score matrix stays small."""
    query, key, value, grad_out = inputs
    backward = case.direction != "fwd"
    dtype = accumulation_dtype(query.dtype)
    results = {"out": torch.empty_like(grad_out)}
    if backward:
        results["grad_query"] = torch.empty_like(query)
        results["grad_key"], results["grad_value"] = (torch.zeros_like(t, dtype=dtype) for t in (key, value))
    count = max(CHUNK_PAIRS // max(query.shape[0] * query.shape[1] * case.k_len, 1), 1)
    for start in range(0, case.q_len, count):
        rows = (slice(None), slice(None), slice(start, min(start + count, case.q_len)))
        some = Inputs(query[rows], key, value, grad_out[rows])
        mask = IntervalMask(*case.window, shift=case.mask.shift + start)
        for name, part in step(some, mask.dense(some.query.shape[2], case.k_len, query.device), backward).items():
            if name in ("out", "grad_query"):
                results[name][rows] = part
            else:
                results[name] += part
    return results


def _exact(inputs: Inputs, visible: torch.Tensor, backward: bool) -> Results:
    """flashx's reference, differentiated by autograd where asked."""
    leaves = [tensor.detach().requires_grad_(backward) for tensor in inputs[:3]]
    out = flashx.attention(leaves[0], leaves[1], leaves[2], bias=visible, backend="reference")
    if not backward:
        return {"out": out}
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    return {"out": out.detach(), **dict(zip(GRADIENTS, grads, strict=True))}


def _naive(inputs: Inputs, visible: torch.Tensor, backward: bool) -> Results:
    """Naive attention in the inputs' dtype; one key head.

    The backward starts from out and lse, as it must in every implementation that does not keep the weights: Dao,
    "FlashAttention-2", section 3.1. Autograd's softmax, which keeps them, is exact where a row sees a single key.
    """
    query, key, value, grad_out = inputs
    scale = query.shape[-1] ** -0.5
    logits = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    out = logits.softmax(-1).masked_fill(empty, 0) @ value
    if not backward:
        return {"out": out}
    lse = logits.to(accumulation_dtype(query.dtype)).logsumexp(-1, keepdim=True)
    weights = torch.exp(logits - lse).masked_fill(empty, 0).to(query.dtype)
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_logits = weights * (grad_out @ value.mT - delta)
    return {
        "out": out,
        "grad_query": grad_logits @ key * scale,
        "grad_key": (grad_logits.mT @ query * scale).sum(1, keepdim=True),
        "grad_value": (weights.mT @ grad_out).sum(1, keepdim=True),
    }


def _ulp(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The dtype's unit in the last place at the largest value."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
