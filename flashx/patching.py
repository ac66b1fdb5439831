"""patch() and unpatch(): torch.nn.functional.scaled_dot_product_attention becomes flashx's."""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import Any, NamedTuple

import torch

from .nn.functional import scaled_dot_product_attention


class _Saved(NamedTuple):
    """What torch had before the first patch()."""

    attention: Any
    fastpath: bool


_lock = threading.Lock()
_depth = 0
_saved: _Saved | None = None


class Patched:
    """What patch() returns: as a context manager it calls unpatch() at the end of the block."""

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unpatch()


def patch() -> Patched:
    """Replace ``torch.nn.functional.scaled_dot_product_attention`` by flashx's, for the whole process.

    Whatever looks the function up in ``torch.nn.functional`` at call time then runs on flashx, also
    ``torch.nn.MultiheadAttention`` and ``torch.nn.TransformerEncoder``: their inference fast path, which does not
    call it, is switched off meanwhile (``torch.backends.mha``). Calls of patch() nest; each wants its unpatch().
    Thread-safe. docs/drop-in.md says what it cannot reach.

    Returns:
        A context manager whose exit calls ``unpatch()``. The patch is in place already when patch() returns.

    Example:
        >>> with flashx.patch():
        ...     model(tokens).sum().backward()
    """
    global _depth, _saved
    with _lock:
        if _saved is None:
            functional, mha = torch.nn.functional, torch.backends.mha
            _saved = _Saved(functional.scaled_dot_product_attention, mha.get_fastpath_enabled())
            functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
            mha.set_fastpath_enabled(False)
        _depth += 1
    return Patched()


def unpatch() -> None:
    """Undo one patch(); the last one puts torch's own function and fast path back.

    Warns:
        RuntimeWarning: something else has replaced the function since patch(); that replacement stays.

    Raises:
        RuntimeError: there is no patch() to undo.
    """
    global _depth, _saved
    with _lock:
        if _saved is None:
            raise RuntimeError("flashx.unpatch() without flashx.patch(): there is nothing to undo")
        _depth -= 1
        if _depth > 0:
            return
        saved, _saved = _saved, None
        torch.backends.mha.set_fastpath_enabled(saved.fastpath)
        replaced = torch.nn.functional.scaled_dot_product_attention is not scaled_dot_product_attention
        if not replaced:
            torch.nn.functional.scaled_dot_product_attention = saved.attention
    if replaced:
        message = (
            "torch.nn.functional.scaled_dot_product_attention was replaced after flashx.patch(); it stays as it is"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
