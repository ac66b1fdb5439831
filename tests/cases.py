"""Cases: attention problems as data, one list for every backend and for the benchmark.

A case says what a problem looks like; ``Case.inputs`` makes its tensors, the same ones every time. Primes and the
neighbours of tile edges come first, since that is where tiled code goes wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

import flashx

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias or mask by its shape's letters: b, h, q, k are the problem's sizes, 1 broadcasts ("b11k").

    ``values`` is one of _BIAS_VALUES; ``storage`` one of STORAGES (for a bias of four dimensions).
    """

    shape: str
    values: str = "add"
    storage: str = "contiguous"

    def __str__(self) -> str:
        return "_".join([self.shape, self.values, *([self.storage] if self.storage != "contiguous" else [])])


@dataclass(frozen=True, slots=True)
class Blocks:
    """A block mask by its shape's letters ("11", "b1", "1h", "bh"), its blocks' sizes and its kind: _BLOCK_MASKS."""

    shape: str
    block: tuple[int, int] = (64, 64)
    kind: str = "mixed"

    def __str__(self) -> str:
        return f"{self.shape}_{self.block[0]}x{self.block[1]}_{self.kind}"


@dataclass(frozen=True, slots=True)
class Case:
    """One attention problem. Sizes are in elements; storages are keys of STORAGES.

    ``kv_heads`` and ``value_dim`` default to ``heads`` and ``head_dim``; ``magnitude`` multiplies query, so that the
    softmax becomes spiky; ``alibi`` is the slopes' shape in letters ("h" or "bh").
    """

    q_len: int
    k_len: int
    head_dim: int = 16
    value_dim: int | None = None
    batch: int = 1
    heads: int = 1
    kv_heads: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    bias: Bias | None = None
    alibi: str | None = None
    softcap: float = 0.0
    sinks: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    magnitude: float = 1.0
    query_storage: str = "contiguous"
    kv_storage: str = "contiguous"
    seed: int = 0
    sink_tokens: int = 0
    blocks: Blocks | None = None

    def __str__(self) -> str:
        """The test id: sizes, then whatever is not the default."""
        heads = f"{self.heads}" if self.kv_heads is None else f"{self.heads}:{self.kv_heads}"
        dims = f"{self.head_dim}" if self.value_dim is None else f"{self.head_dim}:{self.value_dim}"
        parts = [f"b{self.batch}h{heads}_{self.q_len}x{self.k_len}_d{dims}"]
        for field in fields(self)[7:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(field.name if value is True else f"{field.name}={value}".replace(" ", ""))
        return "-".join(parts)

    def options(self) -> dict[str, Any]:
        """flashx.attention's arguments that are not tensors."""
        names = ("causal", "window", "softcap", "dropout_p", "scale", *["sink_tokens"] * (self.sink_tokens > 0))
        return {name: getattr(self, name) for name in names}

    def attention(self) -> Callable[..., Any]:
        """The function of flashx that has what the case asks for."""
        return flashx.sliding_window_attention if self.sink_tokens else flashx.attention

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """The case's tensors: drawn in float64, rounded to dtype, laid out as the case says."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + self.q_len * 263 + self.k_len)
        sizes = {"b": self.batch, "h": self.heads, "q": self.q_len, "k": self.k_len, "1": 1}
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def stored(values: torch.Tensor, storage: str) -> torch.Tensor:
            return STORAGES[storage](values.to(dtype))

        bias = slopes = sinks = None
        query = stored(draw(self.batch, self.heads, self.q_len, self.head_dim) * self.magnitude, self.query_storage)
        key = stored(draw(self.batch, kv_heads, self.k_len, self.head_dim), self.kv_storage)
        value = stored(draw(self.batch, kv_heads, self.k_len, value_dim), self.kv_storage)
        grad_out = stored(draw(self.batch, self.heads, self.q_len, value_dim), self.query_storage)
        grad_lse = draw(self.batch, self.heads, self.q_len).to(wide)
        if self.bias is not None:
            values = _BIAS_VALUES[self.bias.values](draw(*(sizes[letter] for letter in self.bias.shape)))
            if values.is_floating_point():
                values = values.to(torch.float32 if self.bias.values == "add32" else dtype)
            if self.bias.values == "lowest":
                values = values.nan_to_num()
            bias = STORAGES[self.bias.storage](values)
        if self.alibi is not None:
            slopes = draw(*(sizes[letter] for letter in self.alibi)).abs().to(wide)
        if self.sinks:
            sinks = (2 * draw(self.heads)).to(dtype)
        visible = None
        if self.blocks is not None:
            lead = [sizes[letter] for letter in self.blocks.shape]
            lengths = (self.q_len, self.k_len)
            blocks = [-(-length // size) for length, size in zip(lengths, self.blocks.block, strict=True)]
            which = draw(*lead, *blocks)
            for dim, size in zip((-2, -1), self.blocks.block, strict=True):
                which = which.repeat_interleave(size, dim)
            which = which[..., : self.q_len, : self.k_len]
            visible = _BLOCK_MASKS[self.blocks.kind](which, draw(*which.shape))
        block = None if self.blocks is None else self.blocks.block
        return Inputs(query, key, value, bias, slopes, sinks, grad_out, grad_lse, visible, block)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A problem's tensors and the gradients that come in from above."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    grad_out: torch.Tensor
    grad_lse: torch.Tensor
    visible: torch.Tensor | None = None  # a block mask's elements
    block: tuple[int, int] | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """Every tensor changed."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            changed[field.name] = change(value) if isinstance(value, torch.Tensor) else value
        return Inputs(**changed)

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The tensors that have gradients, by name."""
        named = {name: getattr(self, name) for name in ("query", "key", "value", "bias", "sinks")}
        return {name: t for name, t in named.items() if t is not None and t.is_floating_point()}

    def arguments(self) -> dict[str, Any]:
        """flashx.attention's arguments that are tensors, or made of them."""
        names = ("query", "key", "value", "bias", "alibi_slopes", "sinks")
        arguments = {name: getattr(self, name) for name in names}
        if self.visible is not None:
            arguments["block_mask"] = flashx.BlockMask.from_dense(self.visible, self.block)
        return arguments


# What stands around the elements in memory is NaN (True for masks), so that a kernel that reads past them shows it.


def _in(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.full(shape, NAN if like.is_floating_point() else 1, dtype=like.dtype)


def _permuted(*order: int) -> Callable[[torch.Tensor], torch.Tensor]:
    back = sorted(range(4), key=order.__getitem__)
    return lambda values: values.permute(order).contiguous().permute(back)


def _sliced(values: torch.Tensor) -> torch.Tensor:
    """The middle of a larger tensor; rows start at odd addresses, as in a packed qkv with odd dims."""
    around = _in(values, *(size + 3 for size in values.shape))
    view = around[tuple(slice(1, 1 + size) for size in values.shape)]
    return view.copy_(values)


def _every_second(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def store(values: torch.Tensor) -> torch.Tensor:
        shape = list(values.shape)
        shape[dim] *= 2
        view = _in(values, *shape)[(..., *([slice(None, None, 2)] + [slice(None)] * (-dim - 1)))]
        return view.copy_(values)

    return store


def _packed(values: torch.Tensor) -> torch.Tensor:
    """The middle third of a (B, L, 3, H, D) projection."""
    batch, heads, length, dim = values.shape
    return _in(values, batch, length, 3, heads, dim)[:, :, 1].transpose(1, 2).copy_(values)


def _expanded(*dims: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def store(values: torch.Tensor) -> torch.Tensor:
        one = values[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(values.dim()))]
        return one.contiguous().expand(values.shape)

    return store


STORAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "blhd": _permuted(0, 2, 1, 3),  # heads inside length: a projection's (B, L, H, D)
    "lbhd": _permuted(2, 0, 1, 3),
    "bhdl": _permuted(0, 1, 3, 2),  # the last dimension is not contiguous
    "packed": _packed,
    "sliced": _sliced,
    "odd_heads": _every_second(-3),
    "odd_rows": _every_second(-2),
    "odd_columns": _every_second(-1),
    "one_batch": _expanded(0),  # stride 0
    "one_head": _expanded(1),
    "one_row": _expanded(2),
    "one_batch_and_head": _expanded(0, 1),
}


def _hidden_rows(values: torch.Tensor) -> torch.Tensor:
    """Visible at random; every third row, and so perhaps row 0, sees nothing."""
    visible = values > 0
    visible[..., ::3, :] = False
    return visible


_BIAS_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda values: values,
    "add32": lambda values: values,  # float32 whatever query's dtype
    "add_large": lambda values: 40 * values,
    "hide": lambda values: values.masked_fill(values < -0.5, -torch.inf),
    "hide_rows": lambda values: values.masked_fill(~_hidden_rows(values), -torch.inf),
    "lowest": lambda values: torch.zeros_like(values).masked_fill(~_hidden_rows(values), -torch.inf),  # but finite
    "hide_all": lambda values: torch.full_like(values, -torch.inf),
    "bool": lambda values: values > 0,
    "bool_rows": _hidden_rows,
    "bool_few": lambda values: values > 2,  # most tiles are empty, most rows too
    "bool_none": lambda values: torch.zeros_like(values, dtype=torch.bool),
    "bool_all": lambda values: torch.ones_like(values, dtype=torch.bool),
}

# From a number for each block and one for each element.
_BLOCK_MASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mixed": lambda block, element: (block > 0.7) | ((block > 0) & (element > 0)),  # half hidden, a quarter full
    "blocks": lambda block, element: block > 0,
    "few": lambda block, element: block > 1.5,  # one in fifteen
    "hidden_rows": lambda block, element: _hidden_rows(element) & (block > -0.5),
    "none": lambda block, element: block > torch.inf,
    "all": lambda block, element: block < torch.inf,
    "one": lambda block, element: element >= element.max(),  # a single element
}

