"""The reference backend: naive attention, every step a line. It is the oracle, not a fast path."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import philox
from ..masks import dense_blocks
from ..problem import Carry, Gradients, Inputs, Problem, accumulation_dtype

NAME = "reference"
DEVICE = None
AUTOMATIC = True


def limits(problem: Problem) -> list[str]:
    """It takes everything."""
    return []


def why_not(problem: Problem) -> list[str]:
    return limits(problem)


def kernel(problem: Problem) -> str:
    return "reference/naive"


class Rows(NamedTuple):
    """Where the rows of a (B, L) batch lie in a (B', H, L', D) tensor: batch entries and rows, and which there are."""

    batch: torch.Tensor  # (B, L)
    row: torch.Tensor  # (B, L)
    real: torch.Tensor  # (B, L)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B', H, L', ...) -> (B, H, L, ...), zeros where there is no row."""
        taken = tensor[self.batch, :, self.row].transpose(1, 2)
        real = self.real[:, None]
        return torch.where(real if taken.dim() == 3 else real[..., None], taken, 0)

    def put(self, values: torch.Tensor, to: torch.Tensor) -> None:
        """The other way round; rows that nobody has keep what they hold."""
        to[self.batch[self.real], :, self.row[self.real]] = values.transpose(1, 2)[self.real].to(to.dtype)

    def add(self, values: torch.Tensor, to: torch.Tensor) -> None:
        """As put, the sum of what falls on one row."""
        index = (self.batch[self.real], self.row[self.real])
        to.transpose(1, 2).index_put_(index, values.transpose(1, 2)[self.real].to(to.dtype), accumulate=True)


class Layout(NamedTuple):
    """A ragged call, spread out: its rows and keys as a padded batch, and the tables that say where they stand."""

    queries: Rows
    keys: Rows
    diagonal: torch.Tensor  # (B, Lq): the key at distance 0
    offset: torch.Tensor  # (B, 1, 1): keys before key 0


