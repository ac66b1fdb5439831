"""The Triton kernels: interpreted on the CPU, compiled without a GPU. That needs two environments: a process each."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
