"""patch() and unpatch(): torch's attention becomes flashx's."""

from __future__ import annotations


def patch() -> None: ...


def unpatch() -> None: ...
