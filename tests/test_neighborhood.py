"""flashx.neighborhood_attention: against the mask rule spelled out query by query; and the counts of simulate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tolerance
import torch
from cases import NAN, Bias, Case, Inputs
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flashx
from flashx import neighborhood
from flashx.neighborhood import neighborhood_attention, simulate


@dataclass(frozen=True)
class Grid:
    """A neighborhood, with one value per axis."""

    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    def __str__(self) -> str:
        axes = zip(self.spatial, self.kernel, self.stride, self.dilation, self.causal, strict=True)
        return "_".join(f"{n}w{w}s{s}d{d}{'c' if c else ''}" for n, w, s, d, c in axes)

    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "dilation": self.dilation, "is_causal": self.causal}

    @property
    def tokens(self) -> int:
        return math.prod(self.spatial)


def grid(*axes: tuple[int, int, int, int, bool]) -> Grid:
    """From (length, kernel, stride, dilation, causal) per axis."""
    return Grid(*zip(*axes, strict=True))


def keys_of(query: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The key coordinates that one query coordinate of one axis sees."""
    axis = [coordinate for coordinate in range(length) if coordinate % dilation == query % dilation]
    i, last = axis.index(query), len(axis) - 1
    left = kernel // 2
    right = kernel - 1 - left
    if causal:
        leader = min((i // stride) * stride + stride - 1, last)
        return axis[max(leader - left - right, 0) : i + 1]
    leader = min((i // stride) * stride + stride // 2, last)
    start = max(leader - left, 0)
    if leader + right > last:
        start += last - right - leader
    return axis[start : start + kernel]


def visible(case: Grid) -> torch.Tensor:
    """(tokens, tokens) bool, one query after another."""
    place = {token: n for n, token in enumerate(itertools.product(*map(range, case.spatial)))}
    mask = torch.zeros(len(place), len(place), dtype=torch.bool)
    rules = list(zip(case.spatial, case.kernel, case.stride, case.dilation, case.causal, strict=True))
    seen = [{i: keys_of(i, *rule) for i in range(rule[0])} for rule in rules]
    for token, row in place.items():
        keys = itertools.product(*(axis[i] for axis, i in zip(seen, token, strict=True)))
        mask[row, [place[key] for key in keys]] = True
    return mask


# One per dimension count at least of: nothing special, padding, tiles that fit, dilation that divides the length and
# that does not, strides, causal axes, windows as long as the axis.
GRIDS = [
    grid((1, 1, 1, 1, False)),
    grid((64, 7, 1, 1, False)),
    grid((200, 50, 1, 1, True)),
    grid((211, 12, 5, 3, False)),
    grid((192, 64, 64, 1, False)),
    grid((130, 33, 7, 2, True)),
    grid((5, 3, 1, 1, False), (7, 7, 1, 1, False)),
    grid((16, 5, 2, 1, False), (24, 8, 8, 1, False)),
    grid((13, 3, 2, 3, True), (17, 4, 3, 4, False)),
    grid((1, 1, 1, 1, False), (128, 9, 1, 1, False)),
    grid((12, 3, 1, 2, False), (18, 5, 2, 3, True)),
    grid((4, 2, 1, 1, True), (6, 3, 1, 1, False), (9, 5, 2, 1, False)),
    grid((5, 2, 2, 2, False), (6, 3, 1, 1, True), (8, 2, 1, 3, False)),
    grid((3, 3, 3, 1, True), (8, 4, 4, 2, False), (8, 1, 1, 1, False)),
]


@st.composite
def grids(draw: st.DrawFn, most: int = 400) -> Grid:
    """Any valid grid of up to that many tokens."""
    axes, left = [], most
    count = draw(st.integers(1, 3))
    for n in range(count):
        length = draw(st.integers(1, max(1, min(left, round(most ** (1 / (count - n)))))))
        left //= length
        kernel = draw(st.integers(1, length))
        dilation = draw(st.integers(1, length // kernel))
        axes.append((length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
    return grid(*axes)


def tensors(case: Grid, dtype: torch.dtype, **options: Any) -> tuple[Case, Inputs]:
    """A case over the grid's tokens in a row, and its inputs; the neighborhood is its bias, a boolean mask."""
    flat = Case(case.tokens, case.tokens, bias=Bias("qk", "bool"), **options)
    return flat, replace(flat.inputs(dtype), bias=visible(case))


def attend(case: Grid, flat: Case, inputs: Inputs, backend: str | None, device: str = "cpu") -> tolerance.Results:
    """neighborhood_attention, forward and backward; results as tolerance.naive has them, tokens in a row."""
    leaves = {name: tensor.detach().to(device).requires_grad_() for name, tensor in inputs.differentiable().items()}
    query, key, value = (leaves[name].unflatten(2, case.spatial) for name in ("query", "key", "value"))
    options = {"softcap": flat.softcap, "scale": flat.scale, "sinks": leaves.get("sinks"), **case.options()}
    out, lse = neighborhood_attention(query, key, value, case.kernel, **options, return_lse=True, backend=backend)
    assert out.shape == (*query.shape[:-1], value.shape[-1]) and lse.shape == query.shape[:-1]
    assert out.dtype == query.dtype
    above = (inputs.grad_out.to(device).view_as(out), inputs.grad_lse.to(device).view_as(lse))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), above)
    results = {"out": out.detach().flatten(2, -2), "lse": lse.detach().flatten(2)}
    results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.cpu() for name, tensor in results.items()}


def check(flat: Case, inputs: Inputs, results: tolerance.Results) -> None:
    """Within the budget of tolerance.py, whose own functions do not know a mask that is not the case's."""
    dtype = inputs.query.dtype
    low = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(low).eps
    factor = (3 if flat.softcap else 2) + (dtype == torch.float64)
    exact, shuffle = tolerance.naive(flat, inputs, torch.float64), torch.Generator().manual_seed(0)
    assert results.keys() == exact.keys()
    draws = [tolerance.naive(flat, inputs, low, shuffle) for _ in range(tolerance.DRAWS)]
    if low != torch.float32:  # lse is float32 there, so that is its yardstick
        draws = [draw | {"lse": tolerance.naive(flat, inputs, torch.float32, shuffle)["lse"]} for draw in draws]
    for name, actual in results.items():
        yardstick = scale * max(tolerance.error(draw[name], exact[name]) for draw in draws)
        budget = factor * yardstick + tolerance.ulp(exact[name], actual.dtype)
        tolerance.compare(f"{flat} {dtype} {name}", actual, exact[name], budget)


def test_windows_by_hand() -> None:
    """The rule itself, where it can be seen: clamped, not cut; even windows lean left; groups of a stride agree."""

    def first_keys(*rule: Any) -> list[int]:
        return [keys_of(query, *rule)[0] for query in range(rule[0])]

    assert first_keys(7, 3, 1, 1, False) == [0, 0, 1, 2, 3, 4, 4]
    assert first_keys(7, 4, 1, 1, False) == [0, 0, 0, 1, 2, 3, 3]
    assert first_keys(8, 4, 2, 1, False) == [0, 0, 1, 1, 3, 3, 4, 4]
    assert first_keys(9, 3, 3, 1, False) == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert keys_of(4, 9, 3, 1, 2, False) == [2, 4, 6] and keys_of(7, 9, 3, 1, 2, False) == [3, 5, 7]
    assert [keys_of(i, 5, 2, 1, 1, True) for i in range(5)] == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert [keys_of(i, 6, 4, 3, 1, True) for i in range(6)] == [[0], [0, 1], [0, 1, 2], [2, 3], [2, 3, 4], [2, 3, 4, 5]]


def arranged_mask(case: Grid) -> tuple[Any, torch.Tensor]:
    """The BlockMask of a grid and the token, or -1, at every place that it speaks of: (sub-axes, length)."""
    axes = neighborhood._axes(case.spatial, case.kernel, *case.options().values())
    plan = neighborhood._plan(axes, torch.device("cpu"))
    tokens = torch.arange(case.tokens) if plan.tokens is None else plan.tokens
    if plan.padded is not None:
        tokens = tokens.masked_fill(plan.padded, -1)
    return plan.mask, tokens.view(math.prod(case.dilation), -1)


@settings(max_examples=100, deadline=None, derandomize=True)
@example(grid(*[(10, 2, 1, 1, True)] * 2))  # rows see nothing of a block that ends before them, or that is padding
@given(grids())
def test_mask(case: Grid) -> None:
    """The permuted mask shows every (query, key) pair of the rule, once, and no padded one."""
    mask, tokens = arranged_mask(case)
    dense = mask.to_dense()[:, 0].expand(len(tokens), -1, -1)
    group, query, key = dense.nonzero().unbind(1)
    assert (tokens[group, query] >= 0).all() and (tokens[group, key] >= 0).all()
    found = torch.zeros(case.tokens, case.tokens, dtype=torch.int64)
    found.index_put_((tokens[group, query], tokens[group, key]), torch.tensor(1), accumulate=True)
    assert torch.equal(found, visible(case).long())
    # Blocks are full, or have a bitmap, only where they must; and no bitmap is there twice.
    length = tokens.shape[1]
    edge = -length % 64
    blocks = torch.nn.functional.pad(mask.to_dense()[:, 0].float(), (0, edge, 0, edge), value=NAN)
    blocks = blocks.unflatten(1, (-1, 64)).unflatten(3, (-1, 64)).transpose(2, 3).flatten(3)
    kinds = torch.where(blocks.nan_to_num(1).amin(-1) == 1, 1, 2) * (blocks.nan_to_num(0).amax(-1) == 1)
    assert torch.equal(mask.map[:, 0].clamp(max=2), kinds.int())
    assert len(mask.bits.unique(dim=0)) == len(mask.bits)


@pytest.mark.parametrize("case", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_the_oracle(case: Grid, dtype: torch.dtype) -> None:
    flat, inputs = tensors(case, dtype, batch=2, heads=4, kv_heads=2, head_dim=8, value_dim=12, sinks=True, softcap=5.0)
    check(flat, inputs, attend(case, flat, inputs, None))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(grids(250), st.booleans(), st.sampled_from([(1, 1), (2, 1), (3, 3)]), st.sampled_from([None, "reference"]))
def test_any_grid(case: Grid, sinks: bool, heads: tuple[int, int], backend: str | None) -> None:
    flat, inputs = tensors(case, torch.float64, batch=2, heads=heads[0], kv_heads=heads[1], head_dim=3, sinks=sinks)
    check(flat, inputs, attend(case, flat, inputs, backend))


@pytest.mark.parametrize("case", [GRIDS[8], GRIDS[12]], ids=str)
def test_every_engine(case: Grid, engine: str) -> None:
    flat, inputs = tensors(case, torch.float32, heads=2, kv_heads=1, head_dim=16)
    check(flat, inputs, attend(case, flat, inputs, engine, tolerance.device_of(engine)))


@pytest.mark.parametrize("case", [GRIDS[5], GRIDS[6], GRIDS[8], GRIDS[12]], ids=str)
def test_hidden_nan_changes_nothing(case: Grid) -> None:
    """Token 0 is NaN, and so are the padded places, where it stands too. Only rows that see it may know."""
    flat, inputs = tensors(case, torch.float32)
    spoilt = inputs.map(torch.clone)
    for tensor in (spoilt.query, spoilt.key, spoilt.value):
        tensor[:, :, 0] = NAN
    clean, dirty = (attend(case, flat, each, None) for each in (inputs, spoilt))
    told = visible(case)[:, 0]
    told[0] = True
    for name in ("out", "lse", "grad_query"):
        tolerance.same_bits(name, dirty[name][:, :, ~told], clean[name][:, :, ~told])
    # A row of NaN spoils the gradients of all keys of its call, but not those of other sub-axes.
    coordinates = torch.tensor(list(itertools.product(*map(range, case.spatial))))
    elsewhere = (coordinates % torch.tensor(case.dilation) != 0).any(-1)
    for name in ("grad_key", "grad_value"):
        tolerance.same_bits(name, dirty[name][:, :, elsewhere], clean[name][:, :, elsewhere])


def test_ints_stand_for_every_axis() -> None:
    q = torch.randn(1, 1, 12, 14, 8)
    one = neighborhood_attention(q, q, q, 5, stride=2, dilation=2, is_causal=True)
    each = neighborhood_attention(q, q, q, (5, 5), stride=[2, 2], dilation=(2, 2), is_causal=(True, True))
    tolerance.same_bits("out", one, each)
    assert isinstance(one, torch.Tensor)


def test_any_strides() -> None:
    case = GRIDS[8]
    q = torch.randn(2, *case.spatial, 3, 8).movedim(-2, 1)
    strided, contiguous = (neighborhood_attention(t, t, t, case.kernel, **case.options()) for t in (q, q.contiguous()))
    tolerance.same_bits("out", strided, contiguous)


def test_the_mask_is_built_once_and_serves_training_after_inference() -> None:
    neighborhood._built.cache_clear()
    q = torch.randn(2, 1, 9, 10, 8)
    with torch.inference_mode():
        neighborhood_attention(q, q, q, 3)
    leaf = q.clone().requires_grad_()
    neighborhood_attention(leaf, leaf, leaf, (3, 3)).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert neighborhood._built.cache_info().misses == 1


@pytest.mark.parametrize("shape", [(0, 2, 9, 10, 8), (2, 0, 9, 10, 8)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_nothing_to_do(shape: tuple[int, ...], dilation: int) -> None:
    q = torch.zeros(shape)
    out, lse = neighborhood_attention(q, q, q, 3, dilation=dilation, return_lse=True)
    assert out.shape == shape and lse.shape == shape[:-1]


def test_explain() -> None:
    q = torch.zeros(1, 2, 9, 10, 8)
    found = flashx.explain(neighborhood_attention, q, q, q, 3, dilation=2, backend="reference")
    assert found.backend == "reference"
    assert (found.problem.batch, found.problem.q_heads, found.problem.block) == (4, 2, (64, 64))
    with pytest.raises(ValueError, match="stride must be"):
        flashx.explain(neighborhood_attention, q, q, q, 3, stride=4)


def test_compiled_whole() -> None:
    """One graph, no matter how the plan is built."""
    q = torch.randn(1, 2, 9, 10, 8)
    compiled = torch.compile(
        lambda q: neighborhood_attention(q, q, q, 3, dilation=(1, 3)), backend="aot_eager", fullgraph=True
    )
    tolerance.same_bits("out", compiled(q), neighborhood_attention(q, q, q, 3, dilation=(1, 3)))


# Generalized Neighborhood Attention's cases: bounds by FLOPs and by tiles.
PUBLISHED = [
    (32768, 2048, 1, 128, 16.0, 15.1),
    (32768, 2048, 256, 128, 16.0, 16.0),
    (32768, 2048, 2048, 128, 16.0, 16.0),
    ((256, 256), 80, 1, (16, 8), 10.2, 7.5),
    ((256, 256), 80, 16, (16, 8), 10.2, 10.2),
    ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), 11.1, 5.4),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 11.1, 11.1),
]


@pytest.mark.parametrize("spatial, kernel, stride, tile, flop_bound, tile_bound", PUBLISHED)
def test_published_bounds(
    spatial: Any, kernel: Any, stride: Any, tile: Any, flop_bound: float, tile_bound: float
) -> None:
    found = simulate(spatial, kernel, stride=stride, tile=tile)
    assert (round(found.flop_bound, 1), round(found.tile_bound, 1)) == (flop_bound, tile_bound)
    assert (found.overhead == 1) == (found.tile_bound == found.flop_bound) == (stride != 1)


def counted(case: Grid, tile: Sequence[int], kv_tile: Sequence[int]) -> tuple[int, int]:
    """Visited and full pairs of spatial tiles, seen one by one."""
    sees, places = visible(case), list(itertools.product(*map(range, case.spatial)))

    def tiles(sizes: Sequence[int]) -> list[list[int]]:
        """Tokens by sub-axis and tile."""
        found: dict[Any, list[int]] = {}
        for n, token in enumerate(places):
            axes = list(zip(token, case.dilation, sizes, strict=True))
            found.setdefault((*(x % d for x, d, _ in axes), *(x // d // t for x, d, t in axes)), []).append(n)
        return list(found.values())

    def whole(block: list[int], sizes: Sequence[int]) -> bool:
        return len(case.spatial) == 1 or len(block) == math.prod(sizes)

    visited = full = 0
    for rows, columns in itertools.product(tiles(tile), tiles(kv_tile)):
        shown = sees[rows][:, columns]
        visited += bool(shown.any())
        full += bool(shown.all()) and whole(rows, tile) and whole(columns, kv_tile)
    return visited, full


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids(120), st.data())
def test_simulate_counts_tiles(case: Grid, data: st.DataObject) -> None:
    tile, kv_tile = (data.draw(st.tuples(*[st.integers(1, 9)] * len(case.spatial))) for _ in range(2))
    if len(case.spatial) == 1:  # its last tile may be short; of two lengths of sub-axes one has padding then
        case = replace(case, spatial=(case.spatial[0] // case.dilation[0] * case.dilation[0],))
    visited, full = counted(case, tile, kv_tile)
    shown = int(visible(case).sum())
    found = simulate(case.spatial, case.kernel, **case.options(), tile=tile, kv_tile=kv_tile)
    dense = math.ceil(case.tokens / math.prod(tile)) * math.ceil(case.tokens / math.prod(kv_tile))
    assert found.tokens == case.tokens and found.tile == tile and found.kv_tile == kv_tile
    assert found.visible == pytest.approx(shown / case.tokens**2)
    assert found.flop_bound == pytest.approx(case.tokens**2 / shown)
    assert found.tile_bound == pytest.approx(dense / visited)
    assert found.full_fraction == pytest.approx(full / visited)
    assert found.overhead == pytest.approx(visited * math.prod(tile) * math.prod(kv_tile) / shown)


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_the_best_tile_is_chosen(case: Grid) -> None:
    every = (shape for shape in itertools.product(range(1, 65), repeat=len(case.spatial)) if math.prod(shape) == 64)
    best = max(simulate(case.spatial, case.kernel, **case.options(), tile=tile).tile_bound for tile in every)
    chosen = simulate(case.spatial, case.kernel, **case.options())
    assert math.prod(chosen.tile) == 64 and chosen.tile_bound == best
    mask, tokens = arranged_mask(case)
    visited = (mask.map != 0).sum() * (len(tokens) // mask.map.shape[0])
    assert visited == round(math.ceil(case.tokens / 64) ** 2 / best)
    assert case.tokens > 1 or visited == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_strides_that_need_no_element_mask(data: st.DataObject) -> None:
    """The condition for it of Generalized Neighborhood Attention, on an axis of whole tiles."""
    tile, kv_tile = (data.draw(st.sampled_from([1, 2, 4, 8])) for _ in range(2))
    length = 8 * data.draw(st.integers(1, 12))
    window = data.draw(st.integers(1, length))
    stride = data.draw(st.integers(1, window))
    last = keys_of(length - 1, length, window, stride, 1, False)[0]
    aligned = stride % tile == 0 and window % kv_tile == 0 and (length % stride == 0 or last % kv_tile == 0)
    aligned = aligned and (window // 2 - stride // 2) % kv_tile == 0
    if window == length or aligned:
        assert simulate(length, window, stride=stride, tile=tile, kv_tile=kv_tile).full_fraction == 1


Q = torch.zeros(1, 2, 6, 7, 8)
BAD = [
    (dict(query=None), TypeError, "query must be a torch.Tensor, got NoneType"),
    (dict(query=Q[0, 0]), ValueError, r"query must have 4 to 6 dimensions .* got shape \(6, 7, 8\)"),
    (dict(key=Q[:, :, :5]), ValueError, r"key must have query's spatial dimensions \(6, 7\), got shape"),
    (dict(value=Q[:, :, 0]), ValueError, r"value must have query's spatial dimensions \(6, 7\), got shape"),
    (dict(key=Q.half()), TypeError, "key must have query's dtype torch.float32, got torch.float16"),
    (dict(key=Q[:, :0]), ValueError, "heads"),
    (dict(sinks=1.0), TypeError, "sinks must be a torch.Tensor or None, got float"),
    (dict(sinks=torch.zeros(3)), ValueError, r"sinks must have shape \(2,\), got \(3,\)"),
    (dict(kernel_size=0), ValueError, "kernel_size must be from 1 to the length 6 in spatial dimension 0, got 0"),
    (dict(kernel_size=7), ValueError, "kernel_size must be from 1 to the length 6 in spatial dimension 0, got 7"),
    (dict(kernel_size=3.0), TypeError, "kernel_size must be int or one int per spatial dimension, got 3.0"),
    (dict(kernel_size="33"), TypeError, "kernel_size must be int .* got '33'"),
    (dict(kernel_size=(3, 3, 3)), ValueError, r"kernel_size must have one value for each of the 2 .* got \(3, 3, 3\)"),
    (dict(stride=0), ValueError, "stride must be from 1 to kernel_size 3 in spatial dimension 0, got 0"),
    (dict(stride=(3, 4)), ValueError, "stride must be from 1 to kernel_size 3 in spatial dimension 1, got 4"),
    (dict(stride=True), TypeError, "stride must be int .* got True"),
    (dict(dilation=0), ValueError, "dilation must be >= 1 in spatial dimension 0, got 0"),
    (dict(dilation=3), ValueError, r"kernel_size \* dilation must be at most the length 6 .* got 3 \* 3"),
    (dict(is_causal=1), TypeError, "is_causal must be bool .* got 1"),
    (dict(is_causal=(True,)), ValueError, r"is_causal must have one value for each of the 2 .* got \(True,\)"),
    (dict(softcap=-1.0), ValueError, "softcap must be >= 0"),
    (dict(backend="abacus"), ValueError, "abacus"),
]


@pytest.mark.parametrize("wrong, error, message", BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        neighborhood_attention(**{"query": Q, "key": Q, "value": Q, "kernel_size": 3, **wrong})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(spatial=()), ValueError, r"spatial must be 1 to 3 lengths, got \(\)"),
        (dict(spatial=(4,) * 4), ValueError, "spatial must be 1 to 3 lengths"),
        (dict(spatial=(4, 0)), ValueError, r"spatial lengths must be >= 1, got \(4, 0\)"),
        (dict(spatial=4.0), ValueError, "spatial must be 1 to 3 lengths, got 4.0"),
        (dict(spatial=(4, "4")), TypeError, "spatial must be int"),
        (dict(tile=(8, 8, 1)), ValueError, "tile must have one value for each of the 2"),
        (dict(tile=(8, 0)), ValueError, r"tile must be >= 1 in every dimension, got \(8, 0\)"),
        (dict(kv_tile="88"), TypeError, "kv_tile must be int"),
        (dict(kernel_size=9), ValueError, "kernel_size must be from 1 to the length 8"),
    ],
)
def test_bad_simulation(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate(**{"spatial": (8, 8), "kernel_size": 3, **arguments})
