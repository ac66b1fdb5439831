"""The benchmark's cases, its oracle and its peers: what the numbers count, and that everybody computes the same."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashx
from flashx.bench import check, implementations, peers, timing
from flashx.bench.cases import CAUSAL, FULL, Case, Dense
from flashx.bench.implementations import Refused
from flashx.bench.peers import IMPLEMENTATIONS
from flashx.bench.prefixes import SharedPrefix, Tree
from flashx.bench.ragged import Decode, Varlen
from flashx.bench.sparse import BlockSparse, Neighborhood
from flashx.bench.variants import VARIANTS, from_dict

SMALL = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 24}
CASES: list[Case] = [
    Dense(33, 40, 2, (9, 3), **SMALL),
    Dense(40, 33, 2, CAUSAL, softcap=3.0, **SMALL),
    Dense(33, 40, 2, (9, 0), sink_tokens=4, sinks=True, bias=True, **SMALL),
    BlockSparse(150, 2, sparsity=0.6, block=32, **SMALL),
    BlockSparse(96, sparsity=0.6, block=16, causal=True, **SMALL),
    SharedPrefix(4, 20, 7, groups=2, q_len=3, **SMALL),
    SharedPrefix(4, 20, 7, sinks=True, **SMALL),
    Tree((1, 2, 6), (20, 7, 5), **SMALL),
    Tree((2, 4, 4), (9, 3, 6), 2, **SMALL),
    Varlen((3, 40, 1, 17), **SMALL),
    Varlen((3, 40, 1, 17), causal=False, softcap=2.0, **SMALL),
    Decode((30, 17, 1), **SMALL),
    Decode((30, 17, 5), 3, 4, 9, 2, sinks=True, **SMALL),
    Neighborhood((11,), (5,), (2,), (2,), **SMALL),
    Neighborhood((7, 9), (3, 4), (2, 1), (1, 2), causal=True, batch=2, **SMALL),
    Neighborhood((3, 5, 6), (2, 3, 5), (1, 3, 2), (1, 1, 1), **SMALL),
]
BOTH = [replace(case, direction="fwd" if case.FORWARD_ONLY else "both") for case in CASES]
IDS = [str(case).replace(" ", "_") for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_pairs_are_what_the_mask_shows(case: Case) -> None:
    shown = 0
    for b in range(case.sequences):
        q_len, _ = case.lengths(b)
        # Taken in two parts, as the oracle does.
        for rows in (range(q_len // 2), range(q_len // 2, q_len)):
            shown += int(case.visible(b, rows, torch.device("cpu")).sum())
    assert case.pairs() == shown


@pytest.mark.parametrize("case", BOTH, ids=IDS)
def test_everybody_computes_the_same(case: Case) -> None:
    """flashx's function and every peer that is here, all results within the oracle's budget."""
    inputs = case.inputs()
    oracle = check.Oracle(case, inputs)
    leaves = [] if case.direction == "fwd" else [f"grad_{name}" for name in inputs.leaves]
    assert oracle.expected.keys() == {"out", *leaves}
    done = []
    for name, implementation in IMPLEMENTATIONS.items():
        if name == "flex" or not isinstance(case, implementation.kinds) or implementation.absent("cpu"):
            continue
        try:
            attend = implementation.prepare(case, inputs)
        except Refused:
            continue
        accuracy = oracle.check(check.run(case, attend, inputs)())
        assert all(it.ok for it in accuracy.values()), (name, accuracy)
        done.append(name)
    assert {"flashx", "naive"} <= set(done)
    assert "torch" in done or case.softcap


@pytest.mark.parametrize("case", BOTH, ids=IDS)
def test_the_oracle_sees_every_result(case: Case) -> None:
    """A part in ten thousand of any of them is too much, wherever it is compared."""
    inputs = case.inputs()
    oracle = check.Oracle(case, inputs)
    results = check.run(case, IMPLEMENTATIONS["naive"].prepare(case, inputs), inputs)()
    assert all(it.ok for it in oracle.check(results).values())
    for name, tensor in results.items():
        broken = {**results, name: tensor + 1e-3}
        assert [other for other, it in oracle.check(broken).items() if not it.ok] == [name]
    for name, tensor in results.items():  # nothing is left out where all units are compared
        assert oracle.expected[name].numel() == tensor.numel() or isinstance(case, Decode)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_cases_survive_json(case: Case) -> None:
    assert from_dict(json.loads(json.dumps(case.as_dict()))) == case


def test_what_is_no_case() -> None:
    with pytest.raises(ValueError, match=r"variant must be one of dense, block-sparse, .*, got 'linear'"):
        from_dict({"variant": "linear"})
    with pytest.raises(ValueError, match=r"not a case of dense: .*'colour'"):
        from_dict({"variant": "dense", "q_len": 1, "k_len": 1, "colour": 1})
    with pytest.raises(ValueError, match="direction must be fwd for decode, which has no backward, got 'both'"):
        Decode((3,), direction="both")
    assert {type(case) for case in CASES} == set(VARIANTS.values())


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_inputs_are_the_same_every_time(case: Case, dtype: str) -> None:
    case = replace(case, dtype=dtype)
    one, other = case.inputs(), case.inputs()
    assert [tuple(leaf.shape) for leaf in one.leaves.values()] == list(case.shapes().values())
    assert all(torch.equal(one.leaves[name], other.leaves[name]) for name in one.leaves)
    assert not torch.equal(one.leaves["query"], case.inputs(seed=1).leaves["query"])
    assert one.grad_out.shape == (*one.leaves["query"].shape[:-1], 24)
    if dtype == "fp64":  # they hold float32's values
        assert torch.equal(one.leaves["key"], one.leaves["key"].float().double())


# What the numbers count


def test_flops_and_bytes() -> None:
    case = Dense(1024, 1024, batch=2, q_heads=8, kv_heads=2, dtype="bf16")
    assert case.flops() == 4 * 2 * 8 * 1024 * 1024 * 64
    assert replace(case, direction="bwd").flops() == 2.5 * case.flops()
    assert replace(case, direction="both").flops() == 3.5 * case.flops()
    assert replace(case, window=CAUSAL).flops() == 4 * 2 * 8 * (1024 * 1025 // 2) * 64
    assert replace(case, value_dim=32).flops() == 0.75 * case.flops()
    query, key = 2 * 8 * 1024 * 64 * 2, 2 * 2 * 1024 * 64 * 2
    assert case.bytes() == 2 * query + 2 * key
    assert replace(case, direction="bwd").bytes() == 4 * query + 4 * key
    assert replace(case, direction="both").bytes() == 6 * query + 6 * key


def test_bytes_that_are_shared_or_not_seen_count_once_or_not_at_all() -> None:
    prefix = SharedPrefix(16, 1000, 10, q_heads=1, kv_heads=1, head_dim=8, value_dim=8)
    assert prefix.bytes() == 4 * 8 * (16 + 2 * 1000 + 16 * 2 * 10 + 16)
    cache = Decode((1000, 600), page=16, q_heads=1, kv_heads=1, head_dim=8, value_dim=8)
    assert cache.bytes() == 4 * 8 * (2 + 2 * 1600 + 2)
    assert replace(cache, window=99, sink_tokens=4).bytes() == 4 * 8 * (2 + 2 * (104 + 104) + 2)


SHAPES = [(1, 1), (1, 9), (9, 1), (7, 7), (5, 8), (8, 5), (16, 16), (3, 17)]
WINDOWS = [FULL, CAUSAL, (0, 0), (2, 0), (0, 2), (3, 1), (None, 2), (2, None), (100, 100), (100, 0)]


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
def test_visible_pairs(q_len: int, k_len: int) -> None:
    for window in WINDOWS:
        for sink_tokens in (0, 2, 100):
            case = Dense(q_len, k_len, window=window, sink_tokens=sink_tokens)
            assert case.pairs() == int(case.interval.dense(q_len, k_len).sum()), (window, sink_tokens)


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_torch_computes_the_same_attention(
    q_len: int, k_len: int, window: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is told is_causal, which it has fast kernels for, wherever that says the whole mask."""
    case = Dense(q_len, k_len, head_dim=8, value_dim=8, q_heads=4, kv_heads=2, window=window)
    inputs, options = case.inputs(), []

    def spy(*tensors: torch.Tensor, **keywords: Any) -> torch.Tensor:
        options.append(keywords)
        return torch.nn.functional.scaled_dot_product_attention(*tensors, **keywords)

    monkeypatch.setattr(implementations, "sdpa", spy)
    actual, expected = (
        IMPLEMENTATIONS[name].prepare(case, inputs)(*inputs.leaves.values()) for name in ("torch", "naive")
    )
    torch.testing.assert_close(actual, expected)
    dense, triangle = case.interval.dense(q_len, k_len), torch.ones(q_len, k_len, dtype=torch.bool).tril()
    assert options[0]["enable_gqa"]
    if dense.all():
        assert "attn_mask" not in options[0] and "is_causal" not in options[0]
    else:
        assert options[0].get("is_causal", False) == torch.equal(dense, triangle)


