"""Training steps as names tell them, each seen beside the other names of its run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .shards import without_shard
from .times import Times, without_times

# In each the last match of a name counts.
_STEP = re.compile(r"(?<![a-z])(?:global[-_ ]?)?(?:step|iter|iteration|ba)s?[-_=. ]*(\d+)")
_CHECKPOINT = re.compile(r"(?<![a-z])(?:checkpoint|ckpt)s?[-_=. ]*(\d+)")
_EPOCH = re.compile(r"(?<![a-z])ep(?:och)?s?[-_=. ]*(\d+)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Precisions, metrics and learning rates are numbers too, but never steps.
_NO_STEP = re.compile(
    r"(?<![a-z])(?:(?:fp|bf|int|float|bfloat)\d+"
    r"|(?:f1|loss|acc|accuracy|bleu|psnr|ssim|wer|cer|ppl|auc|map|m?iou|rouge|fid|r?mse|mae|lr)"
    r"[-_=. ]*\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
)
# What stands in the place of a number; others in such a name are the model's, as in resnet50_best.
_NICKNAME = re.compile(r"(?<![a-z])(?:best|last|latest|final)(?![a-z])")
# Which process has saved a file, which is no step either.
_RANK = re.compile(r"(?<![a-z])rank[-_]?\d+")
_FOLDER = re.compile(
    r"(?:model[-_])?(?:global[-_]?)?(?:checkpoint|ckpt|step|iter|iteration|epoch|ba)[-_=. ]?\d+",
    re.I,
)


@dataclass(frozen=True)
class NamedStep:
    """What a name tells of a checkpoint's place in its run.

    Attributes:
        number: the step; None where no number of the name is known to be one.
        certain: the file itself need not be asked.
        times: when it was saved, in seconds; orders those without a step.
        doubtful: names of the run differ in several numbers, any of which may be the step.
    """

    number: int | None
    certain: bool
    times: Times = ()
    doubtful: bool = False


def is_step_folder(folder: Path) -> bool:
    """Whether a folder is named like one checkpoint of a run: ``checkpoint-200``, ``step_5``."""
    return _FOLDER.fullmatch(folder.name) is not None


def is_numbered(path: Path) -> bool:
    """Whether a checkpoint is called by a number, and not the best, the last or the final one."""
    return bool(re.search(r"\d", path.name)) and not _NICKNAME.search(path.name.lower())


def named_steps(checkpoints: Sequence[tuple[Path, Sequence[Path]]]) -> list[NamedStep]:
    """The steps that the names of checkpoints tell.

    ``step`` and ``iter`` are believed before ``checkpoint``, that before ``epoch``, and any of
    them before a number without a word. Such a number is looked for where the names of a run
    differ. Where they do so in several places, it is the one behind ``checkpoint``, the last one
    that no other contradicts, or the only one that rises evenly; it gives way to what the file
    says. Dates and times are no steps, nor are metrics, precisions and fractions, nor any number
    in the name of the best one.

    Args:
        checkpoints: of each the folder, or the file itself, and the weights in it; of several,
            the first's name is looked at.
    """
    titles = [_title(path, files) for path, files in checkpoints]
    runs: dict[tuple[Path, str], list[int]] = {}
    for k, (path, _) in enumerate(checkpoints):
        runs.setdefault((path.parent, _NUMBER.sub("#", titles[k])), []).append(k)
    named: dict[int, NamedStep] = {}
    for run in runs.values():
        named |= zip(run, _of_a_run([titles[k] for k in run]), strict=True)
    return [named[k] for k in range(len(titles))]


def _title(path: Path, files: Sequence[Path]) -> str:
    """``folder/file`` without the suffix; of a file alone only its name, if there are digits."""
    file = without_shard(files[0].name).rpartition(".")[0].lower() if files else ""
    if path not in files:
        return f"{path.name.lower()}/{file}"
    if is_step_folder(path.parent) and not re.search(r"\d", _RANK.sub("", file)):
        return f"{path.parent.name.lower()}/{file}"
    return file


def _of_a_run(titles: Sequence[str]) -> list[NamedStep]:
    """Of names that differ in their digits alone."""
    rest, times = without_times(titles)
    steps, epochs = _said(_STEP, titles), _said(_EPOCH, rest)
    if any(len(set(column)) > 1 for column in _columns(rest)):
        # A word whose number never changes is of the run, and another number counts.
        steps, epochs = (said if len(set(said)) > 1 else [] for said in (steps, epochs))
    if steps and not (epochs and _start_again(steps, epochs)):
        return [NamedStep(n, True, t) for n, t in zip(steps, times, strict=True)]
    if epochs and (steps or not _said(_CHECKPOINT, rest)):
        return [NamedStep(n, False, t) for n, t in zip(epochs, times, strict=True)]
    numbers, certain = _by_number(rest, times)
    doubtful = not (numbers or times[0]) and len(titles) > 1 and bool(_columns(rest))
    return [
        NamedStep(numbers[k] if numbers else None, certain, times[k], doubtful)
        for k in range(len(titles))
    ]


def _by_number(titles: Sequence[str], times: Sequence[Times]) -> tuple[Sequence[int], bool]:
    """The numbers that are the steps, none where that cannot be told, and whether it is certain."""
    columns, said = _columns(titles), _said(_CHECKPOINT, titles)
    varying = [column for column in columns if len(set(column)) > 1]
    if not varying:
        if times[0]:
            return (said if len(titles) == 1 else ()), False
        return said or (columns[-1] if columns else ()), len(columns) == 1
    certain = len(varying) == 1
    if len(set(said)) == len(titles):
        return said, certain
    if certain and not times[0]:
        return varying[0], certain
    agreed = [c for c in varying if all(_follows(other, c) for other in (*varying, times))]
    if agreed:
        return agreed[-1], certain
    even = [c for c in varying if _is_even(c)]
    return (even[0] if len(even) == 1 and not times[0] else ()), False


def _said(word: re.Pattern[str], titles: Sequence[str]) -> list[int]:
    """The number behind the word in each of the names; none without the word."""
    found = []
    for title in titles:
        matches = next(filter(None, map(word.findall, title.split("/"))), [])
        found += [int(number) for number in matches[-1:]]
    return found if len(found) == len(titles) else []


def _start_again(steps: Sequence[int], epochs: Sequence[int]) -> bool:
    """Whether steps are counted from the start of each epoch."""
    return len(set(zip(steps, epochs, strict=True))) > len(set(steps))


def _columns(titles: Sequence[str]) -> list[list[int]]:
    """The whole numbers that stand in one place of every name, a list a place."""
    parts = [[p for p in title.split("/") if not _NICKNAME.search(p)] for title in titles]
    rows = [_NUMBER.findall("/".join(_NO_STEP.sub("", p) for p in each)) for each in parts]
    if len(set(map(len, rows))) > 1:
        # A digit is a part of the word in some of the names alone, as in f1 and f2.
        rows = [_NUMBER.findall("/".join(each)) for each in parts]
    places = zip(*rows, strict=True)
    return [[int(text) for text in place] for place in places if "." not in "".join(place)]


def _follows(other: Sequence[Any], column: Sequence[int]) -> bool:
    """Whether the other never falls as the column rises, nor changes where that does not."""
    order = sorted(range(len(column)), key=column.__getitem__)
    return all(
        other[a] == other[b] if column[a] == column[b] else other[a] <= other[b]
        for a, b in pairwise(order)
    )


def _is_even(column: Sequence[int]) -> bool:
    """Whether three or more numbers rise by the same from one to the next."""
    ordered = sorted(column)
    rises = {b - a for a, b in pairwise(ordered)}
    return len(column) > 2 and len(rises) == 1 and 0 not in rises
