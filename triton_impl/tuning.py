"""Tile sizes, warps and stages, as data: by element size, padded head dim and GPU. The twin of sm80/config.h.

What limits them: shared memory for a program's own tile and every stage's streamed ones (99 KiB on compute capability
8.6, 8.9 and 12, 163 on 8.0, 227 on 9.0 and 10.0), and 255 registers a thread for sums and logits. The general logits,
dropout's words above all, take so many registers that their tiles are smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import triton


class Tiles(NamedTuple):
    rows: int  # M, query rows
    keys: int  # N
    warps: int
    stages: int


class Sweeps(NamedTuple):
    """Tiles for each kernel with products."""

    forward: Tiles
    grad_key_value: Tiles
    grad_query: Tiles
    grad_bias: Tiles


class SimplicialSweeps(NamedTuple):
    """Those of simplicial.py, whose rows are pairs."""

    forward: Tiles
    grad_key_value: Tiles
    grad_query: Tiles
    grad_second: Tiles


def _sweeps(*four: tuple[int, int, int, int]) -> Sweeps:
    return Sweeps(*(Tiles(*one) for one in four))


def _simplicial(*four: tuple[int, int, int, int]) -> SimplicialSweeps:
    return SimplicialSweeps(*(Tiles(*one) for one in four))


# (bytes of an element, largest padded head dim): forward, dK and dV, dQ, dBias. These fit every GPU.
_PLAIN = {
    (2, 64): _sweeps((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
    (2, 128): _sweeps((128, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
    (2, 256): _sweeps((64, 32, 8, 2), (32, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    # Three TF32 products for each of float32's double the operands.
    (4, 64): _sweeps((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    (4, 128): _sweeps((32, 32, 8, 2), (32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    (4, 256): _sweeps((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
}
_GENERAL = {
    (2, 64): _sweeps((64, 64, 4, 2), (32, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
    (2, 128): _sweeps((64, 64, 8, 2), (32, 64, 8, 2), (64, 16, 4, 2), (64, 32, 4, 1)),
    (2, 256): _sweeps((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    (4, 64): _sweeps((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    (4, 128): _sweeps((32, 16, 4, 2), (16, 16, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    (4, 256): _sweeps((16, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
}
# What is better on GPUs of one major compute capability: (major, general) -> tiles, as above.
_BETTER = {
    # Of these sizes what the tables above name spills there.
    (8, False): {(2, 64): _sweeps((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1))},
    (9, False): {(2, 256): _sweeps((64, 16, 8, 2), (32, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 1))},
    (9, True): {(2, 256): _sweeps((64, 16, 8, 2), (32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1))},
    (10, True): {(2, 64): _sweeps((64, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1))},
    (12, False): {
        (2, 64): _sweeps((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 1)),
        (2, 128): _sweeps((128, 32, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
    },
    (12, True): {(2, 64): _sweeps((64, 32, 4, 2), (32, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1))},
}
# What Triton before 3.9 needs in their place: its ptxas spills more of the loops.
_BEFORE_3_9 = {
    (8, False): {(2, 64): _sweeps((128, 64, 8, 3), (32, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1))},
    (8, True): {
        (2, 64): _sweeps((64, 64, 4, 2), (16, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
        (2, 128): _sweeps((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2), (64, 32, 4, 1)),
    },
    (9, False): {
        (2, 64): _sweeps((128, 64, 8, 3), (32, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
        (4, 128): _sweeps((32, 16, 4, 2), (32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    },
    (9, True): {(4, 128): _sweeps((32, 16, 8, 2), (16, 16, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1))},
    (10, False): {
        (2, 64): _sweeps((128, 64, 8, 3), (32, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
        (4, 128): _sweeps((32, 16, 4, 2), (32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    },
    (12, False): {(2, 64): _sweeps((128, 64, 8, 3), (32, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 1))},
    (12, True): {
        (2, 64): _sweeps((64, 32, 4, 2), (16, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
        (2, 128): _sweeps((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2), (64, 32, 4, 1)),
    },
}
# 2-simplicial attention's, whose rows are pairs: forward, dK and dV, dQ, dK2 and dV2.
_SIMPLICIAL = {
    (2, 64): _simplicial((128, 64, 8, 2), (64, 32, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
    (2, 128): _simplicial((64, 64, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
    (2, 256): _simplicial((32, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (4, 64): _simplicial((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    (4, 128): _simplicial((16, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
}
# By major compute capability. wgmma and tcgen05 want 64 keys of dK and dV, and leave registers for them.
_BETTER_SIMPLICIAL = {
    9: {
        (2, 64): _simplicial((128, 64, 8, 2), (64, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
        (2, 128): _simplicial((64, 64, 8, 2), (32, 64, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
    },
    10: {
        (2, 64): _simplicial((64, 64, 8, 2), (64, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
        (2, 128): _simplicial((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 8, 1), (32, 64, 8, 1)),
    },
}
_IS_BEFORE_3_9 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
# For the interpreter, to which every operation costs the same. No two sizes of one kernel are equal, so that none can
# stand in for the other.
_INTERPRETED = _sweeps((128, 64, 4, 1), (64, 128, 4, 1), (128, 64, 4, 1), (64, 128, 4, 1))
_SIMPLICIAL_INTERPRETED = _simplicial((512, 64, 4, 1), (512, 32, 4, 1), (256, 64, 4, 1), (512, 32, 4, 1))


# Split-KV: a call with at most ROWS_TO_SPLIT packed rows of a sequence is cut at multiples of SPLIT_KEYS, counted from
# key 0, whatever it is batched with. Members share their keys, so their rows are many, and so are the parts that are
# written and read again. csrc/cuda's numbers: what is cut where shows in the bits.
ROWS_TO_SPLIT = 64
SPLIT_KEYS, MEMBER_SPLIT_KEYS = 1024, 4096


def few_rows(tile: Tiles, rows: int, pieces: bool = False) -> Tiles:
    """The forward's tile where a sequence has no more rows than these. pieces: whether ``piece`` is not 0."""
    least = 16
    while least < rows:
        least *= 2
    return tile if least >= tile.rows else tile._replace(rows=least, warps=tile.warps if pieces else min(tile.warps, 4))


def table_dim(block: int) -> int:
    """The head dim whose tiles a padded one has."""
    return min(dim for _, dim in _PLAIN if dim >= block)


def piece(element_bytes: int, block: int) -> int:
    """How many columns of its operands a product over the head dim takes at a time; 0 for all of them.

    float32's three TF32 products need two parts of each operand: of 256 columns that is more than there are registers.
    """
    return 64 if element_bytes == 4 and block > 128 else 0


def tiles(capability: tuple[int, int] | None, element_bytes: int, block: int, general: bool) -> Sweeps:
    """The tiles for a GPU, None is the interpreter, and the larger of the padded head dims."""
    if capability is None:
        return _INTERPRETED
    table = (_GENERAL if general else _PLAIN) | _BETTER.get((capability[0], general), {})
    if _IS_BEFORE_3_9:
        table |= _BEFORE_3_9.get((capability[0], general), {})
    return table[element_bytes, table_dim(block)]


def simplicial_tiles(capability: tuple[int, int] | None, element_bytes: int, block: int) -> SimplicialSweeps:
    """Those of 2-simplicial attention, as ``tiles``."""
    if capability is None:
        return _SIMPLICIAL_INTERPRETED
    table = _SIMPLICIAL | _BETTER_SIMPLICIAL.get(capability[0], {})
    return table[element_bytes, table_dim(block)]
