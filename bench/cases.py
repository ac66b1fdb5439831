"""Cases: the attention problems that are measured, as data. Here what all variants share, and attention itself."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch

import flashx
from flashx.masks import IntervalMask

Direction = Literal["fwd", "bwd", "both"]
Size = tuple[int, int]
Window = tuple[int | None, int | None]
Leaves = Mapping[str, torch.Tensor]

DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd", "both")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

FULL: Window = (None, None)
CAUSAL: Window = (None, 0)

# The backward has five matrix products where the forward has two: S, dP, dQ, dK and dV, against S and O.
_FLOP_FACTOR: dict[Direction, float] = {"fwd": 1.0, "bwd": 2.5, "both": 3.5}


class Inputs(NamedTuple):
    """A case's tensors.

    Attributes:
        leaves: query, and what holds keys and values, in the order in which flashx's function takes them; what a
            backward differentiates.
        constants: tensors that have no gradient here: sinks, bias.
        grad_out: the gradient that comes in from above.
    """

    leaves: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    grad_out: torch.Tensor

    def to(self, device: torch.device | str) -> Inputs:
        """The tensors on another device."""
        leaves, constants = ({name: t.to(device) for name, t in part.items()} for part in self[:2])
        return Inputs(leaves, constants, self.grad_out.to(device))

    @property
    def device(self) -> torch.device:
        return self.grad_out.device


class Call(NamedTuple):
    """A call of flashx: ``function(*bind(*leaves), **options)``."""

    function: Callable[..., torch.Tensor]
    bind: Callable[..., tuple[Any, ...]]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(ABC):
    """One attention problem and the direction to run it in; a variant is a subclass. Sizes are in elements.

    Beside its own layout each case has a dense form, which the oracle and many peers work on: ``rows`` and ``keys``
    give query, key and value as (B, H, L, D), and ``visible`` says which row of a sequence sees which of its keys.

    Attributes:
        direction: "both" is the forward followed by the backward.
        softcap: as in ``flashx.attention``.
        sinks: whether each head has one more logit.
    """

    VARIANT: ClassVar[str]
    # Fields that a chart may go along, the best one first, and their titles.
    AXES: ClassVar[dict[str, str]]
    FORWARD_ONLY: ClassVar[bool] = False

    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "fp32"
    softcap: float = 0.0
    sinks: bool = False
    direction: Direction = "fwd"

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv-heads, got {self.q_heads} and {self.kv_heads}")
        if self.FORWARD_ONLY and self.direction != "fwd":
            raise ValueError(f"direction must be fwd for {self.VARIANT}, which has no backward, got {self.direction!r}")

    @abstractmethod
    def __str__(self) -> str: ...

    # What a variant is

    @property
    @abstractmethod
    def sequences(self) -> int:
        """Number of sequences."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each leaf."""

    @abstractmethod
    def call(self, inputs: Inputs) -> Call:
        """flashx's call. Masks, tables and other things that a model makes once are made here, outside the timing."""

    @abstractmethod
    def lengths(self, sequence: int) -> Size:
        """Rows and keys of a sequence."""

    @abstractmethod
    def pairs(self) -> int:
        """(query, key) pairs that a head's masks show, of all sequences: all that attention needs to compute."""

    @abstractmethod
    def visible(self, sequence: int, rows: range, device: torch.device) -> torch.Tensor:
        """Whether some rows of a sequence see its keys, (rows, keys)."""

    @abstractmethod
    def mask(self, device: torch.device) -> Window | torch.Tensor:
        """The dense form's mask: FULL, CAUSAL aligned top-left, or bool, broadcastable to (B, H, Lq, Lk)."""

    # The dense form; these are right for tensors that are (B, H, L, D) themselves

    def rows(self, tensor: torch.Tensor, sequence: int | None = None) -> torch.Tensor:
        """Something laid out like query as (B, H, Lq, D), of one sequence or of all, padded to the longest."""
        return tensor if sequence is None else tensor[sequence : sequence + 1]

    def unrows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of rows for all sequences."""
        return tensor

    def keys(self, leaves: Leaves, sequence: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as (B, Hkv, Lk, D), of one sequence or of all, padded to the longest. Differentiable."""
        key, value = leaves["key"], leaves["value"]
        return (key, value) if sequence is None else (key[sequence : sequence + 1], value[sequence : sequence + 1])

    def families(self) -> list[Sequence[int]]:
        """The sequences, those that share keys together."""
        return [[sequence] for sequence in range(self.sequences)]

    def head_axis(self, name: str) -> int:
        """The dimension of heads in a leaf; out has query's."""
        return 1

    # What follows

    def head(self, name: str, tensor: torch.Tensor, kv_head: int) -> torch.Tensor:
        """A leaf's (or, with query's name, out's) part that one key head has to do with."""
        count = self.q_heads // self.kv_heads if name == "query" else 1
        return tensor.narrow(self.head_axis(name), kv_head * count, count)

    def inputs(self, seed: int = 0) -> Inputs:
        """The case's tensors, the same ones for the same seed; float64 ones hold float32's values (see check.py)."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DTYPES[self.dtype])

        leaves = {name: draw(*shape) for name, shape in self.shapes().items()}
        grad_out = draw(*leaves["query"].shape[:-1], self.value_dim)
        constants = {name: draw(*shape) for name, shape in self.constants().items()}
        return Inputs(leaves, constants, grad_out)

    def constants(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that has no gradient."""
        return {"sinks": (self.q_heads,)} if self.sinks else {}

    def options(self, inputs: Inputs) -> dict[str, Any]:
        """Arguments that every function of flashx has."""
        return {"softcap": self.softcap, **inputs.constants}

    def flops(self) -> float:
        """Multiplications and additions of the matrix products over visible pairs.

        Forward 2 D + 2 Dv a pair (4 D where D = Dv), backward 2.5 times that, as Dao, "FlashAttention-2", section 4.1.
        """
        return self.q_heads * self.pairs() * 2 * (self.head_dim + self.value_dim) * _FLOP_FACTOR[self.direction]

    def elements(self) -> int:
        """What a forward has to read and to write, once."""
        shapes = self.shapes()
        out = math.prod(shapes["query"][:-1]) * self.value_dim
        return out + sum(map(math.prod, shapes.values()))

    def bytes(self) -> int:
        """Compulsory traffic: each input read and each result written once, with nothing kept in between.

        Forward: query, keys, values, out. Backward: the same and grad_out read, their gradients written.
        """
        factor = {"fwd": 1, "bwd": 2, "both": 3}[self.direction]
        return factor * self.elements() * DTYPES[self.dtype].itemsize

    def place(self, axis: str) -> float | None:
        """Where on one of AXES the case is."""
        value: float | None = getattr(self, axis)
        return value

    def as_dict(self) -> dict[str, Any]:
        """The fields, and the variant's name."""
        return {"variant": self.VARIANT, **asdict(self)}

    def describe(self, what: str, *extras: str) -> str:
        """One line: variant-specific text, then what all cases have."""
        dim = pair(self.head_dim, self.value_dim)
        parts = [what, f"D{dim}", self.dtype, *(extra for extra in extras if extra)]
        if self.softcap:
            parts.append(f"softcap {self.softcap:g}")
        if self.sinks:
            parts.append("sinks")
        return " ".join(parts)

    @property
    def heads_label(self) -> str:
        return f"H{self.q_heads}" if self.q_heads == self.kv_heads else f"H{self.q_heads}/{self.kv_heads}"


