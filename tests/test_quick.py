"""Calls that repeat (flashx/quick.py): the same bits and strides, and nothing of what torch does around a call lost."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerance
import torch
from cases import STORAGES
from torch_ways import (
    WAYS,
    Function,
    Tensors,
    comparable,
    dispatch_mode,
    fake,
    fake_from_real,
    fx,
    negated,
    profiled,
    traced,
)

import flashx
from flashx import _C, ops, prefix_plan, quick
from flashx.backends import cpu
from flashx.nn import functional
from flashx.nn.functional import scaled_dot_product_attention as sdpa

FUNCTIONS: dict[str, Function] = {
    "attention": flashx.attention,
    "sdpa": sdpa,
    "shared_prefix": flashx.shared_prefix_attention,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def forget() -> None:
    quick._kept.clear()
    quick._seen.clear()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(prefix_plan.LAUNCH_BYTES, "cpu", 0)  # small prefixes are shared too
    forget()
    functional._warned.clear()
    torch.manual_seed(0)
    yield
    forget()


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that could be kept, whether it was."""
    found: list[bool] = []
    run = quick.run

    def recorded(*arguments: Any) -> torch.Tensor | None:
        out = run(*arguments)
        found.append(out is not None)
        return out

    monkeypatch.setattr(quick, "run", recorded)
    return found


def tensors_for(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 4,
    heads: int = 4,
    kv_heads: int = 4,
    q_len: int = 3,
    k_len: int = 21,
    dim: int = 16,
    value_dim: int = 16,
    prefix: tuple[int, ...] = (2,),
    prefix_len: int = 300,
    storage: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
) -> Tensors:
    """The function's tensors. prefix: () for one prefix without a group dimension."""
    query, key, value = (
        STORAGES[stored](torch.randn(batch, many, length, size).to(dtype))
        for stored, many, length, size in zip(
            storage, (heads, kv_heads, kv_heads), (q_len, k_len, k_len), (dim, dim, value_dim), strict=True
        )
    )
    if name != "shared_prefix":
        return query, key, value
    prefixes = (torch.randn(*prefix, kv_heads, prefix_len, size).to(dtype) for size in (dim, value_dim))
    return (query, *prefixes, key, value)


def keep(f: Function, tensors: Tensors, **options: Any) -> torch.Tensor:
    """Two like calls; what the first of them gave."""
    first = f(*tensors, **options)
    f(*tensors, **options)
    return first


