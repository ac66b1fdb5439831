"""flashx.varlen_attention against the oracle, one sequence at a time, on every engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import ragged
import tolerance
import torch
from conftest import ENGINES
from ragged import Ragged

import flashx
from flashx import varlen
from flashx.varlen import varlen_attention

NAN = float("nan")
# Where bits may be compared: naive attention's depend on how BLAS cuts a product.
exact = pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"], indirect=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

CALLS = [
    # one row, tile edges, nothing of queries, of keys, of both
    Ragged((1, 17, 64, 129), (5, 64, 130, 129), causal=False),
    Ragged((3, 0, 70, 0, 1), (9, 12, 0, 0, 65)),
    Ragged((0, 0), (0, 3)),
    Ragged((40, 3), (7, 200), head_dim=24, value_dim=40),
    # everything together: window, learned sinks, sink tokens, groups of heads
    Ragged((33, 1, 80), (150, 40, 80), heads=4, kv_heads=2, window=(20, None), sink_tokens=5, sinks=True),
    Ragged((33, 0, 80), (150, 4, 60), heads=6, kv_heads=2, causal=False, window=(9, 30), sink_tokens=70, alibi="bh"),
    Ragged((50, 20), (50, 20), heads=4, kv_heads=1, window=(16, 0), softcap=5.0, alibi="h", sinks=True, magnitude=3.0),
    Ragged((20, 31, 5), (40, 3, 9), sinks=True, dropout_p=0.3),
]


def packed(tensor: torch.Tensor, tail: int) -> torch.Tensor:
    """With rows of NaN after the last sequence."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, tail), value=NAN)


def attend(call: Ragged, inputs: ragged.Inputs, backend: str | None, tail: int = 0, **options: Any) -> ragged.Results:
    """Forward and backward; results without the tail, which is checked here."""
    if inputs.query.dtype == torch.float64 and backend in ("cuda", "cuda_emulated"):
        pytest.skip("the CUDA kernels have no float64")
    torch.manual_seed(call.seed)
    leaves = inputs.leaves()
    there = inputs.to(tolerance.device_of(backend or "cpu"))
    device = there.query.device
    query, key, value = (packed(leaves[name], tail).to(device) for name in ("query", "key", "value"))
    query.retain_grad(), key.retain_grad(), value.retain_grad()
    out, lse = varlen_attention(
        query,
        key,
        value,
        ragged.starts(call.q_lens).to(device),
        ragged.starts(call.k_lens).to(device),
        **call.options("sink_tokens", "dropout_p"),
        alibi_slopes=there.alibi_slopes,
        sinks=leaves["sinks"].to(device) if "sinks" in leaves else None,
        return_lse=True,
        backend=backend,
        **options,
    )
    end = len(inputs.query)
    assert (out[end:] == 0).all() and (lse[:, end:] == -torch.inf).all()
    assert out.dtype == inputs.query.dtype and out.is_contiguous()
    # NaN from above for rows that are not there.
    above = packed(inputs.grad_out, tail).to(device), torch.nn.functional.pad(there.grad_lse, (0, tail), value=NAN)
    torch.autograd.backward((out, lse), above)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        assert tensor.grad is not None and (tensor.grad[len(tensor) - tail :] == 0).all(), name
    found = {"out": out[:end], "lse": lse[:, :end]} | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_oracle(call: Ragged, dtype: torch.dtype, engine: str, poisoned_memory: None) -> None:
    """With rows and keys of NaN after the last sequence."""
    ragged.check(call, dtype, attend(call, call.inputs(dtype), engine, tail=3))


@exact
@pytest.mark.parametrize("call", [CALLS[0], CALLS[1], CALLS[4], CALLS[6]], ids=str)
def test_a_sequence_does_not_depend_on_its_batch(call: Ragged, engine: str) -> None:
    """The same bits as of the sequence alone; on the CPU, as of flashx.attention too."""
    inputs = call.inputs(torch.float32)
    together = attend(call, inputs, engine)
    for b, (rows, keys) in enumerate(call.slices()):
        q_len, k_len = call.q_lens[b], call.k_lens[b]
        alone = replace(call, q_lens=(q_len,), k_lens=(k_len,))
        own = inputs._replace(
            query=inputs.query[rows], key=inputs.key[keys], value=inputs.value[keys],
            grad_out=inputs.grad_out[rows], grad_lse=inputs.grad_lse[:, rows],
        )  # fmt: skip
        found = attend(alone, own, engine)
        for name, tensor in found.items():
            if name != "grad_sinks":
                part = rows if name in ("out", "grad_query") else keys
                want = together[name][:, rows] if name == "lse" else together[name][part]
                tolerance.same_bits(f"{call} sequence {b}: {name}", tensor, want)
        if call.sink_tokens == 0 and engine == "cpu":
            dense = flashx.attention(
                *(tensor.transpose(0, 1)[None] for tensor in own[:3]),
                **call.options(), alibi_slopes=own.alibi_slopes, sinks=own.sinks, backend=engine,
            )  # fmt: skip
            tolerance.same_bits(f"{call} sequence {b}: dense", dense[0].transpose(0, 1), found["out"])


