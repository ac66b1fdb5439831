"""The check that comes before the clock: every result against an oracle in float64.

    err(implementation) <= 2 * err(naive attention in the same dtype) + 1 ulp        (3 with softcap)

Errors are maxima over a tensor, the ulp is the dtype's at the oracle's largest value; flashx's tests have the same
budget. Oracle and yardstick attend one sequence and one key head at a time, on the case's dense form; gradients of keys
that several sequences share are summed over them. Large cases are checked on some of their heads, sequences and
(forward) rows: the outputs are those of the full-size call, only the comparison looks at a part. In small ones naive
attention's error is the largest over several draws of the inputs, since over a few elements an error is luck. float64
has no more exact oracle: there float32's naive error serves, scaled by the ratio of the epsilons, and the oracle's own
error is one more of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

import flashx
from flashx.problem import accumulation_dtype

from .cases import DTYPES, Case, Inputs
from .implementations import Attend

# "out" and "grad_" with each leaf's name, as far as the case's direction has them.
Results = dict[str, torch.Tensor]

# (query, key) pairs over all heads: the most that are compared (but always one unit, see below), and the most that are
# in memory at a time.
CHECKED_PAIRS = 2**22
CHUNK_PAIRS = 2**20
# The most units that are compared, however small.
UNITS = 32
# The most pairs of one sequence and key head; of longer ones a forward is compared on some of the rows.
SEQUENCE_PAIRS = 2**26
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


class Unit(NamedTuple):
    """What can be compared by itself: sequences that share keys (forward: just one sequence), and a key head."""

    sequences: Sequence[int]
    head: int


class Oracle:
    """A case's exact results on some of its units, and the budgets that follow."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        families = [[b] for b in range(case.sequences)] if case.direction == "fwd" else case.families()
        count, pairs = self._count(families)
        total = len(families) * case.kv_heads
        # Spread over sequences and heads, and with the last one, where wrong strides show.
        places = [total - 1 - index * total // count for index in range(count)]
        self.units = [Unit(families[place // case.kv_heads], place % case.kv_heads) for place in places]
        self.seen = [self._seen(inputs, unit) for unit in self.units]
        self.expected = self._results(inputs, torch.float64, _exact)

        dtype = DTYPES[case.dtype]
        low = torch.float32 if dtype == torch.float64 else dtype
        factor: float = 3 if case.softcap else 2
        if dtype == torch.float64:
            factor = (factor + 1) * torch.finfo(dtype).eps / torch.finfo(low).eps
        errors = dict.fromkeys(self.expected, 0.0)
        for draw in range(min(max(ENOUGH_PAIRS // (count * pairs), 1), DRAWS)):
            drawn = case.inputs(seed=draw).to(inputs.device) if draw else inputs
            exact = self._results(drawn, torch.float64, _exact) if draw else self.expected
            rough = self._results(drawn, low, _naive)
            errors = {name: max(errors[name], error(rough[name], exact[name])) for name in errors}
        self.budgets = {name: factor * errors[name] + _ulp(expected, dtype) for name, expected in self.expected.items()}

    def check(self, results: Results) -> dict[str, Accuracy]:
        """The accuracy of each result of a full-size call."""
        accuracy = {}
        for name, expected in self.expected.items():
            leaf = "query" if name == "out" else name.removeprefix("grad_")
            actual = torch.cat(
                [self._part(leaf, results[name], unit, seen) for unit, seen in zip(self.units, self.seen, strict=True)]
            )
            accuracy[name] = Accuracy(error(actual, expected), self.budgets[name])
        return accuracy

    def _count(self, families: Sequence[Sequence[int]]) -> tuple[int, int]:
        """How many units are compared, and the (query, key) pairs of one, on average."""
        case = self.case
        heads = case.q_heads // case.kv_heads
        pairs = sum(math.prod(case.lengths(b)) for b in range(case.sequences)) * heads // len(families)
        count = min(max(CHECKED_PAIRS // max(pairs, 1), 1), UNITS, len(families) * case.kv_heads)
        return count, max(pairs, 1)

    def _part(self, leaf: str, tensor: torch.Tensor, unit: Unit, seen: Results) -> torch.Tensor:
        """A unit's part of a leaf or of something laid out like it, flat; of keys only those that it has to do with."""
        part = self.case.head(leaf, tensor, unit.head)
        if leaf != "query":
            return part[seen[leaf]]
        rows = [_chosen(self.case.rows(part, b), _chunks(self.case, b)) for b in unit.sequences]
        return torch.cat([some.flatten() for some in rows])

    def _heads(self, inputs: Inputs, unit: Unit, dtype: torch.dtype) -> Results:
        """The unit's head of each leaf; autograd follows keys and values."""
        heads = {}
        for name, leaf in inputs.leaves.items():
            heads[name] = self.case.head(name, leaf, unit.head).detach().to(dtype)
            if self.case.direction != "fwd" and name != "query":
                heads[name].requires_grad_()
        return heads

    def _seen(self, inputs: Inputs, unit: Unit) -> Results:
        """For each leaf that holds keys or values, which of its elements the unit's dense form has."""
        if self.case.direction == "fwd":
            return {}
        leaves = self._heads(inputs, unit, torch.float32)
        counts = self._pulled_back(leaves, unit, lambda b, key, value: (torch.ones_like(key), torch.ones_like(value)))
        return {name: count > 0 for name, count in counts.items()}

    def _pulled_back(
        self,
        leaves: Results,
        unit: Unit,
        gradients: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> Results:
        """Gradients of the leaves from those of each sequence's keys and values, summed over the sequences."""
        names = [name for name in leaves if name != "query"]
        sums = {name: torch.zeros_like(leaves[name]) for name in names}
        for b in unit.sequences:
            key, value = self.case.keys(leaves, b)
            grads = gradients(b, key.detach(), value.detach())
            parts = torch.autograd.grad((key, value), [leaves[name] for name in names], grads)
            for name, part in zip(names, parts, strict=True):
                sums[name] += part
        return sums

    def _results(self, inputs: Inputs, dtype: torch.dtype, step: _Step) -> Results:
        """The results of all units, flat, one after the other."""
        parts = [
            self._unit_results(inputs, unit, seen, dtype, step)
            for unit, seen in zip(self.units, self.seen, strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _unit_results(self, inputs: Inputs, unit: Unit, seen: Results, dtype: torch.dtype, step: _Step) -> Results:
        case, wide = self.case, accumulation_dtype(dtype)
        leaves = self._heads(inputs, unit, wide)
        grad_out = case.head("query", inputs.grad_out, unit.head)
        sinks = inputs.constants.get("sinks")
        if sinks is not None:
            sinks = sinks.unflatten(0, (case.kv_heads, -1))[unit.head].to(dtype)
        rows: dict[str, list[torch.Tensor]] = {"out": [], "grad_query": []}

        def attend(b: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sequence = _Sequence(
                case.rows(leaves["query"], b).to(dtype),
                key.to(dtype),
                value.to(dtype),
                case.rows(grad_out, b).to(dtype),
            )
            results = _by_rows(case, b, sequence, sinks, inputs.constants.get("bias"), step)
            for name in rows.keys() & results.keys():
                rows[name].append(_chosen(results[name], _chunks(case, b)).flatten())
            return (results["grad_key"], results["grad_value"]) if case.direction != "fwd" else (key, value)

        if case.direction == "fwd":
            for b in unit.sequences:
                attend(b, *case.keys(leaves, b))
            return {"out": torch.cat(rows["out"])}
        summed = self._pulled_back(leaves, unit, attend)
        return {name: torch.cat(parts) for name, parts in rows.items()} | {
            f"grad_{name}": grad[seen[name]] for name, grad in summed.items()
        }


def run(case: Case, attend: Attend, inputs: Inputs) -> Callable[[], Results]:
    """The call to check and to time: attend in the case's direction."""
    if case.direction == "fwd":
        tensors = tuple(inputs.leaves.values())
        return lambda: {"out": attend(*tensors)}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()}
    tensors, names = tuple(leaves.values()), [f"grad_{name}" for name in leaves]

    def backward(out: torch.Tensor, retain_graph: bool) -> Results:
        grads = torch.autograd.grad(out, tensors, inputs.grad_out, retain_graph=retain_graph)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    if case.direction == "both":
        return lambda: backward(attend(*tensors), retain_graph=False)
    out = attend(*tensors)
    return lambda: backward(out, retain_graph=True)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance; NaN if anything is NaN."""
    return (actual.double() - expected).abs().max().item() if expected.numel() else 0.0


class _Sequence(NamedTuple):
    """Dense tensors of one sequence and one key head: (1, group, Lq, D), (1, 1, Lk, D), ..."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor


class _Logits(NamedTuple):
    """What shapes some rows' logits."""

    visible: torch.Tensor  # (rows, Lk), bool
    bias: torch.Tensor | None  # (rows, Lk)
    sinks: torch.Tensor | None  # (group,)
    softcap: float


def _chunks(case: Case, b: int) -> list[range]:
    """The rows of a sequence, some at a time; of a long one's forward not all, but spread, and with the last ones."""
    q_len, k_len = case.lengths(b)
    per_row = max(case.q_heads // case.kv_heads * k_len, 1)
    count = max(CHUNK_PAIRS // per_row, 1)
    chunks = [range(start, min(start + count, q_len)) for start in range(0, q_len, count)]
    most = max(SEQUENCE_PAIRS // (count * per_row), 1)
    if case.direction != "fwd" or len(chunks) <= most:
        return chunks
    return [chunks[len(chunks) - 1 - index * len(chunks) // most] for index in reversed(range(most))]


def _chosen(tensor: torch.Tensor, chunks: Sequence[range]) -> torch.Tensor:
    """Those rows of (1, group, Lq, D)."""
    if sum(map(len, chunks)) == tensor.shape[2]:
        return tensor
    return torch.cat([tensor[:, :, rows.start : rows.stop] for rows in chunks], dim=2)


# What _by_rows does with some query rows; the last argument says whether to differentiate.
_Step = Callable[[_Sequence, _Logits, bool], Results]


def _by_rows(
    case: Case, b: int, sequence: _Sequence, sinks: torch.Tensor | None, bias: torch.Tensor | None, step: _Step
) -> Results:
    """A sequence in the case's direction, some query rows at a time, so that the score matrix stays small."""
    query, key, value, grad_out = sequence
    backward = case.direction != "fwd"
    dtype = accumulation_dtype(query.dtype)
    results = {"out": torch.empty_like(grad_out)}
    if backward:
        results["grad_query"] = torch.empty_like(query)
        results["grad_key"], results["grad_value"] = (torch.zeros_like(t, dtype=dtype) for t in (key, value))
    for some in _chunks(case, b):
        rows = (slice(None), slice(None), slice(some.start, some.stop))
        logits = _Logits(
            case.visible(b, some, query.device),
            None if bias is None else bias[0, 0, some.start : some.stop].to(query.dtype),
            sinks,
            case.softcap,
        )
        part = step(_Sequence(query[rows], key, value, grad_out[rows]), logits, backward)
        for name, tensor in part.items():
            if name in ("out", "grad_query"):
                results[name][rows] = tensor
            else:
                results[name] += tensor
    return results


def _exact(sequence: _Sequence, logits: _Logits, backward: bool) -> Results:
    """flashx's reference, differentiated by autograd where asked."""
    leaves = [tensor.detach().requires_grad_(backward) for tensor in sequence[:3]]
    visible = logits.visible
    bias = visible if logits.bias is None else logits.bias.masked_fill(~visible, -torch.inf)
    out = flashx.attention(
        leaves[0], leaves[1], leaves[2], bias=bias, softcap=logits.softcap, sinks=logits.sinks, backend="reference"
    )
    if not backward:
        return {"out": out}
    grads = torch.autograd.grad(out, leaves, sequence.grad_out)
    return {"out": out.detach(), **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))}


def _naive(sequence: _Sequence, logits: _Logits, backward: bool) -> Results:
    """Naive attention in the tensors' dtype.

    The backward starts from out and lse, as it must in every implementation that does not keep the weights: Dao,
    "FlashAttention-2", section 3.1. Autograd's softmax, which keeps them, is exact where a row sees a single key.
    """
    query, key, value, grad_out = sequence
    scale = query.shape[-1] ** -0.5
    scores = query @ key.mT * scale
    slope: torch.Tensor | float = 1.0
    if logits.softcap:
        capped = torch.tanh(scores / logits.softcap)
        scores, slope = logits.softcap * capped, 1 - capped * capped
    if logits.bias is not None:
        scores = scores + logits.bias
    scores = scores.masked_fill(~logits.visible, -torch.inf)
    if logits.sinks is not None:  # one more key, whose value is 0
        scores = torch.cat([scores, logits.sinks[:, None, None].expand(*scores.shape[1:3], 1)[None]], dim=-1)
    keys = key.shape[2]
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    out = scores.softmax(-1).masked_fill(empty, 0)[..., :keys] @ value
    if not backward:
        return {"out": out}
    lse = scores.to(accumulation_dtype(query.dtype)).logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(empty, 0).to(query.dtype)[..., :keys]
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = weights * (grad_out @ value.mT - delta) * slope
    return {
        "out": out,
        "grad_query": grad_scores @ key * scale,
        "grad_key": (grad_scores.mT @ query * scale).sum(1, keepdim=True),
        "grad_value": (weights.mT @ grad_out).sum(1, keepdim=True),
    }


def _ulp(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The dtype's unit in the last place at the largest value."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
