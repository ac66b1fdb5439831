"""flashx: IO-aware exact attention for PyTorch."""

from __future__ import annotations

from . import nn
from .attention import AttentionResult, Explanation, attention, explain
from .dispatch import UnsupportedError
from .merge import merge_attention
from .patching import patch, unpatch
from .version import __version__, build_info

__all__ = [
    "AttentionResult",
    "Explanation",
    "UnsupportedError",
    "__version__",
    "attention",
    "build_info",
    "explain",
    "merge_attention",
    "nn",
    "patch",
    "unpatch",
]
