"""Peers that are packages of their own. Whoever is not installed, or needs a GPU that is not there, says so."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from .cases import CAUSAL, DTYPES, FULL, Case, Dense, Inputs
from .implementations import (
    Attend,
    Flashx,
    FlashxConcatenated,
    Flex,
    Implementation,
    Naive,
    Refused,
    Torch,
    TorchCascade,
)
from .ragged import Decode, Varlen
from .sparse import Neighborhood

# flashinfer's scratch memory, as its documentation has it.
WORKSPACE_BYTES = 128 * 2**20


class Package:
    """A package's kernels, which run on a GPU, in half precision."""

    module: str
    kinds: tuple[type[Case], ...]

    def absent(self, device: str) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None if device == "cuda" else "needs a GPU"

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        if DTYPES[case.dtype] not in (torch.float16, torch.bfloat16):
            raise Refused("takes float16 and bfloat16 only")
        if case.sinks or inputs.constants:
            raise Refused("written without sinks and bias")
        if case.head_dim != case.value_dim:
            raise Refused("written for equal head dims")
        if getattr(case, "sink_tokens", 0):
            raise Refused("has no sink tokens")
        return self.attend(case, inputs)

    def attend(self, case: Case, inputs: Inputs) -> Attend:
        raise NotImplementedError


def _window(window: tuple[int | None, int | None]) -> tuple[int, int]:
    """-1 is unbounded."""
    left, right = (-1 if width is None else width for width in window)
    return left, right


class FlashAttention(Package):
    """flash_attn (FlashAttention-2) or flash_attn_interface (3): (B, L, H, D), aligned bottom-right as flashx is.

    ``table``: what the page table's argument is called. ``page``: what the size of pages must be a multiple of.
    """

    kinds = (Dense, Varlen, Decode)

    def __init__(self, module: str, table: str, page: int) -> None:
        self.module, self.table, self.page = module, table, page

    def attend(self, case: Case, inputs: Inputs) -> Attend:
        package: Any = importlib.import_module(self.module)
        if isinstance(case, Dense):
            options = {"window_size": _window(case.window), "softcap": case.softcap}

            def dense(*leaves: torch.Tensor) -> torch.Tensor:
                out = package.flash_attn_func(*(leaf.transpose(1, 2) for leaf in leaves), **options)
                return _tensor(out).transpose(1, 2)

            return dense
        if isinstance(case, Varlen):
            tables = (case.ends(inputs.device),) * 2 + (max(case.lens),) * 2
            options = {"causal": case.causal, "softcap": case.softcap}
            return lambda *leaves: _tensor(package.flash_attn_varlen_func(*leaves, *tables, **options))
        assert isinstance(case, Decode)
        if case.page % self.page:
            raise Refused(f"pages must be multiples of {self.page} keys")
        return self._decode(package.flash_attn_with_kvcache, case, inputs)

    def _decode(self, function: Any, case: Decode, inputs: Inputs) -> Attend:
        query, key, value = inputs.leaves.values()
        lens = torch.tensor(case.lens, dtype=torch.int32, device=inputs.device)
        options: dict[str, Any] = {"cache_seqlens": lens, "causal": True, "softcap": case.softcap}
        if case.window is not None:
            options["window_size"] = (case.window, 0)
        if case.page:
            options[self.table] = case.pages().to(inputs.device)
        else:
            key, value = (tensor.transpose(1, 2).contiguous() for tensor in (key, value))
        rows = query.transpose(1, 2).contiguous()
        return lambda *_: _tensor(function(rows, key, value, **options)).transpose(1, 2)


def _tensor(result: Any) -> torch.Tensor:
    """out, of releases that return it alone and of those that return lse too."""
    out = result[0] if isinstance(result, (tuple, list)) else result
    assert isinstance(out, torch.Tensor)
    return out


