"""flashx.BlockMask: every way to make one is the dense mask it stands for, and bad input is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from flashx import block_bits
from flashx.block_mask import BlockMask

SIZES = (16, 32, 48, 64, 80, 256)
# Queries, keys, block: tile edges, ragged edges, more queries than keys, one row, nothing.
GRIDS = [
    (64, 64, (16, 16)),
    (100, 230, (16, 48)),
    (230, 100, (48, 16)),
    (97, 97, (32, 32)),
    (1, 75, (16, 32)),
    (90, 3, (80, 16)),
    (130, 300, (64, 256)),
    (0, 5, (16, 16)),
    (5, 0, (16, 16)),
]
grids = pytest.mark.parametrize("q_len, k_len, block", GRIDS, ids=str)
trials = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(params=["trimmed", "untrimmed", "trimmed tiles", "untrimmed tiles"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How masks are put together: as on the CPU, as on a GPU, and in many pieces."""
    if "untrimmed" in request.param:
        monkeypatch.setattr(block_bits, "_on_host", lambda device: False)
    if "tiles" in request.param:
        monkeypatch.setattr(block_bits, "_CPU_TILE", 3000)
        monkeypatch.setattr(block_bits, "_GPU_TILE", 3000)


def check(mask: BlockMask, dense: torch.Tensor) -> None:
    """The mask is dense (B, H, q_len, k_len), its map says of every block what it is, and bits beyond bk are 0."""
    assert mask.shape == tuple(dense.shape)
    assert torch.equal(mask.to_dense(), dense)
    (bq, bk), (q_len, k_len) = mask.block, dense.shape[2:]
    assert tuple(mask.map.shape[2:]) == (-(-q_len // bq), -(-k_len // bk))
    assert mask.map.is_contiguous() and mask.bits.is_contiguous()
    assert mask.map.dtype == mask.bits.dtype == torch.int32
    for i, j in itertools.product(*map(range, mask.map.shape[2:])):
        part = dense[:, :, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk].flatten(2)
        kind = torch.where(part.all(2), 1, torch.where(part.any(2), 2, 0))
        assert torch.equal(mask.map[:, :, i, j].clamp(max=2), kind.int())
    if bk % 32:
        assert not (mask.bits[..., -1] >> 16).any()
    partial = mask.map[mask.map >= 2]
    assert bool((partial < 2 + len(mask.bits)).all())
    if dense.numel():
        assert mask.density == pytest.approx(dense.double().mean().item(), abs=1e-12)
        assert mask.block_density == pytest.approx((mask.map != 0).double().mean().item(), abs=1e-12)
    # The layout itself, read without the package: bit c % 32 of word c // 32.
    for b, h, i, j in itertools.islice((mask.map >= 2).nonzero().tolist(), 3):
        words = mask.bits[mask.map[b, h, i, j] - 2]
        for r, c in itertools.product(range(0, min(bq, q_len - i * bq), 7), range(0, min(bk, k_len - j * bk), 5)):
            assert bool((words[r, c // 32].item() >> (c % 32)) & 1) == bool(dense[b, h, i * bq + r, j * bk + c])


@st.composite
def masks(draw: st.DrawFn, block: tuple[int, int] | None = None, lengths: tuple[int, int] | None = None) -> Any:
    """A dense mask with hidden, full and partial blocks, in some memory layout, and a block size."""
    block = block or (draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)))
    q_len, k_len = lengths or (draw(st.integers(0, 150)), draw(st.integers(0, 150)))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns = -(-q_len // block[0]), -(-k_len // block[1])
    kinds = torch.randint(3, (batch, heads, rows, columns), generator=generator)
    kinds = kinds.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :q_len, :k_len]
    rate = draw(st.sampled_from([0.01, 0.5, 0.99]))
    dense = torch.where(kinds == 2, torch.rand(kinds.shape, generator=generator) < rate, kinds == 1)
    layout = draw(st.sampled_from(["plain", "transposed", "offset", "heads last"]))
    if layout == "transposed":
        dense = dense.mT.contiguous().mT
    elif layout == "offset":
        dense = torch.nn.functional.pad(dense, (3, 2, 1, 1))[:, :, 1 : q_len + 1, 3 : k_len + 3]
    elif layout == "heads last":
        dense = dense.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return dense, block


@trials
@given(masks())
def test_dense_round_trip(drawn: Any) -> None:
    dense, block = drawn
    mask = BlockMask.from_dense(dense, block)
    check(mask, dense)
    check(mask.transpose(), dense.mT)
    assert mask.equal(BlockMask.from_dense(dense.clone(), block))
    # Trimmed: only partial blocks are stored.
    assert len(mask.bits) == int((mask.map >= 2).sum())


@trials
@given(st.data())
def test_set_algebra(data: st.DataObject) -> None:
    a, block = data.draw(masks())
    b, _ = data.draw(masks(block, tuple(a.shape[2:])))
    # Dimensions broadcast, so where they differ one of them becomes 1.
    for dim in (0, 1):
        if a.shape[dim] != b.shape[dim]:
            a = a.narrow(dim, 0, 1)
    left, right = BlockMask.from_dense(a, block), BlockMask.from_dense(b, block)
    check(left & right, a & b)
    check(left | right, a | b)
    assert (left | right).equal(right | left)
    assert (left & left).equal(left) and (left & (left | right)).equal(left & (left | right) & (left | right))
    assert left.equal(right) == (a.shape == b.shape and torch.equal(a, b))


def test_what_is_made_as_on_a_gpu_is_the_same(storage: None) -> None:
    """Bits of all blocks, a tile at a time: same elements, whatever the way they are put together."""
    dense = torch.rand(2, 3, 100, 150) < 0.5
    dense[:, :, 32:64], dense[0, :, :, 48:96] = True, False
    mask = BlockMask.from_dense(dense, (32, 48))
    check(mask, dense)
    check(mask.transpose(), dense.mT)
    causal = BlockMask.causal(100, 150, block=(32, 48))
    check(mask & causal, dense & causal.to_dense())
    check(mask | causal, dense | causal.to_dense())
    flex = flex_attention.create_block_mask(lambda b, h, q, k: q + b >= k, 2, 1, 100, 150, "cpu", (32, 48))
    by_flex, by_mod = BlockMask.from_flex(flex), BlockMask.from_mask_mod(flex.mask_mod, 2, 1, 100, 150, (32, 48))
    assert by_flex.equal(by_mod)
    check(by_flex, torch.ones(100, 150, dtype=torch.bool).tril()[None, None] | by_flex.to_dense())
    check(by_mod, flex_attention.create_mask(flex.mask_mod, 2, 1, 100, 150, "cpu"))


def test_no_wait_where_values_are_far() -> None:
    """Meta tensors have no values, so whatever would have to wait for a GPU fails on them."""
    dense = torch.ones(2, 3, 100, 200, dtype=torch.bool, device="meta")
    mask = BlockMask.from_dense(dense, (32, 32))
    causal = BlockMask.causal(100, 200, block=32, device="meta")
    by_mod = BlockMask.from_mask_mod(lambda b, h, q, k: q >= k, 2, 3, 100, 200, block=32, device="meta")
    flex = flex_attention.create_block_mask(lambda b, h, q, k: q >= k, 2, 3, 100, 200, "cpu", 32).to("meta")
    for made in (mask, by_mod, BlockMask.from_flex(flex), mask & causal, causal | mask, mask.transpose().transpose()):
        assert made.shape == (2, 3, 100, 200) and made.device.type == "meta"
        assert made.to_dense().shape == dense.shape
    with pytest.raises(RuntimeError, match="meta"):
        _ = mask.density


def test_above_the_limit_only_partial_blocks_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_bits, "_on_host", lambda device: False)
    dense = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    assert len(BlockMask.from_dense(dense, 32).bits) == 16
    monkeypatch.setattr(block_bits, "_UNTRIMMED_BYTES", 16 * 32 * 4 - 1)
    assert len(BlockMask.from_dense(dense, 32).bits) == 4
    check(BlockMask.from_dense(dense, 32), dense)


@pytest.mark.parametrize(
    "dims, expected",
    [((9, 20), (1, 1)), ((3, 9, 20), (1, 3)), ((1, 3, 9, 20), (1, 3)), ((2, 1, 9, 20), (2, 1))],
)
def test_dimensions(dims: tuple[int, ...], expected: tuple[int, int]) -> None:
    dense = torch.rand(dims) < 0.5
    check(BlockMask.from_dense(dense), dense.reshape(*expected, 9, 20))


def test_expanded_dimensions_are_stored_once() -> None:
    dense = torch.rand(2, 1, 40, 40) < 0.5
    assert BlockMask.from_dense(dense.expand(-1, 4, -1, -1)).shape == (2, 1, 40, 40)
    assert BlockMask.from_dense(dense[:1].expand(8, 4, -1, -1)).shape == (1, 1, 40, 40)
    # Rows and keys that are expanded are elements like others.
    check(BlockMask.from_dense(dense[..., :1, :].expand(-1, -1, 40, -1), 16), dense[..., :1, :].expand(2, 1, 40, 40))


def test_a_mask_that_starts_anywhere() -> None:
    dense = (torch.rand(3 + 64 * 128) < 0.5)[3:].view(1, 1, 64, 128)
    check(BlockMask.from_dense(dense), dense)


def distance(q_len: int, k_len: int) -> torch.Tensor:
    """How far key j is ahead of row i, aligned at the last row and key."""
    return (torch.arange(k_len) - torch.arange(q_len)[:, None] - (k_len - q_len))[None, None]


@grids
def test_causal(q_len: int, k_len: int, block: tuple[int, int], storage: None) -> None:
    check(BlockMask.causal(q_len, k_len, block=block), distance(q_len, k_len) <= 0)


@grids
@pytest.mark.parametrize("sink", [0, 1, 32, 50, 1000])
@pytest.mark.parametrize("window", [0, 20, (5, 40), (None, 3), (64, None), (2**62, 2**62)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_sliding_window(q_len: int, k_len: int, block: tuple[int, int], window: Any, sink: int, causal: bool) -> None:
    ahead = distance(q_len, k_len)
    left, right = window if isinstance(window, tuple) else (window, window)
    dense = torch.ones_like(ahead, dtype=torch.bool)
    if left is not None:
        dense &= (ahead >= -left) | (torch.arange(k_len) < sink)
    if right is not None and not causal:
        dense &= ahead <= right
    if causal:
        dense &= ahead <= 0
    check(BlockMask.sliding_window(q_len, k_len, window, causal, sink, block=block), dense)


@grids
@pytest.mark.parametrize("sink, local", [(0, 0), (4, 0), (0, 30), (4, 17), (40, 64), (500, 1)])
def test_streaming(q_len: int, k_len: int, block: tuple[int, int], sink: int, local: int) -> None:
    ahead = distance(q_len, k_len)
    dense = (ahead <= 0) & ((torch.arange(k_len) < sink) | (-ahead < local))
    check(BlockMask.streaming(q_len, k_len, sink, local, block=block), dense)


@grids
@pytest.mark.parametrize("stride, local", [(1, None), (7, None), (16, 0), (30, 5), (1000, None)])
def test_strided(q_len: int, k_len: int, block: tuple[int, int], stride: int, local: int | None) -> None:
    back = -distance(q_len, k_len)
    dense = (back >= 0) & ((back < (stride if local is None else local)) | (back % stride == 0))
    check(BlockMask.strided(q_len, k_len, stride, local, block=block), dense)


def test_patterns_store_each_kind_of_block_once() -> None:
    """Sizes where an elementwise builder would take minutes."""
    assert len(BlockMask.causal(2**18, 2**18, block=256).bits) == 1
    assert len(BlockMask.causal(2**17, 2**18 + 8, block=256).bits) <= 4
    assert len(BlockMask.sliding_window(2**16, 2**16, 1000).bits) <= 4
    assert len(BlockMask.strided(2**14, 2**14, 100).bits) <= 2 * 2**14 // 64


@grids
@pytest.mark.parametrize("max_stride", [None, 1, 2, 4, 64])
def test_butterfly(q_len: int, k_len: int, block: tuple[int, int], max_stride: int | None) -> None:
    mask = BlockMask.butterfly(q_len, k_len, max_stride, block=block)
    rows, columns = mask.map.shape[2:]
    dense = torch.zeros(1, 1, q_len, k_len, dtype=torch.bool)
    for i, j in itertools.product(range(rows), range(columns)):
        x = (i + max(columns - rows, 0)) ^ (j + max(rows - columns, 0))
        strides = [0, *(2**n for n in range(10) if max_stride is None or 2 ** (n + 1) <= max_stride)]
        dense[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = x in strides
    check(mask, dense)
    assert len(mask.bits) == 0


@pytest.mark.parametrize("density", [0, 0.1, 0.5, 0.77, 1.0])
def test_random(density: float) -> None:
    arguments: Any = {"density": density, "B": 2, "H": 3, "block": (16, 32)}
    mask = BlockMask.random(100, 650, seed=5, **arguments)
    assert mask.shape == (2, 3, 100, 650)
    assert mask.map.unique().tolist() in ([0], [1], [0, 1])
    assert bool((mask.map.sum(-1) == round(density * 21)).all())
    assert mask.equal(BlockMask.random(100, 650, seed=5, **arguments))
    if 0 < density < 1:
        assert not mask.equal(BlockMask.random(100, 650, seed=6, **arguments))
        assert not torch.equal(mask.map[0, 0], mask.map[1, 2])


DOCUMENT = torch.arange(300) // 37
TABLE = torch.randn(4, 300, 300, generator=torch.Generator().manual_seed(0)) > 0
FEATURES = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))

MODS: dict[str, Callable[..., torch.Tensor]] = {
    "causal": lambda b, h, q, k: q >= k,
    "document": lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
    "per head": lambda b, h, q, k: (q - k).abs() <= 20 * h,
    "per batch": lambda b, h, q, k: k < 100 * (b + 1),
    "table": lambda b, h, q, k: TABLE[h, q, k] & (q >= k),
    "keys only": lambda b, h, q, k: k % 3 == 0,
    "constant": flex_attention.noop_mask,
    "nothing": lambda b, h, q, k: (q < 0) | (k < 0),
    "composed": flex_attention.and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 50),
    # On tensors that broadcast these fail, or mean something else.
    "dot": lambda b, h, q, k: torch.dot(FEATURES[q], FEATURES[k]) > 0,
    "sum": lambda b, h, q, k: (FEATURES[q] * FEATURES[k]).sum() > h,
    "sum and positions": lambda b, h, q, k: (FEATURES[q] * FEATURES[k]).sum() > (q - k) / 100,
    "first dimension": lambda b, h, q, k: (FEATURES[q] * FEATURES[k]).sum(0) > b,
}


@pytest.mark.parametrize("sizes", [(None, None, 130, 200), (2, 4, 97, 300), (3, 1, 1, 64)], ids=str)
@pytest.mark.parametrize("name", MODS)
def test_mask_mod(name: str, sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_bits, "_CPU_TILE", 20000)
    mod, block = MODS[name], (32, 48)
    dense = flex_attention.create_mask(mod, *sizes, device="cpu")
    mask = BlockMask.from_mask_mod(mod, *sizes, block=block)
    check(mask, dense)
    for separate in (True, False):
        flex = flex_attention.create_block_mask(
            mod, *sizes, device="cpu", BLOCK_SIZE=block, separate_full_blocks=separate
        )
        check(BlockMask.from_flex(flex), dense)
        assert BlockMask.from_flex(flex).equal(mask)


def test_a_mask_mod_without_batch_and_head_is_evaluated_once_on_tensors() -> None:
    visible = []

    def mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        visible.append((q >= k).numel())
        return q >= k

    mask = BlockMask.from_mask_mod(mod, 16, 8, 200, 200)
    assert mask.shape == (16, 8, 200, 200) and len(mask.bits) == 4
    assert visible == [1, 5 * 7, 200 * 200]


def test_mask_mod_sees_no_index_beyond_the_mask() -> None:
    def mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return TABLE[b, q, k] & (h < 3)

    flex = flex_attention.create_block_mask(mod, 4, 3, 300, 300, device="cpu", BLOCK_SIZE=128)
    mask = BlockMask.from_flex(flex)
    check(mask, TABLE[:, None].expand(4, 3, 300, 300))
    assert mask.equal(BlockMask.from_mask_mod(mod, 4, 3, 300, 300, block=128))


@pytest.mark.parametrize("q_len, k_len", [(0, 40), (40, 0), (0, 0)])
def test_mask_mod_of_nothing(q_len: int, k_len: int) -> None:
    for mod in (MODS["causal"], MODS["dot"]):
        check(BlockMask.from_mask_mod(mod, 2, None, q_len, k_len), torch.zeros(2, 1, q_len, k_len, dtype=torch.bool))


def flex_lists(**changes: Any) -> flex_attention.BlockMask:
    """2 x 3 blocks of 32: block 0 full, block 1 or 2 partial, with changes; shorter lists and any order are valid."""
    lists: dict[str, Any] = {
        "seq_lengths": (64, 90),
        "kv_num_blocks": torch.tensor([[[1, 2]]]),
        "kv_indices": torch.tensor([[[[1, 7, 7], [2, 1, 7]]]]),
        "full_kv_num_blocks": torch.tensor([[[1, 1]]]),
        "full_kv_indices": torch.tensor([[[[0, -1], [0, 9]]]]),
        "BLOCK_SIZE": (32, 32),
        "mask_mod": lambda b, h, q, k: (q + k) % 2 == 0,
        **dict.fromkeys(("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")),
        **changes,
    }
    return flex_attention.BlockMask(**lists)


def test_flex_lists() -> None:
    """What a list does not name is hidden, a full block is not evaluated, and unused slots are not read."""
    q, k = torch.arange(64)[:, None], torch.arange(90)
    dense = (k < 32) | (((q + k) % 2 == 0) & ((k < 64) | (q >= 32)))
    check(BlockMask.from_flex(flex_lists()), dense[None, None])
    without = BlockMask.from_flex(flex_lists(full_kv_num_blocks=None, full_kv_indices=None))
    check(without, (dense & (k >= 32))[None, None])


def test_flex_lists_out_of_range_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody may look at them, wrong counts and indices hide blocks and read nothing."""
    monkeypatch.setattr(block_bits, "_on_host", lambda device: False)
    wild = flex_lists(
        kv_num_blocks=torch.tensor([[[2**31, -5]]]), kv_indices=torch.tensor([[[[1, -1, 3], [2, 1, 2**40]]]])
    )
    mask = BlockMask.from_flex(wild)
    assert mask.map.clamp(max=2).tolist() == [[[[1, 2, 0], [1, 0, 0]]]]


def test_entries_out_of_range_hide_their_block_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_bits, "_on_host", lambda device: False)
    entries = torch.tensor([[[[2**31 - 1, -7], [3, 2]]]], dtype=torch.int32)
    mask = BlockMask(entries, torch.full((1, 16, 1), 0x0101, dtype=torch.int32), (16, 16), 32, 32)
    dense = torch.zeros(32, 32, dtype=torch.bool)
    dense[16:, [16, 24]] = True
    for made in (mask, mask | BlockMask.from_dense(~dense & dense, 16), mask & mask, mask.transpose().transpose()):
        assert torch.equal(made.to_dense()[0, 0], dense)


def test_constructor_and_to() -> None:
    mask = BlockMask.from_dense(torch.rand(2, 1, 50, 60) < 0.5, (16, 48))
    turned = mask.map.transpose(2, 3).contiguous().transpose(2, 3)
    same = BlockMask(turned, mask.bits, [16, 48], 50, 60)  # type: ignore[arg-type]
    assert same.map.is_contiguous() and same.block == (16, 48) and same.equal(mask)
    assert mask.to("cpu") is mask
    assert mask.device == torch.device("cpu")
    with pytest.raises(AttributeError):
        mask.q_len = 3  # type: ignore[misc]
    assert mask != same and len({mask, same}) == 2
    assert repr(mask) == "BlockMask(shape=(2, 1, 50, 60), block=(16, 48), bitmaps=16, device=cpu)"


def test_bits_beyond_the_edge_mean_nothing() -> None:
    """Bits past q_len and k_len may be anything; a block is full if what exists of it is visible."""
    bits = torch.full((1, 32, 1), -1, dtype=torch.int32)
    bits[0, 10:] = 0x5555
    mask = BlockMask(torch.full((1, 1, 1, 1), 2, dtype=torch.int32), bits, (32, 32), 10, 20)
    full = BlockMask.from_dense(torch.ones(10, 20, dtype=torch.bool), 32)
    assert mask.density == 1.0 and mask.to_dense().all() and mask.equal(full) and full.equal(mask)
    assert (mask & full).map.item() == (mask | mask).map.item() == 1
    assert mask.transpose().equal(full.transpose())


def test_shared_bits_at_the_edge() -> None:
    """The same bits are a partial block inside and a full one at the edge."""
    bits = torch.full((1, 16, 1), 0x00FF, dtype=torch.int32)
    mask = BlockMask(torch.full((1, 1, 2, 2), 2, dtype=torch.int32), bits, (16, 16), 32, 24)
    dense = torch.arange(24).expand(1, 1, 32, 24) % 16 < 8
    assert torch.equal(mask.to_dense(), dense)
    check(mask & mask, dense)
    check(BlockMask.from_dense(dense, 16) | mask, dense)
    turned = mask.transpose()
    check(turned | turned, dense.mT)


def test_equal() -> None:
    mask = BlockMask.causal(40, 40, block=16)
    assert mask.equal(BlockMask.from_dense(torch.ones(40, 40, dtype=torch.bool).tril(), 16))
    assert not mask.equal(BlockMask.causal(40, 40, block=32))
    assert not mask.equal(BlockMask.causal(40, 41, block=16))
    assert not mask.equal(BlockMask.from_dense(torch.ones(40, 40, dtype=torch.bool).tril(-1), 16))


def good() -> dict[str, Any]:
    """A valid constructor call."""
    return {
        "map": torch.zeros(2, 1, 3, 2, dtype=torch.int32),
        "bits": torch.zeros(4, 16, 2, dtype=torch.int32),
        "block": (16, 48),
        "q_len": 40,
        "k_len": 90,
    }


def made(**changes: Any) -> Callable[[], Any]:
    return lambda: BlockMask(**{**good(), **changes})


def call(name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(BlockMask, name)(*arguments, **options)


def from_lists(**changes: Any) -> Callable[[], Any]:
    return lambda: BlockMask.from_flex(flex_lists(**changes))


def filled(name: str, value: int) -> torch.Tensor:
    return torch.full_like(good()[name], value)


SQUARE = torch.ones(40, 90, dtype=torch.bool)
CAUSAL = BlockMask.causal(40, 90)

# What, the call, the error, and what its message must contain: the argument's name and the value.
BAD = [
    ("map list", made(map=[0]), TypeError, ("map", "torch.Tensor", "list")),
    ("map int64", made(map=good()["map"].long()), TypeError, ("map", "int32", "int64")),
    ("map 3-d", made(map=good()["map"][0]), ValueError, ("map", "4 dimensions", "(1, 3, 2)")),
    ("map shape", made(map=good()["map"].mT), ValueError, ("map", "(B, H, 3, 2)", "(2, 1, 2, 3)")),
    ("map sparse", made(map=good()["map"].to_sparse()), TypeError, ("map", "strided", "sparse")),
    ("map negative", made(map=filled("map", -1)), ValueError, ("map", ">= 0", "-1")),
    ("map beyond bits", made(map=filled("map", 6)), ValueError, ("map", "2 + 4", "6")),
    ("bits None", made(bits=None), TypeError, ("bits", "torch.Tensor", "NoneType")),
    ("bits uint8", made(bits=good()["bits"].byte()), TypeError, ("bits", "int32", "uint8")),
    ("bits 2-d", made(bits=good()["bits"][0]), ValueError, ("bits", "3 dimensions", "(16, 2)")),
    ("bits words", made(bits=good()["bits"][..., :1]), ValueError, ("bits", "(n, 16, 2)", "(4, 16, 1)")),
    ("bits device", made(bits=good()["bits"].to("meta")), ValueError, ("bits", "cpu", "meta")),
    ("bits beyond bk", made(bits=filled("bits", 1 << 16)), ValueError, ("bits", "beyond", "48")),
    ("block 3", made(block=(16, 48, 16)), TypeError, ("block", "pair", "(16, 48, 16)")),
    ("block 24", made(block=(16, 24)), ValueError, ("block", "multiples of 16", "(16, 24)")),
    ("block 0", made(block=(0, 48)), ValueError, ("block", "from 16 to 256", "(0, 48)")),
    ("block 272", made(block=272), ValueError, ("block", "from 16 to 256", "(272, 272)")),
    ("block float", made(block=(16, 48.0)), TypeError, ("block", "ints", "48.0")),
    ("block bool", made(block=True), TypeError, ("block", "True")),
    ("block string", made(block="ab"), TypeError, ("block", "'ab'")),
    ("q_len negative", made(q_len=-1), ValueError, ("q_len", ">= 0", "-1")),
    ("k_len float", made(k_len=90.0), TypeError, ("k_len", "int", "float")),
    ("q_len bool", made(q_len=True), TypeError, ("q_len", "int", "bool")),
    ("dense float", call("from_dense", SQUARE.float()), TypeError, ("mask", "bool", "float32")),
    ("dense 1-d", call("from_dense", SQUARE[0]), ValueError, ("mask", "2 to 4", "(90,)")),
    ("dense 5-d", call("from_dense", SQUARE[None, None, None]), ValueError, ("mask", "2 to 4", "(1, 1, 1, 40, 90)")),
    ("dense list", call("from_dense", [[True]]), TypeError, ("mask", "torch.Tensor", "list")),
    ("dense block", call("from_dense", SQUARE, (64, 65)), ValueError, ("block", "multiples of 16", "(64, 65)")),
    ("mod None", call("from_mask_mod", None, 1, 1, 9, 9), TypeError, ("mask_mod", "callable", "NoneType")),
    ("mod int", call("from_mask_mod", lambda b, h, q, k: q - k, 1, 1, 9, 9), TypeError, ("mask_mod", "bool", "int64")),
    ("mod B", call("from_mask_mod", MODS["causal"], -2, 1, 9, 9), ValueError, ("B", ">= 0", "-2")),
    ("mod H", call("from_mask_mod", MODS["causal"], 1, 1.0, 9, 9), TypeError, ("H", "int", "float")),
    ("mod length", call("from_mask_mod", MODS["causal"], 1, 1, 9, -9), ValueError, ("k_len", ">= 0", "-9")),
    ("causal length", call("causal", -3, 9), ValueError, ("q_len", ">= 0", "-3")),
    ("window negative", call("sliding_window", 9, 9, -3), ValueError, ("window", "left", ">= 0", "-3")),
    ("window right", call("sliding_window", 9, 9, (1, -2)), ValueError, ("window", "right", ">= 0", "-2")),
    ("window float", call("sliding_window", 9, 9, 3.0), TypeError, ("window", "pair", "3.0")),
    ("window bool", call("sliding_window", 9, 9, (True, 1)), TypeError, ("window", "left", "True")),
    ("window three", call("sliding_window", 9, 9, (1, 2, 3)), TypeError, ("window", "pair", "(1, 2, 3)")),
    ("window None", call("sliding_window", 9, 9, None), TypeError, ("window", "pair", "None")),
    ("causal int", call("sliding_window", 9, 9, 3, 1), TypeError, ("causal", "bool", "int")),
    ("sink_tokens", call("sliding_window", 9, 9, 3, True, -1), ValueError, ("sink_tokens", ">= 0", "-1")),
    ("sink", call("streaming", 9, 9, -1, 3), ValueError, ("sink", ">= 0", "-1")),
    ("local", call("streaming", 9, 9, 1, 3.5), TypeError, ("local", "int", "float")),
    ("stride 0", call("strided", 9, 9, 0), ValueError, ("stride", ">= 1", "0")),
    ("stride long", call("strided", 9, 9, 2**62 + 1), ValueError, ("stride", "at most 2**62", str(2**62 + 1))),
    ("strided local", call("strided", 9, 9, 1, -1), ValueError, ("local", ">= 0", "-1")),
    ("max_stride 3", call("butterfly", 9, 9, 3), ValueError, ("max_stride", "power of two", "3")),
    ("max_stride 0", call("butterfly", 9, 9, 0), ValueError, ("max_stride", ">= 1", "0")),
    ("density", call("random", 9, 9, 1.5, 0), ValueError, ("density", "[0, 1]", "1.5")),
    ("density nan", call("random", 9, 9, float("nan"), 0), ValueError, ("density", "[0, 1]", "nan")),
    ("density string", call("random", 9, 9, "1", 0), TypeError, ("density", "number", "str")),
    ("seed", call("random", 9, 9, 0.5, -1), ValueError, ("seed", ">= 0", "-1")),
    ("and block", lambda: CAUSAL & BlockMask.causal(40, 90, block=16), ValueError, ("block", "(64, 64)", "(16, 16)")),
    ("or q_len", lambda: CAUSAL | BlockMask.causal(41, 90), ValueError, ("q_len", "40 and 41")),
    ("or k_len", lambda: CAUSAL | BlockMask.causal(40, 91), ValueError, ("k_len", "90 and 91")),
    ("and device", lambda: CAUSAL & CAUSAL.to("meta"), ValueError, ("device", "cpu and meta")),
    (
        "and heads",
        lambda: BlockMask.random(9, 9, 1, 0, H=2) & BlockMask.random(9, 9, 1, 0, H=3),
        ValueError,
        ("heads", "(1, 2, 9, 9)", "(1, 3, 9, 9)"),
    ),
    ("and tensor", lambda: CAUSAL & SQUARE, TypeError, ("BlockMask", "Tensor")),
    ("equal tensor", lambda: CAUSAL.equal(SQUARE), TypeError, ("other", "BlockMask", "Tensor")),  # type: ignore[arg-type]
    ("plot head", lambda: CAUSAL.plot(head=1), ValueError, ("head", "< 1", "1")),
    ("plot batch", lambda: CAUSAL.plot(batch=-1), ValueError, ("batch", ">= 0", "-1")),
    ("flex tensor", call("from_flex", SQUARE), TypeError, ("block_mask", "flex_attention.BlockMask", "Tensor")),
    ("flex block", from_lists(BLOCK_SIZE=(32, 512)), ValueError, ("BLOCK_SIZE", "from 16 to 256", "(32, 512)")),
    ("flex block 8", from_lists(BLOCK_SIZE=(8, 32)), ValueError, ("BLOCK_SIZE", "multiples of 16", "(8, 32)")),
    ("flex rows", from_lists(seq_lengths=(65, 90)), ValueError, ("kv_indices", "3, n", "(1, 1, 2, 3)")),
    ("flex count", from_lists(kv_num_blocks=torch.tensor([[[1, 4]]])), ValueError, ("kv_num_blocks", "at most 3", "4")),
    ("flex count -1", from_lists(kv_num_blocks=torch.tensor([[[-1, 2]]])), ValueError, ("kv_num_blocks", ">= 0", "-1")),
    ("flex counts", from_lists(kv_num_blocks=torch.tensor([[1, 1]])), ValueError, ("kv_num_blocks", "(1, 2)")),
    ("flex float", from_lists(kv_num_blocks=torch.ones(1, 1, 2)), TypeError, ("kv_num_blocks", "int32", "float32")),
    (
        "flex index",
        from_lists(full_kv_indices=torch.tensor([[[[0, 1], [3, 1]]]])),
        ValueError,
        ("full_kv_indices", "< 3", "3"),
    ),
    (
        "flex negative index",
        from_lists(kv_indices=torch.tensor([[[[-2, 1], [1, 2]]]])),
        ValueError,
        ("kv_indices", ">= 0", "-2"),
    ),
    (
        "flex twice",
        from_lists(kv_indices=torch.tensor([[[[1, 1], [2, 2]]]])),
        ValueError,
        ("kv_indices", "once", "2 twice"),
    ),
    (
        "flex in both",
        from_lists(full_kv_indices=torch.tensor([[[[1], [0]]]])),
        ValueError,
        ("full_kv_indices", "kv_indices", "both"),
    ),
    (
        "flex batch",
        from_lists(full_kv_indices=torch.zeros(2, 1, 2, 1).int(), full_kv_num_blocks=torch.ones(2, 1, 2).int()),
        ValueError,
        ("full_kv_indices", "(1, 1)", "(2, 1)"),
    ),
]  # fmt: skip


def test_the_good_call_is_good() -> None:
    assert made()().shape == (2, 1, 40, 90)


@pytest.mark.parametrize("make, error, parts", [pytest.param(*row[1:], id=row[0]) for row in BAD])
def test_bad_argument(make: Callable[[], Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        make()
    for part in parts:
        assert part in str(raised.value), f"{str(raised.value)!r} does not say {part!r}"


def test_mask_mod_errors_are_its_own() -> None:
    def mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such document")

    with pytest.raises(KeyError, match="no such document"):
        BlockMask.from_mask_mod(mod, None, None, 40, 40)
    sliced = flex_attention.create_block_mask(MODS["causal"], 1, 1, 64, 64, "cpu", 32)[:, :, :]
    with pytest.raises(RuntimeError, match="mask_mod"):
        BlockMask.from_flex(sliced)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    dense = torch.ones(2, 1, 300, 500, dtype=torch.bool).tril()
    dense[1] = False
    mask = BlockMask.from_dense(dense)
    colors = []
    for batch in (0, 1):
        path = tmp_path / f"{batch}.png"
        figure = mask.plot(path, batch)
        assert "300 x 500" in figure.axes[0].get_title()
        image = torch.tensor(imread(path))
        colors.append(len(image.flatten(0, 1).unique(dim=0)))
    assert colors[0] > 3 and not torch.equal(torch.tensor(imread(tmp_path / "0.png")), image)
    BlockMask.causal(0, 10).plot(tmp_path / "empty.png")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        CAUSAL.plot()
