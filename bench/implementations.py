"""The implementations that are compared: flashx, torch's attention in every form it has, and naive attention.

Peers that are packages of their own are in peers.py, and so is the registry.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# By name: flashx.patch() changes torch.nn.functional, and flashx must not be compared with itself.
from torch.nn.functional import scaled_dot_product_attention as sdpa

import flashx
from flashx import dispatch
from flashx.attention import Explanation

from .cases import CAUSAL, DTYPES, FULL, Case, Dense, Inputs, Leaves, Size, Window
from .prefixes import Shared
from .sparse import BlockSparse, Neighborhood

# A case's leaves -> out, laid out as the case has it; autograd gives the gradients.
Attend = Callable[..., torch.Tensor]
# Dense query, key, value (B, H, L, D) -> out.
DenseAttend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Dense key, value -> the same in another form.
Arrange = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# Naive attention keeps a handful of (B, H, Lq, Lk) matrices; above this size for one of them it is left out.
NAIVE_LIMIT = 2**30
# Above this size for a mask, or for keys that are not shared, the dense form is left out.
DENSE_LIMITS = {"cpu": 2**32, "cuda": 2**35}


class Refused(Exception):
    """A case that an implementation does not take; the arguments are the reasons."""


class Implementation(Protocol):
    """One way to compute attention. ``kinds``: the cases that it has to do with; it gets no row for others."""

    @property
    def kinds(self) -> tuple[type[Case], ...]: ...

    def absent(self, device: str) -> str | None:
        """Why it cannot run at all on such a device here; None if it can. Asked once per run."""

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        """What is timed; masks and other things that a model makes once are made here, outside the timing.

        Raises:
            Refused: it cannot run the case.
        """


class Flashx:
    """flashx's function for the variant, with the backend that dispatch chooses, or with a named one."""

    kinds = (Case,)

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def absent(self, device: str) -> str | None:
        # Twins of the kernels that flashx itself would choose, as peers on a GPU.
        return f"needs a GPU, this run is on the {device}" if self.backend and device != "cuda" else None

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        function, bind, options = case.call(inputs)
        options = {**options, "backend": self.backend}
        explained: Any = flashx.explain(function, *bind(*inputs.leaves.values()), **options)
        for level in getattr(explained, "levels", [explained]):
            if reasons := self._against(level, inputs.device.type):
                raise Refused(*reasons)
        return lambda *leaves: function(*bind(*leaves), **options)

    def _against(self, explained: Explanation, device: str) -> list[str]:
        # The reference takes everything, but it is naive attention, which has a row of its own.
        if explained.backend not in (None, "reference"):
            return []
        backends = dispatch.BACKENDS.items()
        here = [name for name, backend in backends if backend.AUTOMATIC and device == backend.DEVICE]
        names = [self.backend] if self.backend else here
        return [f"{name}: {reason}" for name in names for reason in explained.refusals[name]]


def on_dense(case: Case, inputs: Inputs, attend: DenseAttend, arrange: Arrange | None = None) -> Attend:
    """An attention over the case's dense form: concatenated, padded, contiguous; ``arrange`` changes it further.

    Without a gradient the dense form is made beforehand, as if a model had kept it so all along.
    """
    per_key = case.kv_heads * (case.head_dim + case.value_dim) * DTYPES[case.dtype].itemsize
    _check_size("the keys of all sequences take", case.sequences * _longest(case)[1] * per_key, inputs.device)

    def arranged(leaves: Leaves) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key, value = case.keys(leaves)
        return case.rows(leaves["query"]), *(arrange(key, value) if arrange else (key, value))

    if case.direction == "fwd":
        dense = arranged(inputs.leaves)
        return lambda *_: case.unrows(attend(*dense))
    names = list(inputs.leaves)
    return lambda *leaves: case.unrows(attend(*arranged(dict(zip(names, leaves, strict=True)))))


