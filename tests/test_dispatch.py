"""flashx.dispatch and flashx.explain: the first backend without a reason against a problem runs it, and says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import CASES, Case

import flashx
from flashx import _C, dispatch
from flashx.backends import cpu, reference

WIDE = torch.randn(1, 1, 3, 300)


def test_order() -> None:
    """Fast ones first; the reference, which takes everything, last."""
    assert list(dispatch.BACKENDS) == ["cpu", "reference"]
    assert {"cpu": cpu, "reference": reference} == dispatch.BACKENDS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpu_kernels_take_every_case(case: Case) -> None:
    explanation = flashx.explain(**case.inputs(torch.float32).arguments(), **case.options())
    assert explanation.backend == "cpu" and explanation.refusals == {"cpu": [], "reference": []}


def test_explanation(engine: str) -> None:
    query = torch.randn(1, 2, 3, 4)
    explanation = flashx.explain(query, query, query, backend=engine)
    assert explanation.backend == engine
    kernel = {"cpu": f"cpu/{cpu.isa()}", "reference": "reference/naive"}[engine]
    assert explanation.kernel == kernel
    lines = str(explanation).splitlines()
    assert lines[:2] == [f"problem: {explanation.problem}", f"runs on: {kernel}"]
    other = {"cpu": "reference", "reference": "cpu"}[engine]
    assert f"  {engine}: chosen" in lines and f"  {other}: could run" in lines


def test_explanation_of_a_refusal() -> None:
    alone = flashx.explain(WIDE, WIDE, WIDE, backend="cpu")
    assert alone.backend is None and alone.kernel is None and "runs on: nothing" in str(alone)
    assert alone.refusals["cpu"] == ["head dim 300 is over 256", "value dim 300 is over 256"]
    assert "  cpu: head dim 300 is over 256; value dim 300 is over 256" in str(alone)


def test_explain_runs_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    query = torch.full((1, 2, 3, 4), float("nan"))
    flashx.explain(query, query, query, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reference_is_never_chosen_silently() -> None:
    with pytest.warns(UserWarning, match="head dim 300 is over 256"):
        out = flashx.attention(WIDE, WIDE, WIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = flashx.attention(WIDE, WIDE, WIDE, backend="reference")
    assert torch.equal(out, asked)


def test_forced_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for isa in _C.cpu_isas():
            monkeypatch.setenv("FLASHX_CPU_ISA", isa)
            cpu.isa.cache_clear()
            assert cpu.isa() == isa
        for unset in ("", None):
            if unset is None:
                monkeypatch.delenv("FLASHX_CPU_ISA")
            else:
                monkeypatch.setenv("FLASHX_CPU_ISA", unset)
            cpu.isa.cache_clear()
            assert cpu.isa() == _C.cpu_isas()[0]
        monkeypatch.setenv("FLASHX_CPU_ISA", "mmx")
        cpu.isa.cache_clear()
        with pytest.raises(ValueError, match=r"FLASHX_CPU_ISA must be one of .*plain.* got 'mmx'"):
            flashx.attention(WIDE[..., :8], WIDE[..., :8], WIDE[..., :8])
    finally:
        monkeypatch.undo()
        cpu.isa.cache_clear()


def test_plain_is_everywhere() -> None:
    assert _C.cpu_isas()[-1] == "plain"
