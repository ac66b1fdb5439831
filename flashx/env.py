"""Environment variables read at run time, all of them (table in docs/building.md)."""

from __future__ import annotations

import os


def cpu_isa() -> str | None:
    """FLASHX_CPU_ISA: force the CPU kernels' instruction set (see flashx.build_info()); None lets flashx choose."""
    return os.environ.get("FLASHX_CPU_ISA") or None


def triton_interpret() -> bool:
    """TRITON_INTERPRET, Triton's own: 1 lets its interpreter run the Triton kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_autotune() -> bool:
    """FLASHX_TRITON_AUTOTUNE: 1 has the Triton kernels time tiles around their table's, and keep the fastest."""
    return os.environ.get("FLASHX_TRITON_AUTOTUNE") == "1"


def cache_folder() -> str:
    """Where flashx may keep files: in XDG_CACHE_HOME, which is everybody's, else in ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is none.
    return os.path.join(given if os.path.isabs(given) else os.path.expanduser("~/.cache"), "flashx")
