"""flashx: IO-aware exact attention for PyTorch."""

from __future__ import annotations

from . import io, neighborhood, nn
from .attention import AttentionResult, Explanation, attention, explain
from .block_mask import BlockMask
from .decode import KVCache, PagedKVCache, decode_attention
from .dispatch import UnsupportedError
from .merge import merge_attention
from .neighborhood import neighborhood_attention
from .patching import patch, unpatch
from .prefix_calls import PrefixLevel
from .prefix_plan import SharedPrefixExplanation
from .prefix_tree import PrefixNode, PrefixTree
from .shared_prefix import shared_prefix_attention, tree_attention
from .simplicial import simplicial_attention
from .sparse import block_sparse_attention, sliding_window_attention
from .varlen import varlen_attention
from .version import __version__, build_info

__all__ = [
    "AttentionResult",
    "BlockMask",
    "Explanation",
    "KVCache",
    "PagedKVCache",
    "PrefixLevel",
    "PrefixNode",
    "PrefixTree",
    "SharedPrefixExplanation",
    "UnsupportedError",
    "__version__",
    "attention",
    "block_sparse_attention",
    "build_info",
    "decode_attention",
    "explain",
    "io",
    "merge_attention",
    "neighborhood",
    "neighborhood_attention",
    "nn",
    "patch",
    "shared_prefix_attention",
    "simplicial_attention",
    "sliding_window_attention",
    "tree_attention",
    "unpatch",
    "varlen_attention",
]
