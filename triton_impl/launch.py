"""Starts the kernels: what csrc/cuda/launch.cuh and sm80/host.cuh do for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from .. import env
from ..masks import IntervalMask
from ..problem import Carry, Gradients, Inputs, Problem
from . import autotune
from . import backward as backward_kernels
from . import forward as forward_kernels
from . import simplicial as simplicial_kernels
from .problem import FAR, Bias, Flags, Tables
from .tile import View
from .tuning import (
    MEMBER_SPLIT_KEYS,
    ROWS_TO_SPLIT,
    SPLIT_KEYS,
    SimplicialSweeps,
    Sweeps,
    Tiles,
    few_rows,
    piece,
    simplicial_tiles,
    tiles,
)

_FAR = FAR.value
_LOW, _HIGH = -(2**31), 2**31 - 1  # of int32; as widths no limit
_LARGEST_GRID_Y = 65535
_MOST_PARTS = 16  # of a tile of pairs: few are wasted where the window is no multiple


class Dims(NamedTuple):
    """Head dims and what they are padded to, known when a kernel is compiled."""

    head: int
    head_block: int
    value_dim: int  # not `value`, which a constexpr has itself
    value_block: int
    piece: int = 0  # columns that tile.py's multiply_pieces takes at a time; 0 where tiles are held whole


class Second(NamedTuple):
    """2-simplicial attention's second keys."""

    key: torch.Tensor
    value: torch.Tensor
    window: int


class Sums(NamedTuple):
    """The dimensions that a bias broadcasts over."""

    batch: bool
    heads: bool
    rows: bool
    keys: bool


def forward(
    problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, carry: Carry | None, tf32: bool
) -> None:
    """As dispatch.Backend's. tf32: float32 products may be single TF32 ones."""
    _check(problem)
    parts = splits(problem)
    flags, dims = _flags(problem, inputs, tf32), _dims(problem)
    flags = flags._replace(split=parts > 1)
    state = forward_kernels.Carry(None, None, None)
    if carry is not None:
        state = forward_kernels.Carry(carry.max, carry.sum, carry.acc)
        # States are in natural units.
        flags = flags._replace(carried=True, suspends=carry.suspend, general=True)
    elif problem.unified_max is not None:
        flags = flags._replace(unified=True)
    general = flags.general or flags.dropout
    table = _tiles(inputs.query, general, dims).forward
    if problem.groups is None:
        table = few_rows(table, problem.q_len * _group(problem), dims.piece > 0)
    partial, numbered = forward_kernels.Partial(None, None), lse.numel()
    if parts > 1:
        workspace = torch.empty(parts * numbered * (problem.value_dim + 1), dtype=torch.float32, device=out.device)
        partial = forward_kernels.Partial(
            *workspace.split_with_sizes([parts * numbered * problem.value_dim, parts * numbered])
        )
    to = _queries(problem, out)
    described = _described(problem, inputs)

    def launch(tile: Tiles) -> None:
        row_tiles = _row_tiles(problem, tile)
        run(
            forward_kernels.forward_kernel, (_row_programs(problem, row_tiles), parts), tile,
            _queries(problem, inputs.query), _keys(problem, inputs.key), _keys(problem, inputs.value), to, lse, state,
            partial, numbered, inputs.sinks, problem.unified_max or 0.0, row_tiles, _split_keys(problem) // tile.keys,
            *described, flags, dims, tile.rows, tile.keys,
        )  # fmt: skip
        if parts > 1:
            run(
                forward_kernels.combine_kernel, (_row_programs(problem, row_tiles), 1), tile,
                to, lse, state, partial, numbered, row_tiles, parts, *described, flags, dims, tile.rows,
            )  # fmt: skip

    _start("forward", problem, inputs.query, general, dims, table, launch, overwrites=carry is None)


def backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    gradients: Gradients,
    tf32: bool,
) -> None:
    """As dispatch.Backend's, all but sinks' gradient; writes delta (B, Hq, Lq) too."""
    _check(problem)
    flags, dims = _flags(problem, inputs, tf32), _dims(problem)
    flags = flags._replace(adds=gradients.adds_query)
    # Members' limits and the elements of a block mask are registers there.
    general = flags.general or flags.dropout or flags.blocks or flags.members
    sweeps = _tiles(inputs.query, general, dims)
    _start_delta(problem, out, grad_out, grad_lse, delta, dims, sweeps.grad_query)
    tensors = (
        _queries(problem, inputs.query), _keys(problem, inputs.key), _keys(problem, inputs.value),
        _queries(problem, grad_out), lse, delta,
    )  # fmt: skip
    described = _described(problem, inputs)
    of = (problem, inputs.query, general, dims)

    def grad_key_value(tile: Tiles) -> None:
        count = triton.cdiv(problem.k_len, tile.keys)
        groups = problem.batch if problem.groups is None else problem.groups
        run(
            backward_kernels.grad_key_value_kernel, (count * groups * problem.kv_heads, 1), tile, *tensors,
            _keys(problem, gradients.key), _keys(problem, gradients.value), count,
            *described, flags, dims, tile.rows, tile.keys,
        )  # fmt: skip

    _start("grad_key_value", *of, sweeps.grad_key_value, grad_key_value)

    def grad_query(tile: Tiles) -> None:
        count = _row_tiles(problem, tile)
        run(
            backward_kernels.grad_query_kernel, (_row_programs(problem, count), 1), tile, *tensors,
            _queries(problem, gradients.query), count, *described, flags, dims, tile.rows, tile.keys,
        )  # fmt: skip

    _start("grad_query", *of, sweeps.grad_query, grad_query, overwrites=not flags.adds)

    bias = gradients.bias
    if bias is not None:

        def grad_bias(tile: Tiles) -> None:
            size = (1,) * (4 - bias.dim()) + tuple(bias.shape)
            sums = Sums(*(one == 1 for one in size))
            rows = 1 if sums.rows else triton.cdiv(size[2], tile.rows)
            keys = 1 if sums.keys else triton.cdiv(size[3], tile.keys)
            run(
                backward_kernels.grad_bias_kernel, (size[0] * size[1] * rows * keys, 1), tile, *tensors, bias,
                rows, keys, *described, flags, dims, sums, tile.rows, tile.keys,
            )  # fmt: skip

        _start("grad_bias", *of, sweeps.grad_bias, grad_bias)


def simplicial_forward(
    problem: Problem, inputs: Inputs, second: Second, out: torch.Tensor, lse: torch.Tensor, tf32: bool
) -> None:
    """2-simplicial attention; the problem is that of the first keys."""
    flags, dims, tile = _flags(problem, inputs, tf32), _dims(problem), _simplicial_tiles(problem, inputs).forward
    own, parts = _pairs(problem, second, tile)
    row_tiles = triton.cdiv(problem.q_len * _group(problem), own)
    run(
        simplicial_kernels.simplicial_forward_kernel, (_row_programs(problem, row_tiles), 1), tile,
        _view(inputs.query), _view(inputs.key), _view(inputs.value), _view(second.key), _view(second.value),
        _view(out), lse, second.window, row_tiles, *_described(problem, inputs), flags, dims, tile.rows, tile.keys,
        parts,
    )  # fmt: skip


def simplicial_backward(
    problem: Problem,
    inputs: Inputs,
    second: Second,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    tf32: bool,
) -> None:
    """Gradients of query, key, value, and the second key and value: of the last two pairs both or none."""
    flags, dims, sweeps = _flags(problem, inputs, tf32), _dims(problem), _simplicial_tiles(problem, inputs)
    programs = problem.batch * problem.kv_heads
    _start_delta(problem, out, grad_out, grad_lse, delta, dims, sweeps.grad_query)
    tensors = (
        _view(inputs.query), _view(inputs.key), _view(inputs.value), _view(second.key), _view(second.value),
        _view(grad_out), lse, delta,
    )  # fmt: skip
    described = (*_described(problem, inputs), flags, dims)
    query, key, value, key2, value2 = gradients
    if query is not None:
        tile = sweeps.grad_query
        own, parts = _pairs(problem, second, tile)
        row_tiles = triton.cdiv(problem.q_len * _group(problem), own)
        run(
            simplicial_kernels.simplicial_grad_query_kernel, (_row_programs(problem, row_tiles), 1), tile, *tensors,
            _view(query), second.window, row_tiles, *described, tile.rows, tile.keys, parts,
        )  # fmt: skip
    if key is not None and value is not None:
        tile = sweeps.grad_key_value
        _, parts = _pairs(problem, second, tile)
        count = triton.cdiv(problem.k_len, tile.keys)
        run(
            simplicial_kernels.simplicial_grad_key_value_kernel, (count * programs, 1), tile, *tensors, _view(key),
            _view(value), second.window, count, *described, tile.rows, tile.keys, parts,
        )  # fmt: skip
    if key2 is not None and value2 is not None:
        tile = sweeps.grad_second
        own, parts = _pairs(problem, second, tile)
        count = triton.cdiv(problem.k_len, own)
        run(
            simplicial_kernels.simplicial_grad_second_kernel, (count * programs, 1), tile, *tensors, _view(key2),
            _view(value2), second.window, count, *described, tile.rows, tile.keys, parts,
        )  # fmt: skip


