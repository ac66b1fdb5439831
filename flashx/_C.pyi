"""csrc/bindings/module.cpp."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

_Strides = tuple[int, int, int]
_View = tuple[int, int, int, int]
_Carry = tuple[int, int, int, bool] | None

class Problem:
    dtype: int
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float
    q_rows: int
    k_rows: int
    packed: bool
    unified_max: float
    def set_mask(self, left: int, right: int, shift: int, first: int) -> None: ...
    def set_blocks(
        self,
        map: int,
        batch: int,
        head: int,
        q_blocks: int,
        k_blocks: int,
        bits: int,
        bitmaps: int,
        q_block: int,
        k_block: int,
    ) -> None: ...
    def set_sequences(self, sequences: int) -> None: ...
    def set_members(self, members: int, member_begin: int, groups: int) -> None: ...
    def set_pages(self, table: int, width: int, size: int, count: int) -> None: ...
    def set_bias(self, data: int, dtype: int, stride: Sequence[int], size: Sequence[int]) -> None: ...
    def set_alibi(self, data: int, batch_stride: int) -> None: ...
    def set_sinks(self, data: int) -> None: ...
    def set_dropout(self, dropout_p: float, seed: int) -> None: ...

def build_info() -> dict[str, Any]: ...
def cpu_isas() -> list[str]: ...

class CpuCall:
    def __init__(
        self, isa: str, query: _Strides, out: _Strides, levels: Sequence[tuple[Problem, _Strides, _Strides]]
    ) -> None: ...
    def __call__(
        self, query: int, keys_and_values: Sequence[int], out: int, threads: int, carry: _Carry = ...
    ) -> None: ...

def cpu_forward(
    isa: str, threads: int, levels: Sequence[tuple[Problem, _View, _View, _View, _View, int]], carry: _Carry
) -> None: ...
def cpu_backward(
    problem: Problem,
    isa: str,
    threads: int,
    query: _View,
    key: _View,
    value: _View,
    out: _View,
    lse: int,
    grad_out: _View,
    grad_lse: int,
    delta: int,
    grad_query: _View,
    grad_key: _View,
    grad_value: _View,
    grad_bias: int,
    adds_grad_query: bool,
) -> None: ...
def cpu_multiply_adds(
    isa: str, unit: Literal["fp32", "bf16_pairs", "bf16_tiles"], rounds: int, threads: int
) -> float: ...
def cpu_read(isa: str, words: int, count: int, threads: int) -> int: ...

class Machine(Protocol):
    """cuda and cuda_emulated: submodules of the builds that have them."""

    def forward_workspace(self, problem: Problem) -> int: ...
    def forward_kernel(self, problem: Problem) -> str: ...
    def forward(
        self,
        problem: Problem,
        query: _View,
        key: _View,
        value: _View,
        out: _View,
        lse: int,
        carry: _Carry,
        device: int,
        stream: int,
        workspace: int,
        tf32: bool,
    ) -> None: ...
    def backward(
        self,
        problem: Problem,
        query: _View,
        key: _View,
        value: _View,
        out: _View,
        lse: int,
        grad_out: _View,
        grad_lse: int,
        delta: int,
        grad_query: _View,
        grad_key: _View,
        grad_value: _View,
        grad_bias: int,
        adds_grad_query: bool,
        device: int,
        stream: int,
        tf32: bool,
    ) -> None: ...

class core:
    """csrc/core, for tests."""

    class IntervalMask:
        def __init__(self, left: int | None, right: int | None, shift: int, first: int = 0) -> None: ...
        def lo(self, q: int, k_len: int) -> int: ...
        def hi(self, q: int, k_len: int) -> int: ...
        def kind(self, q_first: int, q_last: int, k_begin: int, k_end: int, k_len: int) -> str: ...

    @staticmethod
    def row_schedule(
        mask: core.IntervalMask, k_len: int, q_first: int, q_last: int, tile_len: int
    ) -> list[tuple[int, int, str]]: ...
    @staticmethod
    def column_schedule(mask: core.IntervalMask, q_len: int, k_begin: int, k_end: int) -> tuple[int, int]: ...
    @staticmethod
    def philox(seed: int, c0: int, c1: int, c2: int) -> list[int]: ...
