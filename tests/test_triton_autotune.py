"""Tiles by measurement, without a GPU: a launcher and a timer that only say what they were asked for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashx import env

triton = pytest.importorskip("triton")

import triton_compiled  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from flashx.problem import Carry, Gradients  # noqa: E402
from flashx.triton_impl import autotune, launch, tuning  # noqa: E402
from flashx.triton_impl.autotune import Gpu, Kernel  # noqa: E402
from flashx.triton_impl.tuning import Sweeps, Tiles  # noqa: E402

H200 = Gpu("NVIDIA H200 (9.0)", 227 * 1024)
SMALL = Gpu("NVIDIA GeForce RTX 5090 (12.0)", 99 * 1024)
TABLE = Tiles(128, 64, 8, 3)
KERNEL = Kernel("forward", torch.float16, 64, False, H200)
FASTER = Tiles(64, 64, 4, 3)


class Machine:
    """A GPU on which a tile takes `milliseconds`, and some do not run."""

    def __init__(self) -> None:
        self.launched: list[Tiles] = []
        self.timed: list[Tiles] = []
        self.fails: Callable[[Tiles], bool] = lambda tile: False
        self.error: Exception = OutOfResources(300000, 232448, "shared memory")
        self.milliseconds: Callable[[Tiles], float] = lambda tile: 0.5 if tile == FASTER else 1.0

    def launch(self, tile: Tiles) -> None:
        self.launched.append(tile)
        if self.fails(tile):
            raise self.error

    def do_bench(self, run: Callable[[], None], return_mode: str) -> float:
        run()
        self.timed.append(self.launched[-1])
        return self.milliseconds(self.timed[-1])

    def start(self, kernel: Kernel = KERNEL, table: Tiles = TABLE) -> Tiles:
        """What a call has run at last."""
        autotune.start(kernel, table, self.launch)
        return self.launched[-1]


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_chosen", {})
    autotune._warn.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine()
    new_process(monkeypatch)
    monkeypatch.setenv("FLASHX_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "do_bench", machine.do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield machine
    autotune._warn.cache_clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "flashx" / "triton_tiles.json"


def test_candidates_of_one_kernel() -> None:
    near = [
        (128, 64, 8, 3),
        (256, 64, 8, 3), (64, 64, 8, 3), (128, 128, 8, 3), (128, 32, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3),
        (128, 64, 8, 4), (128, 64, 8, 2),
    ]  # fmt: skip
    assert autotune.candidates(KERNEL, TABLE) == near
    # 128 queries are 16 KiB, 128 keys and values 32 for each of 3 stages: more than 99.
    some = [one for one in near if one != (128, 128, 8, 3)]
    assert autotune.candidates(KERNEL._replace(gpu=SMALL), TABLE) == some
    # 128 rows of 256 sums and 32 logits are 288 registers of 128 threads.
    some = autotune.candidates(KERNEL._replace(block=256), Tiles(64, 32, 4, 2))
    assert (128, 32, 8, 2) in some and (128, 32, 4, 2) not in some


@pytest.mark.parametrize(
    "gpu, major", [(H200, 9), (SMALL, 12), (Gpu("A100", 163 * 1024), 8), (Gpu("B200", 227 * 1024), 10)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("general", [False, True])
def test_candidates_are_legal(gpu: Gpu, major: int, dtype: torch.dtype, general: bool) -> None:
    for block in (16, 64, 128, 256):
        tables = tuning.tiles((major, 0), dtype.itemsize, block, general)
        rows = [(sweep, table) for sweep, table in zip(Sweeps._fields, tables, strict=True)]
        rows += [("forward", tuning.few_rows(tables.forward, few)) for few in (1, 20, 64)]
        for sweep, table in rows:
            some = autotune.candidates(Kernel(sweep, dtype, block, general, gpu), table)
            assert some[0] == table
            assert 1 <= len(some) == len(set(some)) <= 9
            for tile in some:
                assert all(type(number) is int for number in tile)
                assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:2])
                assert tuning.SPLIT_KEYS % tile.keys == 0
                assert tile.warps in (4, 8) and tile.stages >= 1
                # The streamed tiles of every stage but the one in use.
                streamed = tile.rows if sweep == "grad_key_value" else tile.keys
                assert (tile.stages - 1) * streamed * 2 * tuning.table_dim(block) * dtype.itemsize <= gpu.shared


def test_the_fastest_wins(machine: Machine) -> None:
    assert machine.start() == FASTER
    assert machine.timed == autotune.candidates(KERNEL, TABLE)
    assert machine.launched[len(machine.timed) :] == [FASTER]
    assert machine.start() == FASTER
    assert len(machine.launched) == len(machine.timed) + 2


def test_the_table_stays_where_nothing_is_faster(machine: Machine) -> None:
    machine.milliseconds = lambda tile: 1.0
    assert machine.start() == TABLE


@pytest.mark.parametrize(
    "error",
    [OutOfResources(1, 0, "threads"), triton.CompilationError("", None, "no"), RuntimeError("PassManager::run failed")],
    ids=["resources", "compiler", "passes"],
)
def test_failures_are_skipped(error: Exception, machine: Machine) -> None:
    machine.error = error
    machine.fails = lambda tile: tile == FASTER or tile.stages == 4
    machine.milliseconds = lambda tile: 0.7 if tile.keys == 32 else 1.0
    assert machine.start() == Tiles(128, 32, 8, 3)


def test_where_nothing_runs_the_error_is_the_tables(machine: Machine, file: Path) -> None:
    machine.fails = lambda tile: True
    with pytest.raises(OutOfResources):
        machine.start()
    assert machine.launched == [*autotune.candidates(KERNEL, TABLE), TABLE]
    assert not file.exists()
    # Nothing is tried again by the next call.
    machine.fails, before = lambda tile: False, len(machine.launched)
    assert machine.start() == TABLE
    assert len(machine.launched) == before + 1


def test_a_variant_that_does_not_fit_the_choice_runs_on_the_table(machine: Machine) -> None:
    assert machine.start() == FASTER
    machine.fails = lambda tile: tile == FASTER
    assert machine.start() == TABLE
    machine.fails = lambda tile: True
    with pytest.raises(OutOfResources):
        machine.start()


def test_later_processes_read_the_choice(machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.start() == FASTER
    other, table = KERNEL._replace(sweep="grad_query"), Tiles(64, 32, 4, 2)
    assert machine.start(other, table) == table
    assert sorted(json.loads(file.read_text()).values()) == [[*table], [*FASTER]]
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    new_process(monkeypatch)
    machine.timed.clear()
    assert machine.start() == FASTER
    assert machine.start(other, table) == table
    assert machine.timed == []


def test_the_first_process_to_store_decides(machine: Machine, file: Path) -> None:
    theirs = Tiles(128, 64, 8, 2)

    def store_theirs(tile: Tiles) -> float:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({autotune._key(KERNEL, TABLE): theirs, "another": [1]}))
        return 0.5 if tile == FASTER else 1.0

    machine.milliseconds = store_theirs
    assert machine.start() == theirs
    assert json.loads(file.read_text()) == {autotune._key(KERNEL, TABLE): [*theirs], "another": [1]}


@pytest.mark.parametrize("content", [b"", b'{"forward', b"[1]", b"\xff", b"[" * 100000], ids=range(5))
def test_a_malformed_file_is_rewritten(content: bytes, machine: Machine, file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="triton_tiles.json is ignored: ") as caught:
        assert machine.start() == FASTER
    assert len(caught) == 1
    assert list(json.loads(file.read_text()).values()) == [[*FASTER]]


@pytest.mark.parametrize("entry", [[7, 64, 8, 3], [512, 512, 8, 9], [64, 64, 4], "64", None, {}])
def test_a_stored_tile_that_is_no_candidate_is_replaced(entry: Any, machine: Machine, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({autotune._key(KERNEL, TABLE): entry}))
    assert machine.start() == FASTER
    assert list(json.loads(file.read_text()).values()) == [[*FASTER]]


def test_a_folder_that_cannot_be_written(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    with pytest.warns(UserWarning, match="cannot be written, so the next process will tune again") as caught:
        assert machine.start() == FASTER
    assert len(caught) == 1
    timed = len(machine.timed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.start() == FASTER
    assert len(machine.timed) == timed


def test_a_captured_call_is_not_timed(machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert machine.start() == TABLE
    assert machine.timed == []
    assert not file.exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert machine.start() == FASTER


def test_what_has_tiles_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        (KERNEL._replace(sweep="grad_query"), TABLE),
        (KERNEL._replace(dtype=torch.bfloat16), TABLE),
        (KERNEL._replace(block=128), TABLE),
        (KERNEL._replace(general=True), TABLE),
        (KERNEL._replace(gpu=H200._replace(name="NVIDIA H100 (9.0)")), TABLE),
        (KERNEL._replace(gpu=H200._replace(name="NVIDIA H200 (10.0)")), TABLE),
        (KERNEL, tuning.few_rows(TABLE, 1)),
    ]
    keys = {autotune._key(*one) for one in [(KERNEL, TABLE), *others]}
    assert len(keys) == len(others) + 1
    assert autotune._key(KERNEL._replace(block=16), TABLE) in keys  # the table's
    autotune._key.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.14.15")
    assert autotune._key(KERNEL, TABLE) not in keys
    autotune._key.cache_clear()


def test_the_gpus_name_and_room(monkeypatch: pytest.MonkeyPatch) -> None:
    class Utils:
        def get_device_properties(self, index: int) -> dict[str, int]:
            return {"max_shared_mem": 1000 + index}

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(autotune.driver, "_active", type("Driver", (), {"utils": Utils()})())
    autotune.gpu.cache_clear()
    assert autotune.gpu(torch.device("cuda", 1)) == Gpu("NVIDIA H200 (9.1)", 1001)
    autotune.gpu.cache_clear()


def kernels_of_a_call(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, state: bool = False, q_len: int = 500
) -> list[tuple[str, Tiles]]:
    """The kernels that a forward and a backward start on a GPU, tuning apart."""
    started: list[tuple[str, Tiles]] = []

    def run(kernel: Any, grid: tuple[int, int], tile: Tiles, *arguments: Any) -> None:
        started.append((kernel.__name__, tile))
        machine.launch(tile)

    def do_bench(run_one: Callable[[], None], return_mode: str) -> float:
        before = len(started)
        milliseconds = machine.do_bench(run_one, return_mode)
        del started[before:]
        return milliseconds

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(autotune, "do_bench", do_bench)
    monkeypatch.setattr(autotune, "gpu", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    problem = triton_compiled.problem(64, torch.float16, bias=torch.float16, q_len=q_len)
    with FakeTensorMode(), torch.device("cuda"):
        inputs = triton_compiled.tensors(problem)
        out, lse = torch.empty_like(inputs.query), torch.empty(inputs.query.shape[:3])
        launch.forward(problem, inputs, out, lse, Carry(lse, lse, out, True) if state else None, False)
        gradients = Gradients(out, inputs.key, inputs.value, inputs.bias, None, state)
        launch.backward(problem, inputs, out, lse, out, None, lse, gradients, False)
    return started


NAMES = ["forward_kernel", "delta_kernel", "grad_key_value_kernel", "grad_query_kernel", "grad_bias_kernel"]


def of_the_table() -> list[tuple[str, Tiles]]:
    table = tuning.tiles((9, 0), 2, 64, True)
    tiles = [table.forward, table.grad_query, table.grad_key_value, table.grad_query, table.grad_bias]
    return list(zip(NAMES, tiles, strict=True))


@pytest.mark.parametrize("flag", [None, "0", ""])
def test_without_the_flag_the_table(
    flag: str | None, machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flag is None:
        monkeypatch.delenv("FLASHX_TRITON_AUTOTUNE")
    else:
        monkeypatch.setenv("FLASHX_TRITON_AUTOTUNE", flag)
    monkeypatch.setattr(autotune, "start", None)
    assert kernels_of_a_call(machine, monkeypatch) == of_the_table()
    assert not file.parent.exists()


def test_every_sweep_is_tuned(machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.milliseconds = lambda tile: 1 / tile.stages
    wanted = [
        (name, tile if name == "delta_kernel" else tile._replace(stages=tile.stages + 1))
        for name, tile in of_the_table()
    ]
    assert kernels_of_a_call(machine, monkeypatch) == wanted
    assert len(json.loads(file.read_text())) == 4
    machine.timed.clear()
    assert kernels_of_a_call(machine, monkeypatch) == wanted
    assert machine.timed == []


def test_what_reads_what_it_writes_takes_the_table(
    machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that is carried on, and a query's gradient that is added to: before and after others were tuned."""
    machine.milliseconds = lambda tile: 1 / tile.stages
    table = dict(of_the_table())
    for tuned in (["grad_bias", "grad_key_value"], ["forward", "grad_bias", "grad_key_value", "grad_query"]):
        started = dict(kernels_of_a_call(machine, monkeypatch, state=True))
        assert sorted(key.split(",")[0] for key in json.loads(file.read_text())) == tuned
        for name in ("forward_kernel", "grad_query_kernel"):
            assert started[name] == table[name]
        kernels_of_a_call(machine, monkeypatch)


def test_a_call_without_rows_is_not_timed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_of_a_call(machine, monkeypatch, q_len=0)
    assert machine.timed == []


@pytest.mark.parametrize(
    "given, folder",
    [("/some/where", "/some/where/flashx"), ("", "/home/me/.cache/flashx"), ("relative", "/home/me/.cache/flashx")],
)
def test_the_cache_folder(given: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/home/me")
    assert env.cache_folder() == folder
