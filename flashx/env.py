"""Environment variables read at run time, all of them (table in docs/building.md)."""

from __future__ import annotations

import os


def cpu_isa() -> str | None:
    """FLASHX_CPU_ISA: force the CPU kernels' instruction set (see flashx.build_info()); None lets flashx choose."""
    return os.environ.get("FLASHX_CPU_ISA") or None


def triton_interpret() -> bool:
    """TRITON_INTERPRET, Triton's own: 1 lets its interpreter run the Triton kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