def assert_same(label: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance.same_bits(label, actual, expected)
    assert (actual.stride(), actual.dtype, actual.requires_grad) == (
        expected.stride(), expected.dtype, expected.requires_grad
    ), label  # fmt: skip


_BLHD, _PACKED, _SLICED = (("blhd",) * 3, ("packed",) * 3, ("contiguous", "sliced", "odd_rows"))
GQA = {"kv_heads": 2}

# Function, what its tensors are like, its options.
CALLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("attention", {}, {}),
    ("attention", {"q_len": 1, "batch": 1, **GQA}, {"causal": True}),
    ("attention", {"q_len": 40, "k_len": 150, "dim": 24, "value_dim": 24, **GQA}, {"window": (9, None)}),
    ("attention", {"q_len": 5, "k_len": 5, "storage": _BLHD}, {"window": (0, 3), "scale": -0.3, "softcap": 2.0}),
    ("attention", {"q_len": 9, "storage": _PACKED, "dim": 17, "value_dim": 17}, {"causal": True, "scale": 0.0}),
    ("attention", {"storage": _SLICED, "q_len": 30, "k_len": 3}, {"backend": "cpu", "window": (2, 2)}),
    ("attention", {"q_len": 1, "k_len": 2100, "batch": 1, **GQA}, {}),
    ("sdpa", {}, {}),
    ("sdpa", {"q_len": 7, "k_len": 4}, {"is_causal": True}),
    ("sdpa", {"q_len": 7, "k_len": 4}, {"enable_gqa": True, "scale": 0.4}),
    ("sdpa", {"q_len": 20, "storage": _BLHD}, {"is_causal": True}),
    ("sdpa", {"q_len": 6, "storage": _PACKED}, {}),
    ("shared_prefix", {}, {}),
    ("shared_prefix", {"q_len": 1, "prefix": (), **GQA}, {"window": (200, 0), "sink_tokens": 3}),
    ("shared_prefix", {"q_len": 2, "prefix": (1,), "storage": _BLHD}, {"causal": False, "softcap": 3.0}),
    ("shared_prefix", {"q_len": 5, "k_len": 5, "storage": _PACKED}, {"scale": -0.2}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, like, options", CALLS)
def test_same_bits_and_strides(
    name: str, like: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, hits: list[bool]
) -> None:
    """Of the tensors that were kept, and of others that are like them."""
    f, tensors = FUNCTIONS[name], tensors_for(name, dtype, **like)
    copies = [tensor.clone() for tensor in tensors]
    outs = [f(*tensors, **options) for _ in range(4)]
    assert hits == [False, False, True, True]
    for out in outs[1:]:
        assert_same(name, out, outs[0])
    assert len({out.data_ptr() for out in outs}) == 4
    for tensor, copy in zip(tensors, copies, strict=True):
        tolerance.same_bits("inputs are left alone", tensor, copy)
    others = tensors_for(name, dtype, **like)
    known = f(*others, **options)
    assert hits[-1]
    forget()
    assert_same("other tensors", known, f(*others, **options))


@every_function
def test_poisoned_memory(name: str, hits: list[bool]) -> None:
    """Every element of the output is written, and no state is read that nobody wrote."""
    tensors = tensors_for(name)
    first = keep(FUNCTIONS[name], tensors)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(name, FUNCTIONS[name](*tensors), first)
    finally:
        torch.use_deterministic_algorithms(False)
    assert hits[-1]


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"causal": True}, {"window": (2, 1)}, {"window": (1, 2)}, {"window": (2, None)}, {"window": (None, 2)},
        {"scale": 0.5}, {"scale": 0.25, "softcap": 0.5}, {"softcap": 0.25, "scale": 0.5}, {"softcap": 2.0},
        {"backend": "cpu"},
    ],
    "sdpa": [{"is_causal": True}, {"scale": 0.5}, {"enable_gqa": True}],
    "shared_prefix": [
        {"causal": False}, {"window": (2, 0)}, {"window": (310, 1)}, {"scale": 0.5}, {"softcap": 2.0},
        {"window": (2, 0), "sink_tokens": 3}, {"sink_tokens": 2, "window": (3, 0)}, {"backend": "cpu"},
    ],
}  # fmt: skip
LIKES: list[dict[str, Any]] = [
    {"q_len": 4}, {"k_len": 22}, {"k_len": 3}, {"batch": 2}, {"heads": 8, "kv_heads": 8}, {"dim": 8}, {"dim": 17},
    {"value_dim": 8}, {"value_dim": 17}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
    *({"storage": tuple(kind if i == j else "contiguous" for j in range(3))}
      for i in range(3) for kind in ("blhd", "odd_rows", "odd_heads")),
]  # fmt: skip
PREFIXES: list[dict[str, Any]] = [{"prefix": ()}, {"prefix": (1,)}, {"prefix": (4,)}, {"prefix_len": 299}]


@every_function
def test_calls_that_differ_do_not_share(name: str, hits: list[bool]) -> None:
    f = FUNCTIONS[name]
    differing: list[tuple[Tensors, dict[str, Any]]] = [(tensors_for(name), options) for options in OPTIONS[name]]
    differing += [(tensors_for(name, **like), {}) for like in LIKES + PREFIXES * (name == "shared_prefix")]
    keep(f, tensors_for(name))
    found = []
    for tensors, options in differing:
        found.append(f(*tensors, **options))
        assert not hits[-1], (options, [(t.shape, t.stride(), t.dtype) for t in tensors])
        keep(f, tensors, **options)
    again = [f(*tensors, **options) for tensors, options in differing]
    for (tensors, options), first, third in zip(differing, found, again, strict=True):
        forget()
        assert_same(str(options), first, f(*tensors, **options))
        assert_same(str(options), third, first)


