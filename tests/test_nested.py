"""Jagged nested tensors: attention of their sequences, where they lie, on every engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import ragged
import tolerance
import torch
from ragged import Ragged

import flashx
from flashx.attention import attention
from flashx.nested import attention_nested
from flashx.nn.functional import FlashxFallbackWarning
from flashx.nn.functional import scaled_dot_product_attention as sdpa

NAN = float("nan")
# How sequences lie in the values: end to end, with holes of NaN between them, heads before rows.
STORAGES = ["contiguous", "holes", "heads first"]

CALLS = [
    Ragged((3, 1, 70), (9, 130, 65), heads=4, kv_heads=2, head_dim=24, value_dim=40, causal=False),
    Ragged((33, 1, 40), (50, 7, 20), heads=4, kv_heads=1, window=(9, None), sinks=True, alibi="bh"),
    Ragged((5, 0, 3), (5, 4, 0), softcap=5.0, magnitude=3.0),
    Ragged((33, 1, 40), (50, 7, 20), top_left=True),
    Ragged((20, 0, 3), (40, 4, 0), top_left=True, heads=2, kv_heads=1, window=(5, 2)),
    Ragged((20, 3), (12, 9), dropout_p=0.4),
]


def nest(tensor: torch.Tensor, lens: tuple[int, ...], storage: str) -> torch.Tensor:
    """(total, H, D) -> (B, H, j, D), a differentiable view of it or of a copy with holes."""
    if storage == "holes":
        parts = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 2), value=NAN) for part in tensor.split(lens)]
        lengths = torch.tensor(lens, device=tensor.device)
        offsets = torch.nn.functional.pad((lengths + 2).cumsum(0), (1, 0))
        nested = torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets, lengths)
        return nested.transpose(1, 2)
    offsets = ragged.starts(lens).long().to(tensor.device)
    if storage == "heads first":
        return torch.nested.nested_tensor_from_jagged(tensor.transpose(0, 1).contiguous(), offsets, jagged_dim=2)
    return torch.nested.nested_tensor_from_jagged(tensor, offsets).transpose(1, 2)


def flat(nested: torch.Tensor) -> torch.Tensor:
    """(B, H, j, ...) -> (total, H, ...), differentiable."""
    return torch.cat([part.transpose(0, 1) for part in nested.unbind()])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_oracle(call: Ragged, dtype: torch.dtype, storage: str, engine: str, poisoned_memory: None) -> None:
    if dtype == torch.float64 and engine in ("cuda", "cuda_emulated"):
        pytest.skip("the CUDA kernels have no float64")
    inputs = call.inputs(dtype)
    there = inputs.to(tolerance.device_of(engine))
    leaves = there.leaves()
    query, key = (nest(leaves[name], lens, storage) for name, lens in (("query", call.q_lens), ("key", call.k_lens)))
    # As in modules, whose key and value are views of one projection: the same offsets.
    packed = nest(leaves["value"], call.k_lens, storage)
    value = torch.nested.nested_tensor_from_jagged(packed.values(), key.offsets(), key.lengths(), jagged_dim=2)
    torch.manual_seed(call.seed)
    out, lse = attention_nested(
        query, key, value, **call.options("dropout_p"),
        alibi_slopes=there.alibi_slopes, sinks=leaves.get("sinks"),
        align="top-left" if call.top_left else "bottom-right", backend=engine,
    )  # fmt: skip
    assert out.offsets() is query.offsets() and out.lengths() is query.lengths()
    assert out.transpose(1, 2).values().is_contiguous()
    found = ragged.results(flat(out), flat(lse).transpose(0, 1), leaves, there)
    ragged.check(call, dtype, found)


def test_it_composes_with_modules() -> None:
    """A self-attention block on a jagged batch, as of each sequence by itself."""
    torch.manual_seed(0)
    project, output = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
    parts = [torch.randn(length, 16) for length in (5, 1, 9)]

    def block(tokens: torch.Tensor, attend: Callable[..., Any]) -> torch.Tensor:
        query, key, value = (
            tensor.unflatten(-1, [2, 8]).transpose(-3, -2) for tensor in project(tokens).chunk(3, dim=-1)
        )
        return tokens + output(attend(query, key, value).transpose(-3, -2).flatten(-2))

    def one(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)

    batch = torch.nested.nested_tensor(parts, layout=torch.jagged)
    out = block(batch, lambda *tensors: attention_nested(*tensors, causal=True).out)
    expected = torch.cat([block(part, one) for part in parts])
    grads = [torch.autograd.grad(t.square().sum(), project.parameters()) for t in (out.values(), expected)]
    torch.testing.assert_close(out.values(), expected)
    torch.testing.assert_close(*grads)


def test_public_calls(engine: str) -> None:
    """flashx.attention, aligned bottom-right, and the drop-in, aligned top-left, for a batch of both."""
    device = tolerance.device_of(engine)
    query, key = (
        nest(torch.randn(sum(lens), 4, 8, device=device), lens, "contiguous") for lens in ((3, 0, 6), (5, 2, 4))
    )
    for align, call in (
        ("bottom-right", lambda *tensors, **options: attention(*tensors, backend=engine, **options)),
        (
            "top-left",
            lambda *tensors, causal: sdpa(*tensors, is_causal=causal),
        ),
    ):
        if align == "top-left" and engine not in ("cpu", "reference"):
            continue
        backend = engine if align == "bottom-right" else None
        for causal in (False, True):
            expected = attention_nested(query, key, key, causal=causal, align=align, backend=backend)
            out = call(query, key, key, causal=causal)
            assert out.offsets() is query.offsets()
            torch.testing.assert_close(out.values(), expected.out.values(), rtol=0, atol=0)
    result = attention(query, key, key, return_lse=True, backend=engine)
    assert isinstance(result, flashx.AttentionResult) and result.lse.shape == query.shape[:3]


def _patched(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    with flashx.patch():
        return torch.nn.functional.scaled_dot_product_attention(*tensors, None, 0.0, False, **options)


def _on_default_device(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.device("cpu"):
        return sdpa(*tensors, **options)


DROP_INS = {
    "plain": sdpa,
    "patched": _patched,
    "default device": _on_default_device,
    "compiled": torch.compile(sdpa, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("name", DROP_INS)
def test_drop_in_is_torchs(name: str) -> None:
    """Results, their layout and gradients; nothing goes to torch."""
    tokens = torch.nested.nested_tensor(
        [torch.randn(n, 32) for n in (4, 1, 7)], layout=torch.jagged, requires_grad=True
    )
    found = []
    for attend in (DROP_INS[name], torch._C._nn.scaled_dot_product_attention):
        query, key, value = (t.unflatten(-1, [4, 8]).transpose(1, 2) for t in (tokens, 2 * tokens, tokens.sin()))
        with warnings.catch_warnings():
            warnings.simplefilter("error", FlashxFallbackWarning)
            out = attend(query, key, value, scale=0.3)
        assert out.shape == query.shape
        found.append((out.values(), *torch.autograd.grad(out.values().square().sum(), tokens)))
    (out, grad), (expected, expected_grad) = found
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad.values(), expected_grad.values())


def test_drop_in_groups_heads_and_autocasts() -> None:
    """Which torch does not do for nested tensors on the CPU."""
    query, key = jagged((3, 6), heads=4), jagged((3, 6), heads=2)
    grouped = sdpa(query, key, key, is_causal=True, enable_gqa=True)
    repeated = key.transpose(1, 2).repeat_interleave(2, 2).transpose(1, 2)
    torch.testing.assert_close(grouped.values(), sdpa(query, repeated, repeated, is_causal=True).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sdpa(query, query, query).dtype == torch.bfloat16


FALLBACKS = {
    "jagged in their length": lambda q: (q.transpose(1, 2),) * 3,
    "different dtypes": lambda q: (q.to(torch.complex64),) * 3,
    "different numbers of heads": lambda q: (q, jagged((3, 6), heads=1), jagged((3, 6), heads=1)),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_no_kernel_covers_goes_to_torch(reason: str) -> None:
    """With a warning, or torch's error."""
    tensors = FALLBACKS[reason](jagged((3, 6), heads=4))
    flashx.nn.functional._warned.clear()
    try:
        expected = torch._C._nn.scaled_dot_product_attention(*tensors)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            sdpa(*tensors)
        return
    with pytest.warns(FlashxFallbackWarning, match=reason):
        out = sdpa(*tensors)
    torch.testing.assert_close(out.values(), expected.values(), rtol=0, atol=0)


