"""What this build of flashx is and can do."""

from __future__ import annotations

from typing import Any

import torch

from . import _C
from .backends import cpu

__version__: str = _C.build_info()["version"]


def build_info() -> dict[str, Any]:
    """Version, compiled backends, CUDA architectures, the CPU instruction set in use, compiler.

    Returns:
        dict with the keys ``version``, ``torch``, ``backends`` (compiled ones), ``cuda_archs`` (compute capabilities
        that the CUDA kernels have machine code for, such as "80", and "120+PTX" where newer GPUs can compile it),
        ``cpu_isa`` (in use), ``cpu_isas`` (usable on this machine, best first), ``compiler``.

    Example:
        >>> flashx.build_info()["backends"][0]
        'cpu'
    """
    built = _C.build_info()
    return {
        "version": built["version"],
        "torch": torch.__version__,
        "backends": built["backends"],
        "cuda_archs": built["cuda_archs"],
        "cpu_isa": cpu.isa(),
        "cpu_isas": _C.cpu_isas(),
        "compiler": built["compiler"],
    }
