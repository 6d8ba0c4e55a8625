"""Blocks that came to the same coefficients, as one row to be shown: whole layers of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from .document import Document, written_coefficients
from .errors import listing

_MOST_NAMES = 2


def shown_coefficients(document: Document) -> dict[str, list[float]]:
    """``written_coefficients``, where blocks that share theirs are one row.

    ``model.layers.0.* (12 tensors)`` are all whose names begin like that.
    """
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, row in written_coefficients(document).items():
        groups.setdefault(tuple(row), []).append(name)
    everywhere = Counter(prefix for group in groups.values() for prefix in _prefixes(group))
    kind = (document.get("blocks") or {}).get("kind")
    unit = "tensors" if kind == "tensors" else "blocks"
    return {_name(group, everywhere, unit): list(row) for row, group in groups.items()}


def _name(group: Sequence[str], everywhere: Counter[str], unit: str) -> str:
    if len(group) == 1:
        return group[0]
    here = Counter(_prefixes(group))
    names = dict.fromkeys(_covering(name, here, everywhere) for name in group)
    return f"{listing(names, _MOST_NAMES)} ({len(group)} {unit})"


def _covering(name: str, here: Counter[str], everywhere: Counter[str]) -> str:
    """The shortest beginning of a name under which nothing lies that is of another row."""
    for prefix in _prefixes([name]):
        if here[prefix] > 1 and here[prefix] == everywhere[prefix]:
            return f"{prefix}.*"
    return name


def _prefixes(names: Sequence[str]) -> Iterator[str]:
    """Of every name all beginnings that end before a dot, the shortest first."""
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            yield ".".join(parts[:depth])
