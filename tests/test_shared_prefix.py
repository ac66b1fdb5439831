"""Shared prefixes and prefix trees: against attention over each sequence's concatenated keys, spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tolerance
import torch
from conftest import CUDA_ENGINES
from hypothesis import given, settings
from hypothesis import strategies as st
from prefixes import Case, Level, attend, check, one_prefix, poisoned, run

import flashx
from flashx import PrefixLevel, prefix_calls, shared_prefix_attention, tree_attention
from flashx.prefix_plan import SharedPrefixPlan, plan
from flashx.shared_prefix import explain_shared_prefix


@pytest.fixture(params=["levels", "concatenated"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The form that calls take, whatever their costs; without a prefix, and with a block mask, there is no choice."""

    def forced(*arguments: Any, **options: Any) -> SharedPrefixPlan:
        chosen = plan(*arguments, **options)
        return chosen if chosen.form == "plain" or options["block_mask"] else chosen._replace(form=request.param)

    monkeypatch.setattr(prefix_calls, "plan", forced)
    yield request.param


SHARED = [
    one_prefix(1, 1, 1, 1),
    one_prefix(4, 1, 65, 17),
    one_prefix(4, 2, 130, 9, 0, 9, 3, 1, q_len=3),
    one_prefix(6, 3, 37, 20, 20, 0, 1, 19, 7, 3, q_len=5, heads=4, kv_heads=2, sinks=True),
    one_prefix(3, 3, 50, 33, q_len=33, heads=3, kv_heads=3),
    one_prefix(2, 1, 20, 3, 2, 0, q_len=30),  # rows before the first key
    one_prefix(4, 1, 100, 24, 3, 24, 10, 11, q_len=2, window=(13, None)),
    one_prefix(4, 2, 100, 24, 3, 24, 10, 0, q_len=9, window=(7, 2), causal=False, sink_tokens=5),
    one_prefix(4, 1, 7, 70, 60, 1, 70, 33, q_len=4, window=(20, 0), sink_tokens=9, sinks=True),  # across the boundary
    one_prefix(4, 1, 40, 15, 4, 0, 15, 8, q_len=3, causal=False, alibi="bh", softcap=2.0),
    one_prefix(4, 2, 40, 15, 4, 0, 15, 8, q_len=3, alibi="h", scale=0.3, head_dim=24, value_dim=7),
    one_prefix(5, 1, 33, 12, q_len=4, blocks="11", causal=False),
    one_prefix(4, 2, 33, 40, 40, 1, 17, 33, q_len=20, blocks="bh", heads=4, kv_heads=2, window=(30, 0), sink_tokens=3),
    one_prefix(8, 1, 200, 0, q_len=2, heads=8, kv_heads=2),  # no suffix
    one_prefix(4, 2, 0, 19, 19, 3, 0, 5, q_len=4, sinks=True),  # no prefix
    one_prefix(4, 1, 0, 19, q_len=4, blocks="b1"),
    one_prefix(2, 1, 0, 0, q_len=2, sinks=True),
    one_prefix(2, 1, 9, 4, q_len=0),
    one_prefix(32, 1, 140, 5, heads=1, head_dim=64, value_dim=64),  # more rows than a query tile
]