_LENGTHS = [
    (1, 1), (1, 2), (2, 1), (3, 7), (7, 3), (13, 13), (16, 16), (17, 16), (16, 17), (47, 48), (49, 47), (48, 49),
    (63, 65), (64, 64), (65, 63), (97, 97), (127, 128), (129, 127), (128, 129), (193, 64), (64, 193), (257, 129),
    (1, 257), (257, 1), (130, 520), (530, 70),
]  # fmt: skip

LENGTHS = [Case(q, k, causal=causal) for q, k in _LENGTHS for causal in (False, True)]

_DIMS = [
    (1, 1), (3, 8), (8, 3), (16, 17), (17, 16), (31, 33), (32, 32), (40, 24), (48, 64), (64, 64), (65, 63), (80, 80),
    (96, 128), (128, 96), (128, 128), (160, 160), (192, 128), (256, 256), (255, 5), (1, 256), (256, 1),
]  # fmt: skip

HEAD_DIMS = [Case(37, 67, d, dv, heads=2, causal=index % 2 == 0) for index, (d, dv) in enumerate(_DIMS)]

GROUPS = [
    Case(33, 65, batch=2, heads=heads, kv_heads=kv_heads, causal=causal)
    for heads, kv_heads, causal in [
        (2, 2, True),
        (4, 2, False),
        (6, 2, True),
        (3, 1, False),
        (8, 1, True),
        (16, 2, True),
    ]
] + [
    Case(1, 129, 64, batch=3, heads=8, kv_heads=2, causal=True),
    Case(2, 300, 32, heads=6, kv_heads=2, causal=True),
]

