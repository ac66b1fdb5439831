"""Bytes, products and exponentials of csrc/cuda's own kernels, counted as they loop: their tiles, their sweeps.

Each function mirrors a kernel. What the model says of every tensor is what the emulator counts (docs/emulator.md);
tests/test_io.py holds the two together.
"""

from __future__ import annotations

import itertools

from ..problem import Problem
from . import tiles as sm80
from .calls import Tables
from .cost import Cost, Kernel, Tally
from .tiles import LANES, WORD, Map, Row, Span, Strip, Tiles, ceil_div, group

_FIELDS = 6  # words of a sequence in its table
_MEMBER_FIELDS = 4  # and those that are read of a member, whose rows are all of query's
_WARP_ROWS = 16  # rows, or keys, that a warp owns
_PIECE = 2  # bytes of a bitmap for 16 keys


def forward(
    problem: Problem,
    tables: Tables | None = None,
    *,
    carried: bool = False,
    suspend: bool = False,
    fresh: bool = False,
) -> Cost:
    """The forward: Q, O and lse once, K and V once per tile of packed rows that sees them (FlashAttention-2's order).

    Args:
        problem: ``flashx.io.problem(...)``, or that of ``flashx.explain(...)``.
        tables: what the problem's tables hold, where it has any.
        carried: the rows' softmax goes on from a state that another call left (a level of a prefix tree).
        suspend: and leaves one.
        fresh: the state is the one before any key.

    Returns:
        Cost in bytes asked for, FLOPs issued and exponentials; a second kernel combines the parts of split-KV.

    Raises:
        ValueError: a head dim over 256, float64, or tables that are missing.
    """
    model = _Model(problem, tables)
    return model.forward(carried or suspend, suspend, fresh)


def backward(problem: Problem, tables: Tables | None = None, *, adds_grad_query: bool = False) -> Cost:
    """The backward: delta, the sweep or sweeps that own dK and dV, the one that owns dQ, and dBias's.

    Args:
        adds_grad_query: dQ is added to in float32, since other calls (levels) add to it too.

    Raises:
        ValueError: as ``forward``.
    """
    model = _Model(problem, tables)
    return model.backward(adds_grad_query)


