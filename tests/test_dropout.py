"""Dropout: Philox as published, one mask for all backends, exact given the mask, reproducible from torch's seed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tolerance
import torch
from cases import Case

import flashx
from flashx import philox

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox.words(key[0] | key[1] << 32, tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in words) == expected


def test_mask_is_words_over_a_threshold() -> None:
    """Spelled out for one element: word j % 4 of counter (j // 4, i, b * heads + h, 0), kept from p * 2**32 on."""
    seed, p = 1234567890123456789, 0.37
    mask = philox.keep_mask(seed, p, 2, 3, 5, 11)
    assert mask.shape == (2, 3, 5, 11) and mask.dtype == torch.bool
    b, h, i, j = 1, 2, 4, 9
    words = philox.words(seed, tuple(torch.tensor(word) for word in (j // 4, i, b * 3 + h, 0)))
    assert bool(mask[b, h, i, j]) == (int(words[j % 4]) >= round(p * 2**32))


def test_mask_of_a_part_is_part_of_the_mask() -> None:
    """An element's bits depend on its place alone, not on the sizes around it (but for heads, which number batches)."""
    whole = philox.keep_mask(7, 0.5, 3, 4, 33, 70)
    assert torch.equal(philox.keep_mask(7, 0.5, 2, 4, 17, 13), whole[:2, :, :17, :13])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_kept_fraction(p: float) -> None:
    """Within five standard deviations, over all and over each row, column and head."""
    mask = philox.keep_mask(42, p, 4, 8, 128, 128).double()
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        kept = mask.mean(dims)
        count = mask.numel() / kept.numel()
        assert ((kept - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p) / count)).all(), dims


def test_neighbours_and_seeds_are_independent() -> None:
    p, n = 0.5, 4 * 8 * 128 * 128
    mask = philox.keep_mask(42, p, 4, 8, 128, 128)
    other = philox.keep_mask(43, p, 4, 8, 128, 128)
    pairs = [(mask, other), *((mask, mask.roll(1, dim)) for dim in range(4))]
    for one, two in pairs:
        assert abs((one == two).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_keep_all_or_nothing(p: float) -> None:
    assert (philox.keep_mask(5, p, 1, 2, 9, 9) == (p == 0)).all()


# Values and gradients given the mask are cases like all others: test_attention.py has some of them; here are more, with
# the mask across tiles, groups of heads and every kind of row that sees only part of the keys.
EXACT = [
    Case(1, 1, 8, dropout_p=0.5),
    Case(65, 131, 16, batch=2, heads=6, kv_heads=2, dropout_p=0.25),
    Case(131, 65, 16, heads=3, causal=True, dropout_p=0.5),
    Case(300, 300, 8, window=(33, 7), dropout_p=0.1),
    Case(3, 517, 24, heads=4, kv_heads=1, causal=True, dropout_p=0.75),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_exact_given_the_mask(case: Case, dtype: torch.dtype, engine: str) -> None:
    tolerance.check(case, dtype, tolerance.attend(case, case.inputs(dtype), engine))


def test_reproducible_from_manual_seed(engine: str) -> None:
    case = Case(65, 131, 16, batch=2, heads=4, kv_heads=2, dropout_p=0.3)
    inputs = case.inputs(torch.float32)
    first = tolerance.attend(case, inputs, engine)
    for name, again in tolerance.attend(case, inputs, engine).items():
        tolerance.same_bits(name, again, first[name])
    other = tolerance.attend(replace(case, seed=1), inputs, engine)
    assert not torch.equal(other["out"], first["out"])
    tolerance.same_bits("lse, which dropout does not touch", other["lse"], first["lse"])


def test_every_call_draws_its_own_mask() -> None:
    query = torch.randn(1, 2, 33, 8)
    torch.manual_seed(0)
    first, second = (flashx.attention(query, query, query, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_no_dropout_draws_nothing_from_the_generator() -> None:
    query = torch.randn(1, 2, 33, 8)
    before = torch.get_rng_state()
    flashx.attention(query, query, query, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropping_everything(engine: str) -> None:
    case = Case(9, 17, 8, heads=2, dropout_p=1.0, sinks=True)
    results = tolerance.attend(case, case.inputs(torch.float32), engine)
    kept = tolerance.attend(replace(case, dropout_p=0.0), case.inputs(torch.float32), engine)
    assert (results["out"] == 0).all() and (results["grad_value"] == 0).all()
    tolerance.same_bits("lse", results["lse"], kept["lse"])


def test_expectation_is_attention_without_dropout(engine: str) -> None:
    """The mean over many seeds, within five standard errors of the samples."""
    query = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    torch.manual_seed(0)
    samples = torch.stack([flashx.attention(query, query, query, dropout_p=0.3, backend=engine) for _ in range(2000)])
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - flashx.attention(query, query, query, backend=engine)).abs() < 5 * error).all()
