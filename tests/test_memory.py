"""Memory: nothing grows with Lq x Lk, forward or backward, whatever the mask."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import tolerance
import torch
from cases import CASES, COMBINED, Case
from conftest import CUDA_ENGINES

# At this length the matrix of logits would be 1 GiB; all inputs, outputs and gradients together are 6 MiB.
LENGTH = 16384
MATRIX_MIB = LENGTH * LENGTH * 4 / 2**20
ALLOWED_MIB = 64

MEASURE = """
import json, resource, sys, torch, flashx

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

length, options, backward = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "backward"
torch.set_num_threads(2)
torch.manual_seed(0)
bias = torch.zeros(length, requires_grad=True) if options.pop("bias", False) else None
blocks = options.pop("blocks", False)

def attend(n):
    query, key, value = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    mask = flashx.BlockMask.streaming(n, n, sink=70, local=150) if blocks else None
    options.update(bias=None if bias is None else bias[:n], block_mask=mask)
    out = flashx.attention(query, key, value, backend="cpu", **options)
    if backward:
        out.sum().backward()

attend(200)  # what torch and the threads need once
before = peak_mib()
attend(length)
print(peak_mib() - before)
"""


def _growth_mib(options: dict[str, object], direction: str) -> float:
    command = [sys.executable, "-c", MEASURE, str(LENGTH), json.dumps(options), direction]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


# Windows keep most of them quick: the memory that a wrong kernel would take does not depend on what is visible.
OPTIONS = [
    ({"causal": True}, "forward"),
    ({"window": [100, 100]}, "backward"),
    ({"blocks": True}, "backward"),
    ({"window": [64, 0], "bias": True, "dropout_p": 0.1, "softcap": 5.0}, "backward"),
]


@pytest.mark.skipif(sys.platform == "darwin", reason="ru_maxrss is in bytes there")
@pytest.mark.parametrize("options, direction", OPTIONS, ids=str)
def test_peak_memory(options: dict[str, object], direction: str) -> None:
    growth = _growth_mib(options, direction)
    assert growth < ALLOWED_MIB < MATRIX_MIB / 10, f"{growth:.0f} MiB; the matrix would take {MATRIX_MIB:.0f} MiB"


# Every subset of the features that need memory of their own, with dims from the smallest on.
WORKSPACES = CASES + [
    replace(
        COMBINED[6], q_len=200, k_len=200, head_dim=dim, value_dim=dim, softcap=softcap, dropout_p=dropout_p, bias=bias
    )
    for dim in (1, 16, 40, 256)
    for softcap in (0.0, 3.0)
    for dropout_p in (0.0, 0.1)
    for bias in (None, COMBINED[1].bias)
]


@pytest.mark.usefixtures("threads")
def test_workspaces_are_large_enough(engine: str) -> None:
    """A kernel may keep its memory for the next call; in a thread of its own no call lives off an earlier one."""
    torch.set_num_threads(1)
    failures = []

    def attend(case: Case, dtype: torch.dtype) -> None:
        try:
            tolerance.attend(case, case.inputs(dtype), engine)
        except Exception as error:
            failures.append(f"{case} {dtype}: {error!r}")

    for case in WORKSPACES:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            if dtype == torch.float64 and engine in CUDA_ENGINES:
                continue
            thread = threading.Thread(target=attend, args=(case, dtype))
            thread.start()
            thread.join()
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:5]])