def _check_size(what: str, size: int, device: torch.device) -> None:
    limit = DENSE_LIMITS[device.type]
    if size > limit:
        raise Refused(f"{what} {_gib(size)}, more than {_gib(limit)}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _longest(case: Case) -> Size:
    """Rows and keys of the dense form."""
    rows, keys = zip(*map(case.lengths, range(case.sequences)), strict=True)
    return max(rows), max(keys)


def dense_mask(case: Case, inputs: Inputs) -> Window | torch.Tensor:
    """The case's mask in dense form, with its bias: FULL, CAUSAL (top-left), bool, or added to the logits."""
    _check_size("a mask takes", math.prod(_longest(case)), inputs.device)
    mask, bias = case.mask(inputs.device), inputs.constants.get("bias")
    if bias is None:
        return mask
    if isinstance(mask, tuple):
        mask = torch.ones(bias.shape[2:], dtype=torch.bool, device=bias.device)
        mask = mask if case.mask(inputs.device) == FULL else mask.tril()
    return bias.masked_fill(~mask, -torch.inf)


class Torch:
    """scaled_dot_product_attention, told as much about the mask as its signature allows.

    Keys at the beginning that no row sees are cut off. Sinks, which it does not have, are one more key: its logit is
    the mask's, its value 0.
    """

    kinds = (Case,)

    def __init__(self, backend: SDPBackend | None = None, device: str | None = None) -> None:
        self.backend, self.device = backend, device

    def absent(self, device: str) -> str | None:
        return None if self.device in (None, device) else f"torch has it on {self.device} only"

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        if case.softcap:
            raise Refused("torch's attention has no softcap")
        mask, first = _cut(dense_mask(case, inputs))
        if case.sinks:
            mask = self._with_sinks(case, inputs, mask, first)
        options: dict[str, Any] = {"enable_gqa": case.q_heads != case.kv_heads}
        if isinstance(mask, torch.Tensor):
            options["attn_mask"] = mask
        elif mask == CAUSAL:
            options["is_causal"] = True

        def arrange(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            key, value = key[:, :, first:], value[:, :, first:]
            if case.sinks:
                key, value = (torch.nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
            return key, value

        attend = on_dense(case, inputs, lambda query, key, value: self._attend(query, key, value, options), arrange)
        if self.backend is not None:
            self._try(attend, inputs)
        return attend

    def _try(self, attend: Attend, inputs: Inputs) -> None:
        """A backend by itself says only when it is called that it does not take a case."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attend(*inputs.leaves.values())
        except RuntimeError as error:
            if str(error).startswith(("No available", "No viable")):
                raise Refused(f"torch: {str(error).splitlines()[0]}") from None
            raise

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        only: AbstractContextManager[None] = nullcontext() if self.backend is None else sdpa_kernel(self.backend)
        with only:
            return sdpa(query, key, value, **options)

    def _with_sinks(self, case: Case, inputs: Inputs, mask: Window | torch.Tensor, first: int) -> torch.Tensor:
        """The mask added to the logits, of each head, with the sinks' column."""
        q_len, k_len = _longest(case)
        k_len -= first
        size = case.q_heads * q_len * k_len * DTYPES[case.dtype].itemsize
        if size > NAIVE_LIMIT:
            raise Refused(f"sinks need a mask for each head, {_gib(size)}, more than {_gib(NAIVE_LIMIT)}")
        if isinstance(mask, tuple):
            shown = torch.ones(q_len, k_len, dtype=torch.bool, device=inputs.device)
            mask = shown.tril() if mask == CAUSAL else shown
        sinks = inputs.constants["sinks"]
        if mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=sinks.dtype, device=sinks.device).masked_fill(~mask, -torch.inf)
        shape = torch.broadcast_shapes(mask.shape, (1, case.q_heads, q_len, 1))[:3]
        return torch.cat([mask.expand(*shape, k_len), sinks[:, None, None].expand(*shape, 1)], dim=-1)


def _cut(mask: Window | torch.Tensor) -> tuple[Window | torch.Tensor, int]:
    """The mask without the keys at the beginning that no row sees, and how many they are."""
    if isinstance(mask, tuple) or mask.dtype != torch.bool:
        return mask, 0
    seen = mask.flatten(0, -2).any(0)
    first = int(seen.int().argmax()) if seen.any() else 0
    rest = mask[..., first:]
    return (FULL if rest.all() else rest), first


class Naive:
    """Softmax of the whole score matrix, in the case's dtype: the textbook formula line by line."""

    kinds = (Case,)

    def absent(self, device: str) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        q_len, k_len = _longest(case)
        size = case.sequences * case.q_heads * q_len * k_len * DTYPES[case.dtype].itemsize
        if size > NAIVE_LIMIT:
            raise Refused(f"a score matrix takes {_gib(size)}, more than {_gib(NAIVE_LIMIT)}")
        mask = dense_mask(case, inputs)
        sinks = inputs.constants.get("sinks")
        if isinstance(mask, tuple) and mask == CAUSAL:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=inputs.device).tril()
        shown = mask if isinstance(mask, torch.Tensor) else None
        return on_dense(case, inputs, lambda query, key, value: naive(query, key, value, shown, case.softcap, sinks))


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Naive attention; mask is True where a row sees a key, or added to the logits; None shows everything."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) if group > 1 else tensor for tensor in (key, value))
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None and sinks is None:
        return logits.softmax(-1) @ value
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        extra = sinks[:, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, extra], dim=-1).softmax(-1)[..., :-1] @ value
    # A row that sees no key has 0 / 0 everywhere; its output is 0.
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.softmax(-1).masked_fill(empty, 0) @ value


class FlashxConcatenated:
    """flashx.attention on each sequence's own copy of the keys that it shares: what sharing saves."""

    kinds = (Shared,)

    def absent(self, device: str) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        assert isinstance(case, Shared)
        options = {"causal": True, **case.options(inputs)}
        return on_dense(case, inputs, lambda *dense: flashx.attention(*dense, **options))