A, B = Level(1, 40, (0,) * 6), Level(3, 33, (2, 0, -1, 2, 1, 0), (33, 0, 17))
TREES = [
    Case(6, (), 12, (12, 0, 1, 5, 3, 12), q_len=3, sinks=True),
    Case(6, (A,), 12, q_len=2, window=(15, 0), sink_tokens=2),
    Case(6, (A, B), 12, (12, 0, 1, 5, 3, 12), q_len=3, heads=4, kv_heads=2, sinks=True),
    Case(6, (B, A, B), 4, (1, 0, 4, 2, 3, 4), q_len=5, window=(30, 3), causal=False, sink_tokens=4, sinks=True),
    Case(
        6, (A, Level(2, 70, (1, 0, 1, 1, -1, 0), (70, 3)), B, Level(5, 9, (4, 3, 1, 0, -1, 1))), 3, q_len=2, alibi="h"
    ),
    Case(6, (B, Level(1, 0, (0,) * 6), Level(0, 5, (-1,) * 6)), 0, q_len=40, softcap=1.5),
    Case(6, (Level(2, 21, (-1,) * 6), A), 30, q_len=30, blocks="1h", heads=4, kv_heads=2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_prefix(case: Case, dtype: torch.dtype, engine: str, form: str) -> None:
    check(case, dtype, run(case, poisoned(case, case.tensors(dtype)), engine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", TREES, ids=str)
def test_trees(case: Case, dtype: torch.dtype, engine: str) -> None:
    check(case, dtype, run(case, poisoned(case, case.tensors(dtype)), engine))


@pytest.mark.parametrize("case", [SHARED[3], SHARED[7], TREES[2]], ids=str)
def test_float64(case: Case, engine: str, form: str) -> None:
    if engine in CUDA_ENGINES:
        pytest.skip("the CUDA kernels have no float64")
    check(case, torch.float64, run(case, poisoned(case, case.tensors(torch.float64)), engine))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any tree, and options in any combination."""
    batch = draw(st.integers(1, 5))

    def many(least: int, most: int, count: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(least, most), min_size=count, max_size=count)))

    levels = []
    for _ in range(draw(st.integers(0, 3))):
        nodes, length = draw(st.integers(0, 4)), draw(st.integers(0, 40))
        lens = many(0, length, nodes) if draw(st.booleans()) else None
        levels.append(Level(nodes, length, many(-1, nodes - 1, batch), lens))
    suffix = draw(st.integers(0, 24))
    widths = st.one_of(st.none(), st.integers(0, 30))
    return Case(
        batch, tuple(levels), suffix, many(0, suffix, batch) if draw(st.booleans()) else None,
        q_len=draw(st.integers(1, 20)), heads=draw(st.sampled_from([2, 4])), kv_heads=draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([8, 17])), causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.tuples(widths, widths))), sink_tokens=draw(st.integers(0, 9)),
        alibi=draw(st.sampled_from([None, "h", "bh"])), softcap=draw(st.sampled_from([0.0, 3.0])),
        sinks=draw(st.booleans()), blocks=draw(st.sampled_from([None, None, "11", "bh"])),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_any_tree(case: Case) -> None:
    check(case, torch.float32, run(case, poisoned(case, case.tensors(torch.float32)), "cpu"))


def test_empty_tensors(engine: str, form: str) -> None:
    no_heads = one_prefix(4, 2, 9, 5, q_len=3, heads=0, kv_heads=0)
    for case in (no_heads, one_prefix(4, 2, 9, 5, q_len=3, value_dim=0)):
        found = run(case, case.tensors(torch.float32), engine)
        assert found["out"].shape == (4, case.heads, 3, case.value_dim) and found["lse"].isfinite().all()


def test_empty_batch(engine: str) -> None:
    for case in (one_prefix(0, 3, 21, 4), Case(0, (Level(2, 21, ()),), 3, (), q_len=2, sinks=True)):
        found = run(case, case.tensors(torch.float32), engine)
        assert found["out"].shape == (0, 2, case.q_len, 16) and found["lse"].shape == (0, 2, case.q_len)
        assert found["grad_key0"].shape[2] == 21 and not any(tensor.any() for tensor in found.values())


def test_concatenated_is_attention() -> None:
    """And so is no prefix; to the bit."""
    for prefix, suffix in ((21, 5), (0, 20), (9, 0)):
        query, key = torch.randn(4, 4, 3, 8), torch.randn(4, 2, suffix, 8)
        shared = torch.randn(2, 2, prefix, 8)
        call = (query, shared, shared, key, key)
        assert flashx.explain(shared_prefix_attention, *call).plan.form == ("concatenated" if prefix else "plain")
        joined = torch.cat([shared.repeat_interleave(2, 0), key], 2)
        options: dict[str, Any] = {"causal": True, "window": (7, None), "return_lse": True}
        expected = flashx.attention(query, joined, joined, **options)
        for actual, exact in zip(shared_prefix_attention(*call, **options), expected, strict=True):
            tolerance.same_bits(f"prefix {prefix}", actual, exact)


@pytest.mark.parametrize("case", [SHARED[3], SHARED[7], TREES[3], TREES[4]], ids=str)
def test_hidden_keys_change_no_bit(case: Case, engine: str, form: str) -> None:
    tensors = case.tensors(torch.float32)
    expected = run(case, poisoned(case, tensors, 0.0), engine)
    for name, actual in run(case, poisoned(case, tensors), engine).items():
        tolerance.same_bits(f"{case} {name}", actual, expected[name])


def _sequences(case: Case, chosen: list[int]) -> Case:
    """The case with those sequences only, in that order. Its tensors are not the same ones."""
    levels = tuple(replace(level, node=tuple(level.node[b] for b in chosen)) for level in case.levels)
    lens = None if case.suffix_lens is None else tuple(case.suffix_lens[b] for b in chosen)
    return replace(case, batch=len(chosen), levels=levels, suffix_lens=lens)


@pytest.mark.parametrize("chosen", [[5, 3, 1, 0, 2, 4], [2], [4, 1, 5]], ids=str)
@pytest.mark.parametrize("case", [TREES[2], TREES[4], replace(TREES[4], q_len=17, levels=(A, B), suffix=90)], ids=str)
def test_bits_of_a_sequence_do_not_depend_on_the_batch(case: Case, chosen: list[int], engine: str) -> None:
    """Neither on the sequences beside it nor on their order."""
    if engine == "reference":
        pytest.skip("torch's products promise no such thing")
    tensors = case.tensors(torch.float32)
    whole = run(case, tensors, engine)
    own = {name: tensor[chosen] if name in ("query", "key", "value") else tensor for name, tensor in tensors.items()}
    out, lse, _ = attend(_sequences(case, chosen), own, engine)
    tolerance.same_bits("out", out.detach().cpu(), whole["out"][chosen])
    tolerance.same_bits("lse", lse.detach().cpu(), whole["lse"][chosen])


def test_one_level_cut_in_two(engine: str) -> None:
    """Where levels end changes roundings only; the window crosses all of it."""
    whole = Case(6, (A, B), 12, (12, 0, 1, 5, 3, 12), q_len=3, window=(50, 0), sink_tokens=3, sinks=True)
    tensors = whole.tensors(torch.float32)
    first, second = replace(A, length=11), replace(A, length=29)
    cut = replace(whole, levels=(first, second, B))
    pieces = dict(tensors)
    for name in ("key", "value"):
        pieces[f"{name}2"] = tensors[f"{name}1"]
        pieces[f"{name}0"], pieces[f"{name}1"] = tensors[f"{name}0"].split([11, 29], dim=2)
    found = run(cut, pieces, engine)
    for name in ("key", "value"):
        found[f"grad_{name}0"] = torch.cat([found[f"grad_{name}0"], found.pop(f"grad_{name}1")], dim=2)
        found[f"grad_{name}1"] = found.pop(f"grad_{name}2")
    check(whole, torch.float32, found)


def test_strided_tensors(engine: str) -> None:
    """Heads inside length, as projections and caches have them."""
    case = SHARED[3]
    tensors = case.tensors(torch.float32)
    strided = {
        name: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for name, t in tensors.items()
    }
    check(case, torch.float32, run(case, strided, engine))


def test_only_some_gradients(engine: str) -> None:
    case = SHARED[3]
    tensors, expected = case.tensors(torch.float32), run(case, case.tensors(torch.float32), engine)
    device = tolerance.device_of(engine)
    query, prefix, key = (tensors[name].to(device) for name in ("query", "key0", "key"))
    value, prefix_value = tensors["value"].to(device), tensors["value0"].to(device).requires_grad_()
    lens = torch.tensor(case.suffix_lens, device=device)
    out = shared_prefix_attention(
        query,
        prefix,
        prefix_value,
        key,
        value,
        suffix_lens=lens,
        sinks=tensors["sinks"].to(device),
        backend=engine,
    )
    (grad,) = torch.autograd.grad(out, prefix_value, case.above(torch.float32)[0].to(device))
    tolerance.same_bits("prefix value", grad.cpu(), expected["grad_value0"])


@pytest.mark.parametrize("case", [SHARED[14], TREES[5], one_prefix(0, 3, 21, 4)], ids=str)
def test_gradients_of_what_nobody_sees(case: Case) -> None:
    """They are zeros, whatever form runs, not None."""
    out, _, leaves = attend(case, case.tensors(torch.float32), None)
    out.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name


def test_explain() -> None:
    prefix, own = torch.randn(2, 8, 4096, 16), torch.randn(4, 8, 5, 16)
    found = flashx.explain(shared_prefix_attention, own, prefix, prefix, own, own, window=(9, 0))
    assert found.plan.form == "levels" and [level.problem.k_len for level in found.levels] == [4096, 5]
    assert [level.problem.groups for level in found.levels] == [2, None]
    assert all(level.backend == "cpu" for level in found.levels)
    said = str(found)
    for part in ("runs as: levels (2 of 4 prefixes", "launches", "concatenated: ", "without sharing", "runs on: cpu/"):
        assert part in said
    short = prefix[:, :, :9]
    found = flashx.explain(shared_prefix_attention, own, short, short, own, own, suffix_lens=torch.tensor([5, 0, 1, 2]))
    assert found.plan.form == "concatenated" and [level.problem.k_len for level in found.levels] == [14]
    with pytest.raises(ValueError, match="abacus"):
        flashx.explain(shared_prefix_attention, own, prefix, prefix, own, own, backend="abacus")


def _arguments(**changed: Any) -> dict[str, Any]:
    return {
        "query": torch.zeros(4, 4, 3, 8),
        "prefix_key": torch.zeros(2, 2, 5, 8),
        "prefix_value": torch.zeros(2, 2, 5, 6),
        "key": torch.zeros(4, 2, 7, 8),
        "value": torch.zeros(4, 2, 7, 6),
        **changed,
    }


LENS = torch.tensor([7, 0, 3, 1])
BAD = [
    (dict(query=None), TypeError, "query must be a torch.Tensor, got NoneType"),
    (dict(query=torch.zeros(4, 3, 8)), ValueError, r"query must have 4 dimensions .* got shape \(4, 3, 8\)"),
    (dict(key=torch.zeros(3, 2, 7, 8)), ValueError, r"key must have query's batch size 4, got shape \(3, 2, 7, 8\)"),
    (dict(value=torch.zeros(4, 2, 6, 6)), ValueError, "value must have key's length 7"),
    (dict(prefix_key=None), TypeError, "prefix_key must be a torch.Tensor, got NoneType"),
    (dict(prefix_value=torch.zeros(5, 6)), ValueError, r"prefix_value must have 3 or 4 dimensions .* \(5, 6\)"),
    (dict(prefix_key=torch.zeros(2, 2, 5, 8).half()), TypeError, "prefix_key must have query's dtype torch.float32"),
    (dict(prefix_key=torch.zeros(2, 2, 5, 8, device="meta")), ValueError, "prefix_key must be on query's device cpu"),
    (
        dict(prefix_key=torch.zeros(2, 4, 5, 8)),
        ValueError,
        r"prefix_key must have the suffix's 2 heads .* \(2, 4, 5, 8\)",
    ),
    (dict(prefix_key=torch.zeros(2, 2, 5, 9)), ValueError, "prefix_key must have the suffix's 2 heads and dim 8"),
    (dict(prefix_value=torch.zeros(2, 2, 5, 8)), ValueError, "prefix_value must have the suffix's 2 heads and dim 6"),
    (dict(prefix_value=torch.zeros(2, 2, 4, 6)), ValueError, "prefix_value must have prefix_key's length 5"),
    (dict(prefix_value=torch.zeros(2, 5, 6)), ValueError, "prefix_value .* leading dimension 2"),
    (
        dict(prefix_key=torch.zeros(3, 2, 5, 8), prefix_value=torch.zeros(3, 2, 5, 6)),
        ValueError,
        "prefix_key's groups must divide query's batch size 4, got 3",
    ),
    (dict(suffix_lens=[7, 0, 3, 1]), TypeError, "suffix_lens must be a torch.Tensor, got list"),
    (dict(suffix_lens=LENS.float()), TypeError, "suffix_lens must be of integers, got torch.float32"),
    (dict(suffix_lens=LENS > 1), TypeError, "suffix_lens must be of integers, got torch.bool"),
    (dict(suffix_lens=LENS[:3]), ValueError, r"suffix_lens must have shape \(4,\), got \(3,\)"),
    (dict(suffix_lens=LENS.to("meta")), ValueError, "suffix_lens must be on cpu, got meta"),
    (dict(suffix_lens=LENS + 1), ValueError, "suffix_lens must be from 0 to 7, got 8"),
    (dict(suffix_lens=LENS - 1), ValueError, "suffix_lens must be from 0 to 7, got -1"),
    (dict(causal=1), TypeError, "causal must be a bool, got int"),
    (dict(window=(-3, 0)), ValueError, "window's left width must be >= 0 .* got -3"),
    (dict(sink_tokens=-1), ValueError, "sink_tokens must be >= 0"),
    (dict(sink_tokens=1.0), TypeError, "sink_tokens must be an int"),
    (dict(softcap=-1.0), ValueError, "softcap must be >= 0"),
    (dict(sinks=torch.zeros(3)), ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
    (dict(block_mask=torch.ones(3, 7)), TypeError, "block_mask must be a flashx.BlockMask or None, got Tensor"),
    (
        dict(block_mask=flashx.BlockMask.causal(3, 8)),
        ValueError,
        r"block_mask must broadcast to .* = \(4, 4, 3, 7\), got \(1, 1, 3, 8\)",
    ),
    (dict(backend="abacus"), ValueError, "abacus"),
]


@pytest.mark.parametrize("wrong, error, message", BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (shared_prefix_attention, explain_shared_prefix):
        with pytest.raises(error, match=message):
            function(**_arguments(**wrong))


def _level(**changed: Any) -> PrefixLevel:
    level = PrefixLevel(torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 6), torch.tensor([2, -1, 0, 2]))
    return level._replace(**changed)


BAD_LEVELS = [
    (None, TypeError, "levels must be a list of flashx.PrefixLevel, got NoneType"),
    ([_level(), 3], TypeError, r"levels\[1\] must be a flashx.PrefixLevel, got int"),
    ([_level(key=1)], TypeError, r"levels\[0\].key must be a torch.Tensor, got int"),
    ([_level(), _level(value=torch.zeros(2, 5, 6))], ValueError, r"levels\[1\].value must have 4 dimensions"),
    ([_level(value=torch.zeros(2, 2, 5, 6))], ValueError, r"levels\[0\].value must have levels\[0\].key's length 5"),
    ([_level(key=torch.zeros(3, 1, 5, 8))], ValueError, r"levels\[0\].key must have the suffix's 2 heads"),
    ([_level(key=torch.zeros(3, 2, 5, 8).double())], TypeError, r"levels\[0\].key must have query's dtype"),
    ([_level(node_of_sequence=[0, 0, 0, 0])], TypeError, r"levels\[0\].node_of_sequence must be a torch.Tensor"),
    ([_level(node_of_sequence=torch.zeros(4))], TypeError, r"levels\[0\].node_of_sequence must be of integers"),
    (
        [_level(node_of_sequence=LENS[:2])],
        ValueError,
        r"levels\[0\].node_of_sequence must have shape \(4,\), got \(2,\)",
    ),
    ([_level(node_of_sequence=LENS)], ValueError, r"levels\[0\].node_of_sequence must be from -1 to 2, got 7"),
    ([_level(node_of_sequence=-2 + 0 * LENS)], ValueError, "node_of_sequence must be from -1 to 2, got -2"),
    ([_level(lens=torch.tensor([1, 6, 0]))], ValueError, r"levels\[0\].lens must be from 0 to 5, got 6"),
    ([_level(lens=torch.tensor([1, 5]))], ValueError, r"levels\[0\].lens must have shape \(3,\), got \(2,\)"),
]


@pytest.mark.parametrize("levels, error, message", BAD_LEVELS)
def test_bad_levels(levels: Any, error: type[Exception], message: str) -> None:
    arguments = _arguments(levels=levels)
    del arguments["prefix_key"], arguments["prefix_value"]
    with pytest.raises(error, match=message):
        tree_attention(**arguments)


@pytest.mark.skipif("cuda" not in CUDA_ENGINES, reason="no GPU")
def test_nothing_waits_for_a_gpu() -> None:
    """torch raises where its own code waits; lengths and nodes out of range are clamped, not read."""
    query, key = torch.randn(4, 2, 3, 16, device="cuda"), torch.randn(4, 1, 9, 16, device="cuda")
    node, lens = torch.tensor([9, -5, 0, 1], device="cuda"), torch.tensor([-3, 99, 2, 0], device="cuda")
    level = PrefixLevel(key[:2], key[:2], node, lens[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs = [
            shared_prefix_attention(query, key[:2], key[:2], key, key, suffix_lens=lens),
            tree_attention(query, [level, level], key, key, suffix_lens=lens),
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(out.isfinite().all()) for out in outs)


def test_explanation_of_a_tree() -> None:
    root, own, query = torch.randn(1, 2, 9, 8), torch.randn(3, 2, 4, 8), torch.randn(3, 4, 1, 8)
    level = PrefixLevel(root, root, torch.tensor([0, 0, -1]))
    explanation = flashx.explain(flashx.tree_attention, query, [level], own, own, window=(5, 0))
    assert [part.problem.groups for part in explanation.levels] == [1, None]
    assert [part.backend for part in explanation.levels] == ["cpu", "cpu"]
    assert str(explanation).count("runs on: cpu/") == 2
    alone = flashx.explain(flashx.tree_attention, query, [], own, own)
    assert len(alone.levels) == 1 and alone.levels[0].problem.k_len == 4
