"""The examples run, and training on flashx is training on torch."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashx

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ARCHS = ["gpt2", "llama"]
STEPS = 12

# Of a loss of about 4 in float64. Rounding (4e-16 of it) leaves curves some 1e-15 apart, those of torch's own two
# implementations too; a thousand times that still tells a scale that is off by a billionth.
BOUND = 1e-12


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "runs on: " in capsys.readouterr().out
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("train_tiny_lm")


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def train(example: ModuleType, arch: str) -> list[float]:
    return example.train(arch, STEPS, batch=2, context=65, dtype=torch.float64)


@pytest.fixture(scope="module")
def on_torch(example: ModuleType, arch: str) -> list[float]:
    return train(example, arch)


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_flashx_gives_the_same_loss_curve(example: ModuleType, arch: str, on_torch: list[float]) -> None:
    with flashx.patch(), Operators() as operators:
        on_flashx = train(example, arch)
    assert largest_difference(on_flashx, on_torch) <= BOUND
    assert on_torch[-1] < on_torch[0] - 1.5, "the model does not learn"

    # Every layer of every step ran on flashx, forward and backward, and none on torch.
    assert operators.calls["flashx::attention"] == example.LAYERS * STEPS
    assert operators.calls["flashx::attention_backward"] == example.LAYERS * STEPS
    assert not [name for name in operators.calls if "_scaled_dot_product" in name]


def test_the_bound_tells_a_wrong_attention(
    example: ModuleType, arch: str, on_torch: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.nn.functional.scaled_dot_product_attention

    def wrong(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return right(query, *arguments, scale=(1 + 1e-9) / query.shape[-1] ** 0.5, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    assert largest_difference(train(example, arch), on_torch) > BOUND


def test_the_script(
    example: ModuleType, arch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tiny_lm.py", "--arch", arch, "--steps", "2"])
    example.main()
    output = capsys.readouterr().out
    first, second = (line.split() for line in output.splitlines() if line.lstrip()[:2] in ("0 ", "1 "))
    assert float(second[1]) < float(first[1])
    # The strict comparison is the one in float64 above; here it is the columns that count.
    assert float(second[3]) == pytest.approx(float(second[1]), abs=1e-4)
    assert "largest difference" in output


def test_bad_arguments(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tiny_lm.py", "--steps", "0"])
    with pytest.raises(SystemExit) as error:
        example.main()
    assert error.value.code == 2
    assert "--steps: must be at least 1, got 0" in capsys.readouterr().err
