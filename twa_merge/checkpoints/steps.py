"""Training steps: read from names and from trainer_state.json; order and selection by them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..config import Selection
from ..errors import CheckpointError, listing
from .shards import without_shard

# The most telling first; in each the last match of a name counts.
_WORDS = (
    re.compile(r"(?<![a-z])(?:global[-_ ]?)?(?:step|iter|iteration|ba)s?[-_=. ]*(\d+)"),
    re.compile(r"(?<![a-z])(?:checkpoint|ckpt)s?[-_=. ]*(\d+)"),
    re.compile(r"(?<![a-z])ep(?:och)?s?[-_=. ]*(\d+)"),
)
# Losses, versions and precisions are numbers too, but never steps.
_NO_STEP = re.compile(r"\d+\.\d+|(?<![a-z])(?:fp|bf|int|float|bfloat)\d+")
# What stands in the place of a number; others in such a name are the model's, as in resnet50_best.
_NICKNAME = re.compile(r"(?<![a-z])(?:best|last|latest|final)(?![a-z])")
_BEST = re.compile(r"(?<![a-z])best(?![a-z])")
_FOLDER = re.compile(
    r"(?:model[-_])?(?:global[-_]?)?(?:checkpoint|ckpt|step|iter|iteration|epoch|ba)[-_=. ]?\d+",
    re.I,
)


@dataclass(frozen=True)
class NamedStep:
    """A step as a name tells it; ``certain`` unless it only counts epochs."""

    number: int
    certain: bool


class HasStep(Protocol):
    @property
    def path(self) -> Path: ...

    @property
    def step(self) -> int | None: ...


T = TypeVar("T", bound=HasStep)


def is_step_folder(folder: Path) -> bool:
    """Whether a folder is named like one checkpoint of a run: ``checkpoint-200``, ``step_5``."""
    return _FOLDER.fullmatch(folder.name) is not None


def is_numbered(path: Path) -> bool:
    """Whether a checkpoint is called by a number, and not the best, the last or the final one."""
    return bool(re.search(r"\d", path.name)) and not _NICKNAME.search(path.name.lower())


def named_step(path: Path, files: Sequence[Path]) -> NamedStep | None:
    """The step that the name of a checkpoint tells.

    ``step`` and ``iter`` are believed before ``checkpoint``, that before ``epoch``, and any of
    them before the last number in the name, which counts for nothing in that of the best one.

    Args:
        path: the folder, or the file itself.
        files: the weights in it; of several, the first's name is looked at.
    """
    file = without_shard(files[0].name).rpartition(".")[0].lower() if files else ""
    names = [file] if path in files else [path.name.lower(), file]
    if path in files and is_step_folder(path.parent) and not re.search(r"\d", file):
        names.append(path.parent.name.lower())
    for k, words in enumerate(_WORDS):
        for name in names:
            if numbers := words.findall(name):
                return NamedStep(int(numbers[-1]), certain=k < 2)
    for name in reversed(names):
        if _NICKNAME.search(name):
            continue
        if numbers := re.findall(r"\d+", _NO_STEP.sub("", name)):
            return NamedStep(int(numbers[-1]), certain=True)
    return None


def trainer_step(folder: Path) -> int | None:
    """``global_step`` of the folder's ``trainer_state.json``; None without one that says it."""
    try:
        state = json.loads((folder / "trainer_state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    step = state.get("global_step") if isinstance(state, dict) else None
    return step if type(step) is int and step >= 0 else None


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorting key that puts ``b2`` before ``b10``."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p)) if p.isdecimal() else (1, p.lower()) for p in parts]


def in_order(found: Sequence[T], *, listed: bool) -> list[T]:
    """The checkpoints by training step.

    Args:
        listed: the user has listed them, so that without a step for every one of them they stay
            in the order given. Those of one run folder stand in natural order of their names
            then, those without a step last (``final.pt``), but first if they are called the best
            (``model_best.pth``), which may be any of them; where no name has a number in it, in
            the order in which they were written.
    """
    if all(c.step is not None for c in found):
        return sorted(found, key=lambda c: c.step or 0)
    if listed:
        return list(found)
    if not any(re.search(r"\d", c.path.name) for c in found) and all(c.step is None for c in found):
        return sorted(found, key=lambda c: (_written(c.path), natural(c.path.name)))
    return sorted(found, key=_in_a_run)


def _in_a_run(found: HasStep) -> tuple[int, int, list[tuple[int, int | str]]]:
    place = 1
    if found.step is None:
        place = 0 if _BEST.search(found.path.name.lower()) else 2
    return place, found.step or 0, natural(found.path.name)


def select(found: Sequence[T], selection: Selection) -> list[T]:
    """The checkpoints that take part: from_step and to_step first, then every, then last.

    Checkpoints without a known step are outside any range of steps.

    Raises:
        CheckpointError: none is left.
    """
    chosen = list(found)
    for bound, sign in ((selection.from_step, 1), (selection.to_step, -1)):
        if bound is not None:
            chosen = [c for c in chosen if c.step is not None and sign * (c.step - bound) >= 0]
    if selection.every:
        chosen = chosen[::-1][:: selection.every][::-1]
    if selection.last:
        chosen = chosen[-selection.last :]
    if not chosen:
        steps = [str(c.step) for c in found if c.step is not None]
        raise CheckpointError(
            "No checkpoint is left by the selection.",
            expected=f"steps {_range(selection)}",
            found=f"{len(found)} checkpoints with "
            + (f"steps {listing(steps, 40)}" if steps else "no known steps"),
            remedy="widen --from-step and --to-step, or leave them out",
        )
    return chosen


def _range(selection: Selection) -> str:
    least = "" if selection.from_step is None else f"from {selection.from_step}"
    most = "" if selection.to_step is None else f"to {selection.to_step}"
    return " ".join(filter(None, (least, most)))


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
