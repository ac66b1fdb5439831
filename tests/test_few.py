"""Blocks of at most 8 packed rows (csrc/cpu/few.h), which compute with dims as lanes, and their neighbour, 9 rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ragged
import tolerance
import torch
from cases import Bias, Blocks, Case, Inputs
from conftest import ENGINES
from ragged import Ragged
from test_decode import attend as attend_cached
from test_decode import filled
from test_varlen import attend as attend_packed

import flashx
from flashx.backends import cpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
CPU = [name for name in ENGINES if name.startswith("cpu/")]
on_cpu = pytest.mark.parametrize("engine", CPU, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Rows of a query head, query heads of a key head: 1 to 9 packed rows.
_ROWS = [(1, 1), (1, 2), (3, 1), (2, 2), (5, 1), (1, 6), (7, 1), (1, 8), (2, 4), (3, 3), (9, 1)]
_DIMS = [(1, 1), (7, 16), (16, 7), (17, 17), (64, 64), (80, 64), (128, 80), (256, 128), (64, 256), (1, 256), (256, 1)]
_LENGTHS = [1, 15, 16, 17, 127, 128, 129, 300]
_FEATURES: list[dict[str, Any]] = [
    {}, {"causal": True}, {"window": (9, 0)}, {"window": (130, 2)}, {"alibi": "h"}, {"alibi": "bh", "causal": True},
    {"softcap": 2.0, "magnitude": 4.0}, {"bias": Bias("b11k")}, {"bias": Bias("bhqk", "hide_rows")},
    {"bias": Bias("bhqk", "bool_rows")}, {"bias": Bias("b11k", "bool"), "alibi": "h"}, {"sinks": True},
    {"blocks": Blocks("1h", (16, 16))}, {"blocks": Blocks("bh", (16, 64)), "causal": True, "sinks": True},
    {"blocks": Blocks("11", (16, 128), "hidden_rows")}, {"scale": -0.7}, {"scale": 0.0},
    {"scale": -0.2, "causal": True}, {"window": (20, 0), "sink_tokens": 5},
    {"scale": -0.3, "softcap": 3.0, "bias": Bias("bhqk", "add32")},
    {"kv_storage": "packed"}, {"kv_storage": "sliced", "query_storage": "blhd"}, {"kv_storage": "one_batch_and_head"},
    {"bias": Bias("qk", "bool_none"), "sinks": True}, {"magnitude": 30.0, "scale": 1.0}, {"dropout_p": 0.3},
]  # fmt: skip


def _case(number: int, rows: tuple[int, int], dims: tuple[int, int], k_len: int, feature: dict[str, Any]) -> Case:
    (q_len, group), (dim, value_dim), kv_heads = rows, dims, 1 + number % 2
    if "packed" in feature.values():  # holds key and value side by side
        value_dim = dim
    return Case(
        q_len, k_len, dim, value_dim, batch=2, heads=group * kv_heads, kv_heads=kv_heads, seed=3000 + number, **feature
    )


def _cases() -> list[Case]:
    """Every number of rows with every second pair of dims, and the lengths and features in turn."""
    pairs = [(rows, dims) for shift in range(len(_DIMS)) for rows, dims in zip(_ROWS, _DIMS[shift:] + _DIMS[:shift])]  # noqa: B905
    lengths, features = itertools.cycle(_LENGTHS), itertools.cycle(_FEATURES)
    return [_case(number, *pair, next(lengths), next(features)) for number, pair in enumerate(pairs[::2])]


# Cut into parts (split-KV).
SPLIT = [
    Case(1, 2049, 64, batch=2, heads=4, kv_heads=1),
    Case(3, 2049, 17, 16, heads=4, kv_heads=2, causal=True),
    Case(1, 4200, 16, 80, heads=2, kv_heads=1, bias=Bias("b11k", "bool"), sinks=True),
    Case(2, 4100, 7, window=(3000, 0), heads=1, alibi="h"),
    Case(2, 4100, 16, window=(100, 0), heads=1),  # parts that nobody sees
    Case(9, 2100, 16, scale=-0.5),
]


def _runs() -> Iterator[Any]:
    """Each case in one dtype on the best instruction set, and on one of the others."""
    for number, case in enumerate(_cases() + SPLIT):
        dtype = DTYPES[(number // 3 + number) % 4]
        if case.head_dim == 256:
            dtype = DTYPES[2 + number % 2]  # sums of 256 in their order are near the budget, in all blocks alike
        for engine in {CPU[-number % 2 * (number % len(CPU))], CPU[number % len(CPU)]}:
            yield pytest.param(case, dtype, engine, id=f"{case}-{str(dtype).removeprefix('torch.')}-{engine}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case, dtype, engine", sorted(_runs(), key=lambda run: str(run.id)), indirect=["engine"])
def test_within_budget(case: Case, dtype: torch.dtype, engine: str) -> None:
    """Forward and backward."""
    tolerance.check(case, dtype, tolerance.attend(case, case.inputs(dtype), engine))


def _dense(inputs: Inputs, case: Case, engine: str, **changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {**inputs.arguments(), **changed}
    result = case.attention()(**arguments, **case.options(), return_lse=True, backend=engine)
    return result.out, result.lse


# What hides all of 170 keys but [40, 150), or but the last 95, from every row.
_HIDDEN: dict[str, dict[str, Any]] = {
    "window": {"window": (0, None)},
    "bool": {"bias": Bias("qk", "bool_all")},
    "bias": {"bias": Bias("bhqk")},
    "blocks": {"blocks": Blocks("11", (16, 16), "all")},
    "window, bias": {"window": (0, None), "bias": Bias("b11k"), "softcap": 2.0, "alibi": "h"},
}


@on_cpu
@every_dtype
@pytest.mark.parametrize("hider", _HIDDEN)
def test_hidden_nonfinite(hider: str, dtype: torch.dtype, engine: str) -> None:
    """NaN and inf in keys and values that a row does not see change no bit of it, with dims of whole vectors or not."""
    for rows, (dim, value_dim) in itertools.product((1, 4, 5, 8), ((64, 16), (17, 7))):
        case = Case(rows, 170, dim, value_dim, heads=2, seed=rows, **_HIDDEN[hider])
        first, last = 40, 150
        if case.window is not None:  # row 0 stands at key 170 - rows
            first, last, case = 75, 170, replace(case, window=(95 - rows, None))
        inputs = case.inputs(dtype)
        if inputs.bias is not None:
            hidden = False if inputs.bias.dtype == torch.bool else -INF
            inputs.bias[..., :first], inputs.bias[..., last:] = hidden, hidden
        if inputs.visible is not None:
            inputs.visible[..., :first], inputs.visible[..., last:] = False, False
        expected = _dense(inputs, case, engine)
        assert expected[0].isfinite().all() and expected[1].isfinite().all()
        for bad in (NAN, INF, -INF):
            key, value = inputs.key.clone(), inputs.value.clone()
            for tensor in (key, value):
                tensor[..., :first, :], tensor[..., last:, :] = bad, bad
            out, lse = _dense(inputs, case, engine, key=key, value=value)
            tolerance.same_bits(f"{case} {bad} out", out, expected[0])
            tolerance.same_bits(f"{case} {bad} lse", lse, expected[1])


@on_cpu
@every_dtype
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_value_that_only_later_rows_see(bad: float, dtype: torch.dtype, engine: str) -> None:
    for rows, (dim, value_dim) in itertools.product((2, 4, 7, 8), ((64, 16), (17, 7))):
        case = Case(rows, 130, dim, value_dim, heads=1, causal=True, seed=rows)
        inputs = case.inputs(dtype)
        expected, _ = _dense(inputs, case, engine)
        for seen_by in range(rows):  # the last rows - seen_by ones
            value = inputs.value.clone()
            value[..., 130 - rows + seen_by, 3] = bad
            found, _ = _dense(inputs, case, engine, value=value)
            tolerance.same_bits(f"{case} blind", found[..., :seen_by, :], expected[..., :seen_by, :])
            others = [d for d in range(value_dim) if d != 3]
            tolerance.same_bits(f"{case} other dims", found[..., others], expected[..., others])
            assert not found[..., seen_by:, 3].isfinite().any()


@on_cpu
def test_visible_nan_in_a_key_or_query(engine: str) -> None:
    """Makes the rows that it reaches NaN, and no others."""
    for dtype, rows in itertools.product(DTYPES, (1, 3, 8)):
        case = Case(rows, 150, 16, heads=1, causal=True)
        inputs = case.inputs(dtype)
        expected, _ = _dense(inputs, case, engine)
        key, query = inputs.key.clone(), inputs.query.clone()
        key[..., 150 - 1, 0] = NAN
        found, lse = _dense(inputs, case, engine, key=key)
        assert found[..., -1, :].isnan().all() and lse[..., -1].isnan().all()
        tolerance.same_bits("key", found[..., :-1, :], expected[..., :-1, :])
        query[..., rows - 1, 2] = NAN
        found, lse = _dense(inputs, case, engine, query=query)
        assert found[..., -1, :].isnan().all() and lse[..., -1].isnan().all()
        tolerance.same_bits("query", found[..., :-1, :], expected[..., :-1, :])


@on_cpu
@every_dtype
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, engine: str) -> None:
    """1 to 8 rows of a block, or of several query heads that share keys: each has the bits that it has alone."""
    most = 4 if cpu.isa() == "plain" and dtype == torch.float64 else 8  # a block's lanes, if those are fewer
    for number, (dim, value_dim) in enumerate(_DIMS):
        case = Case(most, _LENGTHS[number % len(_LENGTHS)], dim, value_dim, seed=number)
        inputs = case.inputs(dtype)
        arguments = {"backend": engine, "return_lse": True}
        alone = [
            flashx.attention(inputs.query[:, :, i : i + 1], inputs.key, inputs.value, **arguments) for i in range(most)
        ]
        for rows in range(1, most + 1):
            query = inputs.query[:, :, :rows]
            out, lse = flashx.attention(query, inputs.key, inputs.value, **arguments)
            grouped = flashx.attention(query.transpose(1, 2), inputs.key, inputs.value, **arguments)
            for i in range(rows):
                tolerance.same_bits(f"{case} {i} of {rows}", out[:, :, i], alone[i].out[:, :, 0])
                tolerance.same_bits(f"{case} {i} of {rows}: lse", lse[:, :, i], alone[i].lse[:, :, 0])
            tolerance.same_bits(f"{case} {rows} heads", grouped.out.transpose(1, 2), out)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_backward_recomputes_the_same_scores(dtype: torch.dtype, engine: str) -> None:
    """Where one key has all the weight, lse is its score, and exp(score - lse) exactly 1.

    Scores are in the thousands: one that is off by an ulp would show. The gradients from above are powers of two, so
    that the values' gradient has a bit for each row. With 9 rows up to 31, the forward's scores are the backward's too.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for dim, k_len, rows in itertools.product((1, 7, 16, 17, 64, 80, 128, 256), (5, 130), (1, 2, 3, 5, 8, 9)):
        base = draw(dim)
        base *= 70 / base.norm()
        query = (base * (1 + torch.rand(rows, 1, generator=generator) / 4)).to(dtype)
        key = (0.01 * draw(k_len, dim)).to(dtype)
        place = int(torch.randint(k_len, (), generator=generator))
        key[place] = base.to(dtype)
        value = draw(k_len, 16).to(dtype).requires_grad_()
        out, lse = flashx.attention(
            query[None, None], key[None, None], value[None, None], scale=1.0, return_lse=True, backend=engine
        )
        label = f"dim {dim}, {rows} rows, {k_len} keys"
        tolerance.same_bits(label, out[0, 0].detach(), value[place].detach().expand(rows, -1))
        many = flashx.attention(
            query.repeat(27 // rows, 1)[None, None], key[None, None], value[None, None], scale=1.0, return_lse=True,
            backend=engine,
        )  # fmt: skip
        tolerance.same_bits(f"{label}: lse", lse.detach(), many.lse[..., :rows].detach())
        above = torch.exp2(torch.arange(rows, dtype=dtype)).expand(16, rows).mT
        (grad,) = torch.autograd.grad(out, value, above[None, None])
        tolerance.same_bits(f"{label}: grad_value", grad[place], torch.full((16,), 2.0**rows - 1, dtype=dtype))


@on_cpu
def test_threads_change_no_bit(threads: None, engine: str) -> None:
    for case, dtype in itertools.product(SPLIT[:3], DTYPES):
        inputs = case.inputs(dtype)
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(_dense(inputs, case, engine))
        tolerance.same_bits(f"{case} {dtype}", *(out for out, _ in results))
        tolerance.same_bits(f"{case} {dtype} lse", *(lse for _, lse in results))


_DECODED = [
    Ragged((1,) * 3, (129, 16, 1), 64, 64, heads=8, kv_heads=1),
    Ragged((3,) * 2, (130, 17), 80, 17, heads=4, kv_heads=2, window=(40, None), sinks=True),
    Ragged((8,) * 2, (15, 300), 16, 128, heads=1, alibi="bh", softcap=3.0),
    Ragged((1,), (2049,), 64, 16, heads=4, kv_heads=1, sink_tokens=3, window=(100, 0)),
]


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", _DECODED, ids=str)
def test_caches(call: Ragged, dtype: torch.dtype, engine: str, poisoned_memory: None) -> None:
    """Contiguous, and with pages of 1, 3 and 16 rows: within the budget, and the same bits."""
    results = []
    for page in (None, 1, 3, 16):
        inputs, cache = filled(call, dtype, page, engine)
        results.append(attend_cached(call, inputs, cache, engine))
    ragged.check(call, dtype, results[0])
    for page, found in zip((1, 3, 16), results[1:], strict=True):
        for name, tensor in results[0].items():
            tolerance.same_bits(f"{call} page {page} {name}", found[name], tensor)


_PACKED = [
    Ragged((1, 5, 8, 9, 0, 2), (16, 129, 300, 17, 5, 1), 64, 64, heads=1),
    Ragged((1, 3, 2), (127, 15, 140), 17, 80, heads=6, kv_heads=2, window=(30, 3), causal=False, alibi="h"),
    Ragged((2, 1), (2049, 2300), 16, 16, heads=4, kv_heads=1, sinks=True),
]


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", _PACKED, ids=str)
def test_varlen(call: Ragged, dtype: torch.dtype, engine: str, poisoned_memory: None) -> None:
    """Sequences of a few rows beside one of more; NaN follows the last."""
    ragged.check(call, dtype, attend_packed(call, call.inputs(dtype), engine, tail=3))


@on_cpu
@pytest.mark.parametrize("unified_max", [0.0, 5.0, -300.0, 1e30])
def test_unified_max(unified_max: float, engine: str) -> None:
    """Also where the sums do not fit, and the rows start again."""
    for call, dtype in itertools.product(_DECODED[:2], (torch.float32, torch.bfloat16)):
        inputs, cache = filled(call, dtype, None, engine)
        ragged.check(call, dtype, attend_cached(call, inputs, cache, engine, unified_max=unified_max))
