"""Numbers as people read them."""

from __future__ import annotations

import math

from twa_merge.numerals import decimals, figure

NONE = "-"


def number(value: float | None, digits: int = 4) -> str:
    """``value`` with ``digits`` decimals; a dash where there is none."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    text = figure(value, digits)
    # Minus zero reads like a mistake.
    return text.removeprefix("-") if float(text) == 0 else text


def loss(value: float) -> str:
    return number(value, max(decimals([value]), 7 if 0 < abs(value) < 0.01 else 0))


def size(count: float) -> str:
    """Bytes with a decimal unit, as file managers and GPU vendors count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def amount(count: float) -> str:
    """A count in thousands, millions or billions where that is shorter."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 999.5:
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def duration(seconds: float) -> str:
    """``8.1 s``, ``4:05`` or ``1:02:09``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
