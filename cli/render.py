"""Documents → what a person reads in the terminal.

Names come from files: every one goes through ``plain``, and consoles take no markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from twa_merge.document import (
    GLOBAL,
    Document,
    checkpoint_labels,
    coefficient_note,
    interval,
    leading_candidates,
    loss_columns,
    metric,
    metric_columns,
    metric_decimals,
    metric_of,
    table_decimals,
)
from twa_merge.errors import listing
from twa_merge.shared_rows import shown_coefficients
from twa_merge.wording import statistics_notes, verdict

from .console import plain
from .figures import NONE, amount, duration, number, size
from .pictures import bars, fitted, new_table, signed_map

# More rows than this are a list to search, not a table to read; the document has them all.
_MOST_CANDIDATES = 16
_MOST_BARS = 40
_MOST_BLOCKS = 16
_PLUS = "+/- 95 %"

# A row of a table of candidates → what stands in one of its columns.
Cell = Callable[[Document], Text]


def show_train(document: Document, console: Console, output: Path) -> None:
    """Candidates, the winner in a sentence, its coefficients, where it lies."""
    console.print()
    table = candidates_table(document, console.width)
    console.print(table)
    if any(column.header == "cost" for column in table.columns):
        console.print(Text("cost: passes over the fit data", "dim"))
    for note in statistics_notes(document):
        console.print(Text(plain(note), "dim"))
    for sentence in verdict(document):
        uncertain = "within noise" in sentence or sentence.startswith("No candidate")
        console.print(Text(plain(sentence), "yellow" if uncertain else "green"))
    show_coefficients(document, console)
    _show_written(document, console, output)


def show_average(document: Document, console: Console, output: Path) -> None:
    """The effective coefficients, and where the result lies."""
    show_coefficients(document, console)
    _show_written(document, console, output)


def show_evaluation(document: Document, console: Console) -> None:
    """One row a model."""
    models = document["models"]
    metrics = metric_columns(models, "metrics")
    metric_digits = [metric_decimals(models, column) for column in metrics]
    digits = table_decimals(models, ["loss"])
    table = new_table("model", "loss", _PLUS, *_headings(metrics))
    for model in models:
        table.add_row(
            Text(plain(model["path"]), overflow="fold"),
            number(model.get("loss"), digits),
            _half_width(model, "ci95", digits),
            *_metrics(model, metrics, metric_digits),
        )
    console.print(fitted(table, console.width))
    if document.get("examples") is not None:
        console.print(Text(f"{document['examples']} examples", "dim"))


def candidates_table(document: Document, width: int) -> Table:
    """Candidates by what decided, the chosen one marked.

    Where room is short what decided stays, and the test loss as long as it can.
    """
    everything = document["candidates"]
    rows = leading_candidates(document, _MOST_CANDIDATES)
    metrics = metric_columns(rows, "guard_metrics", "test_metrics")
    columns = _columns(document, rows, metrics)
    table = new_table("candidate", *(heading for heading, _ in columns))
    for row in rows:
        chosen = row["name"] == document.get("chosen")
        name = Text(("> " if chosen else "  ") + plain(row["name"]))
        cells = [name, *(cell(row) for _, cell in columns)]
        table.add_row(*cells, style="bold green" if chosen else None)
    hidden = len(everything) - len(rows) + len(document.get("other_candidates") or [])
    if hidden:
        table.caption = f"and {hidden} more in twa_merge.json"
        table.caption_justify = "left"
    decided = ("guard_metrics", metric(document))
    others = [column for column in metrics if column[1:] != decided]
    least = ["cost", "fit loss", *reversed(_headings(others)), _PLUS, "test loss"]
    return fitted(table, width, least)


def _columns(
    document: Document, rows: Sequence[Document], metrics: Sequence[tuple[str, str, str]]
) -> list[tuple[str, Cell]]:
    """Headings of a table of these candidates, and a row's cells; what decided has an interval."""
    everything, selected = document["candidates"], metric(document)
    keys = loss_columns(document)
    digits = max((table_decimals(rows, [key]) for key in keys), default=4)
    columns: list[tuple[str, Cell]] = []

    def add_interval(key: str, digits: int) -> None:
        if _any(everything, key):
            columns.append((_PLUS, lambda row: Text(_half_width(row, key, digits), "dim")))

    for key in keys:
        columns.append((key.replace("_", " "), _loss_cell(key, digits)))
        if key == "guard_loss" and selected is None:
            add_interval("guard_ci95", digits)
    for column in metrics:
        places = metric_decimals(rows, column)
        columns.append((plain(column[0]), _metric_cell(column, places)))
        if column[1:] == ("guard_metrics", selected):
            add_interval("guard_metric_ci95", places)
    if _any(everything, "cost"):
        columns.append(("cost", lambda row: Text(_cost(row.get("cost")))))
    return columns


def _loss_cell(key: str, digits: int) -> Cell:
    return lambda row: Text(number(row.get(key), digits))


def _metric_cell(column: tuple[str, str, str], digits: int) -> Cell:
    return lambda row: Text(number(metric_of(row, column), digits))