_WINDOWS: list[tuple[int, int, tuple[int | None, int | None], bool]] = [
    (17, 17, (0, 0), False), (64, 64, (1, 0), False), (65, 65, (0, 1), False), (129, 129, (16, 0), False),
    (97, 97, (17, 3), False), (130, 130, (None, 5), False), (130, 130, (5, None), False), (200, 200, (63, 64), False),
    (127, 257, (31, 7), False), (257, 127, (31, 7), False), (257, 65, (3, None), False), (97, 193, (None, 30), True),
    (97, 193, (30, 30), True), (193, 97, (200, 200), True), (33, 33, (10**6, 10**6), False), (1, 300, (128, 0), True),
    (300, 3, (1, 1), False), (50, 50, (2**62, 3), False), (300, 300, (40, None), True),
]  # fmt: skip

WINDOWS = [Case(q, k, window=window, causal=causal, heads=2) for q, k, window, causal in _WINDOWS]

_BIASES = [
    Bias("k"), Bias("qk"), Bias("11qk"), Bias("b11k"), Bias("bhq1"), Bias("1h11"), Bias("1hqk"), Bias("bhqk"),
    Bias("hqk"), Bias("b1qk"), Bias("1"), Bias(""), Bias("q1"),
    Bias("11qk", "add32"), Bias("b11k", "add32"), Bias("bhqk", "add_large"),
    Bias("bhqk", "add", "bhdl"), Bias("bhqk", "add", "odd_columns"), Bias("bhqk", "add", "sliced"),
    Bias("bhqk", "add", "one_batch"), Bias("bhqk", "add", "one_batch_and_head"), Bias("bhqk", "add", "one_row"),
    Bias("1hqk", "add", "odd_heads"), Bias("b11k", "add", "odd_columns"),
    Bias("qk", "hide"), Bias("b11k", "hide"), Bias("bhqk", "hide_rows"), Bias("11qk", "hide_all"), Bias("bhq1", "hide"),
    Bias("k", "bool"), Bias("qk", "bool"), Bias("11qk", "bool"), Bias("b11k", "bool"), Bias("bhq1", "bool"),
    Bias("1h11", "bool"), Bias("bhqk", "bool_rows"), Bias("bhqk", "bool_few"), Bias("qk", "bool_none"),
    Bias("k", "bool_all"), Bias("bhqk", "bool", "bhdl"), Bias("bhqk", "bool", "one_batch_and_head"),
    Bias("bhqk", "bool", "sliced"), Bias("bhqk", "bool", "odd_columns"),
]  # fmt: skip