@dataclass(frozen=True, slots=True)
class Dense(Case):
    """flashx.attention.

    ``window`` is flashx.attention's: (None, None) sees everything, (None, 0) is causal, aligned bottom-right.
    ``sink_tokens``: keys at the beginning that the window does not hide. ``bias``: one is added, (1, 1, Lq, Lk).
    """

    VARIANT: ClassVar[str] = "dense"
    AXES: ClassVar[dict[str, str]] = {"k_len": "keys", "window": "window"}

    q_len: int
    k_len: int
    batch: int = 1
    window: Window = FULL
    sink_tokens: int = 0
    bias: bool = False

    def __str__(self) -> str:
        left, right = (str(width) if width is not None else "none" for width in self.window)
        mask = {FULL: "full", CAUSAL: "causal"}.get(self.window, f"window {left},{right}")
        sink_tokens = f"{self.sink_tokens} sink tokens" if self.sink_tokens else ""
        size = f"B{self.batch} {self.heads_label} N{pair(self.q_len, self.k_len)}"
        return self.describe(size, mask, sink_tokens, "bias" if self.bias else "")

    @property
    def interval(self) -> IntervalMask:
        """The keys that each query row sees."""
        return IntervalMask(*self.window, shift=self.k_len - self.q_len, first=self.sink_tokens)

    @property
    def sequences(self) -> int:
        return self.batch

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "query": (self.batch, self.q_heads, self.q_len, self.head_dim),
            "key": (self.batch, self.kv_heads, self.k_len, self.head_dim),
            "value": (self.batch, self.kv_heads, self.k_len, self.value_dim),
        }

    def constants(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"sinks": (self.q_heads,)} if self.sinks else {}
        return shapes | ({"bias": (1, 1, self.q_len, self.k_len)} if self.bias else {})

    def call(self, inputs: Inputs) -> Call:
        options = self.options(inputs)
        if self.sink_tokens:
            options |= {"causal": False, "sink_tokens": self.sink_tokens}
            return Call(flashx.sliding_window_attention, lambda *leaves: (*leaves, self.window), options)
        return Call(flashx.attention, lambda *leaves: leaves, {"window": self.window, **options})

    def place(self, axis: str) -> float | None:
        return self.window[0] if axis == "window" else self.k_len

    def lengths(self, sequence: int) -> Size:
        return self.q_len, self.k_len

    def pairs(self) -> int:
        return self.batch * visible_pairs(self.interval, self.q_len, self.k_len)

    def visible(self, sequence: int, rows: range, device: torch.device) -> torch.Tensor:
        mask = replace(self.interval, shift=self.interval.shift + rows.start)
        return mask.dense(len(rows), self.k_len, device)

    def mask(self, device: torch.device) -> Window | torch.Tensor:
        mask = self.interval
        if mask.hides_nothing(self.q_len, self.k_len):
            return FULL
        # flashx aligns bottom-right: that is top-left where the lengths are equal.
        if self.window[1] == 0 and mask.shift == 0 and mask.lo(self.q_len - 1, self.k_len) == 0:
            return CAUSAL
        return mask.dense(self.q_len, self.k_len, device)


