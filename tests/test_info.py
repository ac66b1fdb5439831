"""flashx.build_info, python -m flashx.info, and what importing flashx does: nothing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

import torch

import flashx
from flashx import _C


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_build_info() -> None:
    info = flashx.build_info()
    assert set(info) == {"version", "torch", "backends", "cuda_archs", "cpu_isa", "cpu_isas", "compiler"}
    assert info["version"] == flashx.__version__
    assert info["torch"] == torch.__version__
    assert "cpu" in info["backends"]
    assert info["cpu_isas"] == _C.cpu_isas() and info["cpu_isa"] in info["cpu_isas"]


def test_compiled_backends() -> None:
    """What is listed is there, and what is there is listed; architectures only with the kernels for GPUs."""
    info = flashx.build_info()
    for name in ("cuda", "cuda_emulated"):
        assert (name in info["backends"]) == hasattr(_C, name)
    assert bool(info["cuda_archs"]) == ("cuda" in info["backends"])
    assert all(re.fullmatch(r"\d{2,3}(\+PTX)?", arch) for arch in info["cuda_archs"])


def test_version_is_the_distributions() -> None:
    assert flashx.__version__ == importlib.metadata.version("flashx")


def test_command() -> None:
    done = _run("-m", "flashx.info", FLASHX_CPU_ISA="plain")
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert printed["version"] == flashx.__version__ and printed["cpu_isa"] == "plain"
    assert printed["cpu_isas"] == ", ".join(_C.cpu_isas())


def test_import_is_pure() -> None:
    """Nothing printed, torch's attention and its settings left alone."""
    code = """
import torch
before = torch.nn.functional.scaled_dot_product_attention, torch.get_num_threads(), torch.get_rng_state()
import flashx
after = torch.nn.functional.scaled_dot_product_attention, torch.get_num_threads(), torch.get_rng_state()
assert before[:2] == after[:2] and torch.equal(before[2], after[2])
"""
    done = _run("-W", "error::UserWarning:flashx", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names() -> None:
    for name in flashx.__all__:
        assert hasattr(flashx, name), name
