"""The README's support matrix is the one that the backends give."""

from __future__ import annotations

from pathlib import Path

from flashx import support_matrix


def test_readme_shows_the_generated_matrix() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    assert support_matrix.markdown() in readme.read_text(), "run python -m flashx.support_matrix and paste"