def test_functions_do_not_share() -> None:
    """Both causal, but aligned differently."""
    tensors = tensors_for("attention")
    keep(flashx.attention, tensors, causal=True)
    keep(sdpa, tensors, is_causal=True)
    bottom_right, top_left = flashx.attention(*tensors, causal=True), sdpa(*tensors, is_causal=True)
    forget()
    assert_same("attention", bottom_right, flashx.attention(*tensors, causal=True))
    assert_same("sdpa", top_left, sdpa(*tensors, is_causal=True))
    assert not torch.equal(bottom_right, top_left)


WRONG: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"causal": 1}, {"causal": 0}, {"causal": None}, {"window": (1.0, 0)}, {"window": (True, 0)},
        {"window": (-1, 0)}, {"window": (1, 2, 3)}, {"window": ()},
        {"window": "ab"}, {"window": 3}, {"scale": True}, {"scale": "1"},
        {"scale": float("nan")}, {"scale": float("inf")}, {"softcap": True}, {"softcap": -1.0}, {"softcap": None},
        {"dropout_p": False}, {"dropout_p": -0.5}, {"dropout_p": "0"}, {"backend": "nonsense"}, {"backend": "cuda"},
        {"backend": 1}, {"backend": []}, {"backend": {}}, {"bias": 0}, {"block_mask": 0}, {"alibi_slopes": 1.0},
        {"sinks": 0},
    ],
    "sdpa": [
        {"is_causal": 1}, {"enable_gqa": 1}, {"scale": "1"}, {"dropout_p": -0.1}, {"dropout_p": None}, {"attn_mask": 0},
    ],
    "shared_prefix": [
        {"causal": 1}, {"window": (1.0, 0)}, {"scale": True}, {"softcap": False}, {"sink_tokens": True},
        {"sink_tokens": 1.0}, {"sink_tokens": -1}, {"backend": "nonsense"}, {"backend": []}, {"suffix_lens": 0},
        {"block_mask": 0}, {"alibi_slopes": 0}, {"sinks": 0},
    ],
}  # fmt: skip


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or its error as text."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@every_function
def test_wrong_arguments_still_raise(name: str) -> None:
    f, tensors = FUNCTIONS[name], tensors_for(name)
    wrong: list[tuple[Tensors, dict[str, Any]]] = [(tensors, options) for options in WRONG[name]]
    for i in range(len(tensors)):
        shortened, other = tensors[i][..., :8], tensors[i].int()
        wrong += [((*tensors[:i], bad, *tensors[i + 1 :]), {}) for bad in (shortened, other, None, tensors[i].tolist())]
        if i % 2 == 1 and name != "sdpa":  # keys; torch, which takes it there, reads past the shorter one
            wrong.append(((*tensors[:i], tensors[i][..., 1:, :], *tensors[i + 1 :]), {}))
    wrong = [(bad, options) for bad, options in wrong if bad[-1] is None or bad[-1] is tensors[-1] or len(bad) == 3]
    before = [outcome(lambda: f(*bad, **options)) for bad, options in wrong]  # noqa: B023
    keep(f, tensors)
    for (bad, options), expected in zip(wrong, before, strict=True):
        found = outcome(lambda: f(*bad, **options))  # noqa: B023
        if isinstance(expected, torch.Tensor):  # value alone may be narrower
            assert_same(str(options), found, expected)
        else:
            assert isinstance(found, str) and found.split(" object at ")[0] == expected.split(" object at ")[0], options
            assert "unhashable" not in expected, expected
    assert all(isinstance(expected, str) for expected in before[: len(WRONG[name])])


@every_function
def test_gradients(name: str, hits: list[bool]) -> None:
    """A call that was kept without them has gradients where they are asked for; under no_grad it is the kept one."""
    f, tensors = FUNCTIONS[name], tensors_for(name)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    first = keep(f, tensors)
    for i in range(len(tensors)):
        one = [leaf if i == j else tensor for j, (leaf, tensor) in enumerate(zip(leaves, tensors, strict=True))]
        out = f(*one)
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[i])
        tolerance.same_bits("out", out.detach(), first)
        torch.testing.assert_close(grad, expected[i])
        with torch.no_grad():
            hits.clear()
            assert_same("no_grad", f(*one), first)
            assert hits == [True]


