"""backend="cuda" as a citizen of torch: chosen for CUDA tensors, on their device and stream, never waiting for it."""

from __future__ import annotations

import pytest
import tolerance
import torch
from conftest import CUDA_ENGINES

import flashx

pytestmark = pytest.mark.skipif("cuda" not in CUDA_ENGINES, reason="no GPU, or a build without its kernels")


def _draw(*shape: int, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, torch.float16).requires_grad_()


def _step(tensors: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    out = flashx.attention(*tensors, **options)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return [_draw(2, 4, 130, 64), _draw(2, 2, 150, 64), _draw(2, 2, 150, 64)]


def test_chosen_for_cuda_tensors(tensors: list[torch.Tensor]) -> None:
    explanation = flashx.explain(*tensors, causal=True)
    assert explanation.backend == "cuda" and explanation.refusals["cpu"] == ["tensors are on cuda, not on cpu"]
    double = [tensor.double() for tensor in tensors]
    assert flashx.explain(*double).refusals["cuda"] == ["the CUDA kernels have no float64"]


def test_nothing_waits(tensors: list[torch.Tensor]) -> None:
    """torch raises where its own code waits for the device."""
    sinks = torch.zeros(4, device="cuda", requires_grad=True)
    split = [_draw(1, 8, 1, 64), _draw(1, 2, 5000, 64), _draw(1, 2, 5000, 64)]  # with a workspace
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(tensors, causal=True, dropout_p=0.1, softcap=5.0)
        flashx.attention(*tensors, sinks=sinks).sum().backward()
        _step(split)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream(tensors: list[torch.Tensor]) -> None:
    """The inputs come late on a stream of its own; a kernel on another stream would not wait for them."""
    expected = _step(tensors, causal=True)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(tensor) for tensor in tensors]
        torch.cuda._sleep(50_000_000)
        for tensor, source in zip(late, tensors, strict=True):
            tensor.copy_(source.detach())
        actual = _step([tensor.requires_grad_() for tensor in late], causal=True)
    stream.synchronize()
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        tolerance.same_bits(f"result {number}", one, other)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_graphs(tensors: list[torch.Tensor], dropout_p: float) -> None:
    """A replay computes with what the inputs hold by then; dropout keeps the seed of the capture."""
    static = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(static, causal=True, dropout_p=dropout_p)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch.manual_seed(5)
    with torch.cuda.graph(graph):
        results = _step(static, causal=True, dropout_p=dropout_p)
    others = [(2 * tensor).detach().requires_grad_() for tensor in tensors]
    with torch.no_grad():
        for tensor, source in zip(static, others, strict=True):
            tensor.copy_(source)
    for _ in range(2):
        graph.replay()
        torch.manual_seed(5)
        for number, expected in enumerate(_step(others, causal=True, dropout_p=dropout_p)):
            tolerance.same_bits(f"result {number}", results[number], expected)


def test_graphs_of_split_keys() -> None:
    tensors = [_draw(1, 8, 1, 64), _draw(1, 2, 5000, 64), _draw(1, 2, 5000, 64)]
    with torch.no_grad():
        expected = flashx.attention(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flashx.attention(*tensors)
        out.zero_()
        graph.replay()
    tolerance.same_bits("out", out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device(tensors: list[torch.Tensor]) -> None:
    """The call runs where the tensors are, and leaves the current device as it was."""
    expected = _step(tensors, causal=True)
    there = [tensor.detach().to("cuda:1").requires_grad_() for tensor in tensors]
    results = _step(there, causal=True)
    assert torch.cuda.current_device() == 0 and {tensor.device.index for tensor in results} == {1}
    for number, (one, other) in enumerate(zip(results, expected, strict=True)):
        tolerance.same_bits(f"result {number}", one.cpu(), other.cpu())


def test_memory_is_linear() -> None:
    """No buffer of size Lq x Lk, forward or backward."""
    length = 16384
    tensors = [_draw(1, 1, length, 64) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(tensors, causal=True)
    assert torch.cuda.max_memory_allocated() - before < 16 * length * 64 * 2 < length * length


def test_inputs_that_the_cuda_kernels_lack() -> None:
    tensors = [_draw(1, 1, 3, 300) for _ in range(3)]
    with pytest.raises(flashx.UnsupportedError, match="cuda: head dim 300 is over 256"):
        flashx.attention(*tensors, backend="cuda")