@exact
def test_few_rows_beside_many(engine: str) -> None:
    """A sequence with one row and many keys may be cut in parts, whoever is in the batch."""
    if engine != "cpu":
        pytest.skip("the CUDA kernels decide for the call, by its longest sequence of queries")
    call = Ragged((1, 150), (2500, 150), head_dim=8, heads=1)
    inputs = call.inputs(torch.float32)
    out = attend(call, inputs, engine)["out"]
    alone = inputs._replace(
        query=inputs.query[:1], key=inputs.key[:2500], value=inputs.value[:2500],
        grad_out=inputs.grad_out[:1], grad_lse=inputs.grad_lse[:, :1],
    )  # fmt: skip
    tolerance.same_bits("one row", attend(replace(call, q_lens=(1,), k_lens=(2500,)), alone, engine)["out"], out[:1])


@exact
def test_longest_lengths_change_nothing(engine: str) -> None:
    call = CALLS[4]
    inputs = call.inputs(torch.float32)
    without = attend(call, inputs, engine)
    for lengths in ((80, 150), (1000, 200), (113, None)):
        found = attend(call, inputs, engine, max_seqlen_q=lengths[0], max_seqlen_k=lengths[1])
        for name, tensor in found.items():
            tolerance.same_bits(name, tensor, without[name])


@exact
def test_strides(engine: str) -> None:
    """Slices of one packed projection, heads before rows, int64 tables."""
    device = tolerance.device_of(engine)
    ends = torch.tensor([0, 13, 30], device=device)
    query, key, value = torch.randn(3, 2, 30, 16).to(device).transpose(1, 2)
    views = torch.stack((query, key, value), 1)
    plain = (tensor.contiguous() for tensor in (query, key, value))
    expected = varlen_attention(*plain, ends.int(), ends.int(), backend=engine)
    tolerance.same_bits("heads first", varlen_attention(query, key, value, ends, ends, backend=engine), expected)
    tolerance.same_bits("packed", varlen_attention(*views.unbind(1), ends, ends, backend=engine), expected)


