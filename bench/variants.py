"""The variants that can be measured, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cases import Case, Dense
from .prefixes import SharedPrefix, Tree
from .ragged import Decode, Varlen
from .sparse import BlockSparse, Neighborhood

VARIANTS: dict[str, type[Case]] = {
    kind.VARIANT: kind for kind in (Dense, BlockSparse, SharedPrefix, Tree, Varlen, Decode, Neighborhood)
}


def from_dict(fields: Mapping[str, Any]) -> Case:
    """The inverse of Case.as_dict, through JSON.

    Raises:
        ValueError: a variant or a field that this version does not know.
    """
    values = {name: _frozen(value) for name, value in fields.items() if name != "variant"}
    variant = fields.get("variant")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    try:
        return VARIANTS[variant](**values)
    except TypeError as error:
        raise ValueError(f"not a case of {variant}: {error}") from None


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