def test_compiled() -> None:
    query = nest(torch.randn(9, 2, 8), (3, 0, 6), "contiguous")
    compiled = torch.compile(attention_nested, backend="aot_eager", fullgraph=True)
    tolerance.same_bits(
        "out", compiled(query, query, query).out.values(), attention_nested(query, query, query).out.values()
    )


def test_key_and_value_may_have_equal_offsets(engine: str) -> None:
    """On the CPU their values are compared, as torch does not."""
    device = tolerance.device_of(engine)
    query, key, value = (nest(torch.randn(9, 2, 8, device=device), (3, 0, 6), "contiguous") for _ in range(3))
    same = torch.nested.nested_tensor_from_jagged(value.values(), key.offsets(), jagged_dim=2)
    expected = attention_nested(query, key, same, backend=engine).out.values()
    if device == "cpu":
        tolerance.same_bits("out", attention_nested(query, key, value, backend=engine).out.values(), expected)
    else:
        with pytest.raises(ValueError, match="value must have key's offsets"):
            attention_nested(query, key, value, backend=engine)


def jagged(lens: tuple[int, ...], heads: int = 2, dim: int = 8, **options: Any) -> torch.Tensor:
    return nest(torch.randn(sum(lens), heads, dim, **options), lens, "contiguous")


