"""Checked calls of shared_prefix_attention and tree_attention, and how each of them runs.

Arguments are checked once, by ``checked``; from there on sizes and tables are what the operators expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import levels as level_operator
from . import ops
from .attention import explain_problem, operator_arguments
from .block_mask import BlockMask
from .checks import check_tensor, on_host
from .dispatch import Backend
from .prefix_plan import SharedPrefixExplanation, SharedPrefixPlan, TreeExplanation, plan
from .problem import Inputs, Problem, check_qkv, shape
from .varlen import sequence_table


class PrefixLevel(NamedTuple):
    """One level of a prefix tree: its nodes' keys, and the node that each sequence passes through.

    Attributes:
        key: (nodes, Hkv, Lmax, D).
        value: (nodes, Hkv, Lmax, Dv).
        node_of_sequence: (B,), integers on key's device: 0 to nodes - 1, or -1 for a sequence that has no node here.
        lens: (nodes,), integers on key's device: number of keys of each node, the first ones of Lmax. None: all.
    """

    key: torch.Tensor
    value: torch.Tensor
    node_of_sequence: torch.Tensor
    lens: torch.Tensor | None = None


class Options(NamedTuple):
    """What shapes the logits beside the keys' positions, as the operators take it."""

    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    block_mask: BlockMask | None
    left: int | None
    right: int | None
    sink_tokens: int
    scale: float
    softcap: float
    backend: str | None

    def blocks(self) -> tuple[Any, Any, int, int]:
        """The block mask's map, bits and block sizes."""
        mask = self.block_mask
        return (None, None, 0, 0) if mask is None else (mask.map, mask.bits, *mask.block)

    def one_call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sequences: torch.Tensor | None,
        page_table: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Arguments of torch.ops.flashx.attention."""
        block_map, bits, block_q, block_k = self.blocks()
        return (
            query, key, value, None, self.alibi_slopes, self.sinks, None, self.left, self.right,
            key.shape[2] - query.shape[2], self.scale, self.softcap, 0.0, self.backend,
            block_map, bits, sequences, None, None, page_table, self.sink_tokens, block_q, block_k,
        )  # fmt: skip

    def levels(
        self,
        query: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        sequences: list[torch.Tensor],
        members: list[torch.Tensor],
        begins: list[torch.Tensor],
    ) -> tuple[Any, ...]:
        """Arguments of torch.ops.flashx.level_attention."""
        block_map, bits, block_q, block_k = self.blocks()
        return (
            query, keys, values, sequences, members, begins, self.alibi_slopes, self.sinks, block_map, bits,
            self.left, self.right, self.sink_tokens, block_q, block_k, self.scale, self.softcap, self.backend,
        )  # fmt: skip


def checked_options(
    query: Any,
    key: Any,
    value: Any,
    causal: Any,
    window: Any,
    block_mask: Any,
    alibi_slopes: Any,
    softcap: Any,
    sinks: Any,
    scale: Any,
    backend: Any,
    sink_tokens: Any,
) -> Options:
    """The checked options of a call with suffixes key and value."""
    checked = operator_arguments(
        query, key, value, causal, window, block_mask, None, alibi_slopes, softcap, sinks, 0.0, scale, backend,
        sink_tokens=sink_tokens,
    )  # fmt: skip
    if block_mask is not None:
        want = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        have = block_mask.shape
        if have[2:] != want[2:] or any(n not in (1, m) for n, m in zip(have[:2], want[:2], strict=True)):
            raise ValueError(f"block_mask must broadcast to (batch, heads, q_len, suffix length) = {want}, got {have}")
    return Options(
        checked[4], checked[5], block_mask, checked[7], checked[8], sink_tokens, checked[10], checked[11], backend
    )


@dataclass(frozen=True)
class SharedPrefixCall:
    """A checked call of shared_prefix_attention; prefixes are (G, Hkv, Lp, D) and suffix_lens int64 in [0, Ls]."""

    query: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    suffix_lens: torch.Tensor | None
    options: Options

    @classmethod
    def checked(
        cls,
        query: torch.Tensor,
        prefix_key: Any,
        prefix_value: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        suffix_lens: Any,
        options: Options,
    ) -> SharedPrefixCall:
        check_qkv(query, key, value)
        for name, tensor in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
            check_tensor(name, tensor)
            if tensor.dim() not in (3, 4):
                raise ValueError(
                    f"{name} must have 3 or 4 dimensions ([groups,] heads, length, dim), got shape {shape(tensor)}"
                )
        first, second = (tensor[None] if tensor.dim() == 3 else tensor for tensor in (prefix_key, prefix_value))
        _check_prefix(("prefix_key", "prefix_value"), first, second, key, value)
        batch, groups = query.shape[0], first.shape[0]
        if groups == 0 or batch % groups:
            raise ValueError(f"prefix_key's groups must divide query's batch size {batch}, got {groups}")
        lens = _lengths("suffix_lens", suffix_lens, batch, query.device, key.shape[2])
        _check_total(first.shape[2] + key.shape[2])
        return cls(query, first, second, key, value, lens, options)

    def plan(self) -> SharedPrefixPlan:
        batch, q_heads, q_len, head_dim = self.query.shape
        groups, kv_heads, prefix_len, value_dim = self.prefix_value.shape
        return plan(
            batch, groups, q_heads, kv_heads, q_len, prefix_len, self.key.shape[2], head_dim, value_dim,
            self.query.dtype, self.query.device.type, block_mask=self.options.block_mask is not None,
        )  # fmt: skip

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        form = self.plan().form
        if form == "levels":
            return torch.ops.flashx.level_attention(*self.levels())
        if form == "concatenated":
            key, value = self._joined(self.prefix_key, self.key), self._joined(self.prefix_value, self.value)
            return torch.ops.flashx.attention(*self.one_call(key, value, self.prefix_key.shape[2]))
        return torch.ops.flashx.attention(*self.plain())

    def explain(self) -> SharedPrefixExplanation:
        chosen, backend = self.plan(), self.options.backend
        if chosen.form == "levels":
            problems = [problem for problem, _ in level_operator.described(self.levels())]
        elif chosen.form == "plain":
            problems = [ops.describe(self.plain())]
        else:
            length = self.prefix_key.shape[2]
            key, value = (_stand_in(tensor, length + tensor.shape[2]) for tensor in (self.key, self.value))
            problems = [ops.describe(self.one_call(key, value, length))]
        return SharedPrefixExplanation(chosen, tuple(explain_problem(problem, backend) for problem in problems))

    def described(self) -> tuple[list[tuple[Problem, Inputs]], Backend]:
        """What the operator makes of its arguments before it runs: of levels, or of prefixes or suffixes alone."""
        if self.plan().form == "plain":
            problem, inputs, chosen = ops.described(self.plain())
            return [(problem, inputs)], chosen
        levels = level_operator.described(self.levels())
        return levels, level_operator.choose(levels, self.options.backend)

    def levels(self) -> tuple[Any, ...]:
        """Arguments of level_attention: the groups, then every sequence for itself."""
        batch, q_len = self.query.shape[0], self.query.shape[2]
        groups, _, prefix_len, _ = self.prefix_key.shape
        device, lens, longest = self.query.device, self.suffix_lens, self.key.shape[2]
        rows = [
            [0, q_len, 0, prefix_len, longest + prefix_len - q_len, 0],
            [0, q_len, 0, longest, longest - q_len, prefix_len],
        ]
        tables = torch.tensor(rows, dtype=torch.int32, device=device)[:, None].repeat(1, batch, 1)
        if lens is not None:
            tables[..., 4] += lens - longest
            tables[1, :, 3] = lens
        members, begins = [], []
        if groups < batch:
            members = [torch.arange(batch, dtype=torch.int32, device=device)]
            begins = [torch.arange(0, batch + 1, batch // groups, dtype=torch.int32, device=device)]
        keys, values = [self.prefix_key, self.key], [self.prefix_value, self.value]
        return self.options.levels(self.query, keys, values, [tables[0], tables[1]], members, begins)

    def plain(self) -> tuple[Any, ...]:
        """Arguments of attention over the prefixes or the suffixes, where the others have no keys."""
        prefix, suffix = [self.prefix_key, self.prefix_value], [self.key, self.value]
        if self.prefix_key.shape[2] > 0 and self.query.shape[0] > 0:
            return self.one_call(_with_unused(prefix[0], suffix), prefix[1], prefix[0].shape[2])
        return self.one_call(_with_unused(suffix[0], prefix), suffix[1], 0)

    def one_call(self, key: torch.Tensor, value: torch.Tensor, prefix_len: int) -> tuple[Any, ...]:
        """Arguments of attention over sequences that begin with prefix_len keys that they do not share."""
        sequences = None
        if self.suffix_lens is not None:
            sequences = last_rows(self.suffix_lens + prefix_len, self.query.shape[2])
        return self.options.one_call(self.query, key, value, sequences)

    def _joined(self, prefix: torch.Tensor, suffix: torch.Tensor) -> torch.Tensor:
        groups, each = prefix.shape[0], suffix.shape[0] // prefix.shape[0]
        own = suffix.unflatten(0, (groups, each))
        return torch.cat([prefix[:, None].expand(-1, each, -1, -1, -1), own], dim=3).flatten(0, 1)


class _Level(NamedTuple):
    """A checked level: node (B,) int64, -1 where there is none; lens (nodes,) int64 or None."""

    key: torch.Tensor
    value: torch.Tensor
    node: torch.Tensor
    lens: torch.Tensor | None

    def lengths(self) -> torch.Tensor:
        """Keys of the level that each sequence has, (B,)."""
        length = self.key.shape[2] if self.lens is None else self.lens[self.node.clamp(min=0)]
        return torch.where(self.node < 0, 0, length)

    def groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """members and member_begin, as Inputs has them."""
        nodes, members = torch.sort(self.node, stable=True)
        begin = torch.searchsorted(nodes, torch.arange(self.key.shape[0] + 1, device=nodes.device), out_int32=True)
        return members.to(torch.int32), begin


@dataclass(frozen=True)
class TreeCall:
    """A checked call of tree_attention; empty levels are left out."""

    query: torch.Tensor
    levels: tuple[_Level, ...]
    key: torch.Tensor
    value: torch.Tensor
    suffix_lens: torch.Tensor | None
    options: Options

    @classmethod
    def checked(
        cls,
        query: torch.Tensor,
        levels: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        suffix_lens: Any,
        options: Options,
    ) -> TreeCall:
        if not isinstance(levels, Sequence):
            raise TypeError(f"levels must be a list of flashx.PrefixLevel, got {type(levels).__name__}")
        check_qkv(query, key, value)
        batch, device, suffix_len = query.shape[0], query.device, key.shape[2]
        taken, unused, total = [], [], suffix_len
        for i, level in enumerate(levels):
            name = f"levels[{i}]"
            if not isinstance(level, PrefixLevel):
                raise TypeError(f"{name} must be a flashx.PrefixLevel, got {type(level).__name__}")
            names = (f"{name}.key", f"{name}.value")
            for part, tensor in zip(names, level[:2], strict=True):
                check_tensor(part, tensor)
                if tensor.dim() != 4:
                    raise ValueError(
                        f"{part} must have 4 dimensions (nodes, heads, length, dim), got shape {shape(tensor)}"
                    )
            _check_prefix(names, level.key, level.value, key, value)
            nodes, length = level.key.shape[0], level.key.shape[2]
            node = check_integers(f"{name}.node_of_sequence", level.node_of_sequence, (batch,), device, (-1, nodes - 1))
            node = torch.where(node < nodes, node, -1)
            node_lens = _lengths(f"{name}.lens", level.lens, nodes, device, length)
            total += length
            if nodes == 0 or length == 0 or batch == 0:
                unused += [level.key, level.value]
            else:
                taken.append(_Level(level.key, level.value, node, node_lens))
        lens = _lengths("suffix_lens", suffix_lens, batch, device, suffix_len)
        _check_total(total)
        return cls(query, tuple(taken), _with_unused(key, unused), value, lens, options)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.levels:
            return torch.ops.flashx.level_attention(*self.arguments())
        lens, q_len = self.suffix_lens, self.query.shape[2]
        sequences = None if lens is None else last_rows(lens, q_len)
        return torch.ops.flashx.attention(*self.options.one_call(self.query, self.key, self.value, sequences))

    def explain(self) -> TreeExplanation:
        if self.levels:
            problems = [problem for problem, _ in level_operator.described(self.arguments())]
        else:
            problems = [ops.describe(self.options.one_call(self.query, self.key, self.value, None))]
        return TreeExplanation(tuple(explain_problem(problem, self.options.backend) for problem in problems))

    def arguments(self) -> tuple[Any, ...]:
        """Arguments of level_attention."""
        lengths = [level.lengths() for level in self.levels]
        own = self.suffix_lens
        lengths.append(torch.full_like(lengths[0], self.key.shape[2]) if own is None else own)
        ends = torch.stack(lengths).cumsum(0)  # (levels, B)
        begins = ends - torch.stack(lengths)
        zero, rows = torch.zeros_like(lengths[0]), torch.full_like(lengths[0], self.query.shape[2])
        sequences = [
            torch.stack([zero, rows, zero, length, ends[-1] - rows - begin, begin], dim=1).to(torch.int32)
            for length, begin in zip(lengths, begins, strict=True)
        ]
        groups = [level.groups() for level in self.levels]
        members, member_begins = ([group[i] for group in groups] for i in range(2))
        keys, values = [level.key for level in self.levels], [level.value for level in self.levels]
        return self.options.levels(
            self.query, [*keys, self.key], [*values, self.value], sequences, members, member_begins
        )


class _WithUnused(torch.autograd.Function):
    """The first tensor; the others have gradients 0, since they have no elements or nobody sees them."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *unused: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*unused)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.saved_tensors)


