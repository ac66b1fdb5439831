"""The public calls: attention and explain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch

from . import dispatch, ops, quick
from .block_mask import BlockMask
from .problem import Problem, accumulation_dtype, check_dense

_WIDEST = 2**62


class AttentionResult(NamedTuple):
    """Output and log-sum-exp of the logits.

    Attributes:
        out: (B, Hq, Lq, Dv), query's dtype.
        lse: (B, Hq, Lq), float32 (float64 for float64 inputs), natural log; -inf on a row that sees no key.
    """

    out: torch.Tensor
    lse: torch.Tensor


class Explanation(NamedTuple):
    """What an attention call would run; print it.

    Attributes:
        problem: the call, described.
        backend: name of the backend that runs it, None if none does.
        kernel: the backend's kernel, e.g. ``cpu/avx512``.
        refusals: for each backend the reasons against it, empty where it could run.
    """

    problem: Problem
    backend: str | None
    kernel: str | None
    refusals: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"problem: {self.problem}", f"runs on: {self.kernel or self.backend or 'nothing'}"]
        for name, reasons in self.refusals.items():
            note = "chosen" if name == self.backend else "could run" if not reasons else "; ".join(reasons)
            lines.append(f"  {name}: {note}")
        return "\n".join(lines)


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    block_mask: BlockMask | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    block_mask: BlockMask | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    block_mask: BlockMask | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Exact attention: ``softmax(logits) @ value``, tile by tile, without the Lq x Lk matrix.

    ``logits[i, j] = softcap(scale * query[i] . key[j]) + bias[i, j] - slope * |i + shift - j|`` with
    ``shift = Lk - Lq``: positions are aligned bottom-right, as a KV cache needs it. Tiled online softmax after
    Dao et al., "FlashAttention", section 3.1, and Dao, "FlashAttention-2", section 3.1.

    Jagged nested tensors (``torch.nested``, layout torch.jagged) work too, without bias and block_mask: Lq and Lk are
    then each sequence's own, and results are nested like query.

    Args:
        query: (B, Hq, Lq, D), float16, bfloat16, float32 or (CPU) float64; D from 1 to 256. Any strides work
            without a copy as long as the last dimension is contiguous; so for key and value.
        key: (B, Hkv, Lk, D). Hq must be a multiple of Hkv (grouped-query attention): query head h reads key
            head ``h // (Hq / Hkv)``.
        value: (B, Hkv, Lk, Dv), Dv up to 256.
        causal: row i sees key j only if ``j <= i + Lk - Lq``.
        window: (left, right): row i sees keys ``[i + shift - left, i + shift + right]``; ints >= 0, None is unbounded.
        block_mask: a ``flashx.BlockMask`` over (B, Hq, Lq, Lk), broadcastable in the first two: row i sees only what
            it, causal and window leave. Blocks that it hides are not read.
        bias: added to the logits (query's dtype or float32), or bool: True where visible. Broadcastable to
            (B, Hq, Lq, Lk), read through its strides. -inf hides like False. Differentiable.
        alibi_slopes: (Hq,) or (B, Hq), floating (Press et al., "Train Short, Test Long", section 3). No gradient.
        softcap: c > 0 gives ``c * tanh(x / c)``; 0 switches it off.
        sinks: (Hq,), floating: one more logit per head, with a zero value (Xiao et al., "Efficient Streaming
            Language Models with Attention Sinks"; a learned one as in gpt-oss). Counts in lse. Differentiable.
        dropout_p: probability in [0, 1] of dropping an attention weight. The Philox seed is drawn from torch's default
            generator of the CPU, whatever query's device, so ``torch.manual_seed`` reproduces it and nothing waits for
            a GPU. A CUDA graph keeps the seed of its capture: every replay drops the same weights.
        scale: factor on ``query . key``; default ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp, differentiable too.
        backend: "cuda", "cpu" or "reference"; None takes the first that can (see ``flashx.explain``). In development
            builds "cuda_emulated" too, the CUDA kernels on CPU tensors; it runs only where it is named.

    Returns:
        out (B, Hq, Lq, Dv), or ``AttentionResult(out, lse)``. A row that sees no key has out 0, lse -inf (the sink
        logit, if there are sinks) and gradients 0. NaN and inf in a hidden key or value change nothing.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value. UnsupportedError (a ValueError) if no
            backend, or not the one asked for, can run the problem.

    Example:
        >>> q, k, v = (torch.randn(1, 8, 128, 64) for _ in range(3))
        >>> flashx.attention(q, k, v, causal=True).shape
        torch.Size([1, 8, 128, 64])
    """
    repeated = None
    if (
        block_mask is None and bias is None and alibi_slopes is None and sinks is None and not return_lse
        and type(dropout_p) is float and dropout_p == 0.0
        and (options := quick.options_of("attention", causal, window, softcap, scale, backend)) is not None
    ):  # fmt: skip
        repeated = quick.key_of(options, query, key, value)
        if repeated is not None:
            known = quick.run(repeated, query, key, value)
            if known is not None:
                return known
    if isinstance(query, torch.Tensor) and query.is_nested:
        from .nested import attention_nested  # imports this module

        nested = attention_nested(
            query, key, value,
            causal=causal, window=window, block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap,
            sinks=sinks, dropout_p=dropout_p, scale=scale, backend=backend,
        )  # fmt: skip
        return nested if return_lse else nested.out
    arguments = operator_arguments(
        query,
        key,
        value,
        causal,
        window,
        block_mask,
        bias,
        alibi_slopes,
        softcap,
        sinks,
        dropout_p,
        scale,
        backend,
    )
    out, lse = torch.ops.flashx.attention(*arguments)
    if repeated is not None and quick.came_before(repeated, query, out):
        problem, inputs, chosen = ops.described(arguments)
        quick.keep(repeated, [(problem, inputs)], chosen, (query, key, value), out)
    return AttentionResult(out, lse) if return_lse else out


