"""Order and selection by training step, or else by time or name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from ..config import Selection
from ..errors import CheckpointError, listing
from ..json_files import read_json
from .times import Times

_NUMBERED = 1
_BEST = re.compile(r"(?<![a-z])best(?![a-z])")


class HasStep(Protocol):
    @property
    def path(self) -> Path: ...

    @property
    def step(self) -> int | None: ...

    @property
    def times(self) -> Times: ...


T = TypeVar("T", bound=HasStep)


def trainer_step(folder: Path) -> int | None:
    """``global_step`` of the folder's ``trainer_state.json``; None without one that says it."""
    state = read_json(folder / "trainer_state.json")
    step = state.get("global_step") if isinstance(state, dict) else None
    return step if type(step) is int and step >= 0 else None


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorting key that puts ``b2`` before ``b10``."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p)) if p.isdecimal() else (1, p.lower()) for p in parts]


def in_order(found: Sequence[T], *, listed: bool) -> list[T]:
    """The checkpoints by training step, or by the times in their names where some have no step.

    Args:
        listed: the user has listed them, so that without a step or a time for every one of them
            they stay in the order given. Those of one run folder stand in natural order of their
            names then, those without a step last (``final.pt``), but first if they are called the
            best (``model_best.pth``), which may be any of them; where no name has a number in it,
            in the order in which they were written.
    """
    if all(c.step is not None for c in found):
        return sorted(found, key=lambda c: c.step or 0)
    if all(c.times for c in found):
        return sorted(found, key=lambda c: c.times)
    if listed:
        return list(found)
    if not any(re.search(r"\d", c.path.name) for c in found) and all(c.step is None for c in found):
        return sorted(found, key=lambda c: (_written(c.path), natural(c.path.name)))
    known = [c for c in found if _place(c) == _NUMBERED]
    timed = any(c.step is None for c in known) and all(c.times for c in known)
    return sorted(
        found,
        key=lambda c: (_place(c), c.times if timed else (), c.step or 0, natural(c.path.name)),
    )


def _place(found: HasStep) -> int:
    """Before, among or after those with a step or a time."""
    if found.step is not None or found.times:
        return _NUMBERED
    return _NUMBERED - 1 if _BEST.search(found.path.name.lower()) else _NUMBERED + 1


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
