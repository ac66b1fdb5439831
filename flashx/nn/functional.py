"""torch.nn.functional.scaled_dot_product_attention on flashx's kernels: torch's signature, meaning and errors.

What no kernel covers goes to torch's own function, with one warning per reason (docs/drop-in.md has the table).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from .. import ops, quick
from ..backends.cpu import MAX_DIM
from ..nested import are_jagged, attention_nested, same_structure
from ..problem import DTYPES
from .mask_blocks import block_mask_of

# The builtin itself, whatever torch.nn.functional holds by now: the fallback must not come back here.
_torch_attention = torch._C._nn.scaled_dot_product_attention
# New in torch 2.7; before, torch.export records flashx's operator.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


class FlashxFallbackWarning(UserWarning):
    """An attention call went to torch's own function; the message says why. Given once per reason and process."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, computed tile by tile without the L x S matrix.

    Every input that torch takes works and means the same; where torch raises, torch's error is raised. Two
    differences: dropout draws other weights (from torch's default generator too), and NaN or inf in a key or value
    that ``attn_mask`` hides from a row changes nothing in that row.

    Args:
        query: (..., Hq, L, E); two or more dimensions, batch dimensions broadcast as in torch.
        key: (..., H, S, E).
        value: (..., H, S, Ev).
        attn_mask: broadcastable to (..., Hq, L, S); bool (True takes part) or float, added to the scaled scores
            (float32 or query's dtype). Read through its strides, never expanded. A float mask is differentiable.
        dropout_p: probability in [0, 1] of dropping an attention weight; applied in evaluation mode too.
        is_causal: row i sees keys 0 to i (aligned top-left, unlike ``flashx.attention``'s ``causal``).
        scale: factor on ``query . key``; default ``1 / sqrt(E)``.
        enable_gqa: query head h reads key head ``h // (Hq / H)``.

    Returns:
        (..., Hq, L, Ev). A row that sees no key is 0.

    Warns:
        FlashxFallbackWarning: torch's own function ran, since no kernel covers the call.

    Example:
        >>> q = torch.randn(2, 8, 128, 64)
        >>> flashx.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    repeated = None
    if (
        attn_mask is None and type(is_causal) is bool and type(enable_gqa) is bool
        and type(dropout_p) is float and dropout_p == 0.0 and (scale is None or type(scale) is float)
        and not torch.compiler.is_dynamo_compiling()
    ):  # fmt: skip
        repeated = _key_of_repeated(query, key, value, is_causal, scale, enable_gqa)
        if repeated is not None:
            known = quick.run(repeated, query, key, value)
            if known is not None:
                return known
    if _has_overrides((query, key, value, attn_mask)):
        return _overridden(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out = _attention(query, key, value, attn_mask, dropout_p, is_causal, 0, scale, enable_gqa, repeated)
    if isinstance(out, str):
        reason = out
        if attn_mask is None and are_jagged(query, key, value):  # under torch.compile
            return _jagged(query, key, value, dropout_p, is_causal, scale, enable_gqa)
        out = _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        _warn(reason)
    return out


# TorchScript compiles a call of this function to the torch operator that it stands for.
torch.jit._builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")

# Where torch raises, the reason for going there is never shown.
_TORCH_RAISES = "torch raises"


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    shift: int,
    scale: float | None,
    enable_gqa: bool,
    repeated: Hashable | None = None,
) -> Tensor | str:
    """Attention by flashx's operator, or why the call is torch's. ``shift`` places the causal diagonal."""
    given = query, key, value
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    reason = _why_torch(tensors, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        return reason
    if torch.is_autocast_enabled("cpu"):
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
        mask = None if mask is None else _autocast(mask)
    folded = _fold(query, key, value, mask, enable_gqa)
    if isinstance(folded, str):
        return folded
    arguments, shape = folded
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if dropout_p > 0 else None
    right = 0 if is_causal else None
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    variant: tuple[Any, ...] = ()
    if arguments[3] is not None and not torch.compiler.is_compiling():
        batch, heads, q_len, _ = arguments[0].shape
        blocks = block_mask_of(arguments[3], batch, heads, q_len, arguments[1].shape[2])
        if blocks is not None:
            arguments = (*arguments[:3], None)
            variant = (blocks.map, blocks.bits, None, None, None, None, 0, *blocks.block)
    arguments = (*arguments, None, None, seed, None, right, shift, scale, 0.0, float(dropout_p), None, *variant)
    out, _ = torch.ops.flashx.attention(*arguments)
    # Torch's fused kernel leaves the output in query's layout, its other path makes it contiguous; some callers
    # view it, so here it is the same.
    if not (out.is_contiguous() or _is_fused(query, key, value, mask, dropout_p, enable_gqa)):
        out = out.contiguous()
    out = out if len(shape) == 4 else out.view(shape)
    if repeated is not None and quick.came_before(repeated, query, out):
        problem, inputs, chosen = ops.described(arguments)
        quick.keep(repeated, [(problem, inputs)], chosen, given, out)
    return out


def _key_of_repeated(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Hashable | None:
    """What quick.py keeps the call under; None where something of torch's must be asked first."""
    if torch.is_autocast_enabled("cpu") or not (torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()):
        return None
    return quick.key_of(("sdpa", is_causal, scale, enable_gqa), query, key, value)


def _why_torch(tensors: tuple[Any, ...], dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> str | None:
    """Why the call is torch's, whatever its dtypes and shapes."""
    for tensor in tensors:
        if type(tensor) is not Tensor and not _is_plain(tensor):
            return f"{type(tensor).__name__} dispatches by itself"
        if tensor.is_nested or tensor.layout is not torch.strided:
            return "a tensor is nested or sparse"
        if not tensor.is_cpu:
            return f"tensors are on {tensor.device.type}"
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return _TORCH_RAISES
    for name, number in (("dropout_p", dropout_p), ("scale", 0.0 if scale is None else scale)):
        if not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
            return f"{name} is a {type(number).__name__}"
    if not 0.0 <= dropout_p <= 1.0:
        return _TORCH_RAISES
    if scale is not None and not -math.inf < scale < math.inf:
        return "scale is not finite"
    if len(tensors) == 4 and is_causal:
        return "attn_mask and is_causal are both given"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if not (torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()):
        return "torch.nn.attention.sdpa_kernel excludes one of torch's CPU kernels"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace records torch's operator"
    if _is_exporting():
        return "torch.export records torch's operator"
    return None


def _is_plain(tensor: Any) -> bool:
    """Whether kernels may read its memory, or a tracer stands in for such a tensor."""
    if isinstance(tensor, (FakeTensor, FunctionalTensor)):
        return True
    return isinstance(tensor, Tensor) and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _autocast(tensor: Tensor) -> Tensor:
    """As torch's autocast treats the arguments of its operator."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype("cpu"))


def _fold(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], tuple[int, ...]] | str:
    """Tensors of four dimensions for the operator and the output's shape, or why the call is torch's."""
    if query.dtype not in DTYPES:
        return f"{query.dtype} has no kernel"
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    ranks = (len(q_shape), len(k_shape), len(v_shape))
    rank = max(ranks)
    if (
        key.dtype != query.dtype
        or value.dtype != query.dtype
        or min(ranks) < (3 if enable_gqa else 2)
        or q_shape[-1] != k_shape[-1]
    ):
        return _TORCH_RAISES
    if k_shape[-2] != v_shape[-2]:
        return "key and value have different lengths"
    if not 1 <= q_shape[-1] <= MAX_DIM or v_shape[-1] > MAX_DIM:
        return f"head dimensions {q_shape[-1]} and {v_shape[-1]} are not within 1 to {MAX_DIM}"
    # Everything but length and dim: of the output, and of the scores, which value has no part in.
    lead: tuple[int, ...] | None = q_shape[:-2]
    score_lead = lead
    if not (rank == 4 and lead == k_shape[:-2] == v_shape[:-2]):
        query, key, value = (_with_rank(tensor, max(rank, 4)) for tensor in (query, key, value))
        q_heads, k_heads, v_heads = query.shape[-3], key.shape[-3], value.shape[-3]
        if enable_gqa and (0 in (k_heads, v_heads) or q_heads % k_heads != 0 or q_heads % v_heads != 0):
            return "query's heads are not a multiple of key's and value's"
        score_lead = _broadcast(query.shape[:-2], (*key.shape[:-3], q_heads if enable_gqa else k_heads))
        value_lead = (*value.shape[:-3], q_heads if enable_gqa else v_heads)
        lead = None if score_lead is None else _broadcast(score_lead, value_lead)
        if lead is None:
            return _TORCH_RAISES
        kv_heads = v_heads if k_heads == 1 else k_heads
        if v_heads not in (1, kv_heads):
            return "key and value have different numbers of heads"
        query = _flatten(query.expand(*lead, -1, -1))
        key, value = (_flatten(tensor.expand(*lead[:-1], kv_heads, -1, -1)) for tensor in (key, value))
    assert score_lead is not None and lead is not None
    if mask is not None:
        scores = (*score_lead, q_shape[-2], k_shape[-2])[-max(ranks[:2]) :]
        folded = _fold_mask(mask, query.dtype, scores, lead[:-1])
        if isinstance(folded, str):
            return folded
        mask = folded
    return (query, key, value, mask), (*lead, q_shape[-2], v_shape[-1])[-rank:]


def _fold_mask(mask: Tensor, dtype: torch.dtype, scores: tuple[int, ...], batch: tuple[int, ...]) -> Tensor | str:
    """The mask of scores of that shape as a view that the operator takes, or why the call is torch's."""
    if mask.dim() < 2:
        return "attn_mask has fewer than two dimensions"
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    if (
        mask.dtype not in (torch.bool, torch.float32, dtype)
        or mask.dim() > len(scores)
        or not all(have in (1, want) for have, want in sizes)
    ):
        return _TORCH_RAISES
    if len(batch) > 1 and mask.dim() > 3:
        mask = mask.expand(*batch, -1, -1, -1)
        if not _is_flat(mask):
            return "attn_mask broadcasts over some of several batch dimensions"
        mask = _flatten(mask)
    return mask


def _with_rank(tensor: Tensor, rank: int) -> Tensor:
    """With leading dimensions of size 1."""
    return tensor if tensor.dim() == rank else tensor.expand(*(1,) * (rank - tensor.dim()), *tensor.shape)


def _broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that two shapes of one length broadcast to; None if they do not."""
    if any(a != b and a != 1 and b != 1 for a, b in zip(one, other, strict=True)):
        return None
    return tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))


def _flatten(tensor: Tensor) -> Tensor:
    """All batch dimensions as one; a copy only if strides forbid a view."""
    return tensor if tensor.dim() == 4 else tensor.flatten(0, -4)


def _is_flat(mask: Tensor) -> bool:
    """Whether _flatten gives a view: a copy of a mask could be L x S for every batch entry."""
    sizes, strides = mask.shape[:-3], mask.stride()[:-3]
    return all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(len(sizes) - 1))


def _is_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, enable_gqa: bool
) -> bool:
    """Whether torch's fused CPU kernel takes the call."""
    return (
        dropout_p == 0
        and query.dim() == 4
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and (enable_gqa or query.shape[1] == key.shape[1])
        and (mask is None or (mask.dim() != 3 and not mask.requires_grad))
    )


def _has_overrides(tensors: tuple[Any, ...]) -> bool:
    """has_torch_function, also under torch.compile, where that is True even below Tensor.__torch_function__."""
    if not has_torch_function(tensors):
        return False
    return torch._C._is_torch_function_enabled() or not torch.compiler.is_dynamo_compiling()


def _overridden(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The call when a tensor subclass or a TorchFunctionMode has a say in it."""
    tensors = (query, key, value, mask)
    if mask is None and are_jagged(query, key, value):
        return _jagged(query, key, value, dropout_p, is_causal, scale, enable_gqa)
    is_causal_bias = type(mask).__module__ == "torch.nn.attention.bias"
    if is_causal_bias and not has_torch_function(tensors[:3]):
        return _with_causal_bias(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
    special = [tensor for tensor in tensors[: 3 if is_causal_bias else 4] if _handles_functions(tensor)]
    # Classes with a say of their own (NestedTensor, fx.Proxy) know torch's builtin, not this function.
    out = handle_torch_function(
        _torch_attention if special else scaled_dot_product_attention,
        tensors, *tensors, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    if special:
        _warn(f"{type(special[0]).__name__} handles torch functions by itself")
    return out


def _jagged(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Of nested tensors (B, H, j, E), whose values are packed sequences."""
    tensors = (query, key, value)
    if not torch.compiler.is_dynamo_compiling() and torch._C._len_torch_function_stack() > 0:
        # Modes have their say first, and call again.
        return handle_torch_function(
            scaled_dot_product_attention, (), *tensors, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    reason = _why_torch(tuple(tensor.values() for tensor in tensors), dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (_autocast(tensor) for tensor in tensors)
        reason = _why_not_jagged(query, key, value, enable_gqa)
    if reason is not None:
        out = _torch_attention(*tensors, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        _warn(reason)
        return out
    result = attention_nested(query, key, value, causal=is_causal, dropout_p=dropout_p, scale=scale, align="top-left")
    return result.out


def _why_not_jagged(query: Any, key: Any, value: Any, enable_gqa: bool) -> str | None:
    """Why a call with nested tensors is torch's, whatever its options."""
    tensors = (query, key, value)
    if not all(tensor.dim() == 4 and tensor._ragged_idx == 2 for tensor in tensors):
        return "nested tensors are not (batch, heads, length, dim), jagged in their length"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return "nested tensors have different dtypes, or one without a kernel"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return _TORCH_RAISES
    if not same_structure(key, value):
        return "nested key and value have different lengths"
    dims = query.shape[3], value.shape[3]
    if key.shape[3] != dims[0] or not 1 <= dims[0] <= MAX_DIM or dims[1] > MAX_DIM:
        return f"head dimensions {dims[0]}, {key.shape[3]} and {dims[1]} are not within 1 to {MAX_DIM}"
    heads = query.shape[1], key.shape[1], value.shape[1]
    if heads[1] != heads[2] or (heads[0] != heads[1] and not (enable_gqa and heads[1] and heads[0] % heads[1] == 0)):
        return "nested query, key and value have different numbers of heads"
    return None


def _handles_functions(tensor: Any) -> bool:
    """Whether its class does more in __torch_function__ than Tensor, which keeps the subclass on results."""
    override = getattr(type(tensor), "__torch_function__", None)
    usual = (None, torch._C._disabled_torch_function_impl, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]
    return getattr(override, "__func__", override) not in usual


def _with_causal_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """torch.nn.attention.bias.CausalBias stands for no mask but for the causal limit, aligned its way."""
    out: Tensor | str = _TORCH_RAISES
    if not is_causal and min(query.dim(), key.dim()) >= 2:
        q_len, k_len = query.shape[-2], key.shape[-2]
        upper_left = bias.variant == type(bias.variant).UPPER_LEFT
        if upper_left or (q_len, k_len) == (bias.seq_len_q, bias.seq_len_kv):
            shift = 0 if upper_left else k_len - q_len
            out = _attention(query, key, value, None, dropout_p, True, shift, scale, enable_gqa)
    if isinstance(out, str):  # torch's own way, which calls torch.nn.functional again
        return bias._dispatch(query, key, value, bias, dropout_p, is_causal, scale, enable_gqa)
    return out


_warned: set[str] = set()


def _warn(reason: str) -> None:
    """Warn where the user's code called, once per reason. Not under torch.compile, which cannot trace it."""
    if torch.compiler.is_dynamo_compiling() or reason in _warned:
        return
    _warned.add(reason)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame, level = frame.f_back, level + 1
    message = f"scaled_dot_product_attention ran in torch, not in flashx: {reason}"
    warnings.warn(message, FlashxFallbackWarning, stacklevel=level)
