"""csrc/cuda's kernels beyond dense calls: what they read, their tables and states, and what their launch code refuses.

Ragged and paged sequences, members of a group (a prefix's keys, shared), block masks, carried states. That they compute
attention is tested with every other backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import tolerance
import torch
from conftest import CUDA_ENGINES

import flashx
from flashx import _C

pytestmark = pytest.mark.skipif("cuda_emulated" not in CUDA_ENGINES, reason="this build has no emulator")

# csrc/cuda/sm80/config.h: tiles of the general kernels in float16, head dims up to 64 for the backward's.
ROWS = KEYS = 64
STREAM = 32
SPLIT_KEYS = 1024
MEMBER_SPLIT_KEYS = 4096
UNBOUNDED = 2**40
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

Rows = list[tuple[int, int, int, int, int, int]]  # q_begin, q_len, k_begin, k_len, shift, offset


@pytest.fixture(autouse=True)
def machine() -> Iterator[Any]:
    """The emulator's machine, its counts reset."""
    _C.cuda_emulated.reset_traffic()
    yield _C.cuda_emulated


def read(*names: str) -> int:
    """Bytes of global memory read since the last reset, from the tensors of these names."""
    return sum(count for name, count, _ in _C.cuda_emulated.traffic() if name in names)


def written(name: str) -> int:
    return sum(count for other, _, count in _C.cuda_emulated.traffic() if other == name)


