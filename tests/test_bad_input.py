"""Bad input raises a ValueError or TypeError that names the argument, the rule and the value; nothing crashes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import tolerance
import torch

import flashx

Arguments = dict[str, Any]


def good() -> Arguments:
    """A valid call with everything in it: batch 2, heads 4 over 2, lengths 5 and 7, dims 8 and 3."""
    return {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 2, 7, 8),
        "value": torch.randn(2, 2, 7, 3),
        "bias": torch.randn(2, 1, 5, 7),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
    }


def changed(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[], Arguments]:
    def make() -> Arguments:
        arguments = good()
        arguments[name] = change(arguments[name])
        return arguments

    return make


def option(**options: Any) -> Callable[[], Arguments]:
    return lambda: {**good(), **options}


def _ids(rows: list[tuple[str, Any, type[Exception], tuple[str, ...]]]) -> list[Any]:
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


NAN, INF = math.nan, math.inf

# What, the call, the error, and what its message must contain: the argument's name and the value.
TENSORS = [
    # rank
    ("query 3-d", changed("query", lambda t: t[0]), ValueError, ("query", "4 dimensions", "(4, 5, 8)")),
    ("key 3-d", changed("key", lambda t: t[0]), ValueError, ("key", "4 dimensions", "(2, 7, 8)")),
    ("value 3-d", changed("value", lambda t: t[0]), ValueError, ("value", "4 dimensions", "(2, 7, 3)")),
    ("query 5-d", changed("query", lambda t: t[None]), ValueError, ("query", "4 dimensions", "(1, 2, 4, 5, 8)")),
    ("query scalar", changed("query", lambda t: t[0, 0, 0, 0]), ValueError, ("query", "4 dimensions", "()")),
    ("bias 5-d", changed("bias", lambda t: t[None]), ValueError, ("bias", "broadcast", "(1, 2, 1, 5, 7)")),
    ("slopes 3-d", changed("alibi_slopes", lambda t: t[None, None]), ValueError, ("alibi_slopes", "(1, 1, 4)")),
    ("slopes scalar", changed("alibi_slopes", lambda t: t[0]), ValueError, ("alibi_slopes", "()")),
    ("sinks 2-d", changed("sinks", lambda t: t.expand(2, 4)), ValueError, ("sinks", "(4,)", "(2, 4)")),
    # shape
    ("key batch", changed("key", lambda t: t[:1]), ValueError, ("key", "batch", "2", "(1, 2, 7, 8)")),
    ("value batch", changed("value", lambda t: t[:1]), ValueError, ("value", "batch", "2", "(1, 2, 7, 3)")),
    ("value heads", changed("value", lambda t: t[:, :1]), ValueError, ("value", "heads", "(2, 1, 7, 3)")),
    ("value length", changed("value", lambda t: t[:, :, :6]), ValueError, ("value", "length 7", "(2, 2, 6, 3)")),
    ("key dim", changed("key", lambda t: t[..., :7]), ValueError, ("key", "head dim 8", "(2, 2, 7, 7)")),
    ("query heads", changed("query", lambda t: t[:, :3]), ValueError, ("heads", "multiple", "3 and 2")),
    ("fewer query heads", changed("query", lambda t: t[:, :1]), ValueError, ("heads", "multiple", "1 and 2")),
    ("bias lengths", changed("bias", lambda t: t.mT), ValueError, ("bias", "(2, 4, 5, 7)", "(2, 1, 7, 5)")),
    ("bias heads", changed("bias", lambda t: t.expand(2, 2, 5, 7)), ValueError, ("bias", "(2, 2, 5, 7)")),
    ("bias batch", changed("bias", lambda t: torch.randn(3, 1, 1, 1)), ValueError, ("bias", "(3, 1, 1, 1)")),
    ("bias key", changed("bias", lambda t: torch.randn(6)), ValueError, ("bias", "(6,)")),
    ("bias empty", changed("bias", lambda t: torch.randn(0)), ValueError, ("bias", "(0,)")),
    ("slopes heads", changed("alibi_slopes", lambda t: t[:2]), ValueError, ("alibi_slopes", "(4,)", "(2,)")),
    ("slopes batch", changed("alibi_slopes", lambda t: t.expand(3, 4)), ValueError, ("alibi_slopes", "(3, 4)")),
    ("sinks heads", changed("sinks", lambda t: t[:1]), ValueError, ("sinks", "(4,)", "(1,)")),
    # dtype
    ("query int", changed("query", torch.Tensor.long), TypeError, ("query", "float16", "int64")),
    ("query bool", changed("query", torch.Tensor.bool), TypeError, ("query", "float16", "torch.bool")),
    ("query complex", changed("query", lambda t: t + 0j), TypeError, ("query", "float16", "complex64")),
    ("query float8", changed("query", lambda t: t.to(torch.float8_e4m3fn)), TypeError, ("query", "float8_e4m3fn")),
    ("key half", changed("key", torch.Tensor.half), TypeError, ("key", "float32", "float16")),
    ("value double", changed("value", torch.Tensor.double), TypeError, ("value", "float32", "float64")),
    ("bias double", changed("bias", torch.Tensor.double), TypeError, ("bias", "float32", "float64")),
    ("bias half", changed("bias", torch.Tensor.half), TypeError, ("bias", "float32", "float16")),
    ("bias int", changed("bias", torch.Tensor.int), TypeError, ("bias", "int32")),
    ("bias uint8", changed("bias", torch.Tensor.byte), TypeError, ("bias", "uint8")),
    ("slopes int", changed("alibi_slopes", torch.Tensor.long), TypeError, ("alibi_slopes", "int64")),
    ("sinks int", changed("sinks", torch.Tensor.long), TypeError, ("sinks", "int64")),
    ("sinks complex", changed("sinks", lambda t: t + 0j), TypeError, ("sinks", "complex64")),
    # device
    *(
        (f"{name} meta", changed(name, lambda t: t.to("meta")), ValueError, (name, "cpu", "meta"))
        for name in ("key", "value", "bias", "alibi_slopes", "sinks")
    ),
    ("query meta", changed("query", lambda t: t.to("meta")), ValueError, ("device", "cpu", "meta")),
    # layout
    *(
        (f"{name} sparse", changed(name, torch.Tensor.to_sparse), TypeError, (name, "strided", "sparse"))
        for name in ("query", "key", "value", "bias")
    ),
    # gradients and classes
    (
        "slopes with gradient",
        changed("alibi_slopes", torch.Tensor.requires_grad_),
        ValueError,
        ("alibi_slopes", "gradient", "requires_grad=True"),
    ),
    *((f"{name} list", option(**{name: [1.0]}), TypeError, (name, "torch.Tensor", "list")) for name in good()),
    *((f"{name} None", option(**{name: None}), TypeError, (name, "NoneType")) for name in ("query", "key", "value")),
    ("query number", option(query=1.0), TypeError, ("query", "float")),
]  # fmt: skip

OPTIONS = [
    ("window negative left", option(window=(-1, 0)), ValueError, ("window", "left", ">= 0", "-1")),
    ("window negative right", option(window=(0, -3)), ValueError, ("window", "right", ">= 0", "-3")),
    ("window bool", option(window=(True, 0)), TypeError, ("window", "left", "True")),
    ("window float", option(window=(1, 2.0)), TypeError, ("window", "right", "2.0")),
    ("window string", option(window="ab"), TypeError, ("window", "pair", "'ab'")),
    ("window strings", option(window=("1", 0)), TypeError, ("window", "left", "'1'")),
    ("window int", option(window=3), TypeError, ("window", "pair", "3")),
    ("window one", option(window=(3,)), (TypeError, ValueError), ("window", "pair", "(3,)")),
    ("window three", option(window=(3, 3, 3)), (TypeError, ValueError), ("window", "pair", "(3, 3, 3)")),
    ("window tensor", option(window=torch.ones(2)), TypeError, ("window", "pair")),
    ("window too wide", option(window=(2**63, 0)), ValueError, ("window", "left", str(2**63))),
    ("scale nan", option(scale=NAN), ValueError, ("scale", "finite", "nan")),
    ("scale inf", option(scale=INF), ValueError, ("scale", "finite", "inf")),
    ("scale string", option(scale="1"), TypeError, ("scale", "number", "str")),
    ("scale bool", option(scale=True), TypeError, ("scale", "number", "bool")),
    ("scale tensor", option(scale=torch.ones(())), TypeError, ("scale", "number", "Tensor")),
    ("softcap negative", option(softcap=-1.0), ValueError, ("softcap", ">= 0", "-1.0")),
    ("softcap nan", option(softcap=NAN), ValueError, ("softcap", "finite", "nan")),
    ("softcap inf", option(softcap=INF), ValueError, ("softcap", "finite", "inf")),
    ("softcap None", option(softcap=None), TypeError, ("softcap", "number", "None")),
    ("softcap bool", option(softcap=True), TypeError, ("softcap", "number", "bool")),
    ("dropout over 1", option(dropout_p=1.5), ValueError, ("dropout_p", "[0, 1]", "1.5")),
    ("dropout under 0", option(dropout_p=-0.1), ValueError, ("dropout_p", "[0, 1]", "-0.1")),
    ("dropout nan", option(dropout_p=NAN), ValueError, ("dropout_p", "[0, 1]", "nan")),
    ("dropout string", option(dropout_p="0.1"), TypeError, ("dropout_p", "number", "str")),
    ("dropout bool", option(dropout_p=True), TypeError, ("dropout_p", "number", "bool")),
    ("causal int", option(causal=1), TypeError, ("causal", "bool", "int")),
    ("causal None", option(causal=None), TypeError, ("causal", "bool", "None")),
    ("causal tensor", option(causal=torch.tensor(True)), TypeError, ("causal", "bool", "Tensor")),
    ("block_mask", option(block_mask=torch.ones(1)), TypeError, ("block_mask", "flashx.BlockMask or None", "Tensor")),
    ("backend unknown", option(backend="cudnn"), ValueError, ("backend", "cpu, triton, reference", "'cudnn'")),
    ("backend empty", option(backend=""), ValueError, ("backend", "cpu, triton, reference", "''")),
    ("backend class", option(backend=3), TypeError, ("backend", "string", "int")),
]  # fmt: skip


def _check(call: Callable[..., Any], arguments: Arguments, error: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        call(**arguments)
    message = str(raised.value)
    for part in parts:
        assert part in message, f"{message!r} does not say {part!r}"


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_the_good_call_is_good(backend: str | None) -> None:
    out = flashx.attention(**good(), backend=backend)
    assert out.shape == (2, 4, 5, 3)


@pytest.mark.parametrize("call", [flashx.attention, flashx.explain], ids=["attention", "explain"])
@pytest.mark.parametrize("make, error, parts", _ids(TENSORS + OPTIONS))
def test_bad_argument(
    make: Callable[[], Arguments], error: Any, parts: tuple[str, ...], call: Callable[..., Any]
) -> None:
    _check(call, make(), error, parts)


def test_positional_options_and_unknown_ones() -> None:
    query, key, value, *_ = good().values()
    with pytest.raises(TypeError):
        flashx.attention(query, key, value, True)
    with pytest.raises(TypeError, match="is_causal"):
        flashx.attention(query, key, value, is_causal=True)


def test_head_dim_zero() -> None:
    """1 / sqrt(0) has no value; with a scale of its own it is no better."""
    arguments = {**good(), "query": torch.randn(2, 4, 5, 0), "key": torch.randn(2, 2, 7, 0)}
    for scale in (None, 1.0):
        _check(flashx.attention, {**arguments, "scale": scale}, ValueError, ("query", "head dim", "(2, 4, 5, 0)"))


def test_no_key_heads() -> None:
    arguments = {**good(), "key": torch.randn(2, 0, 7, 8), "value": torch.randn(2, 0, 7, 3)}
    _check(flashx.attention, arguments, ValueError, ("heads", "4 and 0"))


def test_nested_tensors() -> None:
    nested = torch.nested.nested_tensor([torch.randn(4, 5, 8), torch.randn(4, 5, 8)], layout=torch.jagged)
    with pytest.raises((TypeError, ValueError), match="query"):
        flashx.attention(**{**good(), "query": nested})


def test_meta_tensors() -> None:
    """They run nothing and give the results' shapes."""
    meta = {name: tensor.to("meta") for name, tensor in good().items()}
    out, lse = flashx.attention(**meta, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 4, 5, 3), (2, 4, 5))
    assert flashx.explain(**meta).refusals["cpu"] == ["tensors are on meta, not on cpu"]