def _with_unused(tensor: torch.Tensor, unused: Sequence[torch.Tensor]) -> torch.Tensor:
    if torch.is_grad_enabled() and any(other.requires_grad for other in unused):
        return _WithUnused.apply(tensor, *unused)
    return tensor


def last_rows(lens: torch.Tensor, q_len: int) -> torch.Tensor:
    """Inputs.sequences of rows that are the last q_len of lens keys, each sequence in a batch entry of its own."""
    zero, rows = torch.zeros_like(lens), torch.full_like(lens, q_len)
    return sequence_table(zero, rows, zero, lens, lens - q_len)


def _stand_in(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """A tensor of another length, for its shape."""
    batch, heads, _, dim = tensor.shape
    return tensor.new_empty(()).expand(batch, heads, length, dim)


def _check_prefix(
    names: tuple[str, str], key: torch.Tensor, value: torch.Tensor, own_key: torch.Tensor, own_value: torch.Tensor
) -> None:
    """A prefix's key and value, four dimensions each, beside the suffixes'."""
    for name, tensor, own in ((names[0], key, own_key), (names[1], value, own_value)):
        if tensor.dtype != own.dtype:
            raise TypeError(f"{name} must have query's dtype {own.dtype}, got {tensor.dtype}")
        if tensor.device != own.device:
            raise ValueError(f"{name} must be on query's device {own.device}, got {tensor.device}")
        if tensor.shape[1] != own.shape[1] or tensor.shape[3] != own.shape[3]:
            raise ValueError(
                f"{name} must have the suffix's {own.shape[1]} heads and dim {own.shape[3]}, got shape {shape(tensor)}"
            )
        if tensor.shape[0] != key.shape[0] or tensor.shape[2] != key.shape[2]:
            raise ValueError(
                f"{name} must have {names[0]}'s length {key.shape[2]} and leading dimension {key.shape[0]}, "
                f"got shape {shape(tensor)}"
            )


def check_integers(
    name: str,
    tensor: Any,
    want: tuple[int, ...],
    device: torch.device,
    limits: tuple[int, int] | None = None,
) -> torch.Tensor:
    """An integer tensor as int64; values are checked where that waits for nobody."""
    check_tensor(name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be of integers, got {tensor.dtype}")
    if shape(tensor) != want:
        raise ValueError(f"{name} must have shape {want}, got {shape(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    tensor = tensor.to(torch.int64)
    if limits is not None and on_host(tensor):
        check_values(name, tensor, *limits)
    return tensor


def check_values(name: str, tensor: torch.Tensor, least: int, most: int) -> None:
    wrong = (tensor < least) | (tensor > most)
    if bool(wrong.any()):
        raise ValueError(f"{name} must be from {least} to {most}, got {int(tensor[wrong][0])}")


def _lengths(name: str, tensor: Any, count: int, device: torch.device, most: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    return check_integers(name, tensor, (count,), device, (0, most)).clamp(0, most)


def _check_total(length: int) -> None:
    if length >= 2**31:
        raise ValueError(f"prefix and suffix must have less than 2**31 keys together, got {length}")
