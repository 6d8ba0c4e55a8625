"""Reads the ``twa_merge.json`` document: the same for the model card, the report, the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

Document = Mapping[str, Any]

GLOBAL = "global"

# Always worth a row, and whatever was trained; of the others only the best.
_NAMED = ("last", "best_single", "uniform", "greedy")
_EXPLODED = 1e6
# Decimals show too little of numbers below the first, and too much of those above the second.
_TINY, _LARGE = 1e-4, 1e4
# What tables have, and the most that are written out; beyond that powers of ten are shorter.
_PLACES, _MOST_PLACES = 4, 7
_DIGITS = 3
# A smaller share of a blend is not worth naming.
_WORTH_NAMING = 0.01


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
    ordered = sorted(document.get("candidates") or [], key=lambda c: _cost(c, selected))

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


def _cost(candidate: Document, selected: str | None) -> float:
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


def table_decimals(rows: Sequence[Document], keys: Sequence[str]) -> int:
    """``decimals`` of a table's columns, where the smallest loss has three digits as well."""
    return _for_the_smallest([row.get(key) for row in rows for key in keys])


def metric_decimals(rows: Sequence[Document], column: tuple[str, str, str]) -> int:
    """Of a column of ``metric_columns``: four, unless they show too little or too much."""
    values = [metric_of(row, column) for row in rows]
    sizes = _sizes(values)
    ordinary = not sizes or (sizes[0] >= 10 ** (_DIGITS - 1 - _PLACES) and sizes[0] < _LARGE)
    return _PLACES if ordinary else _for_the_smallest(values)


def _for_the_smallest(values: Sequence[Any]) -> int:
    sizes, places = _sizes(values), decimals(values)
    return max(places, _DIGITS - 1 - _order(sizes[0])) if sizes else places


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


def verdict(document: Document) -> list[str]:
    """Who won and by how much, in sentences; plainly, where the difference is within noise."""
    chosen = written_name(document)
    found = improvements(document)
    others = [i for i in found if i["over"] != chosen and not _is_itself(i)]
    said = [_sentence(chosen, other, metric(document)) for other in others]
    if len(others) < len(found) and chosen in ("last", "best_single"):
        said.insert(0, f"No candidate beat {spoken(chosen)}.")
    said = said or [f"{spoken(chosen)} was written."]
    said += _which_single(document, [i["over"] for i in others])
    said += _how_it_was_picked(document, chosen) + _what_it_is_made_of(document, chosen)
    if source := statistics_source(document):
        said.append(f"The running statistics of batch norm in {spoken(chosen)} were {source}.")
    return [_capital(sentence) for sentence in said]


def _which_single(document: Document, compared: Sequence[str]) -> list[str]:
    """Which checkpoint the best single one is, where the winner was compared with it.

    It is picked as the others are, so that on the guard split alone another may be ahead of it.
    """
    rows = document.get("candidates") or []
    row: Document = next((c for c in rows if c["name"] == "best_single"), {})
    which, labels = _only_checkpoint(row), checkpoint_labels(document.get("checkpoints") or [])
    if "best_single" not in compared or which is None or which >= len(labels):
        return []
    return [f"The best single checkpoint is {labels[which]}."]


def _only_checkpoint(row: Document) -> int | None:
    """The place of the checkpoint that a candidate is; None where it is a mean of several."""
    blocks = list(_by_block(row.get("coefficients")).values())
    return blocks[0].index(1.0) if len(blocks) == 1 and 1.0 in blocks[0] else None


def _how_it_was_picked(document: Document, chosen: str) -> list[str]:
    """What decided, where that was not the guard loss alone."""
    rows, selected, mine = document.get("candidates") or [], metric(document), winner(document)
    least = min(rows, key=lambda c: sortable(c.get("guard_loss")), default=None)
    if mine and selected is not None:
        value = guard_metric(mine, selected)
        places = metric_decimals(rows, ("", "guard_metrics", selected))
        found = f", {figure(value, places)}" if is_finite(value) else ""
        return [f"{chosen} was picked by {selected} on the guard split{found}."]
    if least is None or mine.get("selection_loss") is None:
        return []
    if sortable(mine.get("guard_loss")) <= sortable(least.get("guard_loss")):
        return []
    used = (document.get("data") or {}).get("guard_examples_used")
    if mine.get("selection_examples") == used:
        return []  # nothing but the guard split counted
    loss = figure(mine["selection_loss"], table_decimals(rows, ["selection_loss"]))
    return [
        f"{chosen} was picked by its loss on {mine['selection_examples']} examples, {loss}: the "
        "guard split and fit examples that were held out in turn. "
        f"On the guard split alone {spoken(least['name'])} is best."
    ]