def test_no_sequences(engine: str) -> None:
    query = torch.randn(4, 2, 8, device=tolerance.device_of(engine), requires_grad=True)
    none = torch.zeros(1, dtype=torch.int32, device=query.device)
    out, lse = varlen_attention(query, query, query, none, none, return_lse=True, backend=engine)
    assert (out == 0).all() and (lse == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert (grad == 0).all()


def test_result_types() -> None:
    query, ends = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    out, lse = varlen_attention(query, query, query, ends, ends, return_lse=True)
    assert isinstance(varlen_attention(query, query, query, ends, ends), torch.Tensor)
    assert (out.shape, lse.shape, lse.dtype) == ((4, 2, 8), (2, 4), torch.float32)


HOSTILE = [
    [0, 2**31 - 1, -(2**31), 40],
    [-5, 3, 2, 60],
    [50, 60, 70, 80],
    [0, 100, 200, 2**31 - 1],
    [39, 0, 39, 0],
]


@pytest.mark.parametrize("ends", HOSTILE, ids=str)
def test_tables_that_nobody_looks_at_are_harmless(
    ends: list[int], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: whatever they hold, nothing outside of the tensors is read or written."""
    monkeypatch.setattr(varlen, "on_host", lambda tensor: False)
    device = tolerance.device_of(engine)
    query = torch.randn(40, 2, 16, device=device, requires_grad=True)
    good, bad = torch.tensor([0, 10, 20, 40]).int().to(device), torch.tensor(ends).int().to(device)
    for cu_q, cu_k in ((bad, good), (good, bad), (bad, bad)):
        out = varlen_attention(query, query, query, cu_q, cu_k, causal=True, backend=engine)
        torch.autograd.grad(out.sum(), query)
        assert out.isfinite().all()


@exact
def test_tables_that_nobody_looks_at_serve_as_well(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[4]
    expected = attend(call, call.inputs(torch.float32), engine)
    monkeypatch.setattr(varlen, "on_host", lambda tensor: False)
    for name, tensor in attend(call, call.inputs(torch.float32), engine).items():
        tolerance.same_bits(name, tensor, expected[name])


def test_nothing_waits_for_a_device() -> None:
    """Meta tensors have no values, so whatever would have to wait for a GPU fails on them."""
    query, ends = torch.empty(30, 4, 16, device="meta"), torch.empty(5, dtype=torch.int32, device="meta")
    out, lse = varlen_attention(query, query, query, ends, ends, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((30, 4, 16), (4, 30))


def test_explain() -> None:
    explained = flashx.explain(varlen_attention, **good(), sink_tokens=2, return_lse=True)
    problem = explained.problem
    assert (problem.batch, problem.q_len, problem.k_len, problem.packed, problem.mask.first) == (2, 5, 7, True, 2)
    assert explained.backend == "cpu" and "packed sequences" in str(explained)
    assert flashx.explain(varlen_attention, **good(), backend="reference").backend == "reference"


def test_compiled() -> None:
    query, ends = torch.randn(10, 2, 8), torch.tensor([0, 4, 10]).int()
    compiled = torch.compile(varlen_attention, backend="aot_eager", fullgraph=True)
    tolerance.same_bits(
        "out", compiled(query, query, query, ends, ends), varlen_attention(query, query, query, ends, ends)
    )


def good() -> dict[str, Any]:
    return {
        "query": torch.randn(9, 4, 8),
        "key": torch.randn(12, 2, 8),
        "value": torch.randn(12, 2, 3),
        "cu_seqlens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 7, 12], dtype=torch.int32),
    }


def table(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


BAD: list[tuple[dict[str, Any], Any, tuple[str, ...]]] = [
    ({"query": [1.0]}, TypeError, ("query", "list")),
    ({"query": torch.randn(1, 9, 4, 8)}, ValueError, ("query", "3 dimensions", "(1, 9, 4, 8)")),
    ({"key": torch.randn(12, 8)}, ValueError, ("key", "3 dimensions", "(12, 8)")),
    ({"key": torch.randn(12, 2, 7)}, ValueError, ("key", "head dim 8", "(12, 2, 7)")),
    ({"value": torch.randn(11, 2, 3)}, ValueError, ("value", "12", "(11, 2, 3)")),
    ({"value": torch.randn(12, 1, 3)}, ValueError, ("value", "2 heads", "(12, 1, 3)")),
    ({"query": torch.randn(9, 4, 0)}, ValueError, ("query", "head dim", "(9, 4, 0)")),
    ({"query": torch.randn(9, 3, 8)}, ValueError, ("heads", "3 and 2")),
    ({"query": torch.randn(9, 4, 8).half()}, TypeError, ("key", "float16", "float32")),
    ({"value": torch.randn(12, 2, 3, device="meta")}, ValueError, ("value", "meta")),
    ({"cu_seqlens_q": [0, 4, 9]}, TypeError, ("cu_seqlens_q", "list")),
    ({"cu_seqlens_q": torch.tensor([0.0, 4, 9])}, TypeError, ("cu_seqlens_q", "float32")),
    ({"cu_seqlens_k": torch.zeros(1, 3).int()}, ValueError, ("cu_seqlens_k", "(1, 3)")),
    ({"cu_seqlens_k": table()}, ValueError, ("cu_seqlens_k", "(0,)")),
    ({"cu_seqlens_k": table(0, 12)}, ValueError, ("cu_seqlens_k", "(3,)", "(2,)")),
    ({"cu_seqlens_k": table(0, 12, 12).to("meta")}, ValueError, ("cu_seqlens_k", "meta")),
    ({"cu_seqlens_q": table(1, 4, 9)}, ValueError, ("cu_seqlens_q", "start at 0", "1")),
    ({"cu_seqlens_q": table(0, 4, 10)}, ValueError, ("cu_seqlens_q", "9", "10")),
    ({"cu_seqlens_k": table(0, 7, 6)}, ValueError, ("cu_seqlens_k", "not decrease", "6 after 7")),
    ({"cu_seqlens_k": table(0, 70, 12)}, ValueError, ("cu_seqlens_k", "not decrease", "12 after 70")),
    ({"max_seqlen_q": 4}, ValueError, ("max_seqlen_q", "5", "4")),
    ({"max_seqlen_k": -1}, ValueError, ("max_seqlen_k", ">= 0", "-1")),
    ({"max_seqlen_k": 7.0}, TypeError, ("max_seqlen_k", "7.0")),
    ({"sink_tokens": -2}, ValueError, ("sink_tokens", ">= 0", "-2")),
    ({"sink_tokens": True}, TypeError, ("sink_tokens", "bool")),
    ({"causal": 1}, TypeError, ("causal", "int")),
    ({"window": (-1, 0)}, ValueError, ("window", "-1")),
    ({"alibi_slopes": torch.rand(3, 4)}, ValueError, ("alibi_slopes", "(2, 4)", "(3, 4)")),
    ({"sinks": torch.rand(2, 4)}, ValueError, ("sinks", "(4,)", "(2, 4)")),
    ({"softcap": -1.0}, ValueError, ("softcap", "-1.0")),
    ({"dropout_p": 1.5}, ValueError, ("dropout_p", "1.5")),
    ({"backend": "none"}, ValueError, ("backend", "none")),
]  # fmt: skip


@pytest.mark.parametrize(
    "changes, error, parts", BAD, ids=lambda part: "_".join(part) if isinstance(part, dict) else ""
)
def test_bad_input(changes: dict[str, Any], error: Any, parts: tuple[str, ...]) -> None:
    assert varlen_attention(**good()).shape == (9, 4, 3)
    with pytest.raises(error) as raised:
        varlen_attention(**{**good(), **changes})
    for part in parts:
        assert part in str(raised.value), f"{str(raised.value)!r} does not say {part!r}"
