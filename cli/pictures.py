"""Tables, and bars and heat maps out of characters; in ASCII where the terminal knows no other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text

_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_POSITIVE, _NEGATIVE = "blue", "red"
_LABEL_WIDTHS = (28, 36)
# A longer name is folded into several lines of this width, rather than lose the figures beside it.
_LEAST_NAME = 16
_WIDEST = 100


def new_table(first: str, *others: str) -> Table:
    """Names in the first column, figures in the others."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def fitted(table: Table, width: int, least: Sequence[str] = ()) -> Table:
    """The table with as many columns as ``width`` has room for; the first one always stays.

    What is left out is named below it.

    Args:
        least: headings of the columns that go first, in this order; after them goes the last one.
    """
    kept = list(table.columns)
    going = [*least]
    while len(kept) > 1 and _needed(kept) > width:
        heading = going.pop(0) if going else kept[-1].header
        named = [c for c in kept[1:] if str(c.header) == str(heading)]
        if named:
            kept.remove(named[-1])
    if len(kept) == len(table.columns):
        return table
    narrow = new_table(str(kept[0].header), *(str(c.header) for c in kept[1:]))
    cells = zip(*(list(c.cells) for c in kept), strict=True)
    for row, found in zip(table.rows, cells, strict=True):
        narrow.add_row(*found, style=row.style)
    gone = ", ".join(str(c.header) for c in table.columns if c not in kept)
    said = [str(table.caption)] if table.caption else []
    narrow.caption = "\n".join([*said, f"left out for want of room: {gone}"])
    narrow.caption_justify = "left"
    return narrow


def _needed(columns: Sequence[Column]) -> int:
    """Cells that columns take side by side; names may be folded, figures may not."""
    widths = [
        max(cell_len(str(cell)) for cell in [column.header, *column.cells]) for column in columns
    ]
    # An edge on each side and three cells between two columns, as the box of `new_table` has them.
    return min(widths[0], _LEAST_NAME) + sum(widths[1:]) + 3 * len(columns) - 1


def bars(
    labels: Sequence[str], values: Sequence[float], *, width: int, ascii_only: bool, digits: int = 4
) -> list[Text]:
    """One line a value: label, number, bar; negative ones to the left of a common axis."""
    low, high = min(0.0, *values), max(0.0, *values)
    span = (high - low) or 1.0
    names = _shortened(labels, ascii_only)
    label_width = max(len(name) for name in names)
    figures = [f"{v:+.{digits}f}" if low < 0 else f"{v:.{digits}f}" for v in values]
    figure_width = max(len(f) for f in figures)
    cells = max(10, min(width, _WIDEST) - label_width - figure_width - 8)
    left = math.ceil(-low / span * cells)
    axis = "|" if ascii_only else "│"
    lines = []
    for name, figure, value in zip(names, figures, values, strict=True):
        line = Text(f"  {name:<{label_width}}  {figure:>{figure_width}}  ", no_wrap=True)
        length = abs(value) / span * cells
        if left:
            line.append(_leftward(length if value < 0 else 0, left, ascii_only), _NEGATIVE)
            line.append(axis, "dim")
        line.append(_rightward(length if value > 0 else 0, ascii_only), _POSITIVE)
        lines.append(line)
    return lines


def signed_map(
    labels: Sequence[str], rows: Sequence[Sequence[float]], *, width: int, ascii_only: bool
) -> list[Text]:
    """One line a row, one shaded cell a value, darkest at the largest magnitude of all.

    A minus stands before the shade of negative values, so that the map needs no colour.
    """
    shades = _ASCII_SHADES if ascii_only else _SHADES
    names = _shortened(labels, ascii_only)
    label_width = max(len(name) for name in names)
    columns, step = _every(len(rows[0]), (width - label_width - 4) // 2)
    top = max((abs(v) for row in rows for v in row), default=0.0) or 1.0
    lines = []
    for name, row in zip(names, rows, strict=True):
        line = Text(f"  {name:<{label_width}}  ", no_wrap=True)
        for column in columns:
            value = row[column]
            shade = shades[min(4, round(abs(value) / top * 4))]
            sign = "-" if value < 0 and shade != " " else " "
            line.append(sign + shade, _NEGATIVE if value < 0 else _POSITIVE)
        lines.append(line)
    lines.append(_legend(shades, f"{top:.3g}", step, label_width))
    return lines


def distance_map(
    labels: Sequence[str], rows: Sequence[Sequence[float]], *, width: int, ascii_only: bool
) -> list[Text]:
    """A square of shaded blocks, empty at zero distance, full at the largest."""
    shades = _ASCII_SHADES if ascii_only else _SHADES
    names = _shortened(labels, ascii_only)
    label_width = max(len(name) for name in names)
    shown, step = _every(len(rows), (width - label_width - 4) // 2)
    top = max((v for row in rows for v in row), default=0.0) or 1.0
    lines = []
    for i in shown:
        cells = "".join(2 * shades[min(4, math.ceil(rows[i][j] / top * 4))] for j in shown)
        lines.append(
            Text.assemble(f"  {names[i]:<{label_width}}  ", (cells, _POSITIVE), no_wrap=True)
        )
    lines.append(_legend(shades, f"{top:.3g}", step, label_width))
    return lines


def _legend(shades: str, top: str, step: int, indent: int) -> Text:
    text = f"  {'':<{indent}}  0 {''.join(2 * s for s in shades[1:])} {top}"
    return Text(text + (f"   (every {step}. one is shown)" if step > 1 else ""), "dim")


def _every(count: int, room: int) -> tuple[list[int], int]:
    """The newest of ``count`` and as many before it, evenly spread, as there is room for."""
    step = max(1, math.ceil(count / max(1, room)))
    return list(range((count - 1) % step, count, step)), step


def _rightward(length: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(length)
    eighths = round(length * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _leftward(length: float, width: int, ascii_only: bool) -> str:
    if ascii_only:
        return f"{'=' * round(length):>{width}}"
    halves = round(length * 2)
    return f"{'▐' * (halves % 2) + '█' * (halves // 2):>{width}}"


def _shortened(labels: Sequence[str], ascii_only: bool) -> list[str]:
    """The ends of long labels, where most differ, or with as much more as tells them apart."""
    for width in _LABEL_WIDTHS:
        for head in (0, width // 3, width // 2, width * 2 // 3):
            names = [_cut(label, head, width, ascii_only) for label in labels]
            if len(set(names)) == len(set(labels)):
                return names
    return [_cut(label, 0, _LABEL_WIDTHS[0], ascii_only) for label in labels]


def _cut(label: str, head: int, width: int, ascii_only: bool) -> str:
    """A label of ``width`` characters at most: ``head`` of them, dots, and its end."""
    if len(label) <= width:
        return label
    dots = "..." if ascii_only else "…"
    return label[:head] + dots + label[head + len(dots) - width :]