BIASES = [
    Case(35, 67, 8, batch=2, heads=2, kv_heads=1 + index % 2, bias=bias, causal=index % 3 == 0)
    for index, bias in enumerate(_BIASES)
] + [
    Case(150, 140, 8, batch=2, bias=Bias("bhqk", values), causal=causal)
    for values, causal in [("add", True), ("hide_rows", False), ("bool_few", False), ("bool_rows", True)]
]

LOGITS = [
    Case(33, 65, heads=3, alibi="h"),
    Case(65, 33, batch=2, heads=2, alibi="bh", causal=True),
    Case(129, 150, heads=4, kv_heads=2, alibi="h", window=(20, 10)),
    Case(33, 65, heads=2, softcap=1.5, magnitude=4.0),
    Case(130, 70, heads=2, softcap=30.0, causal=True, magnitude=20.0),
    Case(33, 65, heads=2, sinks=True),
    Case(97, 33, batch=2, heads=4, kv_heads=2, sinks=True, causal=True),
    Case(33, 65, heads=2, sinks=True, bias=Bias("qk", "bool_none")),
    Case(33, 65, scale=0.0),
    Case(33, 65, scale=-0.7),
    Case(65, 130, scale=1.0, magnitude=30.0),
    Case(65, 130, 64, magnitude=1e-4),
    Case(40, 70, heads=3, dropout_p=0.3),
    Case(70, 131, batch=2, heads=4, kv_heads=2, dropout_p=0.1, causal=True),
    Case(20, 30, dropout_p=1.0),
    Case(150, 150, dropout_p=0.9, sinks=True, window=(9, 9), heads=2),
]

_LAYOUTS = [
    ("blhd", "blhd"), ("packed", "packed"), ("lbhd", "sliced"), ("sliced", "blhd"), ("odd_heads", "odd_rows"),
    ("odd_rows", "odd_heads"), ("contiguous", "one_batch"), ("one_head", "one_batch_and_head"), ("one_row", "one_row"),
    ("bhdl", "odd_columns"), ("contiguous", "bhdl"),
]  # fmt: skip

LAYOUTS = [
    Case(35, 67, 24, 17, batch=2, heads=4, kv_heads=2, causal=True, query_storage=query, kv_storage=kv)
    for query, kv in _LAYOUTS
]

EMPTY = [
    Case(0, 5), Case(5, 0), Case(0, 0), Case(5, 7, batch=0), Case(5, 7, heads=0), Case(5, 7, heads=0, kv_heads=2),
    Case(5, 0, sinks=True, heads=2, bias=Bias("bhqk")), Case(5, 0, causal=True, bias=Bias("bhq1", "bool")),
    Case(0, 7, sinks=True, bias=Bias("11qk"), heads=2), Case(5, 7, 8, 0, bias=Bias("qk"), sinks=True),
]  # fmt: skip

