"""Long names shortened so that those of one picture stay apart."""

from __future__ import annotations

from collections.abc import Sequence


def shortened(names: Sequence[str], widths: Sequence[int], dots: str = "…") -> list[str]:
    """The ends of long names, where most differ, or with as much more as tells them apart.

    Args:
        widths: in characters, tried in turn.
        dots: stand for what is left out.
    """
    for width in widths:
        for head in (0, width // 3, width // 2, width * 2 // 3):
            found = [_cut(name, head, width, dots) for name in names]
            if len(set(found)) == len(set(names)):
                return found
    return [_cut(name, 0, widths[0], dots) for name in names]


def _cut(name: str, head: int, width: int, dots: str) -> str:
    """A name of ``width`` characters at most: ``head`` of them, dots, and its end."""
    if len(name) <= width:
        return name
    return name[:head] + dots + name[head + len(dots) - width :]