class TorchCascade:
    """Shared keys by torch's own kernels: one call for each level, its sequences folded into rows, merged by lse."""

    kinds = (Shared,)

    def absent(self, device: str) -> str | None:
        return None if device in ("cpu", "cuda") else f"not written for {device}"

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        assert isinstance(case, Shared)
        if case.direction != "fwd":
            raise Refused("torch's log-sum-exp has no gradient")
        if case.rows_each > 1 or case.softcap or case.sinks:
            raise Refused("only for one query each, without softcap or sinks")
        if inputs.device.type == "cuda" and DTYPES[case.dtype] not in (torch.float16, torch.bfloat16):
            raise Refused("torch's flash kernel takes half precision only")
        nodes = [count for count, _ in case.levels] + [case.sequences]

        def attend(query: torch.Tensor, *stores: torch.Tensor) -> torch.Tensor:
            parts = []
            for count, key, value in zip(nodes, stores[::2], stores[1::2], strict=True):
                out, lse = flash_with_lse(_folded(query, count, case.kv_heads), key, value)
                parts.append((_unfolded(out, query.shape[:2]), _unfolded(lse[..., None], query.shape[:2])[..., 0]))
            return _merged(parts)

        return attend


def _folded(query: torch.Tensor, nodes: int, kv_heads: int) -> torch.Tensor:
    """(B, Hq, 1, D) -> (nodes, Hkv, B / nodes * Hq / Hkv, D): all that read the same keys are rows of one problem."""
    split = query.unflatten(0, (nodes, -1)).unflatten(2, (kv_heads, -1))  # (nodes, each, Hkv, group, 1, D)
    return split.transpose(1, 2).flatten(2, 4)


def _unfolded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(nodes, Hkv, each * group, X) -> (B, Hq, 1, X)."""
    batch, heads = shape
    nodes, kv_heads = tensor.shape[:2]
    split = tensor.unflatten(2, (batch // nodes, heads // kv_heads))  # (nodes, Hkv, each, group, X)
    return split.transpose(1, 2).flatten(0, 1).flatten(1, 2)[:, :, None]


def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One result from those over disjoint keys: softmax of the lse weighs them."""
    weights = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
    outs = torch.stack([out for out, _ in parts])
    return (weights * outs).sum(0).to(outs.dtype)


def flash_with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash kernel without a mask, with the log-sum-exp that its public function keeps to itself."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False)
    else:
        out, lse = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False)[:2]
    return out, lse[..., : query.shape[2]]


class Flex:
    """flex_attention, compiled for the case; the compiler runs before the clock does."""

    kinds = (Dense, BlockSparse, Neighborhood)

    def absent(self, device: str) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        assert isinstance(case, (Dense, BlockSparse, Neighborhood))
        if case.dtype == "fp64":
            raise Refused("takes no float64")
        if case.direction != "fwd" and inputs.device.type == "cpu":
            raise Refused("compiled flex_attention has no backward on the CPU")
        if case.sinks or inputs.constants:
            raise Refused("written without sinks and bias")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Afresh for each case: dynamo gives up on a function that it has compiled too often.
        torch.compiler.reset()
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        q_len, k_len = case.lengths(0)
        mod = _mask_mod(case, inputs.device)
        block = None if mod is None else create_block_mask(mod, None, None, q_len, k_len, device=str(inputs.device))
        cap = case.softcap

        def softcap(score: Any, *_: Any) -> Any:
            return cap * torch.tanh(score / cap)

        options: dict[str, Any] = {"enable_gqa": case.q_heads != case.kv_heads, "block_mask": block}
        options["score_mod"] = softcap if cap else None
        return on_dense(case, inputs, lambda query, key, value: compiled(query, key, value, **options))


def _mask_mod(case: Dense | BlockSparse | Neighborhood, device: torch.device) -> Callable[..., Any] | None:
    """The case's mask as flex_attention takes it."""
    if isinstance(case, Dense):
        if case.interval.hides_nothing(case.q_len, case.k_len):
            return None
        (left, right), shift, first = case.window, case.interval.shift, case.sink_tokens

        def interval(b: Any, h: Any, q: Any, k: Any) -> Any:
            back = q + shift - k
            shown = k >= 0
            if left is not None:
                shown = shown & ((back <= left) | (k < first))
            return shown if right is None else shown & (-back <= right)

        return interval
    if isinstance(case, BlockSparse):
        blocks, block, causal = case.blocks().to(device), case.block, case.causal

        def by_block(b: Any, h: Any, q: Any, k: Any) -> Any:
            shown = blocks[q // block, k // block]
            return shown & (k <= q) if causal else shown

        return by_block
    _check_size("a mask takes", case.tokens**2, device)
    dense = case.visible(0, range(case.tokens), device)
    return lambda b, h, q, k: dense[q, k]