def _simplicial_tiles(problem: Problem, inputs: Inputs) -> SimplicialSweeps:
    dims = _dims(problem)
    return simplicial_tiles(_capability(inputs.query), problem.dtype.itemsize, max(dims.head_block, dims.value_block))


def _pairs(problem: Problem, second: Second, tile: Tiles) -> tuple[int, int]:
    """Of a tile of pairs, how many rows (or second keys) they belong to, and how many belong to each."""
    parts = min(triton.next_power_of_2(second.window), _MOST_PARTS)
    own = tile.rows // parts
    _check(problem)
    if problem.batch * problem.kv_heads * (problem.q_len * _group(problem) // own + 1) >= _HIGH:
        raise ValueError(f"the Triton kernels take fewer than 2**31 tiles, got {problem}")
    return own, parts


def run(kernel: Any, grid: tuple[int, int], tile: Tiles, *arguments: Any) -> None:
    """Starts the kernel, if there is anything to do."""
    if grid[0]:
        kernel[grid](*arguments, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


def _start(
    sweep: str,
    problem: Problem,
    query: torch.Tensor,
    general: bool,
    dims: Dims,
    table: Tiles,
    launch: Callable[[Tiles], None],
    overwrites: bool = True,
) -> None:
    """Launches a sweep with the table's tiles, or, where that is asked for and it only overwrites, the fastest ones."""
    if overwrites and env.triton_autotune() and query.is_cuda and _has_work(problem):
        block = max(dims.head_block, dims.value_block)
        kernel = autotune.Kernel(sweep, query.dtype, block, general, autotune.gpu(query.device))
        autotune.start(kernel, table, launch)
    else:
        launch(table)


def _start_delta(
    problem: Problem,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    dims: Dims,
    tile: Tiles,
) -> None:
    entries, _, q_rows, _ = out.shape
    count = triton.cdiv(q_rows, tile.rows)
    run(
        backward_kernels.delta_kernel, (entries * problem.q_heads * count, 1), tile, _view(out), _view(grad_out),
        grad_lse, delta, problem.q_heads, q_rows, count, grad_lse is not None, dims, tile.rows,
    )  # fmt: skip


def _has_work(problem: Problem) -> bool:
    return min(problem.batch, problem.kv_heads, problem.q_len, problem.k_len) > 0


def splits(problem: Problem) -> int:
    """The parts that a call's keys are cut into, at multiples of SPLIT_KEYS counted from key 0.

    A function of its lengths alone, so that a sequence's result does not depend on what it is batched with; nor on how
    much longer than its keys their tensor is, since what fits one part is the same bits, cut or not.
    """
    if problem.q_len == 0 or problem.q_len * _group(problem) > ROWS_TO_SPLIT:
        return 1
    keys = problem.k_len if problem.ragged else problem.mask.hi(problem.q_len - 1, problem.k_len)
    return max(1, triton.cdiv(keys, _split_keys(problem)))


def _split_keys(problem: Problem) -> int:
    return SPLIT_KEYS if problem.groups is None else MEMBER_SPLIT_KEYS


def _row_tiles(problem: Problem, tile: Tiles) -> int:
    """Row tiles of a key head of a batch entry; of members, of all groups: see place.py's _first_tile."""
    rows = problem.q_len * _group(problem)
    if problem.groups is None:
        return triton.cdiv(rows, tile.rows)
    return problem.batch * rows // tile.rows + problem.groups


def _row_programs(problem: Problem, row_tiles: int) -> int:
    """Programs that own rows."""
    if problem.batch == 0 or problem.q_len == 0:
        return 0
    return row_tiles * problem.kv_heads * (problem.batch if problem.groups is None else 1)


def _check(problem: Problem) -> None:
    """Refuses sizes whose indices the kernels' 32 bits do not hold."""
    rows = problem.q_len * _group(problem) * (1 if problem.groups is None else problem.batch)
    heads = problem.batch * problem.q_heads
    tiles = heads * (max(rows, problem.k_len) // 16 + 1)
    if max(rows, problem.k_len, heads) >= _FAR or tiles >= _HIGH:
        raise ValueError(f"the Triton kernels take fewer than 2**30 rows and keys and 2**31 tiles, got {problem}")
    if splits(problem) > _LARGEST_GRID_Y:
        raise ValueError(f"the Triton kernels take at most {_LARGEST_GRID_Y} splits of their keys, got {problem}")


def _group(problem: Problem) -> int:
    return problem.q_heads // max(problem.kv_heads, 1)


def _dims(problem: Problem) -> Dims:
    head, value = (max(16, triton.next_power_of_2(dim)) for dim in (problem.head_dim, problem.value_dim))
    return Dims(problem.head_dim, head, problem.value_dim, value, piece(problem.dtype.itemsize, max(head, value)))


def _tiles(query: torch.Tensor, general: bool, dims: Dims) -> Sweeps:
    return tiles(_capability(query), query.element_size(), max(dims.head_block, dims.value_block), general)


def _capability(query: torch.Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(query.device) if query.is_cuda else None


def _flags(problem: Problem, inputs: Inputs, tf32: bool) -> Flags:
    bias = "none" if problem.bias is None else "bool" if problem.bias == torch.bool else "add"
    softcap = problem.softcap != 0
    return Flags(
        bias=bias,
        alibi=problem.alibi,
        softcap=softcap,
        sinks=problem.sinks,
        dropout=problem.dropout_p > 0,
        general=bias != "none" or problem.alibi or softcap or problem.scale <= 0,
        precision="tf32" if tf32 else "tf32x3",
        first_keys=problem.mask.first > 0,
        **_block_flags(problem, inputs),
        sequences=problem.ragged,
        packed=problem.packed,
        members=problem.groups is not None,
        pages=problem.page is not None,
    )


def _block_flags(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    if problem.block is None or inputs.block_map is None:
        return {}
    batch, heads = inputs.block_map.shape[:2]
    # Of a size of 1 it does not matter which it is.
    return {
        "blocks": True,
        "block_q": problem.block[0],
        "block_k": problem.block[1],
        "block_batch": batch > 1,
        "block_heads": heads > 1,
    }


def _described(problem: Problem, inputs: Inputs) -> tuple[Any, ...]:
    """The kernels' common arguments, in the order of problem.Problem."""
    q_len, k_len, shift = problem.q_len, problem.k_len, problem.mask.shift
    bias = Bias(None, 0, 0, 0, 0)
    if inputs.bias is not None:
        data = inputs.bias.view(torch.uint8) if inputs.bias.dtype == torch.bool else inputs.bias
        bias = Bias(data, *inputs.bias.expand(problem.batch, problem.q_heads, q_len, k_len).stride())
    slopes = inputs.alibi_slopes
    threshold = min(int(problem.dropout_p * 2**32 + 0.5), 2**32 - 1)
    seed = 0 if inputs.seed is None else int(inputs.seed)
    tables = Tables(
        inputs.sequences, inputs.members, inputs.member_begin, inputs.page_table, inputs.block_map, inputs.block_bits
    )
    pages = inputs.page_table
    return (
        problem.kv_heads,
        _group(problem),
        q_len,
        k_len,
        *(_widths(problem.mask) if problem.ragged else _interval(problem.mask, q_len, k_len)),
        min(max(shift, -_FAR), _FAR),
        problem.scale,
        problem.softcap,
        bias,
        slopes,
        problem.q_heads if slopes is not None and slopes.dim() == 2 else 0,
        1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0,
        *(_signed(word) for word in (threshold, seed, seed >> 32)),
        min(problem.mask.first, _HIGH if problem.ragged else k_len),
        tables,
        problem.batch,
        problem.groups or 0,
        *(min(rows, _HIGH) for rows in (problem.q_rows, problem.k_rows)),
        0 if inputs.block_bits is None else min(inputs.block_bits.shape[0], _HIGH),
        problem.page or 1,
        1 if pages is None else pages.shape[1],
        inputs.key.shape[0],
    )


def _interval(mask: IntervalMask, q_len: int, k_len: int) -> tuple[int, int]:
    """low and high of the keys [q + low, q + high) that row q sees; clamped where no row can tell."""
    low = -q_len if mask.left is None else mask.shift - mask.left
    high = k_len if mask.right is None else mask.shift + mask.right + 1
    return min(max(low, -q_len), k_len), min(max(high, -q_len), k_len)


def _widths(mask: IntervalMask) -> tuple[int, int]:
    """low and high of sequences that have shifts of their own."""
    low = _LOW if mask.left is None else max(-mask.left, _LOW)
    return low, _HIGH if mask.right is None else min(mask.right + 1, _HIGH)


def _signed(word: int) -> int:
    """The 32-bit word as a signed number, which is one type whatever its value."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _view(tensor: torch.Tensor) -> View:
    return View(tensor, *tensor.stride()[:3])


def _queries(problem: Problem, tensor: torch.Tensor) -> View:
    """Packed sequences lie in one batch entry."""
    return _view(tensor)._replace(**({"batch": 0} if problem.packed else {}))


def _keys(problem: Problem, tensor: torch.Tensor) -> View:
    alone = tensor.shape[0] == 1 and problem.page is None and problem.groups is None
    return _view(tensor)._replace(**({"batch": 0} if alone else {}))