def _layout(problem: Problem, inputs: Inputs) -> Layout:
    tables = inputs.sequences
    assert tables is not None
    q_begin, q_len, k_begin, k_len, shift, offset = tables.long()[:, :, None].unbind(1)
    batch, q, k = (torch.arange(n, device=tables.device) for n in (problem.batch, problem.q_len, problem.k_len))
    here = batch[:, None]
    key_batch = here if inputs.key.shape[0] != 1 else torch.zeros_like(here)
    absent = torch.zeros_like(here, dtype=torch.bool)
    if inputs.members is not None:  # of a group, all have query's rows
        q_begin, q_len = torch.zeros_like(q_begin), torch.full_like(q_len, problem.q_len)
        assert inputs.member_begin is not None
        place = torch.searchsorted(inputs.member_begin, batch, right=True, out_int32=True).long() - 1
        key_batch = torch.full_like(batch, -1).scatter(0, inputs.members.long(), place)[:, None]
        absent = key_batch < 0
    q_rows, k_rows = q_begin + q, k_begin + k
    queries = Rows(
        (torch.zeros_like(here) if problem.packed else here).expand_as(q_rows),
        q_rows.clamp(0, max(problem.q_rows - 1, 0)),
        (q < q_len) & (q_rows >= 0) & (q_rows < problem.q_rows) & ~absent,
    )
    real = (k < k_len) & (k_rows >= 0) & (k_rows < problem.k_rows) & ~absent
    if inputs.page_table is not None:
        assert problem.page is not None
        page = inputs.page_table.long().gather(1, (k_rows // problem.page).clamp(0, inputs.page_table.shape[1] - 1))
        keys = Rows(page.clamp(0, inputs.key.shape[0] - 1), k_rows % problem.page, real)
    else:
        keys = Rows(key_batch.clamp(min=0).expand_as(k_rows), k_rows.clamp(0, max(problem.k_rows - 1, 0)), real)
    return Layout(queries, keys, q + shift, offset[..., None])


def _visible(problem: Problem, inputs: Inputs, layout: Layout | None) -> torch.Tensor:
    """Boolean, broadcastable to (B, Hq, Lq, Lk): what interval mask, block mask and lengths leave."""
    device = inputs.query.device
    key = torch.arange(problem.k_len, device=device)
    if layout is None:
        visible = problem.mask.dense(problem.q_len, problem.k_len, device)
    else:
        visible = problem.mask.visible(layout.diagonal[..., None], key, layout.offset)
        visible = (visible & layout.keys.real[:, None] & layout.queries.real[..., None])[:, None]
    if inputs.block_map is not None:
        assert inputs.block_bits is not None and problem.block is not None
        lengths = (problem.q_len, problem.k_len)
        visible = visible & dense_blocks(inputs.block_map, inputs.block_bits, problem.block, *lengths)
    return visible


class Naive(NamedTuple):
    """Naive attention's intermediate results, (B, Hq, Lq, Lk) each but lse (B, Hq, Lq)."""

    weights: torch.Tensor  # softmax(logits), 0 where hidden
    kept: torch.Tensor  # dropout's factors: 0 or 1 / (1 - p)
    visible: torch.Tensor
    softcap_slope: torch.Tensor | float
    lse: torch.Tensor


def naive(problem: Problem, inputs: Inputs, layout: Layout | None = None) -> Naive:
    """The softmax of naive attention; key and value have query's heads, and a ragged call's rows are spread out."""
    query, key, _, bias, alibi_slopes, sinks, seed = inputs[:7]
    logits = query @ key.transpose(-1, -2) * problem.scale
    softcap_slope: torch.Tensor | float = 1.0
    if problem.softcap:
        tanh = torch.tanh(logits / problem.softcap)
        logits, softcap_slope = problem.softcap * tanh, 1 - tanh * tanh
    visible = _visible(problem, inputs, layout)
    if alibi_slopes is not None:
        q, k = (torch.arange(n, device=query.device) for n in (problem.q_len, problem.k_len))
        diagonal = q + problem.mask.shift if layout is None else layout.diagonal[:, None]
        logits = logits - alibi_slopes[..., None, None] * (diagonal[..., None] - k).abs()
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        logits, visible = logits + bias, visible & (bias != -torch.inf)
    logits = torch.where(visible, logits, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : problem.k_len]
    weights = torch.where(lse[..., None] == -torch.inf, 0, weights)
    kept = torch.ones((), dtype=query.dtype)
    if seed is not None:
        kept = philox.keep_mask(int(seed), problem.dropout_p, *weights.shape).to(weights)
        kept = kept / (1 - problem.dropout_p) if problem.dropout_p < 1 else kept
    return Naive(weights, kept, visible.expand_as(weights), softcap_slope, lse)


def forward(problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, carry: Carry | None = None) -> None:
    with torch.autocast(problem.device, enabled=False):
        layout = None if inputs.sequences is None else _layout(problem, inputs)
        dense = _prepare(problem, inputs, layout)
        if carry is not None:
            assert layout is not None
            _go_on(problem, dense, layout, out, lse, carry)
            return
        step = naive(problem, dense, layout)
        result = _visible_matmul(step.weights * step.kept, dense.value, step.visible)
        if layout is None:
            out.copy_(result)
            lse.copy_(step.lse)
        else:
            layout.queries.put(result, out)
            layout.queries.put(step.lse, lse)


def _go_on(
    problem: Problem, inputs: Inputs, layout: Layout, out: torch.Tensor, lse: torch.Tensor, carry: Carry
) -> None:
    """One more level of keys for the states; max is in natural units."""
    step = naive(problem, inputs._replace(sinks=None), layout)
    old_max, old_sum, acc = (layout.queries.take(part) for part in (carry.max, carry.sum, carry.acc))
    new_max = torch.maximum(old_max, step.lse)
    maxima, sums = [old_max, step.lse], [old_sum, torch.ones_like(old_sum)]
    accs = [acc, _visible_matmul(step.weights, inputs.value, step.visible)]
    if inputs.sinks is not None:
        maxima.append(inputs.sinks[:, None].expand_as(new_max))
        sums.append(sums[1])
        accs.append(torch.zeros_like(acc))
        new_max = torch.maximum(new_max, maxima[2])
    base = torch.where(new_max == -torch.inf, 0, new_max)
    factors = torch.exp(torch.stack(maxima) - base)
    total = (factors * torch.stack(sums)).sum(0)
    summed = torch.where(factors[..., None] == 0, 0, factors[..., None] * torch.stack(accs)).sum(0)
    if carry.suspend:
        for values, to in zip((new_max, total, summed), (carry.max, carry.sum, carry.acc), strict=True):
            layout.queries.put(values, to)
        return
    empty = total == 0
    safe = torch.where(empty, 1, total)
    layout.queries.put(summed / safe[..., None], out)
    layout.queries.put(torch.where(empty, -torch.inf, base + torch.log(safe)), lse)


def backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    gradients: Gradients,
) -> None:
    with torch.autocast(problem.device, enabled=False):
        layout = None if inputs.sequences is None else _layout(problem, inputs)
        dense = _prepare(problem, inputs, layout)
        rows = [out, grad_out, lse, torch.zeros_like(lse) if grad_lse is None else grad_lse]
        if layout is not None:
            rows = [layout.queries.take(tensor) for tensor in rows]
        out, grad_out, lse, grad_lse = (tensor.to(dense.query.dtype) for tensor in rows)
        _backward(problem, dense, layout, out, grad_out, lse, grad_lse, gradients)


def _backward(
    problem: Problem,
    inputs: Inputs,
    layout: Layout | None,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor,
    gradients: Gradients,
) -> None:
    query, key, value = inputs[:3]
    weights, kept, visible, softcap_slope, own_lse = naive(problem, inputs, layout)
    if gradients.adds_query:  # weights are relative to all keys of all levels
        share = torch.where(own_lse == -torch.inf, 0, torch.exp(own_lse - torch.where(lse == -torch.inf, 0, lse)))
        weights = weights * share[..., None]
    else:
        lse = own_lse
    delta = (grad_out * out).sum(-1) - grad_lse
    grad_weights = grad_out @ value.transpose(-1, -2)
    grad_logits = torch.where(visible, weights * (grad_weights * kept - delta[..., None]), 0)
    grad_scores = grad_logits * softcap_slope * problem.scale
    grad_scores = torch.where(visible, grad_scores, 0)
    seen_by = visible.transpose(-1, -2)
    results = (
        (_visible_matmul(grad_scores, key, visible), gradients.query),
        (_sum_groups(problem, _visible_matmul(grad_scores.transpose(-1, -2), query, seen_by)), gradients.key),
        (_sum_groups(problem, _visible_matmul((weights * kept).transpose(-1, -2), grad_out, seen_by)), gradients.value),
    )
    for i, (result, gradient) in enumerate(results):
        if layout is None:
            gradient.copy_(result)
        elif i > 0:
            layout.keys.add(result, gradient)
        elif gradients.adds_query:
            layout.queries.add(result, gradient)
        else:
            layout.queries.put(result, gradient)
    if gradients.bias is not None:
        gradients.bias.copy_(grad_logits.sum_to_size(gradients.bias.shape))
    if gradients.sinks is not None:
        assert inputs.sinks is not None
        weight = torch.exp(inputs.sinks[:, None] - lse)
        if layout is not None:  # rows of the padding have no sink
            weight = torch.where(layout.queries.real[:, None], weight, 0)
        gradients.sinks.copy_(-(weight * delta).sum((0, 2)))


def _prepare(problem: Problem, inputs: Inputs, layout: Layout | None) -> Inputs:
    """Query, key and value in the accumulation dtype, key and value repeated to query's heads, sequences spread out."""
    dtype = accumulation_dtype(problem.dtype)
    ratio = problem.q_heads // max(problem.kv_heads, 1)
    query, key, value = inputs[:3]
    if layout is not None:
        query, key, value = layout.queries.take(query), layout.keys.take(key), layout.keys.take(value)
    key, value = (tensor.to(dtype).repeat_interleave(ratio, dim=1) for tensor in (key, value))
    return inputs._replace(query=query.to(dtype), key=key, value=value)


def _sum_groups(problem: Problem, grad: torch.Tensor) -> torch.Tensor:
    """(B, Hq, Lk, D) -> (B, Hkv, Lk, D): the query heads of a group share their key head's gradient."""
    return grad.unflatten(1, (problem.kv_heads, -1)).sum(2) if problem.kv_heads else grad


def _visible_matmul(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """weights @ values, where NaN and inf in values count only for the rows that see them (0 * NaN is NaN)."""
    bad = ~values.isfinite()
    if not bad.any():
        return weights @ values
    touched = visible.to(weights.dtype) @ bad.to(weights.dtype) > 0
    return torch.where(touched, weights @ values, weights @ values.masked_fill(bad, 0))