def explain(*arguments: Any, **options: Any) -> Explanation:
    """Which backend and kernel a call would run, and why each other one would not. Runs nothing.

    Args:
        arguments: those of ``flashx.attention``; or a variant's function (``flashx.sliding_window_attention``, ...),
            and then its own arguments.
        options: its keyword arguments.

    Raises:
        ValueError, TypeError: as the function itself; ValueError for a function that has no explanation.

    Example:
        >>> q = torch.randn(1, 8, 128, 64)
        >>> print(flashx.explain(q, q, q))  # doctest: +SKIP
        problem: batch 1, heads 8/8, length 128x128, dim 64/64, float32 on cpu
        runs on: cpu/avx512
          cuda: tensors are on cpu, not on cuda
          cpu: chosen
          reference: could run
    """
    function: Any = attention
    if arguments and callable(arguments[0]) and not isinstance(arguments[0], torch.Tensor):
        function, *arguments = arguments  # type: ignore[assignment]
    if function not in EXPLAINERS:
        known = ", ".join(sorted(known.__name__ for known in EXPLAINERS))
        raise ValueError(f"explain's function must be one of {known}, got {function!r}")
    return EXPLAINERS[function](*arguments, **options)


def explain_problem(problem: Problem, backend: str | None) -> Explanation:
    """The explanation of one problem, for a backend asked for by name or not."""
    dispatch.check_name(backend)
    refusals = dispatch.refusals(problem)
    automatic = [name for name, found in dispatch.BACKENDS.items() if found.AUTOMATIC]
    candidates = automatic if backend is None else [backend]
    chosen = next((name for name, why in refusals.items() if not why and name in candidates), None)
    kernel = None if chosen is None else dispatch.BACKENDS[chosen].kernel(problem)
    return Explanation(problem, chosen, kernel, refusals)


