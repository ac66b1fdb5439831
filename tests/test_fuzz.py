"""Fuzzing: random valid problems over all features against the oracle, from a fixed seed, for a fixed time."""

from __future__ import annotations

import random
import time

import pytest
import tolerance
import torch
from cases import STORAGES, Bias, Case
from conftest import ENGINES

SECONDS = 20.0
SEED = 20240607
MOST_LOGITS = 30_000

_LENGTHS = (1, 2, 3, 5, 7, 13, 16, 17, 31, 33, 48, 63, 64, 65, 97, 127, 128, 129, 193, 257)
_DIMS = (1, 2, 3, 8, 15, 16, 17, 24, 32, 33, 40, 64, 65, 80, 96, 128, 129, 256)
_SHAPES = ("k", "qk", "hqk", "b11k", "b1q1", "1h11", "1hqk", "bhq1", "bhqk", "b1qk", "bh1k")
_VALUES = ("add", "add32", "hide", "hide_rows", "bool", "bool_rows", "bool_few")
# Where all rows or heads of the query are the same, so are their roundings, and the errors of sums over them add up
# instead of averaging out.
_QUERY_STORAGES = [storage for storage in STORAGES if storage not in ("one_row", "one_head", "one_batch_and_head")]


def random_case(draw: random.Random) -> Case:
    """Any valid problem of up to MOST_LOGITS logits; a bit less than half of the features are on."""

    def maybe(value: object, otherwise: object = None) -> object:
        return value if draw.random() < 0.4 else otherwise

    def width() -> int | None:
        return draw.choice((None, 0, 1, draw.randrange(300)))

    group = draw.choice((1, 1, 2, 3, 8))
    kv_heads = draw.choice((1, 1, 2))
    shape, values = draw.choice(_SHAPES), draw.choice(_VALUES)
    if "rows" in values and shape[-2:] != "qk":
        values = "add"
    storage = draw.choice(list(STORAGES)) if len(shape) == 4 else "contiguous"
    batch, q_len, head_dim = draw.choice((1, 2, 3)), draw.choice(_LENGTHS), draw.choice(_DIMS)
    most_keys = max(MOST_LOGITS // (batch * kv_heads * group * q_len), 1)
    return Case(
        q_len=q_len,
        k_len=draw.choice([length for length in _LENGTHS if length <= most_keys]),
        head_dim=head_dim,
        value_dim=draw.choice((None, draw.choice(_DIMS))),
        batch=batch,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        causal=draw.random() < 0.4,
        window=maybe((width(), width())),
        bias=maybe(Bias(shape, values, storage)),
        alibi=maybe(draw.choice(("h", "bh"))),
        softcap=maybe(draw.choice((0.5, 5.0, 30.0)), 0.0),
        sinks=draw.random() < 0.3,
        dropout_p=maybe(draw.choice((0.1, 0.5)), 0.0),
        scale=maybe(draw.choice((-1.0, 0.2, 3.0)) / head_dim),
        magnitude=draw.choice((1.0, 1.0, 4.0)),
        query_storage=draw.choice(_QUERY_STORAGES),
        kv_storage=draw.choice(list(STORAGES)),
        seed=draw.randrange(1000),
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("engine", ENGINES[:1], indirect=True)
def test_random_problems(engine: str) -> None:
    draw = random.Random(SEED)
    end = time.monotonic() + SECONDS
    count = 0
    while time.monotonic() < end:
        case = random_case(draw)
        dtype = draw.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
        try:
            tolerance.check(case, dtype, tolerance.attend(case, case.inputs(dtype), engine))
        except Exception as error:
            raise AssertionError(f"problem {count}:\n{case!r}\n{dtype}") from error
        count += 1
    print(f"{count} problems")


def test_the_same_seed_draws_the_same_problems() -> None:
    first, second = ([random_case(random.Random(SEED)) for _ in range(5)] for _ in range(2))
    assert first == second