def test_torch_gets_what_serves_it_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of a cache is cut out of it, beforehand; what is shared is copied beforehand, and padded for sinks."""
    seen: list[tuple[list[torch.Tensor], dict[str, Any]]] = []

    def spy(*tensors: torch.Tensor, **keywords: Any) -> torch.Tensor:
        seen.append((list(tensors), keywords))
        return torch.nn.functional.scaled_dot_product_attention(*tensors, **keywords)

    monkeypatch.setattr(implementations, "sdpa", spy)
    for case, keys, masked in (
        (Decode((50, 50), window=9), 10, False),
        (Decode((50, 40), window=9), 20, True),
        (Decode((50, 50), window=9, sink_tokens=2), 50, True),
        (Decode((50, 50), window=9, sinks=True), 11, True),
        (SharedPrefix(4, 20, 7), 27, False),
    ):
        inputs = case.inputs()
        attend = IMPLEMENTATIONS["torch"].prepare(case, inputs)
        for _ in range(2):
            attend(*inputs.leaves.values())
        (one, options), (other, _) = seen[-2:]
        assert one[1].shape[2] == keys and ("attn_mask" in options) == masked, case
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(one, other, strict=True)), "made while it is timed"


def test_flashx_is_not_compared_with_itself() -> None:
    with flashx.patch():
        assert implementations.sdpa is not torch.nn.functional.scaled_dot_product_attention


def test_flashx_never_passes_naive_attention_off_as_its_own() -> None:
    case = Dense(8, 8, head_dim=300, value_dim=8)
    with pytest.raises(Refused, match="cpu: head dim 300 is over 256"):
        IMPLEMENTATIONS["flashx"].prepare(case, case.inputs())


# The oracle


@pytest.mark.parametrize(
    "case",
    [
        Dense(97, 97, 3, head_dim=16, value_dim=16),
        Dense(97, 97, 2, CAUSAL, head_dim=16, value_dim=16, q_heads=6, kv_heads=2),
        Dense(30, 97, 2, (20, 5), head_dim=16, value_dim=16, q_heads=2, kv_heads=1),
        SharedPrefix(8, 90, 7, groups=4, q_len=3, head_dim=16, value_dim=16),
    ],
    ids=str,
)
def test_a_large_case_is_checked_in_part(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last head of the last sequence among it; taken in chunks of rows, the oracle says the same."""
    case, inputs = replace(case, direction="both"), case.inputs()
    whole = check.Oracle(case, inputs)
    families = case.families()
    assert len(whole.units) == len(families) * case.kv_heads
    pairs = len(families[0]) * math.prod(case.lengths(0)) * case.q_heads // case.kv_heads
    monkeypatch.setattr(check, "CHECKED_PAIRS", 2 * pairs)
    monkeypatch.setattr(check, "CHUNK_PAIRS", pairs // 3 // len(families[0]))
    some = check.Oracle(case, inputs)
    assert len(some.units) == 2
    assert some.units[0] == check.Unit(families[-1], case.kv_heads - 1)
    for name, expected in some.expected.items():
        parts = dict(zip(map(str, whole.units), whole.expected[name].split(len(expected) // 2), strict=True))
        every = torch.cat([parts[str(unit)] for unit in some.units])
        torch.testing.assert_close(expected, every, atol=1e-12, rtol=0)

    results = check.run(case, IMPLEMENTATIONS["flashx"].prepare(case, inputs), inputs)()
    assert all(accuracy.ok for accuracy in some.check(results).values())


def test_of_a_long_sequence_a_forward_is_checked_on_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread over all of them, and with the last one; what is wrong there is seen."""
    case = Dense(101, 40, head_dim=16, value_dim=16, q_heads=2, kv_heads=1)
    monkeypatch.setattr(check, "CHUNK_PAIRS", 10 * 2 * 40)
    monkeypatch.setattr(check, "SEQUENCE_PAIRS", 4 * 10 * 2 * 40)
    inputs = case.inputs()
    oracle = check.Oracle(case, inputs)
    assert oracle.expected["out"].numel() == 2 * 31 * 16
    out = IMPLEMENTATIONS["flashx"].prepare(case, inputs)(*inputs.leaves.values())
    assert oracle.check({"out": out})["out"].ok
    seen = []
    for row in range(101):
        broken = out.clone()
        broken[0, 1, row, 3] += 1e-3
        if not oracle.check({"out": broken})["out"].ok:
            seen.append(row)
    assert len(seen) == 31 and seen[-1] == 100 and seen[0] < 30 and any(30 <= row < 60 for row in seen)
    assert check.Oracle(replace(case, direction="both"), inputs).expected["out"].numel() == 2 * 101 * 16


@pytest.mark.parametrize(
    ("error", "budget", "ok"),
    [
        (0.0, 0.0, True),
        (1e-9, 0.0, False),
        (1.0, 1.0, True),
        (1.1, 1.0, False),
        (math.nan, 1.0, False),
        (math.inf, 1.0, False),
    ],
)
def test_budget(error: float, budget: float, ok: bool) -> None:
    assert check.Accuracy(error, budget).ok is ok


# Peers that are not installed here: the layouts and arguments that they are called with, on stand-ins


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module with some functions in place of a package."""

    def install(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        for member, value in members.items():
            setattr(made, member, value)
        monkeypatch.setitem(sys.modules, name, made)

    return install


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """flashx.attention on flash-attn's layout, (B, L, H, D)."""
    return flashx.attention(*(t.transpose(1, 2) for t in (query, key, value)), **options).transpose(1, 2)


def _sides(window: tuple[int, int]) -> tuple[int | None, int | None]:
    left, right = (None if width < 0 else width for width in window)
    return left, right


def _flash_attn(table: str) -> dict[str, Any]:
    def dense(query, key, value, window_size, softcap):  # type: ignore[no-untyped-def]
        return _attended(query, key, value, window=_sides(window_size), softcap=softcap)

    def varlen(query, key, value, cu_q, cu_k, max_q, max_k, causal, softcap):  # type: ignore[no-untyped-def]
        return (flashx.varlen_attention(query, key, value, cu_q, cu_k, max_q, max_k, causal=causal, softcap=softcap),)

    def cached(query, key, value, cache_seqlens, causal, softcap, window_size=(-1, -1), **tables):  # type: ignore[no-untyped-def]
        assert causal and tables.keys() <= {table}
        if tables:
            cache: Any = flashx.PagedKVCache(key, value, tables[table], cache_seqlens)
        else:
            cache = flashx.KVCache(key.transpose(1, 2), value.transpose(1, 2), cache_seqlens)
        out = flashx.decode_attention(query.transpose(1, 2), cache, window=_sides(window_size), softcap=softcap)
        return out.transpose(1, 2)

    return {"flash_attn_func": dense, "flash_attn_varlen_func": varlen, "flash_attn_with_kvcache": cached}


def _natten(query, key, value, kernel_size, stride, dilation, is_causal):  # type: ignore[no-untyped-def]
    tensors = (tensor.movedim(-2, 1) for tensor in (query, key, value))
    out = flashx.neighborhood_attention(*tensors, kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    return out.movedim(1, -2)


class _Ragged:
    def __init__(self, scratch: torch.Tensor, layout: str) -> None:
        assert scratch.dtype == torch.uint8 and layout == "NHD"

    def plan(self, qo, kv, heads, kv_heads, dim, *, causal, window_left=-1, logits_soft_cap, q_data_type):  # type: ignore[no-untyped-def]
        assert q_data_type == torch.bfloat16
        window = _sides((window_left, 0 if causal else -1))
        self.tables, self.options = (qo, kv), {"window": window, "softcap": logits_soft_cap or 0.0}

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return flashx.varlen_attention(query, key, value, *self.tables, **self.options)


class _Decode:
    def __init__(self, scratch: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "NHD" and use_tensor_cores

    def plan(self, begins, pages, last, heads, kv_heads, dim, page, *, window_left, logits_soft_cap, **dtypes):  # type: ignore[no-untyped-def]
        counts = begins.diff()
        self.table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for b, count in enumerate(counts.tolist()):
            self.table[b, :count] = pages[begins[b] : begins[b] + count]
        self.lens = (counts - 1) * page + last
        self.window = _sides((window_left, 0))

    def run(self, query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        paged = flashx.PagedKVCache(*cache, self.table, self.lens)
        return flashx.decode_attention(query[:, :, None], paged, window=self.window)[:, :, 0]


def _xformers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_bias: Any) -> torch.Tensor:
    if attn_bias is None or attn_bias == "causal":
        return _attended(query, key, value, causal=attn_bias is not None)
    lens, causal = attn_bias.lens, attn_bias.causal
    ends = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return flashx.varlen_attention(query[0], key[0], value[0], ends, ends, causal=causal)[None]


class _Blocks:
    def __init__(self, lens: list[int], causal: bool = False) -> None:
        self.lens, self.causal = lens, causal

    @classmethod
    def from_seqlens(cls, lens: list[int]) -> _Blocks:
        return cls(lens)

    def make_causal(self) -> _Blocks:
        return _Blocks(self.lens, True)


EQUAL = {"q_heads": 4, "kv_heads": 4, "head_dim": 16, "value_dim": 16, "dtype": "bf16"}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(
            (name, case)
            for name in ("flash_attn", "flash_attn_interface")
            for case in (
                Dense(33, 40, 2, (9, 0), softcap=2.0, **EQUAL),
                Dense(33, 40, 2, CAUSAL, direction="both", **EQUAL),
                Varlen((3, 40, 1), **EQUAL),
                Decode((30, 17), 2, window=9, **EQUAL),
                Decode((300, 17), page=256, **EQUAL),
            )
        ),
        ("flashinfer", Dense(33, 40, 2, (9, 0), **EQUAL)),
        ("flashinfer", Varlen((3, 40, 1), causal=False, **EQUAL)),
        ("flashinfer", Decode((30, 17), page=8, window=9, **EQUAL)),
        ("xformers", Dense(33, 40, 2, **EQUAL)),
        ("xformers", Dense(33, 40, 2, CAUSAL, **EQUAL)),
        ("xformers", Varlen((3, 40, 1), **EQUAL)),
        ("natten", Neighborhood((7, 9), (3, 4), (2, 1), (1, 2), causal=True, direction="both", **EQUAL)),
    ],
    ids=str,
)
def test_packages_are_called_as_they_are_documented(name: str, case: Case, installed: Callable[..., None]) -> None:
    installed("flash_attn", **_flash_attn("block_table"))
    installed("flash_attn_interface", **_flash_attn("page_table"))
    installed("natten", na1d=_natten, na2d=_natten)
    installed("flashinfer", BatchPrefillWithRaggedKVCacheWrapper=_Ragged, BatchDecodeWithPagedKVCacheWrapper=_Decode)
    installed("xformers")
    installed("xformers.ops", memory_efficient_attention=_xformers)
    installed("xformers.ops.fmha")
    installed(
        "xformers.ops.fmha.attn_bias", LowerTriangularFromBottomRightMask=lambda: "causal", BlockDiagonalMask=_Blocks
    )
    peer = IMPLEMENTATIONS[name]
    assert isinstance(peer, peers.Package)
    inputs = case.inputs()
    accuracy = check.Oracle(case, inputs).check(check.run(case, peer.prepare(case, inputs), inputs)())
    assert all(it.ok for it in accuracy.values()), accuracy


def test_packages_say_why_they_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert IMPLEMENTATIONS["flash_attn"].absent("cuda") == "flash_attn is not installed"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert IMPLEMENTATIONS["flash_attn"].absent("cuda") is None
    assert IMPLEMENTATIONS["flash_attn"].absent("cpu") == "needs a GPU"
    case = Dense(8, 8)
    with pytest.raises(Refused, match="takes float16 and bfloat16 only"):
        IMPLEMENTATIONS["flash_attn"].prepare(case, case.inputs())


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Dense(150, 200, 2, (40, 0), q_heads=4, kv_heads=2, softcap=3.0),
        BlockSparse(256, sparsity=0.5, causal=True),
        Neighborhood((12, 12), (5, 5), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_compiled_flex_attention(case: Case) -> None:
    inputs = case.inputs()
    attend = IMPLEMENTATIONS["flex"].prepare(case, inputs)
    accuracy = check.Oracle(case, inputs).check(check.run(case, attend, inputs)())
    assert all(it.ok for it in accuracy.values()), accuracy


def test_flex_refuses_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Dense(8, 8, direction="both")
    with pytest.raises(Refused, match="no backward on the CPU"):
        IMPLEMENTATIONS["flex"].prepare(case, case.inputs())


# Timing


def test_rounds_take_everybody_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of which "slow" takes 3 seconds, "fast" 1: enough repeats, then enough time, never one without."""
    now, log = 0.0, []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds
            log.append(name)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    calls = {"fast": call("fast", 1.0), "slow": call("slow", 3.0)}
    for repeats, min_time, rounds in [(3, 0.0, 3), (1, 10.0, 5), (7, 10.0, 7)]:
        log.clear()
        timings = timing.interleaved(calls, repeats, min_time)
        assert list(timings["fast"].samples) == [1.0] * rounds
        assert list(timings["slow"].samples) == [3.0] * rounds
        # The first round does not count.
        assert len(log) == 2 * (rounds + 1)
        assert all(set(log[start : start + 2]) == {"fast", "slow"} for start in range(0, len(log), 2))
    orders = {tuple(log[start : start + 2]) for start in range(2, len(log), 2)}
    assert len(orders) == 2
    assert timing.interleaved({}, 3, 1.0) == {}


def test_percentiles() -> None:
    samples = timing.Timing([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert samples.median == 3.5
    assert (samples.percentile(0), samples.percentile(20), samples.percentile(80)) == (1.0, 2.0, 5.0)
    assert samples.percentile(100) == 6.0
    assert timing.Timing([2.0]).percentile(80) == 2.0


@pytest.fixture(autouse=True)
def small_pages() -> Iterator[None]:
    """flashinfer's scratch memory, smaller."""
    before = peers.WORKSPACE_BYTES
    peers.WORKSPACE_BYTES = 2**10
    yield
    peers.WORKSPACE_BYTES = before