@pytest.mark.parametrize("dims", [(257, 8), (8, 257)])
def test_dims_beyond_the_kernels(dims: tuple[int, int]) -> None:
    """The backend asked for says why it cannot, and never hands over to another one."""
    query, key, value = torch.randn(1, 1, 3, dims[0]), torch.randn(1, 1, 4, dims[0]), torch.randn(1, 1, 4, dims[1])
    with pytest.raises(flashx.UnsupportedError) as raised:
        flashx.attention(query, key, value, backend="cpu")
    for part in ("no backend runs", "length 3x4", f"dim {dims[0]}/{dims[1]}", "cpu: ", "257 is over 256"):
        assert part in str(raised.value)
    assert issubclass(flashx.UnsupportedError, ValueError)


# The operator beneath, as an exported program or a careless caller may call it.


def _operator(**changes: Any) -> Callable[[], Any]:
    arguments: Arguments = {
        **good(),
        "seed": None,
        "window_left": None,
        "window_right": None,
        "shift": 2,
        "scale": 0.3,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "backend": None,
    }
    arguments.update(changes)
    return lambda: torch.ops.flashx.attention(**arguments)


def _operator_rows() -> list[Any]:
    rows = [pytest.param(row[1], id=row[0]) for row in TENSORS if "list" not in row[0] and "None" not in row[0]]
    return [row for row in rows if row.id not in ("query number", "slopes with gradient")]