@every_function
def test_inference_mode(name: str, hits: list[bool]) -> None:
    """Kept outside and used inside, and the other way round."""
    f, tensors = FUNCTIONS[name], tensors_for(name)
    first = keep(f, tensors)
    with torch.inference_mode():
        inside = f(*tensors)
        assert hits[-1] and inside.is_inference()
        assert_same("inside", inside, first)
        forget()
        keep(f, tensors)
    outside = f(*tensors)
    assert hits[-1] and not outside.is_inference()
    assert_same("outside", outside, first)


@every_function
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_does_around_a_call_is_not_lost(way: str, name: str, hits: list[bool]) -> None:
    """As before anything was kept, which includes errors; and the kept call itself does not run."""
    f, tensors = FUNCTIONS[name], tensors_for(name)
    before = comparable(outcome(lambda: WAYS[way](f, tensors)))
    forget()
    keep(f, tensors)
    f(*tensors)
    assert hits[-1]
    hits.clear()
    after = comparable(outcome(lambda: WAYS[way](f, tensors)))
    assert after == before
    # Neither autocast nor sdpa_kernel means anything to flashx's own functions; torch's is called again below a mode.
    harmless = ["function mode"] if name == "sdpa" else ["autocast", "sdpa_kernel math", "sdpa_kernel flash"]
    assert way in harmless or not any(hits)


@every_function
def test_ways_are_not_vacuous(name: str) -> None:
    """What the comparison above would not show: that there was something to lose."""
    f, tensors = FUNCTIONS[name], tensors_for(name)
    operator = "flashx::level_attention" if name == "shared_prefix" else "flashx::attention"
    keep(f, tensors)
    assert profiled(f, tensors)[1] == [operator]
    assert dispatch_mode(f, tensors)[1] == [operator.replace("::", ".") + ".default"]
    assert any("attention" in target for target in fx("real")(f, tensors))
    assert traced(f, tensors)
    assert fake(f, tensors)[0] == fake_from_real(f, tensors)[0] == "FakeTensor"
    if name == "sdpa":
        with torch.autocast("cpu", torch.bfloat16):
            assert f(*tensors).dtype == torch.bfloat16


@every_function
@pytest.mark.parametrize("index", [0, 1, 2])
def test_neg_bit(name: str, index: int, hits: list[bool]) -> None:
    """A view whose elements are the negatives of its memory, with the strides of one that was kept."""
    f, tensors = FUNCTIONS[name], list(tensors_for(name))
    plain = torch.complex(torch.zeros(tensors[index].shape), tensors[index]).imag
    expected = keep(f, (*tensors[:index], plain, *tensors[index + 1 :]))
    assert_same("kept", f(*tensors[:index], plain, *tensors[index + 1 :]), expected)
    kept = hits[-1]
    opposite = negated(tensors[index])
    assert opposite.stride() == plain.stride()
    assert_same("negated", f(*tensors[:index], opposite, *tensors[index + 1 :]), expected)
    assert not hits[-1] or not kept


@pytest.mark.parametrize("index", [0, 1, 2])
def test_neg_bit_of_rows(index: int, hits: list[bool]) -> None:
    """The same where the last dimension is contiguous, so that such a call is kept."""
    tensors = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    expected = keep(flashx.attention, tuple(tensors))
    memory = (-tensors[index]).contiguous()
    tensors[index] = torch._neg_view(memory)
    assert tensors[index].is_neg() and tensors[index].stride() == memory.stride()
    assert_same("negated", flashx.attention(*tensors), expected)
    assert hits[-1] is False


@every_function
def test_copy_on_write(name: str) -> None:
    f, tensors = FUNCTIONS[name], tensors_for(name)
    expected = keep(f, tensors)
    clones = [torch._lazy_clone(tensor) for tensor in tensors]
    assert_same("clones", f(*clones), expected)
    clones[0].zero_()
    assert_same("originals", f(*tensors), expected)