def _explain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    block_mask: BlockMask | None = None,
    sink_tokens: int = 0,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    arguments = operator_arguments(
        query, key, value, causal, window, block_mask, bias, alibi_slopes, softcap, sinks, dropout_p, scale, backend,
        sink_tokens=sink_tokens, draw=False,
    )  # fmt: skip
    return explain_problem(ops.describe(arguments), backend)


# What explains a function's calls; takes its arguments.
EXPLAINERS: dict[Callable[..., Any], Callable[..., Any]] = {attention: _explain_attention}


def operator_arguments(
    query: Any,
    key: Any,
    value: Any,
    causal: Any,
    window: Any,
    block_mask: Any,
    bias: Any,
    alibi_slopes: Any,
    softcap: Any,
    sinks: Any,
    dropout_p: Any,
    scale: Any,
    backend: Any,
    *,
    sink_tokens: Any = 0,
    draw: bool = True,
) -> tuple[Any, ...]:
    """The operator's arguments; checks what the operator's own checks (Problem.from_tensors) can no longer see."""
    for name, tensor, optional in (
        ("query", query, False),
        ("key", key, False),
        ("value", value, False),
        ("bias", bias, True),
        ("alibi_slopes", alibi_slopes, True),
        ("sinks", sinks, True),
    ):
        if not isinstance(tensor, torch.Tensor) and not (optional and tensor is None):
            raise TypeError(
                f"{name} must be a torch.Tensor{' or None' if optional else ''}, got {type(tensor).__name__}"
            )
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a flashx.BlockMask or None, got {type(block_mask).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if isinstance(sink_tokens, bool) or not isinstance(sink_tokens, (int, torch.SymInt)):
        raise TypeError(f"sink_tokens must be an int, got {type(sink_tokens).__name__}")
    if not 0 <= sink_tokens < 2**31:
        raise ValueError(f"sink_tokens must be >= 0 and below 2**31, got {sink_tokens}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    softcap = _number("softcap", softcap)
    dropout_p = _number("dropout_p", dropout_p)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("bias", bias)):
        if tensor is not None:
            check_dense(name, tensor)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, dim), got shape {tuple(tensor.shape)}"
            )
    if scale is not None:
        scale = _number("scale", scale)
    elif query.shape[3] >= 1:
        scale = 1.0 / math.sqrt(query.shape[3])
    else:
        raise ValueError(f"query must have a head dim of at least 1, got shape {tuple(query.shape)}")
    left, right = _window(window)
    if causal:
        right = 0
    if alibi_slopes is not None:
        if alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes must not require a gradient (pass a bias for that), got requires_grad=True")
        alibi_slopes = _in_accumulation_dtype("alibi_slopes", alibi_slopes, query)
    if sinks is not None:
        sinks = _in_accumulation_dtype("sinks", sinks, query)
    seed = None
    if dropout_p > 0:
        if draw:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        else:
            seed = torch.zeros((), dtype=torch.int64, device="cpu")
    shift = key.shape[2] - query.shape[2]
    plain = (
        query, key, value, bias, alibi_slopes, sinks, seed,
        left, right, shift, scale, softcap, dropout_p, backend,
    )  # fmt: skip
    if block_mask is None and sink_tokens == 0:
        return plain
    if block_mask is None:
        return *plain, None, None, None, None, None, None, sink_tokens
    return *plain, block_mask.map, block_mask.bits, None, None, None, None, sink_tokens, *block_mask.block


def _in_accumulation_dtype(name: str, tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}")
    return tensor.to(accumulation_dtype(query.dtype))


def _window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right), got {window!r}")
    left, right = window
    for side, width in (("left", left), ("right", right)):
        if width is None:
            continue
        if isinstance(width, bool) or not isinstance(width, (int, torch.SymInt)):
            raise TypeError(f"window's {side} width must be an int or None, got {width!r}")
        if not 0 <= width <= _WIDEST:
            raise ValueError(f"window's {side} width must be >= 0 and at most 2**62 (None is unbounded), got {width}")
    return left, right


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)