@pytest.mark.parametrize("make", _operator_rows())
def test_the_operator_with_a_bad_tensor(make: Callable[[], Arguments]) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        _operator(**make())()


SEED = torch.tensor(1, dtype=torch.int64)

OPERATOR = [
    ("no seed", {"dropout_p": 0.5}, ("seed",)),
    ("seed vector", {"dropout_p": 0.5, "seed": SEED.expand(2)}, ("seed",)),
    ("seed float", {"dropout_p": 0.5, "seed": SEED.float()}, ("seed",)),
    ("seed empty", {"dropout_p": 0.5, "seed": SEED.expand(0)}, ("seed",)),
    ("scale nan", {"scale": NAN}, ("scale", "nan")),
    ("softcap negative", {"softcap": -1.0}, ("softcap", "-1.0")),
    ("dropout", {"dropout_p": 2.0, "seed": SEED}, ("dropout_p", "2.0")),
    ("backend", {"backend": "nothing"}, ("backend", "'nothing'")),
]


@pytest.mark.parametrize("changes, parts", [pytest.param(*row[1:], id=row[0]) for row in OPERATOR])
def test_the_operator_with_a_bad_option(changes: Arguments, parts: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        _operator(**changes)()
    assert all(part in str(raised.value) for part in parts), str(raised.value)


@pytest.mark.parametrize("shift", [2**62, -(2**62), 2**40, -(2**40), 3, -2])
@pytest.mark.parametrize("left, right", [(None, 0), (0, None), (2**62, 2**62), (0, 0), (-2, 4), (3, -2), (-1, -1)])
def test_the_operator_with_any_interval(left: int | None, right: int | None, shift: int, engine: str) -> None:
    """Intervals far beyond the keys show all or nothing of them, widths below zero less than the diagonal."""
    there = {name: tensor.to(tolerance.device_of(engine)) for name, tensor in good().items()}
    there |= {"alibi_slopes": None, "sinks": None, "bias": None}
    out, lse = _operator(**there, shift=shift, window_left=left, window_right=right, backend=engine)()
    i, j = range(5), range(7)
    seen = [
        any((left is None or y >= x + shift - left) and (right is None or y <= x + shift + right) for y in j) for x in i
    ]
    assert out.isfinite().all() and lse.isfinite().tolist() == torch.tensor(seen).expand_as(lse).tolist()


BACKWARD = {
    "out": torch.randn(2, 4, 5, 3),
    "lse": torch.randn(2, 4, 5),
    "grad_out": torch.randn(2, 4, 5, 3),
    "grad_lse": torch.randn(2, 4, 5),
    "bias_grad": True,
    "sinks_grad": True,
}

BACKWARD_CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "batch": lambda tensor: tensor[:1],
    "last": lambda tensor: tensor[..., :1],
    "rank": lambda tensor: tensor[0],
    "dtype": torch.Tensor.double,
    "meta": lambda tensor: tensor.to("meta"),
}