@every_function
def test_compiled(name: str) -> None:
    """Traced without a graph break after a like call was kept, and what comes of it is called again and again."""
    f, tensors = FUNCTIONS[name], tensors_for(name)
    expected = keep(f, tensors)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for _ in range(3):
        assert_same("compiled", compiled(*tensors), expected)
    leaf = tensors[0].clone().requires_grad_()
    assert compiled(leaf, *tensors[1:]).requires_grad


def test_output_has_its_own_head_dim(hits: list[bool]) -> None:
    """Strides of sizes 1 say nothing: the output's may be query's although it is narrower."""
    query = torch.randn(1, 1, 1, 8).as_strided((1, 1, 1, 8), (7, 7, 7, 1))
    key, value = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 7)
    for f in (flashx.attention, sdpa):
        first = f(query, key, value)
        assert first.stride() == query.stride()
        for _ in range(3):
            assert_same("out", f(query, key, value), first)


def test_an_empty_call_stays_one() -> None:
    for shape in ((2, 2, 0, 8), (0, 2, 3, 8), (2, 0, 3, 8)):
        tensor = torch.empty(shape)
        for _ in range(4):
            assert flashx.attention(tensor, tensor, tensor).shape == shape
    query, nothing = torch.randn(2, 2, 3, 8), torch.empty(2, 2, 0, 8)
    for _ in range(4):
        assert (flashx.attention(query, nothing, nothing) == 0).all()


@pytest.mark.parametrize("reason", ["value dim", "last dimension", "reference", "wide"])
@pytest.mark.filterwarnings("ignore:flashx runs naive")
def test_what_cannot_be_kept_is_described_once_more_at_most(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    like: dict[str, Any] = {
        "value dim": {"value_dim": 8},
        "last dimension": {"storage": ("contiguous", "bhdl", "contiguous")},
        "wide": {"dim": 300, "value_dim": 300},
    }.get(reason, {})
    options: dict[str, Any] = {"backend": "reference"} if reason == "reference" else {}
    tensors = tensors_for("attention", **like)
    times = 0
    described = ops.described

    def counted(arguments: Any) -> Any:
        nonlocal times
        times += 1
        return described(arguments)

    monkeypatch.setattr(ops, "described", counted)
    for _ in range(5):
        flashx.attention(*tensors, **options)
    assert times <= 6


def test_one_warning_for_each_call() -> None:
    """Keeping a call must not warn once more that the reference runs it."""
    wide = torch.randn(1, 1, 2, 300)
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            flashx.attention(wide, wide, wide)
        assert len(caught) == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, hits: list[bool]) -> None:
    monkeypatch.setattr(quick, "_MOST", 5)
    for length in range(1, 30):
        tensors = tensors_for("attention", k_len=length)
        expected = keep(flashx.attention, tensors)
        assert len(quick._kept) <= 5 and len(quick._seen) <= 5
        assert_same("out", flashx.attention(*tensors), expected)
        assert hits[-1]
    for length in range(1, 30):  # seen once each
        flashx.attention(*tensors_for("attention", q_len=length, k_len=100))
        assert len(quick._seen) <= 5
    assert 1 <= quick._MOST < 10_000


@every_function
def test_tables_outlive_the_call(name: str, hits: list[bool]) -> None:
    """Whatever a kept call points to is kept with it."""
    f, tensors = FUNCTIONS[name], tensors_for(name)
    expected = keep(f, tensors)
    rubbish = [torch.full((size,), -1, dtype=torch.int32) for size in (1, 2, 3, 4, 5, 6, 24, 48) for _ in range(50)]
    assert_same(name, f(*tensors), expected)
    assert hits[-1] and len(rubbish) == 400