def _what_it_is_made_of(document: Document, chosen: str) -> list[str]:
    """The candidates that a blend is the mean of, the heaviest first."""
    blended = winner(document).get("blend_of") or {}
    parts = sorted(((w, k) for k, w in blended.items() if w >= _WORTH_NAMING), reverse=True)
    if not parts:
        return []
    *named, rest = _percentages([weight for weight, _ in parts])
    shares = [f"{p}% {spoken(name)}" for p, (_, name) in zip(named, parts, strict=True)]
    others = f" and {rest}% others" if rest else ""
    said = [f"{chosen} is a mean of candidates: {', '.join(shares)}{others}."]
    ahead = min(document["candidates"], key=lambda c: _cost(c, None))
    if metric(document) is None and _cost(ahead, None) < _cost(winner(document), None):
        said.append(
            f"{spoken(ahead['name'])} alone is ahead of it by less than one standard error, which "
            "is not enough to prefer it."
        )
    return said


def _percentages(shares: Sequence[float]) -> list[int]:
    """By largest remainder, of ``shares`` and of what they leave: they add up to 100."""
    exact = [100 * share for share in (*shares, max(0.0, 1.0 - math.fsum(shares)))]
    found = [math.floor(percent) for percent in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: 100 - sum(found)]:
        found[i] += 1
    return found


def statistics_source(document: Document) -> str | None:
    """Where batch norm's came from; None where they are averaged like everything else."""
    return _source(winner(document))


def _source(row: Document) -> str | None:
    return {
        "reestimate": "re-estimated on fit examples",
        "newest": "taken from the newest checkpoint",
    }.get(str(row.get("batch_norm")))


def statistics_notes(document: Document) -> list[str]:
    """Which checkpoints of a table of candidates are not quite what was saved, below it."""
    newest = len(document.get("checkpoints") or []) - 1
    found: dict[str, list[str]] = {}
    for row in document.get("candidates") or []:
        which, source = _only_checkpoint(row), _source(row)
        itself = row.get("batch_norm") == "newest" and which == newest
        if source and which is not None and not itself and row["name"] != document.get("chosen"):
            found.setdefault(source, []).append(row["name"])
    return [
        f"{', '.join(names)}: running statistics {source} instead of those saved"
        for source, names in found.items()
    ]


def _is_itself(improvement: Document) -> bool:
    """Whether the winner was compared with the same model under another name."""
    return improvement["mean"] == 0 and not any(improvement.get("ci95") or [])


def _capital(sentence: str) -> str:
    # Names of candidates are written as they are: `twa`, not `Twa`.
    return "The" + sentence[3:] if sentence.startswith("the ") else sentence


def _sentence(chosen: str, improvement: Document, selected: str | None) -> str:
    mean = improvement["mean"]
    interval = improvement.get("ci95") or (None, None)
    low, high = (v if is_finite(v) else None for v in interval)
    if mean < 0 and low is not None and high is not None:
        # Of what is stated; without minus zero.
        low, high = 0.0 - high, 0.0 - low
    places = decimals([0.0, mean, low, high])
    how = "better" if mean >= 0 else "worse"
    text = f"{spoken(chosen)} is {how} than {spoken(improvement['over'])}"
    text += f" by {figure(abs(mean), places)}"
    text += f" in {selected}" if selected else ""
    few = improvement.get("enough") is False
    if low is None or high is None:
        return f"{text}{_too_few(improvement) if few else '.'}"
    text += f" (95 % interval {span((low, high), places)})"
    if (low > 0 or high < 0) and few:
        return text + _too_few(improvement)
    if low == high and mean:
        return f"{text}: every example says the same, as if there were only one."
    return f"{text}." if low > 0 or high < 0 else f"{text}: within noise."


def _too_few(improvement: Mapping[str, Any]) -> str:
    return f"{too_few(improvement['examples'], improvement.get('groups'))}, within noise."


def too_few(examples: int, groups: int | None) -> str:
    """That an interval means nothing, as what follows it."""
    alike = "" if groups in (None, examples) else f" in {groups} group{'s' * (groups != 1)}"
    return f", of {examples} examples{alike}: too few"


def spoken(name: str) -> str:
    """A candidate's name as it reads in a sentence."""
    return {
        "best_single": "the best single checkpoint",
        "last": "the last checkpoint",
        "uniform": "the uniform mean",
    }.get(name, name)