@functools.lru_cache(maxsize=256)
def visible_pairs(mask: IntervalMask, q_len: int, k_len: int) -> int:
    """Pairs that an interval mask shows."""
    total = 0
    for row in range(q_len):
        low, high = mask.lo(row, k_len), mask.hi(row, k_len)
        total += max(high - low, 0) + min(mask.first, low, high)
    return total


def pair(first: int, second: int) -> str:
    """The two as one, if they are equal."""
    return f"{first}" if first == second else f"{first}x{second}"


def tour(directions: Iterable[Direction]) -> list[Case]:
    """What a first look should show, in about a minute on two cores."""
    short = Dense(1024, 1024)
    wide = Dense(2048, 2048, head_dim=128, value_dim=128, q_heads=2, kv_heads=2, window=CAUSAL)
    long = Dense(4096, 4096, q_heads=1, kv_heads=1, window=CAUSAL)
    decode = Dense(
        1, 4096, batch=4, head_dim=128, value_dim=128, q_heads=32, kv_heads=8, dtype="bf16", window=CAUSAL
    )  # fmt: skip
    cases = [
        short,
        replace(short, window=CAUSAL),
        replace(short, window=CAUSAL, dtype="bf16"),
        wide,
        replace(wide, dtype="bf16"),
        long,
        replace(long, window=(256, 0)),
        decode,
    ]
    directions = list(directions)
    # Nobody trains through a single query.
    return [
        replace(case, direction=direction)
        for case in cases
        for direction in directions
        if direction == "fwd" or case is not decode
    ]
