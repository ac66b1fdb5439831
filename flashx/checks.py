"""Checks of single arguments; those of arguments against each other are in problem.py."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .problem import check_dense


def on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def check_tensor(name: str, tensor: Any) -> None:
    """A dense torch.Tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)


def check_int(name: str, value: Any, at_least: int = 0) -> int:
    """The value, an int of at least that."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")
    return value
