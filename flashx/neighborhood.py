"""Neighborhood attention in 1 to 3 dimensions: a token permutation, then block-sparse attention, then the way back.

Every axis is a rule of its own (_ranges): a query coordinate sees one interval of key coordinates, whose two ends never
decrease. A query token sees the product of its axes' intervals, so all below is a product over axes too:

    tokens   dilation d splits an axis into d sub-axes that never see each other; their products are the batch of the
             block-sparse call. Each is cut into spatial tiles of 64 tokens (e.g. 4x4x4), and a tile's tokens become
             neighbours in memory: one gather per tensor. Tiles and sub-axes that stick out are padded with tokens
             that are hidden as keys and see nothing as queries.
    blocks   a query tile visits, per axis, one interval of key tiles; a block is full where it is on every axis.
    bits     few patterns occur per axis (in the interior the same ones everywhere), and a partly visible block is a
             combination of one pattern per axis; each combination is stored once.

Building writes one entry per visited block into a map of zeros, once per configuration. Mask rule after Hassani et al.,
"Neighborhood Attention Transformer", "Dilated Neighborhood Attention Transformer", and "Generalized Neighborhood
Attention" (strides, and the idea of counting tiles to bound the speed-up).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch

from .attention import EXPLAINERS, AttentionResult, Explanation, attention, explain
from .block_bits import pack
from .block_mask import BlockMask
from .checks import check_tensor
from .problem import check_qkv, shape

# Query and key tiles have one shape, since query, key and value share one permutation.
_TILE_TOKENS = 64
# Combinations of patterns expanded at a time: 4096 bytes each.
_CHUNK = 4096


class _Axis(NamedTuple):
    length: int
    kernel: int
    stride: int
    dilation: int
    causal: bool

    def sub_lengths(self) -> list[int]:
        """Lengths of the dilation's interleaved sub-axes: never increasing, and at most two different ones."""
        return [-(-(self.length - residue) // self.dilation) for residue in range(self.dilation)]


class Simulation(NamedTuple):
    """What a configuration costs, counted in tiles; see ``simulate``.

    Attributes:
        tokens: number of tokens.
        visible: fraction of the tokens x tokens logits that the mask shows.
        flop_bound: ``1 / visible``, the speed-up over dense attention if only visible logits were computed.
        tile_bound: the speed-up over dense attention if the visited tiles were all that is computed: dense tile pairs
            / visited tile pairs. Without padding that is the number of key tiles / the mean number visited.
        full_fraction: fraction of the visited tile pairs that need no element mask.
        overhead: logits computed / logits visible, ``>= 1``: what tiles cost beyond the exact mask.
        tile: query tile.
        kv_tile: key tile.
    """

    tokens: int
    visible: float
    flop_bound: float
    tile_bound: float
    full_fraction: float
    overhead: float
    tile: tuple[int, ...]
    kv_tile: tuple[int, ...]


@overload
def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    is_causal: bool | Sequence[bool] = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    is_causal: bool | Sequence[bool] = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Attention of each token to the window around it, on a 1-, 2- or 3-dimensional grid. NATTEN's semantics, exactly.

    Per axis of length L, window w and stride s, query coordinate i sees w consecutive keys around the leader of its
    group of s queries, ``min(i // s * s + s // 2, L - 1)``: from ``leader - w // 2`` on, shifted so that the window
    stays inside the axis (it is never cut short; an even w leans left). On a causal axis the leader is the last of the
    group, ``min(i // s * s + s - 1, L - 1)``, and i sees ``[max(leader - w + 1, 0), i]``. With dilation d, this holds
    within each of the d interleaved sub-axes ``i % d``. A token sees the product of its axes' keys. Stride 1 is
    neighborhood attention, stride w blocked attention (Hassani et al., "Neighborhood Attention Transformer", section
    3.1; "Dilated Neighborhood Attention Transformer", section 3; "Generalized Neighborhood Attention").

    Cost grows with the visited tiles (see ``flashx.neighborhood.simulate``). The mask of a configuration is built
    once and kept for the next calls. Differentiable in query, key, value and sinks, through out and lse.

    Args:
        query: (B, Hq, *spatial, D) with one to three spatial dimensions; dtypes as in ``flashx.attention``.
        key: (B, Hkv, *spatial, D); Hq a multiple of Hkv.
        value: (B, Hkv, *spatial, Dv).
        kernel_size: window per spatial dimension, or one int for all; ``kernel_size * dilation <= length``.
        stride: 1 to kernel_size, per dimension or one for all.
        dilation: >= 1, per dimension or one for all.
        is_causal: per dimension or one for all.
        softcap, sinks, scale, backend: as in ``flashx.attention``.
        return_lse: also return the log-sum-exp.

    Returns:
        out (B, Hq, *spatial, Dv), or ``AttentionResult(out, lse)`` with lse (B, Hq, *spatial).

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 16, 32, 32, 64) for _ in range(3))  # frames, height, width
        >>> flashx.neighborhood_attention(q, k, v, (5, 9, 9), stride=(1, 2, 2), is_causal=(True, False, False)).shape
        torch.Size([1, 4, 16, 32, 32, 64])
    """
    plan, arranged, options = _arranged(query, key, value, kernel_size, stride, dilation, is_causal, sinks)
    out, lse = attention(*arranged, **options, softcap=softcap, scale=scale, return_lse=True, backend=backend)
    batch, heads, *spatial, _ = query.shape
    if plan.groups > 1:
        out, lse = (part.transpose(0, 1).flatten(1, 2).unflatten(0, (batch, heads)) for part in (out, lse))
    out = plan.ungather(out).unflatten(2, spatial)
    return AttentionResult(out, plan.ungather(lse).unflatten(2, spatial)) if return_lse else out


def _arranged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    sinks: torch.Tensor | None,
) -> tuple[_Plan, list[torch.Tensor], dict[str, Any]]:
    """The arguments, checked: the plan, flashx.attention's three tensors, and its options that they decide on."""
    _check_tensors(query, key, value, sinks)
    axes = _axes(tuple(query.shape[2:-1]), kernel_size, stride, dilation, is_causal)
    query, key, value = (tensor.flatten(2, -2) for tensor in (query, key, value))
    check_qkv(query, key, value)
    plan = _plan(axes, query.device)
    arranged = [plan.gather(tensor) for tensor in (query, key, value)]
    if plan.groups > 1:
        # Sub-axes are the batch and (batch, heads) the heads: so the gathered tensors need no second copy, and
        # sequences share the mask of their sub-axes.
        split = (plan.groups, plan.mask.q_len)
        arranged = [tensor.flatten(0, 1).unflatten(1, split).transpose(0, 1) for tensor in arranged]
        sinks = None if sinks is None else sinks.repeat(query.shape[0])
    return plan, arranged, {"block_mask": plan.mask, "sinks": sinks}


def _explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> Explanation:
    _, arranged, decided = _arranged(query, key, value, kernel_size, stride, dilation, is_causal, sinks)
    return explain(*arranged, **decided, **options)


EXPLAINERS[neighborhood_attention] = _explain


def simulate(
    spatial: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    tile: int | Sequence[int] | None = None,
    kv_tile: int | Sequence[int] | None = None,
) -> Simulation:
    """Count the tiles that a configuration visits, in closed form; runs no attention.

    ``neighborhood_attention`` takes the tile that is chosen here for ``tile=None``.

    Args:
        spatial: lengths of the 1 to 3 axes.
        kernel_size, stride, dilation, is_causal: as in ``neighborhood_attention``.
        tile: query tile, tokens per dimension. None takes the shape of 64 tokens with the highest tile bound.
        kv_tile: key tile; default is tile.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> one = flashx.neighborhood.simulate((30, 48, 80), (18, 24, 24), tile=(2, 8, 8))
        >>> strided = flashx.neighborhood.simulate((30, 48, 80), (18, 24, 24), stride=(16, 8, 8), tile=(2, 8, 8))
        >>> print(f"{one.flop_bound:.1f}: {one.tile_bound:.1f} against {strided.tile_bound:.1f}")
        11.1: 5.4 against 11.1
    """
    lengths = (spatial,) if isinstance(spatial, int) else spatial
    if not isinstance(lengths, Sequence) or not 1 <= len(lengths) <= 3:
        raise ValueError(f"spatial must be 1 to 3 lengths, got {spatial!r}")
    sizes = _per_axis("spatial", lengths, len(lengths), int)
    if min(sizes) < 1:
        raise ValueError(f"spatial lengths must be >= 1, got {sizes}")
    axes = _axes(sizes, kernel_size, stride, dilation, is_causal)
    return _simulate(axes, _tile("tile", tile, len(axes)), _tile("kv_tile", kv_tile, len(axes)))


def _check_tensors(query: Any, key: Any, value: Any, sinks: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if not 4 <= tensor.dim() <= 6:
            raise ValueError(
                f"{name} must have 4 to 6 dimensions (batch, heads, 1 to 3 spatial, dim), got shape {shape(tensor)}"
            )
        if tensor.shape[2:-1] != query.shape[2:-1]:
            raise ValueError(
                f"{name} must have query's spatial dimensions {tuple(query.shape[2:-1])}, got shape {shape(tensor)}"
            )
    if sinks is not None:
        if not isinstance(sinks, torch.Tensor):
            raise TypeError(f"sinks must be a torch.Tensor or None, got {type(sinks).__name__}")
        if shape(sinks) != (query.shape[1],):
            raise ValueError(f"sinks must have shape {(query.shape[1],)}, got {shape(sinks)}")


def _per_axis(name: str, value: Any, count: int, kind: type) -> tuple[Any, ...]:
    """One value per axis, of exactly that type."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if any(type(each) is not kind for each in values):
        raise TypeError(f"{name} must be {kind.__name__} or one {kind.__name__} per spatial dimension, got {value!r}")
    if len(values) != count:
        raise ValueError(f"{name} must have one value for each of the {count} spatial dimensions, got {value!r}")
    return values


def _tile(name: str, value: Any, count: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    sizes = _per_axis(name, value, count, int)
    if min(sizes) < 1:
        raise ValueError(f"{name} must be >= 1 in every dimension, got {value!r}")
    return sizes


def _axes(spatial: tuple[int, ...], kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> tuple[_Axis, ...]:
    count = len(spatial)
    kernels, strides, dilations = (
        _per_axis(name, value, count, int)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    axes = tuple(map(_Axis, spatial, kernels, strides, dilations, _per_axis("is_causal", is_causal, count, bool)))
    for dim, axis in enumerate(axes):
        where = f"in spatial dimension {dim}"
        if not 1 <= axis.kernel <= axis.length:
            raise ValueError(f"kernel_size must be from 1 to the length {axis.length} {where}, got {axis.kernel}")
        if axis.dilation < 1:
            raise ValueError(f"dilation must be >= 1 {where}, got {axis.dilation}")
        if axis.kernel * axis.dilation > axis.length:
            raise ValueError(
                f"kernel_size * dilation must be at most the length {axis.length} {where}, "
                f"got {axis.kernel} * {axis.dilation}"
            )
        if not 1 <= axis.stride <= axis.kernel:
            raise ValueError(f"stride must be from 1 to kernel_size {axis.kernel} {where}, got {axis.stride}")
    return axes


def _ranges(axis: _Axis, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[begin, end) of the keys that each query of a (sub-)axis sees; neither ever decreases, each holds a key."""
    query = torch.arange(length, device="cpu")
    leader = query // axis.stride * axis.stride
    if axis.causal:
        leader = (leader + axis.stride - 1).clamp(max=length - 1)
        return (leader - axis.kernel + 1).clamp(min=0), query + 1
    leader = (leader + axis.stride // 2).clamp(max=length - 1)
    begin = (leader - axis.kernel // 2).clamp(0, length - axis.kernel)
    return begin, begin + axis.kernel


def _extent(axis: _Axis, tile: int, alone: bool) -> int:
    """Padded length of the sub-axes. A single axis ends inside a tile: there a BlockMask may have a ragged edge."""
    longest = axis.sub_lengths()[0]
    return longest if alone else -(-longest // tile) * tile


class _Visits(NamedTuple):
    """Per query tile of a sub-axis: the key tiles [begin, end) visited, and those of them [full_begin, full_end)."""

    begin: torch.Tensor
    end: torch.Tensor
    full_begin: torch.Tensor
    full_end: torch.Tensor


def _visits(axis: _Axis, length: int, tile: int, kv_tile: int, alone: bool) -> _Visits:
    q_extent, k_extent = _extent(axis, tile, alone), _extent(axis, kv_tile, alone)
    begin, end = _ranges(axis, length)
    first = torch.arange(0, q_extent, tile, device="cpu")
    last = (first + tile).clamp(max=length) - 1
    empty = first >= length
    first_row = first.clamp(max=length - 1)
    # Intervals of neighbouring rows touch (stride <= kernel_size), so a tile's rows together see an interval too.
    visited_begin = begin[first_row] // kv_tile
    visited_end = torch.where(empty, visited_begin, -(-end[last] // kv_tile))
    common_end = end[first_row]
    full_begin = torch.where(empty, visited_begin, -(-begin[last] // kv_tile))
    full_end = torch.where(common_end == k_extent, -(-k_extent // kv_tile), common_end // kv_tile)
    padded = (first + tile).clamp(max=q_extent) > length
    full_end = torch.where(padded, full_begin, torch.maximum(full_begin, full_end))
    return _Visits(visited_begin, visited_end, full_begin, full_end)


@functools.lru_cache(maxsize=256)
def _counts(axis: _Axis, tile: int, kv_tile: int, alone: bool) -> tuple[int, int]:
    """Pairs of tiles of an axis, over all its sub-axes: visited, full."""
    visited = full = 0
    lengths = axis.sub_lengths()
    for length in set(lengths):
        visits = _visits(axis, length, tile, kv_tile, alone)
        times = lengths.count(length)
        visited += times * int((visits.end - visits.begin).sum())
        full += times * int((visits.full_end - visits.full_begin).sum())
    return visited, full


def _shown(axis: _Axis) -> int:
    """Visible (query, key) pairs of an axis."""
    return sum(int((end - begin).sum()) for begin, end in (_ranges(axis, length) for length in axis.sub_lengths()))


@functools.lru_cache(maxsize=64)
def _simulate(
    axes: tuple[_Axis, ...], tile: tuple[int, ...] | None = None, kv_tile: tuple[int, ...] | None = None
) -> Simulation:
    if tile is None:
        # Of equals, the one with more full tiles; then the one that is longest along the last axes.
        every = (_simulate(axes, shape, kv_tile) for shape in _factorisations(_TILE_TOKENS, len(axes)))
        return max(every, key=lambda one: (one.tile_bound, one.full_fraction, one.tile[::-1]))
    kv_tile = kv_tile or tile
    alone = len(axes) == 1
    tokens = math.prod(axis.length for axis in axes)
    counts = [_counts(axis, *sizes, alone) for axis, *sizes in zip(axes, tile, kv_tile, strict=True)]
    visited, full = (math.prod(column) for column in zip(*counts, strict=True))
    shown = math.prod(map(_shown, axes))
    q_size, k_size = math.prod(tile), math.prod(kv_tile)
    return Simulation(
        tokens=tokens,
        visible=shown / tokens**2,
        flop_bound=tokens**2 / shown,
        tile_bound=-(-tokens // q_size) * -(-tokens // k_size) / visited,
        full_fraction=full / visited,
        overhead=visited * q_size * k_size / shown,
        tile=tile,
        kv_tile=kv_tile,
    )


def _factorisations(size: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write size as a product of count ordered factors."""
    if count == 1:
        yield (size,)
        return
    for factor in range(1, size + 1):
        if size % factor == 0:
            for rest in _factorisations(size // factor, count - 1):
                yield (factor, *rest)


class _Plan(NamedTuple):
    """A configuration's mask and permutation.

    Attributes:
        mask: BlockMask over the arranged tokens; its batch is the sub-axes, or 1 where all have the same lengths.
        groups: number of sub-axes, of the product of all axes.
        tokens: (arranged,), the token at each arranged place, any one at a padded place. None: nothing moves.
        places: (tokens,), its inverse.
        padded: (arranged,), bool. None: nothing is padded.
    """

    mask: BlockMask
    groups: int
    tokens: torch.Tensor | None
    places: torch.Tensor | None
    padded: torch.Tensor | None

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Dimension 2 in the arranged order."""
        return tensor if self.tokens is None else _Gather.apply(tensor, self.tokens, self.places, None)

    def ungather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.tokens is None else _Gather.apply(tensor, self.places, self.tokens, self.padded)


class _Gather(torch.autograd.Function):
    """tensor[:, :, index], the gradient by a gather too; it is 0 where unread, the places that index leaves out."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, unread: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse, unread)
        return tensor.index_select(2, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inverse, unread = ctx.saved_tensors
        grad = grad.index_select(2, inverse)
        if unread is not None:
            grad.masked_fill_(unread.view(-1, *(1,) * (grad.dim() - 3)), 0)
        return grad, None, None, None


def _plan(axes: tuple[_Axis, ...], device: torch.device) -> _Plan:
    return _built(axes, device)


# What torch.compiler.assume_constant_result does, which would import torch._dynamo here: a compiled call takes the plan
# as it is, instead of tracing how it is built.
_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=16)
def _built(axes: tuple[_Axis, ...], device: torch.device) -> _Plan:
    # The first call may be in inference mode, the next one a training step.
    with torch.inference_mode(False):
        tile = _simulate(axes).tile
        groups = math.prod(axis.dilation for axis in axes)
        return _Plan(_mask(axes, tile, device), groups, *_order(axes, tile, device))


def _cross(vectors: Sequence[torch.Tensor], places: Callable[[int], Sequence[int]], dims: int) -> list[torch.Tensor]:
    """Axis k's tensor laid along the dimensions places(k) of dims, so that they broadcast to their product."""
    laid = []
    for k, vector in enumerate(vectors):
        sizes = [1] * dims
        for dim, size in zip(places(k), vector.shape, strict=True):
            sizes[dim] = size
        laid.append(vector.reshape(sizes))
    return laid


def _product(vectors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sums of one element per vector: (len, len, ...), flattened."""
    laid = _cross([vector.to(device) for vector in vectors], lambda k: (k,), len(vectors))
    return functools.reduce(torch.add, laid).flatten()


def _steps(sizes: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    return [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]


def _order(
    axes: tuple[_Axis, ...], tile: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """_Plan's tokens, places and padded. Arranged order: sub-axis, tile, place within the tile, each row-major."""
    count = len(axes)
    extents = [_extent(axis, size, count == 1) for axis, size in zip(axes, tile, strict=True)]
    if count == 1:
        tile = (extents[0],)  # tiles in a row are no permutation
    cuts = [extent // size for extent, size in zip(extents, tile, strict=True)]
    as_they_are = all(axis.dilation == 1 and axis.length == extent for axis, extent in zip(axes, extents, strict=True))
    if as_they_are and all(tile[k] == 1 or math.prod(cuts[k + 1 :]) == 1 for k in range(count)):
        return None, None, None

    sizes = [axis.dilation for axis in axes] + cuts + list(tile)
    arranged, spatial = _steps(sizes), _steps([axis.length for axis in axes])
    places, tokens, outside = [], [], []
    for k, axis in enumerate(axes):
        x = torch.arange(axis.length, device="cpu")
        residue, y = x % axis.dilation, x // axis.dilation
        places.append(
            residue * arranged[k] + y // tile[k] * arranged[count + k] + y % tile[k] * arranged[2 * count + k]
        )
        x = torch.arange(extents[k], device="cpu") * axis.dilation + torch.arange(axis.dilation, device="cpu")[:, None]
        x = x.view(sizes[k], sizes[count + k], sizes[2 * count + k])
        tokens.append((x * spatial[k]).to(device))
        outside.append((x >= axis.length).to(device))

    def along(k: int) -> tuple[int, int, int]:
        return k, count + k, 2 * count + k

    order = functools.reduce(torch.add, _cross(tokens, along, 3 * count)).flatten()
    if math.prod(sizes) == math.prod(axis.length for axis in axes):
        return order, _product(places, device), None
    padded = functools.reduce(torch.logical_or, _cross(outside, along, 3 * count)).flatten()
    return order.masked_fill_(padded, 0), _product(places, device), padded


class _Blocks(NamedTuple):
    """The visited blocks of an axis, one entry each, over its sub-axes.

    Attributes:
        residue, q_tile, k_tile: (entries,), where the block is.
        pattern: (entries,), which keys its rows see: an index into patterns.
        patterns: (n, tile, 2), [begin, end) within the block for each row. Number 0 is the full block.
    """

    residue: torch.Tensor
    q_tile: torch.Tensor
    k_tile: torch.Tensor
    pattern: torch.Tensor
    patterns: torch.Tensor


def _blocks(axis: _Axis, tile: int, lengths: Sequence[int], alone: bool) -> _Blocks:
    extent = _extent(axis, tile, alone)
    found = []
    for residue, length in enumerate(lengths):
        visits = _visits(axis, length, tile, tile, alone)
        counts = visits.end - visits.begin
        q_tile = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        k_tile = torch.arange(len(q_tile), device="cpu") - (counts.cumsum(0) - counts - visits.begin)[q_tile]
        partial = (k_tile < visits.full_begin[q_tile]) | (k_tile >= visits.full_end[q_tile])

        # Rows past the extent are no rows of the mask: they do as the last row does, to make no pattern of their own.
        begin, end = (torch.nn.functional.pad(bound, (0, extent - length)) for bound in _ranges(axis, length))
        row = torch.arange(-(-extent // tile) * tile, device="cpu").clamp(max=extent - 1).view(-1, tile)
        rows = torch.stack((begin[row], end[row]), dim=-1)[q_tile[partial]]
        rows = (rows - k_tile[partial][:, None, None] * tile).clamp(0, tile)
        rows = rows.masked_fill(rows[..., :1] >= rows[..., 1:], 0)
        found.append((torch.full_like(q_tile, residue), q_tile, k_tile, partial, rows))

    residues, q_tiles, k_tiles, partials, every = (torch.cat(parts) for parts in zip(*found, strict=True))
    full = torch.tensor([0, tile], device="cpu").expand(1, tile, 2)
    patterns, which = full, torch.zeros_like(q_tiles)
    if len(every):
        distinct, numbers = torch.unique(every, dim=0, return_inverse=True)
        patterns, which[partials] = torch.cat((full, distinct)), numbers + 1
    return _Blocks(residues, q_tiles, k_tiles, which, patterns)


def _mask(axes: tuple[_Axis, ...], tile: tuple[int, ...], device: torch.device) -> BlockMask:
    """The BlockMask over the arranged tokens, with blocks of one tile by one tile."""
    count = len(axes)
    alone = count == 1
    # Sub-axes of different lengths have masks of their own.
    even = all(axis.length % axis.dilation == 0 for axis in axes)
    blocks, sizes = [], []
    for axis, size in zip(axes, tile, strict=True):
        lengths = axis.sub_lengths()
        blocks.append(_blocks(axis, size, lengths[:1] if even else lengths, alone))
        sizes.append((1 if even else axis.dilation, *2 * (-(-_extent(axis, size, alone) // size),)))
    groups, tiles, _ = map(math.prod, zip(*sizes, strict=True))

    # A block's number is its patterns' numbers as digits. Of these, 0 is full on every axis.
    radix = _steps([len(found.patterns) for found in blocks])
    steps = _steps([size for column in zip(*sizes, strict=True) for size in column])
    places = [
        found.residue * steps[k] + found.q_tile * steps[count + k] + found.k_tile * steps[2 * count + k]
        for k, found in enumerate(blocks)
    ]
    numbers = [found.pattern * digit for found, digit in zip(blocks, radix, strict=True)]
    block_map = torch.zeros(groups * tiles * tiles, dtype=torch.int32, device=device)
    block_map[_product(places, device)] = _product(numbers, device).add_(1).to(torch.int32)

    combinations = math.prod(len(found.patterns) for found in blocks)
    block = (_TILE_TOKENS, _TILE_TOKENS)
    bits = torch.empty(combinations - 1, _TILE_TOKENS, _TILE_TOKENS // 32, dtype=torch.int32, device=device)
    elements = []
    for found, size in zip(blocks, tile, strict=True):
        begin, end = found.patterns.to(device)[..., None].unbind(2)
        key = torch.arange(size, device=device)
        elements.append((begin <= key) & (key < end))  # (patterns, size, size)
    for start in range(1, combinations, _CHUNK):
        chosen = torch.arange(start, min(start + _CHUNK, combinations), device=device)
        digits = [chosen // digit % len(axis) for axis, digit in zip(elements, radix, strict=True)]
        laid = _cross(
            [axis[digit] for axis, digit in zip(elements, digits, strict=True)],
            lambda k: (0, 1 + k, 1 + count + k),
            1 + 2 * count,
        )
        visible = functools.reduce(torch.logical_and, laid).reshape(-1, *block)
        bits[start - 1 : start - 1 + len(chosen)] = pack(visible, block)

    length = _extent(axes[0], tile[0], alone) if alone else tiles * _TILE_TOKENS
    return BlockMask(block_map.view(groups, 1, tiles, tiles), bits, block, q_len=length, k_len=length)
