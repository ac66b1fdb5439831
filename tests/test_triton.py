"""The Triton kernels: interpreted on the CPU, compiled without a GPU. That needs two environments: a process each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashx
from flashx.backends import triton as backend

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(file: str, marked: str, interpret: bool) -> None:
    """One of the files beside this one, in a pytest of its own."""
    # The interpreter's products are small: threads would wait for each other more than they compute.
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    arguments = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", marked, "--tb=short"]
    command = [sys.executable, "-m", "pytest", *arguments, str(Path(__file__).with_name(file))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
def test_interpreted() -> None:
    run("triton_interpreted.py", "not slow", interpret=True)


@needs_triton
def test_simplicial_interpreted() -> None:
    run("triton_simplicial.py", "not slow", interpret=True)


@needs_triton
@pytest.mark.exhaustive
def test_every_case_interpreted() -> None:
    run("triton_interpreted.py", "slow", interpret=True)


@needs_triton
def test_compiled() -> None:
    run("triton_compiled.py", "not slow", interpret=False)


@needs_triton
@pytest.mark.exhaustive
def test_everything_compiled() -> None:
    run("triton_compiled.py", "slow", interpret=False)


def test_importing_flashx_does_not_import_triton() -> None:
    code = "import sys, flashx; assert not [name for name in sys.modules if name.split('.')[0] == 'triton']"
    code = code.replace("flashx;", "flashx, flashx.backends.triton;")
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_triton
@pytest.mark.parametrize("version, refused", [("3.5.1", True), ("3.6.0", False), ("3.10.0+git1", False), ("4", False)])
def test_a_triton_that_is_too_old(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    backend._not_installed.cache_clear()
    query = torch.zeros(1, 1, 3, 8)
    reasons = flashx.explain(query, query, query).refusals["triton"]
    backend._not_installed.cache_clear()
    reason = f"triton {version} is older than 3.6: pip install --upgrade triton"
    assert (reason in reasons) == refused