def show_coefficients(document: Document, console: Console) -> None:
    """Bars of the coefficients, or a map by block where there are several blocks."""
    blocks = shown_coefficients(document)
    if not blocks:
        return
    of = f" of {plain(document['chosen'])}" if document.get("chosen") else ""
    labels = [plain(label) for label in checkpoint_labels(document["checkpoints"])]
    console.print(Text(f"\nCoefficients{of}", "bold"))
    if (note := coefficient_note(document)) != "add up to 1":
        console.print(Text(f"  they {note}"))
    if len(blocks) == 1:
        _show_bars(labels, next(iter(blocks.values())), console)
        return
    shared = document["coefficients"].get(GLOBAL)
    console.print(Text(f"  one column a checkpoint, {labels[0]} to {labels[-1]}", "dim"))
    shown = _most_moved(blocks, shared)
    rows = {**({"(twa, all blocks)": shared} if shared else {}), **shown}
    lines = signed_map(
        [plain(name) for name in rows],
        list(rows.values()),
        width=console.width,
        ascii_only=console.options.ascii_only,
    )
    for line in lines:
        console.print(line)
    if len(shown) < len(blocks):
        hidden = len(blocks) - len(shown)
        console.print(Text(f"  and {hidden} blocks that moved less, in twa_merge.json", "dim"))


def _most_moved(
    blocks: dict[str, list[float]], shared: list[float] | None
) -> dict[str, list[float]]:
    """The blocks that lie farthest from what the whole model came to, in their own order."""
    before = shared or [0.0] * len(next(iter(blocks.values())))

    def moved(name: str) -> float:
        return sum((a - b) ** 2 for a, b in zip(blocks[name], before, strict=True))

    most = set(sorted(blocks, key=moved, reverse=True)[:_MOST_BLOCKS])
    return {name: row for name, row in blocks.items() if name in most}


def show_inspection(document: Document, console: Console) -> None:
    """Checkpoints, tensors, differences; geometry and plan where they were asked for."""
    from .inspection import show_geometry, show_plan

    table = new_table("checkpoint", "step", "format", "size", "tensors")
    for checkpoint in document["checkpoints"]:
        step = checkpoint.get("step")
        table.add_row(
            Text(plain(checkpoint["path"]), overflow="fold"),
            NONE if step is None else str(step),
            plain(checkpoint["format"]),
            size(checkpoint["bytes"]),
            str(checkpoint["tensors"]),
        )
    console.print(fitted(table, console.width))
    console.print(_tensor_summary(document))
    _show_entries(document, console)
    for difference in document.get("differences") or []:
        said = "; ".join(line.strip() for line in difference.splitlines())
        console.print(Text.assemble(("difference: ", "yellow"), plain(said)))
    if document.get("geometry"):
        labels = [plain(label) for label in checkpoint_labels(document["checkpoints"])]
        show_geometry(document["geometry"], labels, console)
    if document.get("plan"):
        show_plan(document["plan"], console)


def _show_entries(document: Document, console: Console) -> None:
    """Where in files the weights were found, if that is not where everybody looks for them."""
    rows = document["checkpoints"]
    labels = checkpoint_labels(rows)
    where: dict[str, list[str]] = {}
    for label, row in zip(labels, rows, strict=True):
        if row.get("entry"):
            where.setdefault(row["entry"], []).append(label)
    for entry, files in where.items():
        of = "" if len(files) == len(rows) else f" in {listing(files)}"
        console.print(Text(plain(f"weights read from the entry {entry}{of}")))


def _tensor_summary(document: Document) -> Text:
    tensors = document["tensors"]
    kinds = ", ".join(
        f"{tensors[kind]} {kind}"
        for kind in ("averaged", "copied", "tied", "statistics")
        if tensors.get(kind)
    )
    text = Text.assemble((amount(document["parameters"]), "bold"), f" parameters; tensors: {kinds}")
    for dtype, held in (tensors.get("by_dtype") or {}).items():
        text.append(
            f"\n  {plain(dtype)}: {held['tensors']} tensors, {amount(held['parameters'])} numbers, "
            f"{size(held['bytes'])} a checkpoint"
        )
    return text


def _show_bars(labels: list[str], values: Sequence[float], console: Console) -> None:
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:_MOST_BARS]
    kept = sorted(order)
    lines = bars(
        [labels[i] for i in kept],
        [values[i] for i in kept],
        width=console.width,
        ascii_only=console.options.ascii_only,
    )
    for line in lines:
        console.print(line)
    if len(kept) < len(values):
        rest = max(abs(v) for i, v in enumerate(values) if i not in set(kept))
        console.print(Text(f"  and {len(values) - len(kept)} more, none beyond {rest:.4f}", "dim"))


def _show_written(document: Document, console: Console, output: Path) -> None:
    timings = document.get("timings")
    took = f" in {duration(sum(timings.values()))}" if timings else ""
    text = Text.assemble("\nWritten to ", (plain(output), "bold"), took)
    console.print(text, soft_wrap=True)


def _any(rows: Sequence[Document], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _half_width(row: Document, key: str, digits: int) -> str:
    found = interval(row, key)
    return number((found[1] - found[0]) / 2, digits) if found else NONE


def _metrics(
    row: Document, columns: Sequence[tuple[str, str, str]], digits: Sequence[int]
) -> list[str]:
    return [number(metric_of(row, c), d) for c, d in zip(columns, digits, strict=True)]


def _headings(metrics: Sequence[tuple[str, str, str]]) -> list[str]:
    return [plain(heading) for heading, _, _ in metrics]


def _cost(cost: Any) -> str:
    if cost is None:
        return NONE
    return f"{cost:.3g}" if isinstance(cost, float) else plain(cost)
