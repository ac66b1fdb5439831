"""The CUDA backends: csrc/cuda's kernels on GPUs, and the same ones on the emulator (csrc/emulator), for CPU tensors.

Nothing here waits for the device, so calls may be captured into a CUDA graph. Dropout's seed goes to the kernels by
value: every replay of a graph drops what the capture dropped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .. import _C
from ..problem import Carry, Gradients, Inputs, Problem
from . import native


@dataclass(frozen=True)
class Cuda:
    """One machine that runs csrc/cuda.

    ``kernels`` is the machine's part of flashx._C, None where the build has none; ``setting`` is what builds it.
    """

    NAME: str
    DEVICE: str
    AUTOMATIC: bool
    kernels: _C.Machine | None
    setting: str

    def limits(self, problem: Problem) -> list[str]:
        """What of the problem the kernels do not have."""
        no_float64 = ["the CUDA kernels have no float64"] if problem.dtype == torch.float64 else []
        return no_float64 + native.too_wide(problem)

    def why_not(self, problem: Problem) -> list[str]:
        """Reasons against running the problem on this machine; empty if it can."""
        reasons = []
        if self.kernels is None:
            reasons.append(f"this build has no {self.NAME} kernels: set {self.setting} and build again")
        if problem.device != self.DEVICE:
            reasons.append(f"tensors are on {problem.device}, not on {self.DEVICE}")
        elif not reasons and self.DEVICE == "cuda":
            reasons += _uncovered(torch.cuda.current_device())
        return reasons + self.limits(problem)

    def kernel(self, problem: Problem) -> str:
        """Name of the kernel that runs the problem."""
        assert self.kernels is not None
        described = native.describe(problem)
        # The name depends on whether there are tables, not on what they hold: any address does.
        if problem.ragged:
            described.set_sequences(1)
        if problem.groups is not None:
            described.set_members(1, 1, problem.groups)
        return f"{self.NAME}/{self.kernels.forward_kernel(described)}"

    def forward(
        self, problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, carry: Carry | None = None
    ) -> None:
        assert self.kernels is not None
        described = native.with_inputs(problem, inputs)
        size = self.kernels.forward_workspace(described)
        # torch's allocator keeps the memory to this stream, so it may be freed while the kernel still runs.
        workspace = torch.empty(size, dtype=torch.uint8, device=out.device) if size else None
        tensors = native.forward_tensors(problem, inputs, out, lse)
        address = 0 if workspace is None else workspace.data_ptr()
        state = native.carried(carry)
        self.kernels.forward(described, *tensors, state, *_device_and_stream(out), address, native.tf32())

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        gradients: Gradients,
    ) -> None:
        assert self.kernels is not None
        delta = torch.empty_like(lse)
        described = native.with_inputs(problem, inputs)
        tensors = native.backward_tensors(problem, inputs, out, lse, grad_out, grad_lse, delta, gradients)
        self.kernels.backward(described, *tensors, *_device_and_stream(out), native.tf32())
        native.write_sinks_gradient(inputs, lse, delta, gradients)


def covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a build for archs (build_info's "80" or "120+PTX") runs on a GPU of that compute capability.

    Machine code runs on its own major version from its minor version on, PTX on everything that is not older.
    """
    for arch in archs:
        number = int(arch.removesuffix("+PTX"))
        built = (number // 10, number % 10)
        if (built[0] == capability[0] and built <= capability) or (arch.endswith("+PTX") and built <= capability):
            return True
    return False


@functools.cache
def _uncovered(device: int) -> list[str]:
    """A reason if the build has no code for the GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    archs = _C.build_info()["cuda_archs"]
    if covers(archs, (major, minor)):
        return []
    return [f"the GPU has compute capability {major}.{minor}, this build is for {', '.join(archs)}"]


def _device_and_stream(tensor: torch.Tensor) -> tuple[int, int]:
    if not tensor.is_cuda:
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


CUDA = Cuda("cuda", "cuda", True, getattr(_C, "cuda", None), "FLASHX_CUDA=1")
EMULATED = Cuda("cuda_emulated", "cpu", False, getattr(_C, "cuda_emulated", None), "FLASHX_EMULATOR=1")
