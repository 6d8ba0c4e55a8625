"""Reads the ``twa_merge.json`` document: the same for the model card, the report, the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from .numerals import is_finite, ordinary_decimals, smallest_decimals, sortable

Document = Mapping[str, Any]

GLOBAL = "global"

# Always worth a row, and whatever was trained; of the others only the best.
_NAMED = ("last", "best_single", "uniform", "greedy")


def written_name(document: Document) -> str:
    """What was written: the chosen candidate, or the method where nothing was chosen."""
    return str(document.get("chosen") or document.get("method") or "average")


def written_coefficients(document: Document) -> dict[str, list[float]]:
    """Block → coefficients (n,) of what was written; one block ``global`` where all share them."""
    if mine := winner(document):
        return _by_block(mine.get("coefficients"))
    top = document.get("coefficients") or {}
    return _by_block(top.get("blocks") or top.get(GLOBAL) or top)


def winner(document: Document) -> Document:
    """The chosen candidate's row; empty where nothing was chosen."""
    rows = document.get("candidates") or []
    return next((c for c in rows if c["name"] == document.get("chosen")), {})


def coefficient_note(document: Document) -> str:
    """What the coefficients add up to, and what is added to them, as the end of a sentence."""
    blocks = written_coefficients(document)
    sums = [math.fsum(row) for row in blocks.values()]
    far = max(sums, key=lambda total: abs(total - 1.0), default=1.0)
    text = "add up to 1" if abs(far - 1.0) < 1e-6 else f"add up to {far:.6g}"
    random = (document.get("coefficients") or {}).get("random") or {}
    count = len(random.get("values") or [])
    return f"{text}; {count} random directions are added" if count else text


def _by_block(value: Any) -> dict[str, list[float]]:
    """From (n,) for all blocks or block → (n,)."""
    blocks = value if isinstance(value, Mapping) else {GLOBAL: value or []}
    return {str(name): list(row) for name, row in blocks.items() if row}


def checkpoint_labels(checkpoints: Sequence[Document], least: int = 1) -> list[str]:
    """The shortest endings of the paths, of ``least`` parts or more, that tell them apart."""
    parts = [
        [p for p in PurePath(str(c["path"])).parts if p not in ("/", "..")] for c in checkpoints
    ]
    for depth in range(least, max(map(len, parts), default=1) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return ["/".join(p[-1:]) for p in parts]


def folder_name(path: object) -> str:
    """The last part of a path: reports are published, so they name no machine's folders."""
    return PurePath(str(path)).name or str(path)


def leading_candidates(document: Document, most: int) -> list[Document]:
    """Candidates by what decided: the chosen and the named ones, and the best of the others.

    Args:
        most: how many altogether, if the chosen and the named ones are not more already.
    """
    selected = metric(document)
    ordered = sorted(document.get("candidates") or [], key=lambda c: cost(c, selected))

    def important(name: str) -> bool:
        return name in _NAMED or name == document.get("chosen") or name.startswith("twa")

    room = most - sum(important(c["name"]) for c in ordered)
    others = [c["name"] for c in ordered if not important(c["name"])][: max(0, room)]
    return [c for c in ordered if important(c["name"]) or c["name"] in others]


def loss_columns(document: Document) -> list[str]:
    """Keys of the losses that a table of candidates shows, what decided among them.

    That is ``selection_loss``, where fit examples that were held out in turn counted as well.
    """
    rows = document.get("candidates") or []
    keys = ["fit_loss", "guard_loss", "selection_loss", "test_loss"]
    if all(row.get("selection_loss") == row.get("guard_loss") for row in rows):
        keys.remove("selection_loss")
    return [key for key in keys if any(is_finite(row.get(key)) for row in rows)]


def metric_columns(rows: Sequence[Document], *keys: str) -> list[tuple[str, str, str]]:
    """(heading, key of a row, name of the metric under it), for every metric that a row has."""
    found = []
    for key in keys:
        split = key.removesuffix("metrics").strip("_")
        names = sorted({name for row in rows for name in row.get(key) or {}})
        found += [(f"{split} {name}".strip(), key, name) for name in names]
    return found


def metric_of(row: Document, column: tuple[str, str, str]) -> float | None:
    """A row's value in a column of ``metric_columns``."""
    _, key, name = column
    value = (row.get(key) or {}).get(name)
    return value if isinstance(value, (int, float)) else None


def examples(document: Document, split: str) -> str:
    """How many examples a split has, or how many of them were used: of large data a part is."""
    data = document.get("data") or {}
    there = data.get(f"{split}_examples") or 0
    used = data.get(f"{split}_examples_used")
    return str(there) if used in (None, there) else f"{used} of {there}"


def metric(document: Document) -> str | None:
    """The metric that the winner was picked by; None for the loss."""
    select = str(((document.get("options") or {}).get("guard") or {}).get("select") or "loss")
    return None if select == "loss" else select.removeprefix("metric:")


def guard_metric(candidate: Document, selected: str) -> Any:
    """The candidate's mean of a metric on the guard split; None where it is not known."""
    return (candidate.get("guard_metrics") or {}).get(selected)


def cost(candidate: Document, selected: str | None) -> float:
    """What the winner has least of."""
    if selected is None:
        return sortable(candidate.get("selection_loss", candidate.get("guard_loss")))
    value = guard_metric(candidate, selected)
    return math.inf if value is None or not is_finite(value) else -float(value)


def improvements(document: Document) -> list[Document]:
    """Paired differences of the winner to others: ``{over, mean, ci95}``, positive is better."""
    found = [document.get("improvement"), document.get("improvement_over_uniform")]
    return [i for i in found if i and i.get("mean") is not None]


def interval(row: Document, key: str) -> tuple[float, float] | None:
    """95 % interval under ``key``, where it is known."""
    found = row.get(key)
    if found is None or not all(is_finite(v) for v in found):
        return None
    return found[0], found[1]


def deciding_interval(row: Document, selected: str | None) -> tuple[float, float] | None:
    """95 % interval of what the winner was picked by, on the guard split."""
    return interval(row, "guard_ci95" if selected is None else "guard_metric_ci95")


def table_decimals(rows: Sequence[Document], keys: Sequence[str]) -> int:
    """``decimals`` of a table's columns, where the smallest loss has three digits as well."""
    return smallest_decimals([row.get(key) for row in rows for key in keys])


def metric_decimals(rows: Sequence[Document], column: tuple[str, str, str]) -> int:
    """Of a column of ``metric_columns``: four, unless they show too little or too much."""
    return ordinary_decimals([metric_of(row, column) for row in rows])


def only_checkpoint(row: Document) -> int | None:
    """The place of the checkpoint that a candidate is; None where it is a mean of several."""
    blocks = list(_by_block(row.get("coefficients")).values())
    return blocks[0].index(1.0) if len(blocks) == 1 and 1.0 in blocks[0] else None
