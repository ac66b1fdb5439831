"""Tiles by measurement, behind FLASHX_TRITON_AUTOTUNE=1: a kernel's first call times those next to the table's.

The fastest are kept in a file of the user's cache folder, for every later call of any process: which tiles they are
shows in the bits. Lengths have no say, so that a sequence's bits do not depend on its batch: the first call decides.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.errors import TritonError
from triton.runtime import driver
from triton.testing import do_bench

from .. import env
from .tuning import Tiles, table_dim

_LEAST = 16  # rows and columns of a tl.dot
_WARPS = (4, 8)  # whole warp groups, which is what wgmma takes
_REGISTERS = 255  # of a thread
# From the table's tiles, one step at a time; rows with their warps as well, which leaves a thread what it has.
_STEPS: tuple[dict[str, float], ...] = (
    {"rows": 2}, {"rows": 0.5}, {"keys": 2}, {"keys": 0.5}, {"warps": 2}, {"warps": 0.5},
    {"rows": 2, "warps": 2}, {"rows": 0.5, "warps": 0.5},
)  # fmt: skip
_FAILURES = (TritonError, RuntimeError)  # the compiler's passes and CUDA raise the latter

_chosen: dict[str, Tiles] = {}
_lock = threading.Lock()  # two at once would time each other


class Gpu(NamedTuple):
    name: str
    shared: int  # bytes of shared memory that a program can have


class Kernel(NamedTuple):
    """What has tiles of its own."""

    sweep: str  # a field of tuning.Sweeps
    dtype: torch.dtype
    block: int  # the larger of the padded head dims
    general: bool
    gpu: Gpu


@functools.cache
def gpu(device: torch.device) -> Gpu:
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    shared = driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return Gpu(f"{torch.cuda.get_device_name(device)} ({capability})", shared)


def start(kernel: Kernel, table: Tiles, launch: Callable[[Tiles], None]) -> None:
    """Launches with the fastest tiles. launch may be called many times: it overwrites what it writes."""
    tile = fastest(kernel, table, launch)
    try:
        launch(tile)
    except _FAILURES:  # another variant of the kernel may need more than the one that was timed
        if tile == table:
            raise
        launch(table)


def fastest(kernel: Kernel, table: Tiles, launch: Callable[[Tiles], None]) -> Tiles:
    """The tiles that were chosen before, here or by another process, or are now."""
    key = _key(kernel, table)
    if key in _chosen:
        return _chosen[key]
    with _lock:
        some, file = candidates(kernel, table), Path(env.cache_folder()) / "triton_tiles.json"
        tile = _chosen.get(key) or _stored(_read(file), key, some)
        if tile is None:
            if torch.cuda.is_current_stream_capturing():  # a graph cannot be timed while it is made
                return table
            times = {one: _milliseconds(one, launch) for one in some}
            tile = min(times, key=times.__getitem__)
            tile = _store(file, key, tile, some) if times[tile] < math.inf else table
        _chosen[key] = tile
    return tile


def candidates(kernel: Kernel, table: Tiles) -> list[Tiles]:
    """The table's tiles, and those a step away that the kernel and the GPU have room for."""
    some = [table._replace(**{name: int(getattr(table, name) * by) for name, by in step.items()}) for step in _STEPS]
    some += [table._replace(stages=table.stages + more) for more in (1, -1)]
    return [table, *(one for one in some if _fits(kernel, one))]


def _fits(kernel: Kernel, tile: Tiles) -> bool:
    """tuning.py's limits, at the largest head dim that has the same tiles."""
    dim, forward = table_dim(kernel.block), kernel.sweep == "forward"
    own, streamed = (tile.keys, tile.rows) if kernel.sweep == "grad_key_value" else (tile.rows, tile.keys)
    operands = (own * (1 if forward else 2) + tile.stages * streamed * 2) * dim * kernel.dtype.itemsize
    sums = own * dim * (2 if kernel.sweep == "grad_key_value" else 1)
    logits = tile.rows * tile.keys * (1 if forward else 2)
    return (
        min(tile.rows, tile.keys) >= _LEAST
        and tile.warps in _WARPS
        and tile.stages >= 1
        and operands <= kernel.gpu.shared
        and sums + logits <= _REGISTERS * 32 * tile.warps
    )


@functools.cache
def _key(kernel: Kernel, table: Tiles) -> str:
    """The table's tiles are part of it: a sequence of few rows has others, and so may another version of flashx."""
    dtype, general = str(kernel.dtype).removeprefix("torch."), "general" if kernel.general else "plain"
    parts = (kernel.sweep, dtype, str(table_dim(kernel.block)), general, f"from {list(table)}", kernel.gpu.name)
    return ", ".join((*parts, f"Triton {triton.__version__}"))


def _milliseconds(tile: Tiles, launch: Callable[[Tiles], None]) -> float:
    try:
        return do_bench(lambda: launch(tile), return_mode="median")
    except _FAILURES:
        return math.inf


def _stored(entries: dict[str, Any], key: str, some: list[Tiles]) -> Tiles | None:
    """What is stored, if it is one of these: a file is not trusted."""
    return next((one for one in some if list(one) == entries.get(key)), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn(f"{file} is ignored: {error}")
        return {}
    if isinstance(entries, dict):
        return entries
    _warn(f"{file} is ignored: it must hold an object, got {type(entries).__name__}")
    return {}


def _store(file: Path, key: str, tile: Tiles, some: list[Tiles]) -> Tiles:
    """The tiles that everybody will use: another process's, if it was faster to store them."""
    entries = _read(file)
    tile = _stored(entries, key, some) or tile
    entries[key] = tile
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # a reader sees all of the file or none
            whole = Path(folder) / file.name
            whole.write_text(json.dumps(entries, indent=1))
            os.replace(whole, file)
    except OSError as error:
        _warn(f"{file} cannot be written, so the next process will tune again: {error}")
    return tile


@functools.cache
def _warn(what: str) -> None:
    """Once each."""
    warnings.warn(f"FLASHX_TRITON_AUTOTUNE: {what}", stacklevel=2)
