"""The result of a run in sentences: who won, by how much, and what that rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .document import (
    Document,
    checkpoint_labels,
    guard_metric,
    improvements,
    metric,
    metric_decimals,
    only_checkpoint,
    table_decimals,
    winner,
    written_name,
)
from .numerals import decimals, figure, is_finite, sortable, span

# A smaller share of a blend is not worth naming.
_WORTH_NAMING = 0.01


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
    said += _what_was_passed_over(document, chosen)
    if source := statistics_source(document):
        said.append(f"The running statistics of batch norm in {spoken(chosen)} were {source}.")
    return [_capital(sentence) for sentence in said]


def _which_single(document: Document, compared: Sequence[str]) -> list[str]:
    """Which checkpoint the best single one is, where the winner was compared with it.

    It is picked as the others are, so that on the guard split alone another may be ahead of it.
    """
    rows = document.get("candidates") or []
    row: Document = next((c for c in rows if c["name"] == "best_single"), {})
    which, labels = only_checkpoint(row), checkpoint_labels(document.get("checkpoints") or [])
    if "best_single" not in compared or which is None or which >= len(labels):
        return []
    return [f"The best single checkpoint is {labels[which]}."]


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
    return [f"{chosen} is a mean of candidates: {', '.join(shares)}{others}."]


def _what_was_passed_over(document: Document, chosen: str) -> list[str]:
    """The candidate that has less loss than the winner, and why it is not written."""
    name = document.get("passed_over")
    if not name:
        return []
    if winner(document).get("blend_of"):
        return [
            f"{spoken(name)} alone is ahead of it by less than one standard error, which is not "
            "enough to prefer it."
        ]
    there = {row["name"] for row in document.get("candidates") or []}
    plainest = " and ".join(spoken(plain) for plain in ("last", "uniform") if plain in there)
    return [
        f"{spoken(name)} has less loss than {spoken(chosen)} on the examples that decide, but is "
        f"not ahead of {plainest} by more than luck. More data would tell."
    ]


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
        which, source = only_checkpoint(row), _source(row)
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
