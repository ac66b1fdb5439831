"""flashx.decode_attention and the KV caches, on every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import ragged
import tolerance
import torch
from conftest import ENGINES
from ragged import Ragged

import flashx
from flashx import decode
from flashx.decode import KVCache, PagedKVCache, decode_attention
from flashx.problem import accumulation_dtype

NAN = float("nan")
Cache = KVCache | PagedKVCache
# Where bits may be compared: naive attention's depend on how BLAS cuts a product.
exact = pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"], indirect=True)
# None: not paged.
pages = pytest.mark.parametrize("page", [None, 1, 3, 16], ids=lambda page: f"page{page or 0}")


def query_lengths(count: int, length: int = 1) -> tuple[int, ...]:
    return (length,) * count


CALLS = [
    Ragged(query_lengths(4), (1, 64, 0, 130), heads=4, kv_heads=2),
    Ragged(query_lengths(3, 5), (5, 70, 3), heads=6, kv_heads=2, head_dim=24, value_dim=40),
    Ragged(
        query_lengths(2, 3), (90, 40), heads=4, kv_heads=1, window=(20, None), sink_tokens=4, sinks=True, alibi="bh"
    ),
    Ragged(query_lengths(2, 2), (31, 2), causal=False, window=(9, 3), alibi="h"),
    Ragged(query_lengths(2), (33, 17), heads=8, kv_heads=1, softcap=4.0, sinks=True, magnitude=3.0),
]


def empty_cache(call: Ragged, dtype: torch.dtype, page: int | None, capacity: int, device: str = "cpu") -> Cache:
    """NaN wherever nothing was appended. Pages lie in a random order, among some that are nobody's."""
    batch, heads = len(call.k_lens), call.kv_heads or call.heads
    dims = (call.head_dim, call.value_dim or call.head_dim)
    if page is None:
        return KVCache(*(torch.full((batch, heads, capacity, dim), NAN, dtype=dtype, device=device) for dim in dims))
    width = -(-capacity // page)
    count = batch * width + 3
    table = torch.randperm(count, generator=torch.Generator().manual_seed(page))[: batch * width].view(batch, width)
    stores = (torch.full((count, page, heads, dim), NAN, dtype=dtype, device=device) for dim in dims)
    return PagedKVCache(*stores, table.int().to(device))


def fill(call: Ragged, inputs: ragged.Inputs, cache: Cache) -> None:
    """Every sequence's keys, in two pieces; those that are shorter are then cut off, and overwritten with NaN."""
    longest = max(call.k_lens)
    tensors = []
    for tensor in (inputs.key, inputs.value):
        parts = [tensor[keys] for _, keys in call.slices()]
        padded = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, longest - len(t)), value=NAN) for t in parts]
        tensors.append(torch.stack(padded).transpose(1, 2).to(cache.lens.device))
    first = longest // 3
    for part in (slice(0, first), slice(first, longest)):
        cache.append(*(tensor[:, :, part] for tensor in tensors))
    assert cache.lens.tolist() == [longest] * len(call.k_lens)
    cache.lens = torch.tensor(call.k_lens, device=cache.lens.device)
    if isinstance(cache, PagedKVCache):  # what lens does not need holds anything
        page = cache.key_pages.shape[1]
        for b, length in enumerate(call.k_lens):
            cache.page_table[b, -(-length // page) :] = (-1) ** b * (2**31 - 1)


def queries(call: Ragged, inputs: ragged.Inputs) -> torch.Tensor:
    """(total, Hq, D) -> (B, Hq, Lq, D)."""
    return inputs.query.unflatten(0, (len(call.q_lens), -1)).transpose(1, 2)


def attend(call: Ragged, inputs: ragged.Inputs, cache: Cache, backend: str, **options: Any) -> ragged.Results:
    if inputs.query.dtype == torch.float64 and backend in ("cuda", "cuda_emulated"):
        pytest.skip("the CUDA kernels have no float64")
    there = inputs.to(tolerance.device_of(backend))
    out, lse = decode_attention(
        queries(call, there),
        cache,
        **call.options("sink_tokens"),
        alibi_slopes=there.alibi_slopes,
        sinks=there.sinks,
        return_lse=True,
        backend=backend,
        **options,
    )
    return {"out": out.transpose(1, 2).flatten(0, 1).cpu(), "lse": lse.transpose(0, 1).flatten(1).cpu()}


def filled(call: Ragged, dtype: torch.dtype, page: int | None, backend: str, spare: int = 5) -> tuple[Any, Cache]:
    inputs = call.inputs(dtype)
    cache = empty_cache(call, dtype, page, max(call.k_lens) + spare, tolerance.device_of(backend))
    fill(call, inputs, cache)
    return inputs, cache


@pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_oracle(call: Ragged, dtype: torch.dtype, page: int | None, engine: str, poisoned_memory: None) -> None:
    """With NaN wherever there is no key, and rubbish in the unused rest of page tables."""
    inputs, cache = filled(call, dtype, page, engine)
    ragged.check(call, dtype, attend(call, inputs, cache, engine))


LONG = Ragged(query_lengths(4), (5000, 2048, 1, 2049), head_dim=8, heads=2, kv_heads=1)
# A tile of the first keys and of the window's is not one run of memory.
IN_RUNS = Ragged((5, 5), (2049, 600), 64, heads=4, kv_heads=1, sink_tokens=16, window=(100, 0))


@exact
@pytest.mark.parametrize("call", [CALLS[1], CALLS[2], LONG, IN_RUNS], ids=str)
def test_bits_depend_on_the_sequence_alone(call: Ragged, engine: str) -> None:
    """Neither on the batch, nor on the capacity, nor on pages."""
    inputs, cache = filled(call, torch.float32, None, engine)
    expected = attend(call, inputs, cache, engine)
    for page, spare in ((None, 3000), (1, 0), (3, 7), (16, 5), (700, 0)):
        inputs, cache = filled(call, torch.float32, page, engine, spare)
        found = attend(call, inputs, cache, engine)
        for name, tensor in found.items():
            tolerance.same_bits(f"{call} page {page}: {name}", tensor, expected[name])
    for b, (rows, keys) in enumerate(call.slices()):
        alone = replace(call, q_lens=call.q_lens[b : b + 1], k_lens=call.k_lens[b : b + 1])
        slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes[b : b + 1]
        own = inputs._replace(
            query=inputs.query[rows], key=inputs.key[keys], value=inputs.value[keys], alibi_slopes=slopes
        )
        cache = empty_cache(alone, torch.float32, None, call.k_lens[b], tolerance.device_of(engine))
        fill(alone, own, cache)
        found = attend(alone, own, cache, engine)
        tolerance.same_bits(f"{call} sequence {b}: out", found["out"], expected["out"][rows])
        tolerance.same_bits(f"{call} sequence {b}: lse", found["lse"], expected["lse"][:, rows])


@pytest.mark.parametrize("length", [1, 2])
@pages
def test_a_whole_text_token_by_token(page: int | None, length: int, engine: str) -> None:
    """Prefill, then `length` tokens a call: what causal attention over the whole text gives."""
    call = Ragged((20, 20), (20, 20), heads=4, kv_heads=2, window=(7, 0), sink_tokens=2)
    inputs = call.inputs(torch.float32).to(tolerance.device_of(engine))
    whole = [tensor.unflatten(0, (2, 20)).transpose(1, 2) for tensor in inputs[:3]]
    cache = empty_cache(call, torch.float32, page, 20, tolerance.device_of(engine))
    outs, lses = [], []
    for begin, end in [(0, 10), *((i, i + length) for i in range(10, 20, length))]:
        query, key, value = (tensor[:, :, begin:end] for tensor in whole)
        cache.append(key, value)
        out, lse = decode_attention(
            query, cache, window=call.window, sink_tokens=call.sink_tokens, return_lse=True, backend=engine
        )
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2).transpose(1, 2).flatten(0, 1), torch.cat(lses, 2).transpose(0, 1).flatten(1)
    ragged.check(call, torch.float32, {"out": out.cpu(), "lse": lse.cpu()})


@pytest.mark.parametrize("page", [None, 16], ids=["page0", "page16"])
@pytest.mark.parametrize("unified_max", [0.0, 3.0, -500.0, 500.0, -1e30, 1e30])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_unified_max(call: Ragged, unified_max: float, page: int | None, engine: str) -> None:
    """Whether it fits or the guard has to compute rows again; rows that see nothing among them."""
    inputs, cache = filled(call, torch.float32, page, engine)
    ragged.check(call, torch.float32, attend(call, inputs, cache, engine, unified_max=unified_max))


def test_unified_max_of_rows_that_differ(engine: str) -> None:
    """One head's logits fit, another's are far away; and a row with logits on both sides."""
    call = Ragged(query_lengths(2), (40, 40), heads=4, kv_heads=1)
    inputs, _ = filled(call, torch.float32, None, engine)
    scale = torch.tensor([1.0, 300.0, 1e-3, 30.0])[:, None]
    inputs = inputs._replace(query=inputs.query * scale)
    cache = empty_cache(call, torch.float32, 16, 45, tolerance.device_of(engine))
    fill(call, inputs, cache)
    expected, found = (attend(call, inputs, cache, engine, unified_max=phi) for phi in (None, 0.0))
    exact_results = ragged.naive(call, inputs, torch.float64)
    for name, tensor in found.items():
        error = tolerance.error(expected[name], exact_results[name])
        budget = 2 * error + tolerance.ulp(exact_results[name], tensor.dtype)
        tolerance.compare(name, tensor, exact_results[name], budget)


@pages
def test_lens_are_the_caches_own(page: int | None) -> None:
    call = CALLS[1]
    lens = torch.tensor([1, 2, 3])
    cache = empty_cache(call, torch.float32, page, 20)
    assert cache.lens.tolist() == [0, 0, 0] and cache.lens.dtype == torch.int32 and cache.capacity >= 20
    cache.lens = lens
    lens += 1
    assert cache.lens.tolist() == [1, 2, 3]
    cache.lens += 5
    cache.lens[1] -= 2
    assert cache.lens.tolist() == [6, 5, 8]
    new = torch.randn(3, 2, 4, 24), torch.randn(3, 2, 4, 40)
    cache.append(*new)
    assert cache.lens.tolist() == [10, 9, 12]
    cache.append(*(tensor[:, :, :0] for tensor in new))
    assert cache.lens.tolist() == [10, 9, 12]
    # What a rejected draft leaves behind is overwritten.
    cache.lens -= 4
    cache.append(*new)
    assert cache.lens.tolist() == [10, 9, 12]


def contents(cache: Cache) -> list[torch.Tensor]:
    return [cache._key_rows.clone(), cache._value_rows.clone(), cache.lens.clone()]


@pages
def test_append_is_all_or_nothing(page: int | None) -> None:
    call = Ragged(query_lengths(3), (4, 12, 8), head_dim=8)
    _, cache = filled(call, torch.float32, page, "cpu", spare=0)
    capacity = cache.capacity
    if isinstance(cache, PagedKVCache):
        count = cache.page_table.numel()
        cache.page_table.copy_(torch.arange(count).view(cache.page_table.shape))
    before = contents(cache)
    new = torch.ones(3, 2, capacity - 11, 8)
    with pytest.raises(ValueError, match=f"key must fit .* capacity {capacity}, .* sequence 1, which has 12"):
        cache.append(new, new)
    if isinstance(cache, PagedKVCache):
        for wrong in (-1, len(cache.key_pages)):
            cache.page_table[2, -1] = wrong
            cache.lens = torch.tensor([0, 0, capacity - 1])
            with pytest.raises(ValueError, match=rf"page_table must hold pages from 0 .*, got {wrong} \(sequence 2\)"):
                cache.append(new[:, :, :1], new[:, :, :1])
            cache.lens = torch.tensor(call.k_lens)
    for was, now in zip(before, contents(cache), strict=True):
        tolerance.same_bits("storage", now, was)


@pages
@pytest.mark.parametrize("count", [1, 3, 9])
def test_what_does_not_fit_is_dropped_on_a_gpu(page: int | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is touched: not the last key of a full sequence, not the pages of others."""
    call = Ragged(query_lengths(4), (12, 4, 8, 11), head_dim=8)
    _, cache = filled(call, torch.float32, page, "cpu", spare=0)
    if isinstance(cache, PagedKVCache):
        cache.page_table.copy_(torch.arange(cache.page_table.numel()).view(cache.page_table.shape))
        cache.page_table[2] = torch.tensor([-1, 10**9]).int().repeat(20)[: cache.page_table.shape[1]]
        cache.lens = torch.tensor([cache.capacity, 4, 8, cache.capacity - 1])
    expected = contents(cache)
    monkeypatch.setattr(decode, "on_host", lambda tensor: False)
    key, value = torch.randn(2, 4, 2, count, 8)
    cache.append(key, value)
    for b, i in ((b, i) for b in range(4) for i in range(count)):
        position = int(expected[2][b]) + i
        if position >= cache.capacity or (page is not None and b == 2):
            continue
        entry, row = cache._where(torch.arange(4)[:, None] * 0 + position)
        for store, new in zip(expected, (key, value), strict=False):
            store[entry[b, 0], row[b, 0]] = new[b, :, i]
    expected[2] = (expected[2] + count).clamp(max=cache.capacity)
    for name, was, now in zip(("key", "value", "lens"), expected, contents(cache), strict=True):
        tolerance.same_bits(name, now, was)
    # All of them full.
    cache.lens = torch.full((4,), cache.capacity)
    before = contents(cache)
    cache.append(key, value)
    for was, now in zip(before, contents(cache), strict=True):
        tolerance.same_bits("full", now, was)


@pytest.mark.parametrize("lens", [[-7, 2**31 - 1, 60], [2**31 - 1, -(2**31), 0]], ids=str)
@pages
def test_tables_that_nobody_looks_at_are_harmless(
    lens: list[int], page: int | None, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "on_host", lambda tensor: False)
    device = tolerance.device_of(engine)
    key = torch.randn(3, 2, 32, 8, device=device)
    cache: Cache = KVCache(key, key.clone(), torch.tensor(lens, device=device))
    if page is not None:
        store = torch.randn(40, page, 2, 8, device=device)
        table = torch.tensor([[-1, 2**31 - 1, 40], [39, -(2**31), 5], [0, 0, 0]]).int().to(device)
        cache = PagedKVCache(store, store.clone(), table, torch.tensor(lens, device=device))
    out = decode_attention(torch.randn(3, 4, 2, 8, device=device), cache, backend=engine)
    assert out.isfinite().all()
    cache.append(key[:, :, :5], key[:, :, :5])


def test_nothing_waits_for_a_device() -> None:
    """Meta tensors have no values, so whatever would have to wait for a GPU fails on them."""
    store = torch.empty(12, 16, 2, 8, device="meta")
    table = torch.empty(3, 4, dtype=torch.int32, device="meta")
    key = torch.empty(3, 2, 64, 8, device="meta")
    for cache in (
        PagedKVCache(store, store, table),
        KVCache(key, key, torch.empty(3, dtype=torch.int32, device="meta")),
    ):
        cache.append(key[:, :, :2], key[:, :, :2])
        out, lse = decode_attention(torch.empty(3, 4, 2, 8, device="meta"), cache, unified_max=0.0, return_lse=True)
        assert (out.shape, lse.shape) == ((3, 4, 2, 8), (3, 4, 2))


def test_modes() -> None:
    """Inference mode, autocast and a query of any layout."""
    call = CALLS[1]
    inputs, cache = filled(call, torch.float32, 16, "cpu")
    query = queries(call, inputs)
    expected = decode_attention(query, cache)
    with torch.inference_mode():
        tolerance.same_bits("inference", decode_attention(query, cache), expected)
        inner = empty_cache(call, torch.float32, 3, 80)
        fill(call, inputs, inner)
        tolerance.same_bits("inference", decode_attention(query, inner), expected)
    tolerance.same_bits("layout", decode_attention(query.contiguous(), cache), expected)


def test_explain() -> None:
    _, cache = filled(CALLS[1], torch.float32, 16, "cpu")
    explained = flashx.explain(decode_attention, torch.zeros(3, 6, 5, 24), cache, unified_max=1.0, return_lse=True)
    assert (explained.backend, explained.problem.page, explained.problem.unified_max) == ("cpu", 16, 1.0)
    assert "pages of 16" in str(explained)


def test_compiled() -> None:
    """The whole step in one graph; lens goes on in it."""
    call = Ragged(query_lengths(2), (3, 9), head_dim=8)
    inputs, cache = filled(call, torch.float32, None, "cpu")
    other = KVCache(cache.key.clone(), cache.value.clone(), cache.lens)  # type: ignore[union-attr]

    def step(cache: KVCache, query: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        cache.append(new, new)
        return decode_attention(query, cache)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        new, query = torch.randn(2, 2, 1, 8), queries(call, inputs)
        tolerance.same_bits("out", compiled(other, query, new), step(cache, query, new))  # type: ignore[arg-type]
    assert other.lens.tolist() == [5, 11]


def test_gradients_are_refused() -> None:
    key = torch.zeros(1, 2, 16, 8)
    cache, query = KVCache(key, key.clone(), torch.tensor([4])), torch.randn(1, 2, 1, 8, requires_grad=True)
    sinks = torch.nn.Parameter(torch.zeros(2))
    for arguments in ({"query": query}, {"query": query.detach(), "sinks": sinks}):
        with pytest.raises(ValueError, match=f"{list(arguments)[-1]} must not require a gradient"):
            decode_attention(cache=cache, **arguments)
        with torch.no_grad():
            decode_attention(cache=cache, **arguments)
    with pytest.raises(ValueError, match="key must not require a gradient"):
        cache.append(query, query)
    with torch.no_grad():
        cache.append(query, query)
    with pytest.raises(ValueError, match="value must not require a gradient"):
        KVCache(key, torch.nn.Parameter(key))


def store(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)

BAD_CACHES: list[tuple[Callable[[], Any], Any, tuple[str, ...]]] = [
    (lambda: KVCache([1], store(2, 2, 8, 4)), TypeError, ("key", "list")),  # type: ignore[arg-type]
    (lambda: KVCache(store(2, 8, 4), store(2, 8, 4)), ValueError, ("key", "4 dimensions", "(2, 8, 4)")),
    (lambda: KVCache(store(2, 2, 8, 4), store(2, 2, 7, 4)), ValueError, ("value", "(2, 2, 8, 4)", "(2, 2, 7, 4)")),
    (lambda: KVCache(store(2, 2, 8, 4), store(2, 2, 8, 4).half()), TypeError, ("value", "float32", "float16")),
    (lambda: KVCache(store(2, 2, 8, 4).int(), store(2, 2, 8, 4)), TypeError, ("key", "int32")),
    (lambda: KVCache(store(2, 2, 4, 8).mT, store(2, 2, 8, 4)), ValueError, ("key", "contiguous", "(64, 32, 1, 8)")),
    (lambda: KVCache(store(2, 2, 8, 4), store(2, 2, 8, 4, device="meta")), ValueError, ("value", "meta")),
    (lambda: KVCache(*(store(2, 2, 8, 4),) * 2, torch.zeros(3).int()), ValueError, ("lens", "(2,)", "(3,)")),
    (lambda: KVCache(*(store(2, 2, 8, 4),) * 2, torch.zeros(2)), TypeError, ("lens", "float32")),
    (lambda: KVCache(*(store(2, 2, 8, 4),) * 2, [1, 2]), TypeError, ("lens", "list")),  # type: ignore[arg-type]
    (lambda: KVCache(*(store(2, 2, 8, 4),) * 2, torch.tensor([1, 9])), ValueError, ("lens", "capacity 8", "got 9")),
    (lambda: KVCache(*(store(2, 2, 8, 4),) * 2, torch.tensor([-1, 9])), ValueError, ("lens", "got -1 (sequence 0)")),
    (lambda: PagedKVCache(*(store(0, 8, 2, 4),) * 2, TABLE), ValueError, ("key_pages", "(0, 8, 2, 4)")),
    (lambda: PagedKVCache(*(store(4, 0, 2, 4),) * 2, TABLE), ValueError, ("key_pages", "(4, 0, 2, 4)")),
    (lambda: PagedKVCache(store(4, 8, 2, 4), store(4, 8, 1, 4), TABLE), ValueError, ("value_pages", "(4, 8, 1, 4)")),
    (lambda: PagedKVCache(*(store(4, 8, 2, 4),) * 2, TABLE.long()), TypeError, ("page_table", "int64")),
    (lambda: PagedKVCache(*(store(4, 8, 2, 4),) * 2, TABLE[0]), ValueError, ("page_table", "(2,)")),
    (lambda: PagedKVCache(*(store(4, 8, 2, 4),) * 2, TABLE.mT), ValueError, ("page_table", "contiguous")),
    (lambda: PagedKVCache(*(store(4, 8, 2, 4),) * 2, TABLE[:, :0]), ValueError, ("page_table", "(2, 0)")),
    (lambda: PagedKVCache(*(store(4, 8, 2, 4),) * 2, [[0]]), TypeError, ("page_table", "list")),  # type: ignore[arg-type]
    (lambda: PagedKVCache(*(store(4, 8, 2, 4),) * 2, TABLE.to("meta")), ValueError, ("page_table", "meta")),
    (
        lambda: PagedKVCache(*(store(3, 8, 2, 4),) * 2, TABLE, torch.tensor([16, 9])),
        ValueError, ("page_table", "0 to 2", "got 3 (sequence 1)"),
    ),
    (
        lambda: PagedKVCache(*(store(3, 8, 2, 4),) * 2, -TABLE, torch.tensor([9, 0])),
        ValueError, ("page_table", "0 to 2", "got -1 (sequence 0)"),
    ),
]  # fmt: skip


def says(raised: Any, parts: tuple[str, ...]) -> None:
    for part in parts:
        assert part in str(raised.value), f"{str(raised.value)!r} does not say {part!r}"


@pytest.mark.parametrize("index", range(len(BAD_CACHES)))
def test_bad_caches(index: int) -> None:
    make, error, parts = BAD_CACHES[index]
    with pytest.raises(error) as raised:
        make()
    says(raised, parts)


def test_an_unneeded_page_may_be_none() -> None:
    PagedKVCache(*(store(3, 8, 2, 4),) * 2, TABLE, torch.tensor([16, 8]))


Q = torch.zeros(2, 4, 1, 8)

BAD_CALLS: list[tuple[dict[str, Any], Any, tuple[str, ...]]] = [
    ({"cache": Q}, TypeError, ("cache", "Tensor")),
    ({"query": None}, TypeError, ("query", "NoneType")),
    ({"query": Q[0]}, ValueError, ("query", "(4, 1, 8)")),
    ({"query": Q[:, :, :0]}, ValueError, ("query", "at least 1", "(2, 4, 0, 8)")),
    ({"query": Q[:1]}, ValueError, ("query", "batch size 2", "(1, 4, 1, 8)")),
    ({"query": Q[..., :4]}, ValueError, ("query", "head dim 8", "(2, 4, 1, 4)")),
    ({"query": Q[:, :3]}, ValueError, ("heads", "3 and 2")),
    ({"query": Q.half()}, TypeError, ("query", "float32", "float16")),
    ({"query": Q.to("meta")}, ValueError, ("query", "meta")),
    ({"unified_max": NAN}, ValueError, ("unified_max", "nan")),
    ({"unified_max": "3"}, TypeError, ("unified_max", "str")),
    ({"sink_tokens": -1}, ValueError, ("sink_tokens", "-1")),
    ({"window": (0, -1)}, ValueError, ("window", "-1")),
    ({"causal": None}, TypeError, ("causal", "NoneType")),
    ({"sinks": torch.zeros(3)}, ValueError, ("sinks", "(4,)", "(3,)")),
    ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, ("alibi_slopes", "(2, 4)", "(3, 4)")),
    ({"scale": float("inf")}, ValueError, ("scale", "inf")),
    ({"backend": "gpu"}, ValueError, ("backend", "gpu")),
]


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("index", range(len(BAD_CALLS)))
def test_bad_calls(index: int, page: int | None) -> None:
    changes, error, parts = BAD_CALLS[index]
    cache: Cache = KVCache(store(2, 2, 8, 8), store(2, 2, 8, 5), torch.tensor([3, 8]))
    if page is not None:
        cache = PagedKVCache(store(4, page, 2, 8), store(4, page, 2, 5), TABLE, torch.tensor([3, 8]))
    assert decode_attention(Q, cache).shape == (2, 4, 1, 5)
    with pytest.raises(error) as raised:
        decode_attention(**{"query": Q, "cache": cache, **changes})
    says(raised, parts)


BAD_APPENDS: list[tuple[Any, Any, Any, tuple[str, ...]]] = [
    (None, Q, TypeError, ("key", "NoneType")),
    (Q[0], Q, ValueError, ("key", "(2, 2, number of keys, 8)", "(4, 1, 8)")),
    (Q, Q, ValueError, ("key", "(2, 2, number of keys, 8)", "(2, 4, 1, 8)")),
    (Q[:, :2], Q[:, :2], ValueError, ("value", "(2, 2, number of keys, 5)", "(2, 2, 1, 8)")),
    (Q[:, :2].half(), Q[:, :2], TypeError, ("key", "float32", "float16")),
    (Q[:, :2].to("meta"), Q[:, :2], ValueError, ("key", "meta")),
    (Q[:, :2], store(2, 2, 2, 5), ValueError, ("value", "length 1", "(2, 2, 2, 5)")),
]


@pytest.mark.parametrize("index", range(len(BAD_APPENDS)))
def test_bad_appends(index: int) -> None:
    key, value, error, parts = BAD_APPENDS[index]
    with pytest.raises(error) as raised:
        KVCache(store(2, 2, 8, 8), store(2, 2, 8, 5)).append(key, value)
    says(raised, parts)


def test_values_that_were_changed_in_place_are_looked_at() -> None:
    cache = PagedKVCache(store(4, 8, 2, 8), store(4, 8, 2, 8), TABLE.clone(), torch.tensor([16, 3]))
    cache.page_table[0, 1] = 4
    with pytest.raises(ValueError, match=r"page_table must hold pages from 0 to 3, got 4 \(sequence 0\)"):
        decode_attention(Q, cache)
    cache.lens[0] = 17
    with pytest.raises(ValueError, match="lens must be from 0 to the capacity 16, got 17"):
        decode_attention(Q, cache)
    with pytest.raises(ValueError, match="lens must be from 0 to the capacity 16, got 17"):
        cache.append(Q[:, :2], Q[:, :2])


def test_result_types() -> None:
    cache = KVCache(
        store(2, 2, 8, 8, dtype=torch.bfloat16), store(2, 2, 8, 5, dtype=torch.bfloat16), torch.tensor([3, 8])
    )
    out, lse = decode_attention(Q.bfloat16(), cache, return_lse=True)
    assert isinstance(decode_attention(Q.bfloat16(), cache), torch.Tensor)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, accumulation_dtype(torch.bfloat16))
