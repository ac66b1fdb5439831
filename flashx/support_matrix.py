"""The support matrix: features x backends, asked of the backends. ``python -m flashx.support_matrix`` prints it."""

from __future__ import annotations

import dataclasses

import torch

from . import dispatch
from .masks import IntervalMask
from .problem import Problem

_PLAIN = Problem(
    batch=1,
    q_heads=8,
    kv_heads=8,
    q_len=128,
    k_len=128,
    head_dim=64,
    value_dim=64,
    dtype=torch.float32,
    device="cpu",
    mask=IntervalMask(),
    scale=0.125,
)

# Feature, and what it changes about a plain call.
_FEATURES: dict[str, dict[str, object]] = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "GQA, MQA": {"kv_heads": 1},
    "causal, top-left": {"mask": IntervalMask(right=0), "q_len": 64},
    "causal, bottom-right": {"mask": IntervalMask(right=0, shift=64), "q_len": 64},
    "sliding window": {"mask": IntervalMask(left=16, right=16)},
    "sink tokens": {"mask": IntervalMask(left=16, right=0, first=4)},
    "block mask": {"block": (64, 64)},
    "packed sequences (varlen)": {"ragged": True, "packed": True},
    "shared prefixes, trees": {"ragged": True, "groups": 1},
    "paged cache (forward)": {"ragged": True, "page": 16},
    "additive bias": {"bias": torch.float32},
    "boolean mask": {"bias": torch.bool},
    "ALiBi": {"alibi": True},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.1},
    "value dim other than head dim": {"value_dim": 96},
    "head dim up to 256": {"head_dim": 256, "value_dim": 256},
    "head dim over 256": {"head_dim": 512},
}


def markdown() -> str:
    """The matrix as a markdown table; every feature holds forward and backward, and composes with every other.

    Backends that run only where they are named are for development, and left out.
    """
    backends = {name: backend for name, backend in dispatch.BACKENDS.items() if backend.AUTOMATIC}
    lines = [f"| feature | {' | '.join(backends)} |", f"|---|{'---|' * len(backends)}"]
    for feature, changes in _FEATURES.items():
        problem = dataclasses.replace(_PLAIN, **changes)  # type: ignore[arg-type]
        cells = ("; ".join(backend.limits(problem)) or "yes" for backend in backends.values())
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