def test_threads() -> None:
    """Several at once, of which some make the first calls and others forget all."""
    calls = [(name, tensors_for(name, k_len=length)) for name in FUNCTIONS for length in (5, 21)]
    expected = [FUNCTIONS[name](*tensors) for name, tensors in calls]
    forget()
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(first: int) -> None:
        try:
            start.wait()
            for i in range(60):
                index = (first + i) % len(calls)
                name, tensors = calls[index]
                assert_same(name, FUNCTIONS[name](*tensors), expected[index])
                if i % 20 == 19:
                    forget()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def test_number_of_threads_is_the_one_of_the_moment(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_for("attention")
    given: list[int] = []

    class Call(_C.CpuCall):
        def __call__(self, *arguments: Any) -> None:
            given.append(arguments[3])
            super().__call__(*arguments)

    monkeypatch.setattr(_C, "CpuCall", Call)
    expected = keep(flashx.attention, tensors)
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        assert_same("out", flashx.attention(*tensors), expected)
    assert given == [1, 2, 1]


def _use(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHX_CPU_ISA", isa)
    cpu.isa.cache_clear()


def test_instruction_sets_do_not_share(monkeypatch: pytest.MonkeyPatch, hits: list[bool]) -> None:
    tensors = tensors_for("attention", torch.bfloat16, q_len=40, k_len=200)
    bound: list[str] = []

    class Call(_C.CpuCall):
        def __init__(self, isa: str, *bound_to: Any) -> None:
            bound.append(isa)
            super().__init__(isa, *bound_to)

    monkeypatch.setattr(_C, "CpuCall", Call)
    try:
        for isa in _C.cpu_isas():
            _use(isa, monkeypatch)
            expected = keep(flashx.attention, tensors)
            assert_same(isa, flashx.attention(*tensors), expected)
            assert hits[-3:] == [False, False, True]
        assert bound == _C.cpu_isas()
        for isa in reversed(_C.cpu_isas()):
            _use(isa, monkeypatch)
            known = flashx.attention(*tensors)
            assert hits[-1]
            with contextlib.suppress(KeyError):
                forgotten = dict(quick._kept)
            forget()
            assert_same(isa, known, flashx.attention(*tensors))
            quick._kept.update(forgotten)
    finally:
        monkeypatch.undo()
        cpu.isa.cache_clear()


@pytest.mark.parametrize("copies", [False, True])
def test_grouped_queries_of_the_drop_in_are_kept(copies: bool, hits: list[bool]) -> None:
    """It hands on views of the same elements; only what had to be copied cannot be kept."""
    query, key, value = tensors_for("sdpa", heads=8, kv_heads=2, q_len=1)
    if copies:
        key = torch.randn(*key.shape[:2], key.shape[3], key.shape[2]).mT
    first = keep(sdpa, (query, key, value), enable_gqa=True)
    assert_same("third", sdpa(query, key, value, enable_gqa=True), first)
    assert hits == [False, False, not copies]


@pytest.mark.parametrize("page", [None, 1, 16])
def test_decoding_is_kept_while_the_cache_grows(page: int | None, hits: list[bool]) -> None:
    """What is kept reads the cache's own lens and pages, as they are at each call, and those of no other cache."""

    def cache_of(lens: list[int]) -> flashx.KVCache | flashx.PagedKVCache:
        if page is None:
            return flashx.KVCache(*torch.randn(2, 2, 2, 96, 16).unbind(), torch.tensor(lens))
        table = torch.randperm(2 * 96 // page, dtype=torch.int32).view(2, -1)
        return flashx.PagedKVCache(*torch.randn(2, 2 * 96 // page, page, 2, 16).unbind(), table, torch.tensor(lens))

    caches = [cache_of([5, 60]), cache_of([60, 5])]
    for step in range(6):
        for cache in caches:
            cache.append(*torch.randn(2, 2, 2, 1, 16).unbind())
            query = torch.randn(2, 4, 1, 16)
            out = flashx.decode_attention(query, cache, window=(40, 0))
            expected = flashx.decode_attention(query, cache, window=(40, 0), backend="reference")
            torch.testing.assert_close(out, expected, msg=lambda text, step=step: f"step {step}: {text}")
    assert hits == [True] * 8  # but for two calls of each cache; the reference is never kept
    caches[0].lens[1] = 97
    with pytest.raises(ValueError, match="lens must be from 0 to the capacity 96, got 97"):
        flashx.decode_attention(query, caches[0], window=(40, 0))
    with pytest.raises(ValueError, match="query must have the cache's batch size 2"):
        flashx.decode_attention(query[:1], caches[1], window=(40, 0))