COMBINED = [
    Case(67, 131, 40, 24, 2, 6, 2, True, (50, None), Bias("b11k"), "h", 2.0, True, kv_storage="blhd"),
    Case(131, 67, 17, 33, 2, 4, 1, False, (40, 9), Bias("bhqk", "hide"), "bh", 0.0, True, query_storage="packed"),
    Case(97, 97, 64, 64, 2, 4, 2, True, (33, 0), Bias("1hqk", "bool"), "h", 20.0, True, 0.2, 0.3),
    Case(49, 113, 128, 80, 1, 3, 1, True, None, Bias("11qk", "add32"), None, 5.0, False, 0.5, kv_storage="sliced"),
    Case(113, 49, 80, 16, 3, 2, 2, False, (None, 3), Bias("qk", "bool_rows"), "bh", 0.0, True, 0.4, magnitude=5.0),
    Case(65, 65, 96, 96, 1, 2, 1, True, (None, None), Bias("bhq1"), "h", 0.0, True, query_storage="blhd"),
    Case(300, 310, 16, 16, 1, 1, 1, True, (70, 0), Bias("qk", "hide_rows"), "h", 3.0, True, 0.1),
    Case(1, 400, 64, 64, 2, 8, 2, True, (200, 0), Bias("b11k", "bool"), "h", 10.0, True, kv_storage="packed"),
    Case(5, 260, 32, 64, 2, 9, 3, False, (64, 64), Bias("bhqk", "add", "one_row"), None, 0.0, True, 0.3),
]

SINK_TOKENS = [
    Case(130, 130, window=(20, 0), sink_tokens=4, heads=2),
    Case(300, 300, 32, window=(33, None), causal=True, sink_tokens=1, heads=2, kv_heads=1),
    Case(257, 400, window=(63, 7), sink_tokens=70, heads=2, sinks=True),
    Case(200, 60, window=(5, 5), sink_tokens=16, alibi="h"),
    Case(1, 517, 64, window=(100, 0), sink_tokens=20, batch=2, heads=8, kv_heads=2),
    Case(150, 500, window=(16, 0), sink_tokens=1000),
    Case(420, 420, window=(64, 0), sink_tokens=129, dropout_p=0.3, bias=Bias("qk", "hide"), heads=2),
]

BLOCK_MASKS = [
    Case(200, 200, heads=2, blocks=Blocks("11")),
    Case(257, 300, 32, heads=2, blocks=Blocks("1h"), causal=True),
    Case(130, 390, batch=2, heads=4, kv_heads=2, blocks=Blocks("bh"), causal=True),
    Case(130, 390, 64, batch=2, heads=4, kv_heads=2, blocks=Blocks("b1", (128, 128)), window=(150, 20)),
    Case(300, 310, heads=2, blocks=Blocks("1h", (16, 16)), alibi="h"),
    Case(150, 280, heads=3, kv_heads=1, blocks=Blocks("1h", (16, 48)), softcap=2.0, magnitude=4.0),
    Case(290, 270, 40, 24, heads=2, blocks=Blocks("11", (96, 32)), sinks=True, causal=True),
    Case(333, 530, heads=1, blocks=Blocks("11", (256, 256)), dropout_p=0.3),
    Case(500, 400, 8, heads=2, blocks=Blocks("11", (32, 80), "few"), causal=True),
    Case(260, 260, heads=2, blocks=Blocks("1h", (64, 64), "blocks"), bias=Bias("bhqk", "hide")),
    Case(260, 260, batch=2, heads=2, blocks=Blocks("bh", (64, 64), "hidden_rows"), bias=Bias("qk")),
    Case(100, 100, 8, blocks=Blocks("11", (64, 64), "none")),
    Case(100, 100, 8, blocks=Blocks("11", (64, 64), "none"), sinks=True),
    Case(130, 200, 8, blocks=Blocks("11", (64, 64), "all"), causal=True),
    Case(300, 300, 8, blocks=Blocks("11", (64, 64), "one")),
    Case(3, 700, 64, batch=2, heads=8, kv_heads=2, blocks=Blocks("bh", (16, 64)), causal=True),
    Case(1, 2500, 16, heads=4, kv_heads=1, blocks=Blocks("1h", (16, 128))),
    Case(400, 400, heads=2, blocks=Blocks("1h"), window=(100, 0), sink_tokens=40, causal=True),
    Case(0, 5, blocks=Blocks("11")), Case(5, 0, blocks=Blocks("11"), sinks=True),
]  # fmt: skip

CASES = (
    LENGTHS + HEAD_DIMS + GROUPS + WINDOWS + BIASES + LOGITS + LAYOUTS + EMPTY + COMBINED + SINK_TOKENS + BLOCK_MASKS
)


def default_scale(case: Case) -> float:
    """The scale that the case's attention uses."""
    return 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