class FlashInfer(Package):
    """flashinfer: packed sequences, and paged caches. Plans are made outside the timing."""

    module = "flashinfer"
    kinds = (Dense, Varlen, Decode)

    def attend(self, case: Case, inputs: Inputs) -> Attend:
        flashinfer: Any = importlib.import_module(self.module)
        if case.direction != "fwd":
            raise Refused("has no backward")
        scratch = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
        dtype, heads = DTYPES[case.dtype], (case.q_heads, case.kv_heads, case.head_dim)
        softcap = case.softcap or None
        if isinstance(case, Dense):
            if case.window[1] not in (None, 0) or (case.window[0] is not None and case.window[1] is None):
                raise Refused("windows are to the left only")
            ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(scratch, "NHD")
            ends = [
                length * torch.arange(case.batch + 1, dtype=torch.int32, device=inputs.device)
                for length in (case.q_len, case.k_len)
            ]
            ragged.plan(
                *ends,
                *heads,
                causal=case.window[1] == 0,
                window_left=_window(case.window)[0],
                logits_soft_cap=softcap,
                q_data_type=dtype,
            )
            packed = [leaf.transpose(1, 2).flatten(0, 1).contiguous() for leaf in inputs.leaves.values()]
            return lambda *_: ragged.run(*packed).unflatten(0, (case.batch, case.q_len)).transpose(1, 2)
        if isinstance(case, Varlen):
            ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(scratch, "NHD")
            cu = case.ends(inputs.device)
            ragged.plan(cu, cu, *heads, causal=case.causal, logits_soft_cap=softcap, q_data_type=dtype)
            return lambda *leaves: ragged.run(*leaves)
        if isinstance(case, Decode) and case.page and case.q_len == 1:
            counts = torch.tensor([-(-length // case.page) for length in case.lens], dtype=torch.int32)
            begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            pages = torch.cat([row[:count] for row, count in zip(case.pages(), counts.tolist(), strict=True)])
            last = torch.tensor([(length - 1) % case.page + 1 for length in case.lens], dtype=torch.int32)
            decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
            decode.plan(
                *(table.to(inputs.device) for table in (begins, pages, last)),
                *heads,
                case.page,
                window_left=-1 if case.window is None else case.window,
                logits_soft_cap=softcap,
                q_data_type=dtype,
                kv_data_type=dtype,
            )
            query, key, value = inputs.leaves.values()
            return lambda *_: decode.run(query[:, :, 0], (key, value))[:, :, None]
        raise Refused("written for one query and a paged cache")


class XFormers(Package):
    """xformers' memory_efficient_attention: (B, L, H, D)."""

    module = "xformers"
    kinds = (Dense, Varlen)

    def attend(self, case: Case, inputs: Inputs) -> Attend:
        ops: Any = importlib.import_module("xformers.ops")
        attn_bias: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
        if case.softcap or case.q_heads != case.kv_heads:
            raise Refused("written without softcap and grouped queries")
        bias: Any = None
        if isinstance(case, Dense):
            if case.window not in (FULL, CAUSAL):
                raise Refused("written without windows")
            if case.window == CAUSAL:
                bias = attn_bias.LowerTriangularFromBottomRightMask()
            return lambda *leaves: ops.memory_efficient_attention(
                *(leaf.transpose(1, 2) for leaf in leaves), attn_bias=bias
            ).transpose(1, 2)
        assert isinstance(case, Varlen)
        bias = attn_bias.BlockDiagonalMask.from_seqlens(list(case.lens))
        bias = bias.make_causal() if case.causal else bias
        return lambda *leaves: ops.memory_efficient_attention(*(leaf[None] for leaf in leaves), attn_bias=bias)[0]


class Natten(Package):
    """natten: (B, *spatial, H, D)."""

    module = "natten"
    kinds = (Neighborhood,)

    def attend(self, case: Case, inputs: Inputs) -> Attend:
        natten: Any = importlib.import_module(self.module)
        assert isinstance(case, Neighborhood)
        if case.softcap:
            raise Refused("has no softcap")
        function = getattr(natten, f"na{len(case.spatial)}d")
        options = {
            "kernel_size": case.kernel,
            "stride": case.stride,
            "dilation": case.dilation,
            "is_causal": (case.causal,) * len(case.spatial),
        }

        def attend(*leaves: torch.Tensor) -> torch.Tensor:
            return function(*(leaf.movedim(1, -2) for leaf in leaves), **options).movedim(-2, 1)

        return attend


IMPLEMENTATIONS: dict[str, Implementation] = {
    "flashx": Flashx(),
    "flashx-concat": FlashxConcatenated(),
    "triton": Flashx("triton"),
    "torch": Torch(),
    "torch-flash": Torch(SDPBackend.FLASH_ATTENTION),
    "torch-cudnn": Torch(SDPBackend.CUDNN_ATTENTION, "cuda"),
    "torch-efficient": Torch(SDPBackend.EFFICIENT_ATTENTION, "cuda"),
    "torch-math": Torch(SDPBackend.MATH),
    "torch-cascade": TorchCascade(),
    "flex": Flex(),
    "flash_attn": FlashAttention("flash_attn", "block_table", 256),
    "flash_attn_interface": FlashAttention("flash_attn_interface", "page_table", 1),
    "flashinfer": FlashInfer(),
    "xformers": XFormers(),
    "natten": Natten(),
    "naive": Naive(),
}

# What is measured unless --impl says otherwise. Left to it on the CPU: what torch chooses by itself there, and what
# compiles for half a minute per case.
USUAL = {
    "cpu": [name for name in IMPLEMENTATIONS if name not in ("torch-flash", "torch-math", "flex")],
    "cuda": [name for name in IMPLEMENTATIONS if name not in ("torch",)],
}