def damaged(offsets: list[int], lengths: list[int] | None = None) -> torch.Tensor:
    table = None if lengths is None else torch.tensor(lengths)
    return torch.nested.nested_tensor_from_jagged(torch.randn(2, 9, 8), torch.tensor(offsets), table, jagged_dim=2)


GOOD = jagged((3, 6))

BAD: list[tuple[dict[str, Any], Any, tuple[str, ...]]] = [
    ({"query": torch.randn(2, 2, 3, 8)}, TypeError, ("query", "jagged", "strided")),
    ({"key": torch.randn(2, 2, 3, 8)}, TypeError, ("key", "jagged", "strided")),
    ({"value": [1]}, TypeError, ("value", "jagged", "list")),
    ({"key": torch.nested.nested_tensor([torch.ones(2, 3, 8)] * 2)}, TypeError, ("key", "jagged", "strided")),
    ({"query": GOOD.transpose(1, 2)}, ValueError, ("query", "third dimension")),
    ({"query": GOOD.transpose(1, 2).flatten(2)}, ValueError, ("query", "third dimension")),
    ({"key": jagged((3, 5, 1)), "value": jagged((3, 5, 1))}, ValueError, ("key", "batch size 2", "(3, 2")),
    ({"value": jagged((4, 5))}, ValueError, ("value", "key's offsets")),
    ({"value": nest(torch.randn(9, 2, 8), (3, 6), "holes")}, ValueError, ("value", "key's offsets")),
    ({"bias": torch.zeros(3, 3)}, ValueError, ("bias", "None", "Tensor")),
    ({"block_mask": 1}, ValueError, ("block_mask", "None", "int")),
    ({"value": jagged((3, 6), heads=1)}, ValueError, ("value", "2 heads")),
    ({"query": jagged((3, 6), heads=3)}, ValueError, ("heads", "3 and 2")),
    ({"query": jagged((3, 6), dim=7)}, ValueError, ("key", "head dim 7")),
    ({"query": jagged((3, 6), dtype=torch.float64)}, TypeError, ("key", "float64", "float32")),
    ({"query": damaged([0, 5, 3])}, ValueError, ("query", "offsets", "[0, 5, 3]")),
    ({"query": damaged([0, 5, 10])}, ValueError, ("query", "offsets", "9", "[0, 5, 10]")),
    ({"query": damaged([-1, 5, 9])}, ValueError, ("query", "offsets", "[-1, 5, 9]")),
    ({"query": damaged([0, 5, 9], [6, 1])}, ValueError, ("query", "lengths", "[5, 4]", "[6, 1]")),
    ({"query": damaged([0, 5, 9], [5, -1])}, ValueError, ("query", "lengths", "[5, -1]")),
    ({"causal": 1}, TypeError, ("causal", "int")),
    ({"window": (-1, 0)}, ValueError, ("window", "-1")),
    ({"backend": "gpu"}, ValueError, ("backend", "gpu")),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input(index: int) -> None:
    changes, error, parts = BAD[index]
    assert attention_nested(GOOD, GOOD, GOOD).out.shape == GOOD.shape
    with pytest.raises(error) as raised:
        attention_nested(**{"query": GOOD, "key": GOOD, "value": GOOD, **changes})
    for part in parts:
        assert part in str(raised.value), f"{str(raised.value)!r} does not say {part!r}"