class _Model:
    def __init__(self, problem: Problem, tables: Tables | None) -> None:
        self.problem, self.tables = problem, Tables() if tables is None else tables
        self.element = problem.dtype.itemsize
        if self.element > 4:
            raise ValueError("dtype must be float16, bfloat16 or float32 for the CUDA kernels, got float64")
        for flag, have, name in (
            (problem.ragged, self.tables.sequences, "sequences"),
            (problem.groups is not None, self.tables.groups, "groups"),
            (problem.block is not None, self.tables.block_map, "block_map"),
            (problem.bias is not None, self.tables.bias, "bias"),
        ):
            if flag and have is None:
                raise ValueError(f"tables.{name} must be given for this problem, got None: {problem}")
        self.dim = sm80.head_dim_class(problem)
        self.strips = sm80.strips(problem, self.tables)
        self._maps: dict[tuple[int, int], Map] = {}
        # Words of the tables that describing a packed row takes.
        self.member_words = 0 if problem.groups is None else 1
        self.sequence_words = 0 if not problem.ragged else _FIELDS if problem.groups is None else _MEMBER_FIELDS

    @property
    def rows_numbered(self) -> int:
        """Rows of lse and delta."""
        p = self.problem
        return (min(p.batch, 1) if p.packed else p.batch) * p.q_heads * (p.q_rows if p.q_rows >= 0 else p.q_len)

    def product(self, rows: int, columns: int) -> int:
        """FLOPs of one product of a tile, the head dim padded to its class; float32 is three of them."""
        return 2 * rows * columns * self.dim * (3 if self.element == 4 else 1)

    # ---- Tables

    def describe_rows(self, tally: Tally, count: int) -> None:
        """Reads of the tables by `count` looks at where a packed row lies."""
        tally.read("members", count * self.member_words * WORD)
        tally.read("sequences", count * self.sequence_words * WORD)

    def find_rows(self, tally: Tally, count: int) -> None:
        """As describe_rows, where one sequence's rows need none."""
        if self.problem.groups is not None:
            self.describe_rows(tally, count)

    def row_places(self, tally: Tally, tiles: Tiles, parts: int) -> None:
        """What the blocks that own rows read to know where they work, those that find no rows there included."""
        p = self.problem
        if p.groups is None:
            blocks = ceil_div(p.q_len * group(p), tiles.rows) * p.batch * p.kv_heads * parts
            self.describe_rows(tally, blocks * LANES * 2)
            return
        groups = self.tables.groups
        assert groups is not None
        begins = [0, *itertools.accumulate(map(len, groups))]
        rows, blocks = p.q_len * group(p), p.kv_heads * parts
        for tile in range(p.batch * rows // tiles.rows + p.groups):
            # Its group is the last one that does not begin behind it.
            low, high, looks = 0, p.groups, 1
            while high - low > 1:
                middle, looks = (low + high) // 2, looks + 1
                low, high = (middle, high) if begins[middle] * rows // tiles.rows + middle <= tile else (low, middle)
            tally.read("member_begin", blocks * (tiles.warps * looks + 1) * LANES * 2 * WORD)
            self._members_of(tally, len(groups[low]), blocks)

    def key_places(self, tally: Tally, tiles: Tiles) -> None:
        """As row_places, of the blocks that own keys."""
        p = self.problem
        blocks = ceil_div(p.k_len, tiles.rows) * p.kv_heads
        if p.groups is None:
            self.describe_rows(tally, blocks * p.batch * LANES * 2)
            return
        for members in self.tables.groups or ():
            tally.read("member_begin", blocks * LANES * 2 * WORD)
            self._members_of(tally, len(members), blocks)

    def _members_of(self, tally: Tally, members: int, blocks: int) -> None:
        if members:
            self.describe_rows(tally, blocks * LANES * (1 + ceil_div(members, LANES)))

    def across(self) -> int:
        """Threads that copy one row of a tile."""
        return 8 if self.dim * self.element // 16 % 8 == 0 else 4

    # ---- Forward

    def forward(self, carried: bool, suspend: bool, fresh: bool) -> Cost:
        p = self.problem
        rows_of_64 = sm80.forward_tiles(self.element, self.dim, True).rows
        general = not (sm80.is_plain(p) and not carried and p.q_len * group(p) > rows_of_64)
        tiles, parts = sm80.forward_tiles(self.element, self.dim, general), sm80.splits(p)
        tally, blocks, work = Tally(), 0, 0
        for strip in self.strips:
            for first, last in strip.row_tiles(tiles.rows):
                blocks += strip.count * parts
                work += strip.count * self._forward_block(tally, strip, tiles, general, parts, first, last,
                                                          carried, suspend)  # fmt: skip
        if general:
            self.row_places(tally, tiles, parts)
        unique = self._unique(("query", "key", "value"))
        kernel = Kernel(
            "forward", tally.traffic(), 2 * self.product(1, 1) * work, work, unique, blocks,
            self._row_blocks(tiles.rows) * parts, self._stream_bytes(),
        )  # fmt: skip
        return Cost((kernel,)) + (self._combine(parts, carried, suspend, fresh) if parts > 1 else Cost())

    def _forward_block(
        self, tally: Tally, strip: Strip, tiles: Tiles, general: bool, parts: int, first: int, last: int,
        carried: bool, suspend: bool,
    ) -> int:  # fmt: skip
        """Counts the blocks, one for each part, of one row tile; returns the scores that they compute."""
        p, n, rows, element = self.problem, strip.count, last - first + 1, self.element
        span = strip.span(first, last)
        per_part = sm80.split_keys(p) // tiles.stream
        keys = scores = 0
        for part in range(parts):
            low, high = (part * per_part, (part + 1) * per_part) if parts > 1 else (0, 1 << 62)
            seen, partial = self._walk(tally, strip, tiles, span, (first, last), (low, high))
            keys += _rows_in(seen, tiles.stream, strip.k_len)
            scores += _count(seen) * tiles.rows * tiles.stream
            self._logits(tally, strip, tiles.rows, tiles.stream, first, seen, partial)
            if p.page is not None:
                tally.read("page_table", n * _count(seen) * 2 * tiles.stream * self.across() * WORD)
        tally.read("query", n * parts * rows * p.head_dim * element)
        tally.read("key", n * keys * p.head_dim * element)
        tally.read("value", n * keys * p.value_dim * element)
        if p.sinks and not suspend:
            tally.read("sinks", n * rows * 4 * WORD)
        if general:
            self.describe_rows(tally, n * parts * tiles.rows)
            self.find_rows(tally, n * parts * (tiles.rows * self.across() + rows * 4))
            if p.alibi:
                tally.read("alibi_slopes", n * parts * tiles.rows * WORD)
        if parts > 1:
            tally.write("workspace", n * parts * rows * (p.value_dim + 1) * WORD)
            self.describe_rows(tally, n * parts * rows)
            return scores
        if carried:
            tally.read("carry_max", n * rows * 4 * WORD)
            tally.read("carry_sum", n * rows * WORD)
            tally.read("carry_acc", n * rows * p.value_dim * WORD)
            self.describe_rows(tally, n * rows * 4)
            self.find_rows(tally, n * tiles.rows * 4)
        self.describe_rows(tally, n * rows)
        if suspend:
            tally.write("carry_max", n * rows * WORD)
            tally.write("carry_sum", n * rows * WORD)
            tally.write("carry_acc", n * rows * p.value_dim * WORD)
        else:
            tally.write("lse", n * rows * WORD)
            tally.write("out", n * rows * p.value_dim * element)
        return scores

    def _walk(
        self, tally: Tally, strip: Strip, tiles: Tiles, span: Span, rows: tuple[int, int], part: tuple[int, int]
    ) -> tuple[list[range], list[int]]:
        """Key tiles that a block visits, and those of them that are partly hidden (known only with a block map)."""
        begin, end = part
        visible = [range(max(js.start, begin), min(js.stop, end)) for js in span.tiles(tiles.stream)]
        if self.tables.block_map is None:
            return visible, []
        map_ = self._map(strip)
        queries = rows[0] // strip.step, rows[1] // strip.step
        chunks = sorted({j // LANES for js in visible for j in js})
        seen: list[range] = []
        partial, looked = [], 0
        for chunk in chunks:
            for j in range(chunk * LANES, (chunk + 1) * LANES):
                sees, whole, entries = map_.look(span, queries, j * tiles.stream, (j + 1) * tiles.stream)
                looked += entries
                if sees and begin <= j < end:
                    seen.append(range(j, j + 1))
                    if not whole:
                        partial.append(j)
        tally.read("block_map", strip.count * tiles.warps * looked * WORD)
        return seen, partial

    def _map(self, strip: Strip) -> Map:
        where = strip.batch, strip.kv_head
        if where not in self._maps:
            assert self.tables.block_map is not None
            self._maps[where] = Map(self.problem, self.tables.block_map, strip)
        return self._maps[where]

    def _logits(
        self, tally: Tally, strip: Strip, rows: int, stream: int, first: int, seen: list[range], partial: list[int]
    ) -> None:
        """What rows of a block that owns rows read to make logits of scores: bias, and elements of a block map."""
        if self.tables.bias is not None:
            keys = _rows_in(seen, stream, strip.k_len)
            tally.read("bias", strip.count * rows * keys * self.tables.bias[1])
        if not partial:
            return
        packed = strip.packed(first, rows)
        for j in partial:
            for warp in range(0, rows, _WARP_ROWS):
                its = packed[warp : warp + _WARP_ROWS]
                self._pieces(tally, strip, its, strip.step, j * stream, (j + 1) * stream)

    def _pieces(self, tally: Tally, strip: Strip, rows: list[Row], step: int, begin: int, end: int) -> None:
        """What a warp reads of a block map to hide elements."""
        entries, pieces = self._map(strip).pieces(rows, step, begin, end)
        tally.read("block_map", strip.count * entries * WORD)
        tally.read("block_bits", strip.count * pieces * _PIECE)

    def _combine(self, parts: int, carried: bool, suspend: bool, fresh: bool) -> Cost:
        """csrc/cuda/combine.cuh: a warp for each row merges its parts."""
        p, tally = self.problem, Tally()
        dim, warps = p.value_dim, p.batch * p.q_heads * p.q_len
        if p.groups is not None:
            tally.read("member_begin", warps * LANES * 2 * WORD)
        self.describe_rows(tally, warps * LANES)
        rows = sum(strip.rows * strip.count for strip in self.strips)
        tally.read("workspace", rows * parts * (2 * LANES + dim) * WORD)
        tally.read("workspace", self._parts_with_weight(parts) * dim * WORD)
        if carried:
            tally.read("carry_max", rows * LANES * WORD)
            tally.read("carry_sum", rows * LANES * WORD)
            # What weighs nothing is not read.
            tally.read("carry_acc", 0 if fresh else rows * dim * WORD)
        if suspend:
            tally.write("carry_acc", rows * dim * WORD)
            tally.write("carry_max", rows * WORD)
            tally.write("carry_sum", rows * WORD)
        else:
            tally.write("out", rows * dim * self.element)
            tally.write("lse", rows * WORD)
        exps = rows * (1 + parts) * LANES + rows * parts * dim
        return Cost((Kernel("combine", tally.traffic(), 0, exps, {}, ceil_div(warps, 4)),))

    def _parts_with_weight(self, parts: int) -> int:
        """(row, part) pairs of which the row sees something."""
        keys, total = sm80.split_keys(self.problem), 0
        for strip in self.strips:
            for query in range(strip.q_len):
                span = strip.span(query * strip.step, query * strip.step)
                seen = sum(
                    span.seen(i * keys, min((i + 1) * keys, strip.k_len)) or (i == 0 and self.problem.sinks)
                    for i in range(parts)
                )
                total += seen * strip.step * strip.count
        return total

    # ---- Backward

    def backward(self, adds: bool) -> Cost:
        p = self.problem
        general = not (sm80.is_plain(p) and not adds)
        tiles = sm80.backward_tiles(self.element, self.dim, general)
        rows, tally = self.rows_numbered, Tally()
        tally.read("out", rows * p.value_dim * self.element)
        tally.read("grad_out", rows * p.value_dim * self.element)
        if self.tables.grad_lse:
            tally.read("grad_lse", rows * WORD)
        tally.write("delta", rows * WORD)
        cost = Cost((Kernel("delta", tally.traffic(), blocks=ceil_div(rows, 4)),))
        sums = [(True, True)] if sm80.one_sweep(self.element, self.dim) else [(True, False), (False, True)]
        for sums_key, sums_value in sums:
            cost += self._grad_key_value(tiles, general, sums_key, sums_value)
        cost += self._grad_query(tiles, general, adds)
        if self.tables.bias_grad:
            cost += self._grad_bias()
        return cost

    def _grad_key_value(self, tiles: Tiles, general: bool, sums_key: bool, sums_value: bool) -> Cost:
        p, tally, element = self.problem, Tally(), self.element
        blocks = work = 0
        for strip in self.strips:
            n = strip.count
            for k_begin in range(0, strip.k_len, tiles.rows):
                keys = min(tiles.rows, strip.k_len - k_begin)
                blocks += n
                seen, partial = self._column(tally, strip, tiles, k_begin)
                work += n * _count(seen) * tiles.rows * tiles.stream
                streamed = _rows_in(seen, tiles.stream, strip.rows)
                tally.read("key", n * keys * p.head_dim * element)
                tally.read("value", n * keys * p.value_dim * element)
                tally.read("query", n * streamed * p.head_dim * element)
                tally.read("grad_out", n * streamed * p.value_dim * element)
                tally.read("lse", n * streamed * WORD)
                tally.read("delta", n * streamed * WORD)
                if sums_key:
                    tally.write("grad_key", n * keys * p.head_dim * element)
                if sums_value:
                    tally.write("grad_value", n * keys * p.value_dim * element)
                if not general:
                    continue
                self.describe_rows(tally, n * _count(seen) * tiles.stream)
                self.find_rows(tally, n * _count(seen) * 2 * tiles.stream * self.across())
                if p.alibi:
                    tally.read("alibi_slopes", n * _count(seen) * tiles.stream * WORD)
                if self.tables.bias is not None:
                    tally.read("bias", n * _count(seen) * tiles.stream * keys * self.tables.bias[1])
                self._pieces_of_keys(tally, strip, tiles, k_begin, partial)
        if general:
            self.key_places(tally, tiles)
        products = 2 + 2 * int(sums_key) if sums_key and sums_value else 3 if sums_key else 2
        name = "grad_key_value" if sums_key and sums_value else "grad_key" if sums_key else "grad_value"
        per_strip = ceil_div(p.k_len, tiles.rows)
        return Cost((
            Kernel(
                name, tally.traffic(), products * self.product(1, 1) * work, work,
                self._unique(("query", "key", "value", "grad_out")), blocks, per_strip, self._row_bytes(),
            ),
        ))  # fmt: skip

    def _column(self, tally: Tally, strip: Strip, tiles: Tiles, k_begin: int) -> tuple[list[range], list[int]]:
        """Tiles of packed rows that a block of keys streams over, and those that are partly hidden (with a map)."""
        span = strip.rows_of(k_begin, min(k_begin + tiles.rows, strip.k_len))
        if not span:
            return [], []
        stream = range(span.start // tiles.stream, ceil_div(span.stop, tiles.stream))
        k_end = k_begin + tiles.rows

        def rows(j: int) -> tuple[int, int]:
            first = j * tiles.stream
            return first, min(first + tiles.stream, strip.rows) - 1

        if self.tables.block_map is None:
            # Rows of one sequence in a range like this see the keys; those of several may not.
            if strip.early == strip.late and strip.early.first == 0:
                return [stream], []
            return [range(j, j + 1) for j in stream if strip.span(*rows(j)).seen(k_begin, k_end)], []
        map_, partial, looked = self._map(strip), [], 0
        seen: list[range] = []
        for chunk in range(stream.start // LANES, (stream.stop - 1) // LANES + 1):
            for j in range(chunk * LANES, (chunk + 1) * LANES):
                # A lane may look at rows behind the last.
                first, last = rows(j)
                queries = first // strip.step, last // strip.step
                sees, whole, entries = map_.look(strip.span(first, last), queries, k_begin, k_end)
                looked += entries
                if sees and j in stream:
                    seen.append(range(j, j + 1))
                    if not whole or (j + 1) * tiles.stream > strip.rows:
                        partial.append(j)
        tally.read("block_map", strip.count * tiles.warps * looked * WORD)
        return seen, partial

    def _pieces_of_keys(self, tally: Tally, strip: Strip, tiles: Tiles, k_begin: int, partial: list[int]) -> None:
        """Elements of a block map that a block of keys looks up: a warp owns 16 of them."""
        for j in partial:
            packed = strip.packed(j * tiles.stream, tiles.stream)
            for key in range(k_begin, k_begin + tiles.rows, _WARP_ROWS):
                self._pieces(tally, strip, packed, strip.step, key, key + _WARP_ROWS)

    def _grad_query(self, tiles: Tiles, general: bool, adds: bool) -> Cost:
        p, tally, element = self.problem, Tally(), self.element
        blocks = work = 0
        for strip in self.strips:
            n = strip.count
            for first, last in strip.row_tiles(tiles.rows):
                rows = last - first + 1
                blocks += n
                seen, partial = self._walk(tally, strip, tiles, strip.span(first, last), (first, last), (0, 1 << 62))
                work += n * _count(seen) * tiles.rows * tiles.stream
                keys = _rows_in(seen, tiles.stream, strip.k_len)
                tally.read("query", n * rows * p.head_dim * element)
                tally.read("grad_out", n * rows * p.value_dim * element)
                tally.read("key", n * keys * p.head_dim * element)
                tally.read("value", n * keys * p.value_dim * element)
                tally.read("lse", n * rows * 4 * WORD)
                tally.read("delta", n * rows * 4 * WORD)
                tally.write("grad_query", n * rows * p.head_dim * (WORD if adds else element))
                if adds:
                    tally.read("grad_query", n * rows * p.head_dim * WORD)
                if not general:
                    continue
                self.describe_rows(tally, n * (tiles.rows + rows * 4))
                self.find_rows(tally, n * (2 * tiles.rows * self.across() + rows * 4))
                if p.alibi:
                    tally.read("alibi_slopes", n * tiles.rows * WORD)
                self._logits(tally, strip, tiles.rows, tiles.stream, first, seen, partial)
        if general:
            self.row_places(tally, tiles, 1)
        return Cost((
            Kernel(
                "grad_query", tally.traffic(), 3 * self.product(1, 1) * work, work,
                self._unique(("query", "key", "value", "grad_out")), blocks, self._row_blocks(tiles.rows),
                self._stream_bytes(),
            ),
        ))  # fmt: skip

    def _grad_bias(self) -> Cost:
        """A block owns a tile of dBias and sums over what the bias broadcasts over; heads are not packed."""
        p, tally, element = self.problem, Tally(), self.element
        assert self.tables.bias is not None
        size, bias_bytes = self.tables.bias
        tiles = sm80.backward_tiles(element, self.dim, True)
        step, work = group(p), 0
        blocks = size[0] * size[1] * ceil_div(size[2], tiles.rows) * ceil_div(size[3], tiles.stream)
        for strip in self.strips:
            map_ = None if self.tables.block_map is None else self._map(strip)
            for q in range(0, p.q_len, tiles.rows):
                rows = min(tiles.rows, p.q_len - q)
                queries = (q, q + rows - 1)
                span = strip.span(q * step, queries[1] * step)
                for k in range(0, p.k_len, tiles.stream):
                    keys = min(tiles.stream, p.k_len - k)
                    seen = span.seen(k, k + tiles.stream)
                    whole = seen and span.whole(k, k + tiles.stream)
                    n = strip.count * step
                    if map_ is not None:
                        seen, whole, entries = map_.look(span, queries, k, k + tiles.stream)
                        tally.read("block_map", n * tiles.warps * LANES * entries * WORD)
                    if not seen:
                        continue
                    work += n * tiles.rows * tiles.stream
                    tally.read("query", n * rows * p.head_dim * element)
                    tally.read("grad_out", n * rows * p.value_dim * element)
                    tally.read("key", n * keys * p.head_dim * element)
                    tally.read("value", n * keys * p.value_dim * element)
                    tally.read("lse", n * rows * 4 * WORD)
                    tally.read("delta", n * rows * 4 * WORD)
                    tally.read("bias", n * tiles.rows * keys * bias_bytes)
                    if p.alibi:
                        tally.read("alibi_slopes", n * tiles.rows * WORD)
                    if map_ is not None and not whole:
                        for head in range(step):
                            # Its rows are those of a strip of one head.
                            its = strip.packed(q * step, tiles.rows * step)[head::step]
                            for warp in range(0, tiles.rows, _WARP_ROWS):
                                part = its[warp : warp + _WARP_ROWS]
                                self._pieces(tally, strip, part, 1, k, k + tiles.stream)
        tally.write("grad_bias", size[0] * size[1] * size[2] * size[3] * bias_bytes)
        unique = self._unique(("query", "key", "value", "grad_out"))
        return Cost((Kernel("grad_bias", tally.traffic(), 2 * self.product(1, 1) * work, work, unique, blocks),))

    # ---- What is read, once

    def _unique(self, names: tuple[str, ...]) -> dict[str, int]:
        """Bytes of the tensors, each row counted once; a window hides none of them for long."""
        p, element = self.problem, self.element
        rows = sum(strip.rows * strip.count for strip in self.strips)
        keys = sum(strip.k_len * strip.count for strip in self.strips)
        if p.q_len < p.k_len or p.mask.left is not None:
            keys = sum(self._seen_keys(strip) * strip.count for strip in self.strips)
        sizes = {
            "query": rows * p.head_dim, "key": keys * p.head_dim, "value": keys * p.value_dim,
            "grad_out": rows * p.value_dim,
        }  # fmt: skip
        return {name: sizes[name] * element for name in names}

    @staticmethod
    def _seen_keys(strip: Strip) -> int:
        """Keys that some row sees, of an interval mask."""
        if strip.rows == 0:
            return 0
        span = strip.span(0, strip.rows - 1)
        first = min(span.first, span.hi_max)
        return first + max(span.hi_max - max(span.lo_min, first), 0)

    def _row_blocks(self, rows: int) -> int:
        return max((ceil_div(strip.rows, rows) for strip in self.strips), default=1)

    def _stream_bytes(self) -> int:
        p = self.problem
        return max((strip.k_len for strip in self.strips), default=0) * (p.head_dim + p.value_dim) * self.element

    def _row_bytes(self) -> int:
        p = self.problem
        return max((strip.rows for strip in self.strips), default=0) * (p.head_dim + p.value_dim) * self.element


def _count(tiles: list[range]) -> int:
    return sum(map(len, tiles))


def _rows_in(tiles: list[range], size: int, length: int) -> int:
    """Rows of tiles that exist."""
    return sum(max(min(js.stop * size, length) - js.start * size, 0) for js in tiles if js)