def _backward(**changes: Any) -> Callable[[], Any]:
    arguments: Arguments = {
        **good(),
        "seed": None,
        "window_left": None,
        "window_right": None,
        "shift": 2,
        "scale": 0.3,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "backend": None,
        **BACKWARD,
    }
    arguments.update(changes)
    return lambda: torch.ops.flashx.attention_backward(**arguments)


def test_the_good_backward_is_good() -> None:
    shapes = [tuple(grad.shape) for grad in _backward()()]
    assert shapes == [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3), (2, 1, 5, 7), (4,)]


@pytest.mark.parametrize("name", ["out", "lse", "grad_out", "grad_lse"])
@pytest.mark.parametrize("change", BACKWARD_CHANGES)
def test_the_backward_operator_with_a_bad_tensor(change: str, name: str) -> None:
    """Its kernel reads these through addresses, so a shape that does not fit would be read out of bounds."""
    with pytest.raises((ValueError, TypeError), match=name):
        _backward(**{name: BACKWARD_CHANGES[change](BACKWARD[name])})()


def test_the_backward_operator_with_gradients_of_nothing() -> None:
    """bias_grad without a differentiable bias."""
    for bias in (None, torch.ones(5, 7, dtype=torch.bool)):
        with pytest.raises((ValueError, TypeError, RuntimeError), match="bias"):
            _backward(bias=bias)()
    with pytest.raises((ValueError, TypeError, RuntimeError), match="sinks"):
        _backward(sinks=None)()
