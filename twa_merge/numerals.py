"""Numbers as tables and sentences show them: how many digits, when as powers of ten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Decimals show too little of numbers below the first, and too much of those above the second.
_TINY, _LARGE = 1e-4, 1e4
_EXPLODED = 1e6
# What tables have, and the most that are written out; beyond that powers of ten are shorter.
_PLACES, _MOST_PLACES = 4, 7
_DIGITS = 3


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def sortable(value: Any) -> float:
    """A loss to sort by; missing ones and NaN last."""
    return float(value) if is_finite(value) else math.inf


def decimals(values: Sequence[Any]) -> int:
    """How many, 4 to 7, tell ``values`` apart; more for tiny ones, fewer for large ones.

    Less than none for powers of ten: -3 for thousands.
    """
    known = [float(v) for v in values if is_finite(v)]
    sizes = _sizes(known)
    fewest, most = _PLACES, _MOST_PLACES
    middle = sizes[len(sizes) // 2] if sizes else 1.0
    if middle < _TINY:
        fewest, most = 3 - _order(middle), 6 - _order(middle)
    elif sizes and sizes[0] >= _LARGE:
        fewest = 0
        # Up to seven digits are written out.
        if middle >= _EXPLODED and sizes[-1] >= 10 * _EXPLODED:
            fewest, most = 3 - _order(middle), min(-1, 6 - _order(middle))
    spread = max(known) - min(known) if known else 0.0
    wanted = 2 - _order(spread) if spread > 0 else fewest
    return min(most, max(fewest, wanted))


def smallest_decimals(values: Sequence[Any]) -> int:
    """``decimals``, where the smallest value has three digits as well."""
    sizes, places = _sizes(values), decimals(values)
    return max(places, _DIGITS - 1 - _order(sizes[0])) if sizes else places


def ordinary_decimals(values: Sequence[Any]) -> int:
    """Of a column of any numbers: four, unless they show too little or too much."""
    sizes = _sizes(values)
    ordinary = not sizes or (sizes[0] >= 10 ** (_DIGITS - 1 - _PLACES) and sizes[0] < _LARGE)
    return _PLACES if ordinary else smallest_decimals(values)


def _sizes(values: Sequence[Any]) -> list[float]:
    """Magnitudes of all that is known and not zero, in ascending order."""
    return sorted(abs(float(v)) for v in values if is_finite(v) and v)


def _order(value: float) -> int:
    """The power of ten that a number starts with."""
    return math.floor(math.log10(abs(value)))


def figure(value: float, places: int) -> str:
    """``value`` with so many decimals, from ``decimals``.

    As a power of ten where the others are tiny or huge, and, in short, where it has exploded.
    """
    exploded = abs(value) >= _EXPLODED
    if exploded and places >= 0:
        return f"{value:.{3 if places >= _PLACES else 7}g}"
    if 0 <= places <= _MOST_PLACES or value == 0 or math.isnan(value):
        return f"{value:.{max(0, min(places, _MOST_PLACES))}f}"
    return f"{value:.{min(6, max(0, places + _order(value)))}e}"


def cell(value: Any, places: int) -> str:
    """``value`` as tables have it; empty where it is not known or not finite."""
    return figure(value, places) if is_finite(value) else ""


def span(ends: tuple[float, float] | None, places: int) -> str:
    """An interval in words; empty where it is not known."""
    return f"{figure(ends[0], places)} to {figure(ends[1], places)}" if ends else ""