def lonely(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy far from any other tensor, so that the emulator sees each access beyond it."""
    room = 2**16
    around = torch.zeros(tensor.numel() + 2 * room, dtype=tensor.dtype)
    return around[room : room + tensor.numel()].view(tensor.shape).copy_(tensor)


@dataclass
class Call:
    """One native call with tensors of its own: key is (batch entries, kv heads, rows, dim)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sequences: Rows | torch.Tensor | None = None
    q_len: int | None = None
    k_len: int | None = None
    batch: int | None = None
    packed: bool = False
    members: tuple[Any, Any] | None = None  # members, member_begin
    pages: Any = None
    mask: tuple[int, int, int, int] = (UNBOUNDED, 0, 0, 0)  # left, right, shift, first
    block_mask: flashx.BlockMask | None = None
    unified_max: float = math.nan
    sinks: torch.Tensor | None = None
    out: torch.Tensor = field(init=False)
    lse: torch.Tensor = field(init=False)
    kept: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.query, self.key, self.value = map(lonely, (self.query, self.key, self.value))
        self.out = lonely(torch.full((*self.query.shape[:3], self.value.shape[3]), 7, dtype=self.query.dtype))
        self.lse = lonely(torch.full(self.query.shape[:3], 7.0))

    def problem(self) -> Any:
        batch, heads, rows, dim = self.query.shape
        described = _C.Problem()
        described.dtype, described.q_heads, described.kv_heads = DTYPES[self.query.dtype], heads, self.key.shape[1]
        described.head_dim, described.value_dim, described.scale = dim, self.value.shape[3], dim**-0.5
        described.batch, described.packed = batch if self.batch is None else self.batch, self.packed
        keys = self.key.shape[2] if self.pages is None else self.key.shape[0] * self.key.shape[2]
        described.q_rows, described.k_rows = rows, keys
        described.q_len = rows if self.q_len is None else self.q_len
        described.k_len = keys if self.k_len is None else self.k_len
        described.unified_max = self.unified_max
        described.set_mask(*self.mask)
        if self.sequences is not None:
            described.set_sequences(self._table(self.sequences))
        if self.members is not None:
            members, begin = self.members
            described.set_members(self._table(members), self._table(begin), len(begin) - 1)
        if self.pages is not None:
            pages = torch.as_tensor(self.pages)
            described.set_pages(self._table(pages), pages.shape[1], self.key.shape[2], self.key.shape[0])
        if self.block_mask is not None:
            entries, bits = self.block_mask.map, self.block_mask.bits
            b, h, q_blocks, k_blocks = entries.shape
            strides = 0 if b == 1 else h * q_blocks * k_blocks, 0 if h == 1 else q_blocks * k_blocks
            described.set_blocks(
                entries.data_ptr(), *strides, q_blocks, k_blocks, bits.data_ptr(), len(bits), *self.block_mask.block
            )
        if self.sinks is not None:
            described.set_sinks(self.sinks.data_ptr())
        return described

    def run(self, carry: Carry | None = None, suspend: bool = False, **changes: Any) -> Call:
        """The forward; changes are attributes of the native problem."""
        described = self.problem()
        for name, value in changes.items():
            setattr(described, name, value)
        size = _C.cuda_emulated.forward_workspace(described)
        workspace = torch.full((size,), 255, dtype=torch.uint8)  # NaN
        state = None if carry is None else (*(tensor.data_ptr() for tensor in carry), suspend)
        tensors = self.view(self.query), self.view(self.key), self.view(self.value), self.view(self.out)
        _C.cuda_emulated.forward(described, *tensors, self.lse.data_ptr(), state, 0, 0, workspace.data_ptr(), False)
        return self

    def run_backward(self, adds: bool = False) -> dict[str, torch.Tensor]:
        grad_out, delta = torch.ones_like(self.out), torch.full_like(self.lse, math.nan)
        made = {
            "query": torch.zeros_like(self.query, dtype=torch.float32 if adds else None),
            "key": torch.full_like(self.key, 7),
            "value": torch.full_like(self.value, 7),
        }
        tensors = (self.view(tensor) for tensor in (self.query, self.key, self.value, self.out))
        _C.cuda_emulated.backward(
            self.problem(), *tensors, self.lse.data_ptr(), self.view(grad_out), 0, delta.data_ptr(),
            *map(self.view, made.values()), 0, adds, 0, 0, False,
        )  # fmt: skip
        return made

    def view(self, tensor: torch.Tensor) -> tuple[int, int, int, int]:
        batch, head, length, _ = tensor.stride()
        return tensor.data_ptr(), 0 if tensor.shape[0] == 1 else batch, head, length

    def _table(self, values: Any) -> int:
        table = lonely(torch.as_tensor(values, dtype=torch.int32))
        self.kept.append(table)
        return table.data_ptr()


Carry = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fresh(call: Call) -> Carry:
    """The state before any key."""
    return torch.full_like(call.lse, -math.inf), torch.zeros_like(call.lse), torch.zeros(call.out.shape)


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- Traffic


def test_window_and_sink_tokens_read_their_tiles_only() -> None:
    length, width, first = 1024, 100, 70
    query, key, value = (draw(1, 1, length, 64) for _ in range(3))
    flashx.sliding_window_attention(query, key, value, (width, 0), sink_tokens=first, backend="cuda_emulated")
    tiles = 0
    for row in range(0, length, ROWS):
        window = range(max(row - width, 0) // KEYS, ceil_div(row + ROWS, KEYS))
        tiles += len({*window, *range(ceil_div(min(first, row + ROWS), KEYS))})
    assert read("key") == tiles * KEYS * 64 * 2


@pytest.mark.parametrize("block", [(64, 64), (128, 128), (64, 256), (16, 128)], ids=str)
def test_a_block_mask_reads_its_visible_tiles_only(block: tuple[int, int]) -> None:
    """Forward and backward; with the map within 5 % of what the visible tiles hold, where blocks are whole tiles."""
    length, dim = 1024, 64
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(length // block[0], length // block[1], generator=generator) < 0.2
    dense = visible.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    tiles = dense.unflatten(0, (-1, ROWS)).unflatten(2, (-1, KEYS)).any(1).any(2)
    leaves = [draw(1, 1, length, dim).requires_grad_() for _ in range(3)]
    mask = flashx.BlockMask.from_dense(dense, block)
    out = flashx.block_sparse_attention(*leaves, mask, backend="cuda_emulated")
    once, row = length * dim * 2, dim * 2
    assert read("query") == once and read("key") == read("value") == int(tiles.sum()) * KEYS * row
    total = 2 * once + 2 * int(tiles.sum()) * KEYS * row
    if block[0] % ROWS == 0:
        assert read("query", "key", "value", "block_map", "block_bits") + written("out") < 1.05 * total

    _C.cuda_emulated.reset_traffic()
    out.backward(torch.ones_like(out))
    streamed = dense.unflatten(0, (-1, STREAM)).unflatten(2, (-1, KEYS)).any(1).any(2)
    seen = dense.unflatten(0, (-1, ROWS)).unflatten(2, (-1, STREAM)).any(1).any(2)
    assert read("query") == once + int(streamed.sum()) * STREAM * row
    assert read("key") == once + int(seen.sum()) * STREAM * row


@pytest.mark.parametrize("block", [(64, 64), (128, 128), (32, 96), (16, 16)], ids=str)
@pytest.mark.parametrize(
    "heads, maps, length", [((1, 1), 1, 256), ((4, 2), 1, 250), ((8, 1), 1, 256), ((4, 1), 4, 250)], ids=str
)
def test_partial_blocks_read_their_bits_once(
    heads: tuple[int, int], maps: int, length: int, block: tuple[int, int]
) -> None:
    """Every visible block has a bitmap, and every sweep reads an element's bit once for each tile that holds it.

    That is once for each map and key head, whose heads are rows of a tile. With all that is read and written, each
    sweep moves at most 5 % more than this: what its blocks own once (query, out, lse; key, value and gradients; in dQ's
    also grad_out and delta), of what passes by the rows of the visible tiles (key and value; query, grad_out, lse and
    delta), and the bits.
    """
    dim, (q_heads, kv_heads) = 64, heads
    generator = torch.Generator().manual_seed(0)
    grid = maps, ceil_div(length, block[0]), ceil_div(length, block[1])
    shown = torch.rand(grid, generator=generator) < 0.4
    dense = shown.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :length, :length]
    mask = flashx.BlockMask.from_dense(dense & (torch.rand(dense.shape, generator=generator) < 0.9), block)
    assert ((mask.map[0] >= 2) == shown).all()
    bits = 2 * int(dense[..., ::16].sum()) * (kv_heads if maps == 1 else 1)
    if length % block[0] == length % block[1] == block[1] % 32 == 0:
        assert bits == mask.bits.nbytes * (kv_heads if maps == 1 else 1)

    packed = dense.expand(q_heads, -1, -1).unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)

    def seen(rows: int, keys: int) -> torch.Tensor:
        """The sizes of visible tiles, (kv heads, tiles of rows, tiles of keys, 2)."""
        sizes = [
            torch.tensor([min(step, n - i) for i in range(0, n, step)])
            for n, step in zip(packed.shape[1:], (rows, keys), strict=True)
        ]
        tiles = torch.stack([part.any(1) for part in packed.split(rows, 1)], 1)
        tiles = torch.stack([part.any(2) for part in tiles.split(keys, 2)], 2)
        return tiles[..., None] * torch.stack(torch.meshgrid(*sizes, indexing="ij"), -1)

    def moved() -> int:
        return sum(count for _, *counts in _C.cuda_emulated.traffic() for count in counts)

    row, ends, rows, keys = dim * 2, 8, q_heads * length, kv_heads * length
    leaves = [draw(1, n, length, dim).requires_grad_() for n in (q_heads, kv_heads, kv_heads)]
    out = flashx.block_sparse_attention(*leaves, mask, backend="cuda_emulated")
    assert read("block_bits") == bits
    want = rows * (2 * row + 4) + int(seen(ROWS, KEYS)[..., 1].sum()) * 2 * row + bits
    assert want <= moved() <= 1.05 * want

    _C.cuda_emulated.reset_traffic()
    out.backward(torch.ones_like(out))
    assert read("block_bits") == 2 * bits
    delta = rows * (2 * row + 4)
    grad_key_value = keys * 4 * row + int(seen(STREAM, KEYS)[..., 0].sum()) * (2 * row + ends) + bits
    grad_query = rows * (3 * row + ends) + int(seen(ROWS, STREAM)[..., 1].sum()) * 2 * row + bits
    want = delta + grad_key_value + grad_query
    assert want <= moved() <= 1.05 * want


def test_hidden_block_rows_read_no_keys() -> None:
    mask = flashx.BlockMask.from_dense(torch.zeros(256, 4096, dtype=torch.bool))
    query, key = draw(1, 2, 256, 32), draw(1, 2, 4096, 32)
    out = flashx.block_sparse_attention(query, key, key, mask, backend="cuda_emulated")
    assert read("key") == 0 and (out == 0).all()


def test_ragged_sequences_read_no_padding() -> None:
    """Keys once for each row tile of their sequence, and neither rows nor keys of anybody else."""
    lengths = [(70, 100), (1, 300), (0, 50), (130, 130)]
    rows, keys, dim = sum(q for q, _ in lengths), sum(k for _, k in lengths), 32
    table: Rows = []
    for q_len, k_len in lengths:
        q_begin, k_begin = (sum(row[i] for row in table) for i in (1, 3))
        table.append((q_begin, q_len, k_begin, k_len, 1000, 0))
    call = Call(draw(1, 2, rows, dim), draw(1, 1, keys, dim), draw(1, 1, keys, dim), table, 130, 300, 4, True)
    call.run()
    assert read("query") == 2 * rows * dim * 2 and written("out") == 2 * rows * dim * 2
    assert read("key") == sum(ceil_div(2 * q, ROWS) * k for q, k in lengths) * dim * 2


def test_members_read_their_keys_once() -> None:
    """Four sequences with eight heads are one tile of 32 rows; the groups' prefixes are read once, not for each."""
    lens, dim = [200, 70], 64
    table: Rows = [(0, 1, 0, lens[b // 4], 1000, 0) for b in range(8)]
    call = Call(
        draw(8, 8, 1, dim), draw(2, 1, 200, dim), draw(2, 1, 200, dim), table,
        members=([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 8]),
    )  # fmt: skip
    call.run()
    assert read("key") == read("value") == sum(lens) * dim * 2
    assert read("query") == call.query.numel() * 2
    _C.cuda_emulated.reset_traffic()
    call.run_backward()
    assert read("key") == 2 * sum(lens) * dim * 2  # by the blocks that own them, and for dQ
    assert written("grad_key") == sum(lens) * dim * 2


def test_pages_are_read_once_and_no_others() -> None:
    lens, size, dim = [300, 1, 0, 64], 16, 32
    table = torch.full((4, 20), -5)
    used = torch.randperm(40)[: sum(ceil_div(n, size) for n in lens)]
    pages = iter(used.tolist())
    for b, n in enumerate(lens):
        table[b, : ceil_div(n, size)] = torch.tensor([next(pages) for _ in range(ceil_div(n, size))])
    key, value = draw(40, 2, size, dim), draw(40, 2, size, dim)
    unused = torch.ones(40, dtype=torch.bool)
    unused[used] = False
    key[unused], value[unused] = math.nan, math.nan
    call = Call(draw(4, 8, 1, dim), key, value, [(0, 1, 0, n, n - 1, 0) for n in lens], k_len=300, pages=table)
    call.run()
    assert read("key") == 2 * sum(lens) * dim * 2 and not call.out.isnan().any()


# ---- Tables


WILD = [-(2**31), -1, 0, 1, 7, 100, 2**15, 2**30, 2**31 - 1]


def wild(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Huge, negative and plausible numbers."""
    return torch.tensor(WILD)[torch.randint(len(WILD), shape, generator=generator)]


@pytest.mark.parametrize("seed", range(6))
def test_malformed_tables_stay_in_bounds(seed: int) -> None:
    """The emulator faults at the first access beyond a tensor; results mean nothing."""
    g = torch.Generator().manual_seed(seed)
    batch, q_len, k_len, dim = 5, 6, 90, 16
    blocks = flashx.BlockMask.from_dense(torch.rand(batch, 4, q_len, k_len, generator=g) > 0.3, 16)
    blocks.map.copy_(
        torch.where(torch.rand(blocks.map.shape, generator=g) < 0.5, wild(g, *blocks.map.shape), blocks.map)
    )
    mask = blocks if seed % 2 else None
    window = (20, 3, 0, 5) if seed % 3 else (UNBOUNDED, UNBOUNDED, 0, 0)
    for splits in (False, True):
        longest = 2 * SPLIT_KEYS + 5 if splits else k_len
        packed = Call(
            draw(1, 4, 20, dim), draw(1, 2, longest, dim), draw(1, 2, longest, dim), wild(g, batch, 6), q_len,
            longest, batch, True, mask=window, block_mask=mask,
        )  # fmt: skip
        packed.run()
        members = (wild(g, batch), wild(g, 4))
        longest = MEMBER_SPLIT_KEYS + 5 if splits else k_len
        shared = Call(
            draw(batch, 4, q_len, dim), draw(3, 2, longest, dim), draw(3, 2, longest, dim), wild(g, batch, 6),
            members=members, mask=window, block_mask=mask,
        )  # fmt: skip
        shared.run()
        shared.run(fresh(shared), True)
        paged = Call(
            draw(batch, 4, q_len, dim), draw(7, 2, 24, dim), draw(7, 2, 24, dim), wild(g, batch, 6),
            pages=wild(g, batch, 3), k_len=longest, mask=window, block_mask=mask,
        )  # fmt: skip
        paged.run(k_rows=longest)
        if not splits:
            packed.run_backward()
            shared.run_backward(adds=True)


def test_rows_of_nobody_are_left_alone() -> None:
    """Of packed tensors the gaps, of members the others; and the keys of groups without members."""
    table: Rows = [(2, 3, 5, 20, 17, 0), (9, 1, 30, 40, 39, 0)]
    call = Call(draw(1, 2, 12, 16), draw(1, 2, 80, 16), draw(1, 2, 80, 16), table, 3, 40, 2, True).run()
    gaps = [0, 1, 5, 6, 7, 8, 10, 11]
    assert (call.out[:, :, gaps] == 7).all() and (call.lse[:, :, gaps] == 7).all()
    assert not (call.lse[:, :, [2, 3, 4, 9]] == 7).any()
    grads = call.run_backward()
    assert (grads["key"][:, :, [*range(5), *range(25, 30), *range(70, 80)]] == 7).all()

    for keys in (40, MEMBER_SPLIT_KEYS + 10):
        rows: Rows = [(0, 2, 0, keys, keys, 0)] * 5
        shared = Call(
            draw(5, 2, 2, 16), draw(3, 1, keys, 16), draw(3, 1, keys, 16), rows, members=([3, 0, 1, 2, 4], [1, 3, 3, 4])
        ).run()
        assert (shared.out[[3, 4]] == 7).all() and (shared.lse[[3, 4]] == 7).all()
        assert not (shared.lse[:3] == 7).any()
    assert (shared.run_backward()["key"][1] == 7).all()


# ---- Results that depend on nothing else


def test_neighbours_and_room_change_no_bits() -> None:
    """A sequence alone, among others, in a longer cache; cut into parts or just short of it."""
    lens = [1500, 1024, 3, 1025, 700]
    query, key, value = draw(5, 4, 1, 32), draw(5, 2, 3000, 32), draw(5, 2, 3000, 32)
    table: Rows = [(0, 1, 0, n, n - 1, 0) for n in lens]
    together = Call(query, key, value, table).run()
    for b, n in enumerate(lens):
        for room in {n, 1024, 1025, 2048} - set(range(n)):
            alone = Call(query[b : b + 1], key[b : b + 1], value[b : b + 1], [table[b]], k_len=room).run()
            tolerance.same_bits(f"{b} of {room}", alone.out, together.out[b : b + 1])
            tolerance.same_bits(f"lse {b} of {room}", alone.lse, together.lse[b : b + 1])


def test_pages_change_no_bits() -> None:
    lens, size = [200, 64, 1300], 16
    query, key, value = draw(3, 4, 1, 32), draw(3, 2, 1312, 32), draw(3, 2, 1312, 32)
    table: Rows = [(0, 1, 0, n, n - 1, 0) for n in lens]
    whole = Call(query, key, value, table, k_len=1300).run()
    order = torch.randperm(3 * 82)

    def paged(tensor: torch.Tensor) -> torch.Tensor:
        pages = tensor.unflatten(2, (82, size)).transpose(1, 2).flatten(0, 1)
        return pages[order.argsort()].contiguous()

    pages = order.view(3, 82)
    call = Call(query, paged(key), paged(value), table, k_len=1300, pages=pages).run()
    tolerance.same_bits("out", call.out, whole.out)
    tolerance.same_bits("lse", call.lse, whole.lse)


# ---- Carried states


def levels(first: int, second: int, q_len: int, **options: Any) -> tuple[Call, Call, Call]:
    """A call over all keys, and the same in two."""
    whole = Call(
        draw(2, 4, q_len, 16, dtype=torch.float32), draw(2, 2, first + second, 16, dtype=torch.float32),
        draw(2, 2, first + second, 24, dtype=torch.float32),
    )  # fmt: skip
    shift = first + second - q_len
    whole.mask = (UNBOUNDED, 0, shift, 0)
    parts = []
    for begin, end in ((0, first), (first, first + second)):
        rows: Rows = [(0, q_len, 0, end - begin, shift - begin, begin)] * 2
        key, value = (tensor[:, :, begin:end].contiguous() for tensor in (whole.key, whole.value))
        parts.append(Call(whole.query, key, value, rows))
    whole.sinks = parts[1].sinks = torch.randn(4)
    return whole, parts[0], parts[1]


@pytest.mark.parametrize("first, second, q_len", [(90, 70, 20), (5, 200, 70), (1030, 40, 3), (40, 2100, 1)])
def test_a_carried_state_goes_on_where_it_was_left(first: int, second: int, q_len: int) -> None:
    whole, begun, ended = levels(first, second, q_len)
    whole.run()
    state = fresh(begun)
    begun.run(state, suspend=True)
    assert (begun.out == 7).all() and (begun.lse == 7).all()
    ended.run(state)
    torch.testing.assert_close(ended.out, whole.out)
    torch.testing.assert_close(ended.lse, whole.lse)


@pytest.mark.parametrize("first, q_len", [(90, 20), (1030, 3)])
def test_nan_and_inf_go_on_in_a_carried_state(first: int, q_len: int) -> None:
    """Where a row sees them, and nowhere else: keys of the first part, of the second, of both."""
    whole, begun, ended = levels(first, 40, q_len)
    poisons = ((2, 0, math.nan), (3, 1, math.inf), (first + 1, 1, -math.inf), (first + 39, 2, math.inf))
    for key, column, poison in poisons:
        part, at = (begun, key) if key < first else (ended, key - first)
        whole.value[:, 1, key, column] = part.value[:, 1, at, column] = poison
    whole.run()
    state = fresh(begun)
    begun.run(state, suspend=True)
    ended.run(state)
    assert whole.out.isnan().any() and whole.out.isinf().any() and whole.out.isfinite().any()
    torch.testing.assert_close(ended.out, whole.out, equal_nan=True)


def test_gradients_are_added_once() -> None:
    """In float32, to what is there."""
    whole, begun, ended = levels(30, 50, 20)
    whole.sinks = ended.sinks = None
    whole.run()
    want = whole.run_backward()
    for part in (begun, ended):
        part.out, part.lse = whole.out, whole.lse
    found = begun.run_backward(adds=True)["query"] + ended.run_backward(adds=True)["query"]
    torch.testing.assert_close(found, want["query"])


def test_passes_for_nan_add_no_gradient_twice() -> None:
    """A key that the last row alone sees changes no other row's gradient."""
    call = Call(*(draw(1, 2, 40, 16) for _ in range(3)))
    call.run()
    want = call.run_backward(adds=True)["query"]
    call.key[:, 1, 39, 3] = math.nan
    found = call.run_backward(adds=True)["query"]
    tolerance.same_bits("query", found[:, :, :39], want[:, :, :39])
    assert found[:, 1, 39].isnan().any()


# ---- One maximum for all rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [130, 2100])
def test_unified_max_where_it_fits(dtype: torch.dtype, keys: int) -> None:
    """Every key is read once, and the weights are as exact as with a running maximum."""
    call = Call(draw(1, 8, 1, 32, dtype=dtype), draw(1, 2, keys, 32, dtype=dtype), draw(1, 2, keys, 32, dtype=dtype))
    call.mask = (UNBOUNDED, UNBOUNDED, 0, 0)
    want = call.run().out.clone(), call.lse.clone()
    bytes_read = read("key")
    for unified in (0.0, 2.5):
        _C.cuda_emulated.reset_traffic()
        call.unified_max = unified
        call.run()
        assert read("key") == bytes_read
        ulps = 16 if dtype == torch.float32 else 2
        torch.testing.assert_close(
            call.out, want[0], rtol=0, atol=ulps * torch.finfo(dtype).eps * float(want[0].abs().max())
        )
        torch.testing.assert_close(call.lse, want[1])


@pytest.mark.parametrize("unified", [30.0, -30.0, 1e30, -1e30, math.inf, -math.inf])
def test_unified_max_where_it_does_not_fit(unified: float) -> None:
    """The block sweeps again, and gives the bits of a running maximum."""
    call = Call(draw(2, 8, 1, 32), draw(2, 2, 130, 32), draw(2, 2, 130, 32))
    call.sequences = [(0, 1, 0, 130, 129, 0), (0, 1, 0, 0, -1, 0)]
    want = call.run().out.clone(), call.lse.clone()
    bytes_read = read("key")
    _C.cuda_emulated.reset_traffic()
    call.unified_max = unified
    call.run()
    assert read("key") == 2 * bytes_read
    tolerance.same_bits("out", call.out, want[0])
    tolerance.same_bits("lse", call.lse, want[1])
    assert (call.out[1] == 0).all() and (call.lse[1] == -math.inf).all()


# ---- What the launch code refuses


def dense() -> Call:
    return Call(draw(2, 2, 8, 16), draw(2, 2, 8, 16), draw(2, 2, 8, 16))


def ragged() -> Call:
    return Call(*(draw(1, 2, 8, 16) for _ in range(3)), [(0, 4, 0, 4, 0, 0), (4, 4, 4, 4, 0, 0)], 4, 4, 2, True)


def grouped() -> Call:
    table: Rows = [(0, 8, 0, 8, 0, 0)] * 2
    return Call(draw(2, 2, 8, 16), draw(1, 2, 8, 16), draw(1, 2, 8, 16), table, members=([0, 1], [0, 2]))


def paged() -> Call:
    table: Rows = [(0, 8, 0, 8, 0, 0)] * 2
    return Call(draw(2, 2, 8, 16), draw(3, 2, 16, 16), draw(3, 2, 16, 16), table, k_len=16, pages=[[0], [2]])


def masked() -> Call:
    call = dense()
    call.block_mask = flashx.BlockMask.causal(8, 8)
    return call


CALLS = [dense, ragged, grouped, paged, masked]


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_calls_that_the_launch_takes(make: Callable[[], Call]) -> None:
    make().run()
    assert read("query") > 0


def without(attribute: str) -> Callable[[Any], None]:
    return lambda described: getattr(described, attribute)(0)


def pages(*sizes: int) -> Callable[[Any], None]:
    return lambda described: described.set_pages(64, *sizes)


def blocks(*sizes: int) -> Callable[[Any], None]:
    """batch, head, q_blocks, k_blocks; bitmaps, q_block, k_block; the bits are nowhere."""
    return lambda described: described.set_blocks(64, *sizes[:4], 0, *sizes[4:])


@pytest.mark.parametrize(
    "make, change, rule",
    [
        (dense, lambda p: setattr(p, "q_rows", 9), "tensors as long as"),
        (dense, lambda p: setattr(p, "k_rows", 7), "tensors as long as"),
        (dense, lambda p: setattr(p, "packed", True), "packed rows with a table"),
        (ragged, lambda p: setattr(p, "q_len", 9), "tensors as long as"),
        (ragged, lambda p: setattr(p, "k_len", 9), "tensors as long as"),
        (ragged, lambda p: setattr(p, "q_rows", 2**40), r"fewer than 2\*\*31 rows"),
        (ragged, without("set_sequences"), "tensors as long as"),
        (ragged, lambda p: p.set_bias(64, 1, [0, 0, 0, 0], [1, 1, 1, 1]), "a bias with dense batches"),
        (grouped, lambda p: p.set_members(64, 0, 1), "members in groups"),
        (grouped, lambda p: p.set_members(64, 64, 0), "members in groups"),
        (grouped, lambda p: p.set_members(64, 64, 2**31), r"fewer than 2\*\*31 rows"),
        (grouped, lambda p: setattr(p, "packed", True), "members in groups"),
        (grouped, without("set_sequences"), "members in groups"),
        (grouped, pages(1, 16, 1), "members in groups"),
        (grouped, lambda p: setattr(p, "batch", 2**29), r"fewer than 2\*\*31 rows"),
        (paged, pages(2**31, 16, 3), "page tables"),
        (paged, pages(1, 2**31, 3), "page tables"),
        (paged, pages(1, 16, 2**31), "page tables"),
        (masked, blocks(0, 0, 1, 1, 0, 24, 64), "blocks of 16 to 256"),
        (masked, blocks(0, 0, 1, 1, 0, 64, 512), "blocks of 16 to 256"),
        (masked, blocks(0, 0, 1, 1, 1, 64, 64), "the bitmaps that they name"),
        (masked, blocks(0, 0, 1, 1, -1, 64, 64), "the bitmaps that they name"),
        (masked, blocks(0, 0, -1, 1, 0, 64, 64), "the bitmaps that they name"),
        (masked, blocks(-1, 0, 1, 1, 0, 64, 64), "the bitmaps that they name"),
    ],
)  # fmt: skip
def test_what_the_launch_refuses(make: Callable[[], Call], change: Callable[[Any], None], rule: str) -> None:
    call = make()
    described = call.problem()
    change(described)
    views = call.view(call.query), call.view(call.key), call.view(call.value), call.view(call.out)
    with pytest.raises(ValueError, match=rule):
        _C.cuda_emulated.forward(described, *views, call.lse.data_ptr(), None, 0, 0, 0, False)
    assert _C.cuda_emulated.traffic() == []


def test_states_and_gradients_that_the_launch_refuses() -> None:
    call = dense()
    views = call.view(call.query), call.view(call.key), call.view(call.value), call.view(call.out)
    for state in ((0, 0, 0, True), (64, 64, 0, False), (64, 0, 64, True)):
        with pytest.raises(ValueError, match="a carried state with"):
            _C.cuda_emulated.forward(call.problem(), *views, call.lse.data_ptr(), state, 0, 0, 0, False)
    with pytest.raises(ValueError, match="pages in the forward only"):
        paged().run_backward()
    assert _C.cuda_emulated.traffic() == []
