"""The state of an interrupted run: a log of evaluations, from which the fit is replayed.

The optimizer is deterministic, so a run that answers its first k evaluations from the log is at
the very point where the earlier one was stopped, whatever stopped it. The first one of every
sample of examples is made once more all the same: a task whose code or data has changed gives
another loss.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distributed import World
from .errors import ConfigError, OutputError, listing
from .optimize import Function
from .process_lock import ProcessLock
from .progress import Noted, Progress, silent
from .subspace import Chart

_STATE = "state.jsonl"
_SCRATCH = "state.jsonl.new"
_UNDRAWN = "no-landscape"
_LOCK = "lock"
_FILES = (_STATE, _SCRATCH, _UNDRAWN, _LOCK)
_HEADER, _COLUMNS = {"run"}, {"stage", "z", "mark", "loss", "gradient"}
_ALIKE = 1e-3
_ANOTHER_WAY = (
    "From here on the run goes another way than the earlier one, of which it takes no more."
)
_CHANGED = (
    "A known evaluation has another loss now: the task or its data has changed, and nothing "
    "further is taken from the earlier run."
)


class EvaluationLog:
    """Evaluations of the fit, appended to ``OUT.partial/state.jsonl`` as they are made.

    Args:
        folder: where the state is kept.
        fingerprint: what the run depends on, of rank zero: paths may be other ones on another
            node. A state of another run is not continued.
        fresh: start over.
        progress: is told when the state turns out to be of no use.

    Attributes:
        resumed: evaluations that are known of an earlier run.
        landscape_failed: the task ended that run where the report's landscape was evaluated.

    Raises:
        ConfigError: the folder holds the state of a run with other inputs or options.
        OutputError: the state cannot be written, another run is writing it, or something else is
            kept in its folder.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        world: World,
        fresh: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.folder = folder
        self._progress = progress
        self._checked: set[tuple[int, ...]] = set()
        self._world = world
        others = world.broadcast(self._others() if world.is_zero else [])
        if others:
            raise OutputError(
                f"The state of the run would be kept in {folder}, which holds something else.",
                expected="no such folder, or that of an interrupted run",
                found=listing(others),
                remedy="choose another output folder with -o, or rename this one",
            )
        self._lock = ProcessLock(folder / _LOCK)
        problem = world.broadcast(self._problem() if world.is_zero else None)
        if problem is not None:
            raise problem
        # Through JSON and back, so that tuples and lists compare equal.
        wanted = world.broadcast(json.loads(json.dumps(fingerprint)))
        records = world.broadcast(self._read() if world.is_zero and not fresh else [])
        header = records[0].get("run") if records else None
        if header is not None and header != wanted:
            changed = [k for k in wanted if header.get(k) != wanted[k]]
            raise ConfigError(
                f"{folder} holds the state of an interrupted run with other inputs or options.",
                expected=f"the same {', '.join(changed) or 'version'} as before",
                remedy="repeat the earlier command to continue it, or give --fresh to start over"
                + ("; a dataset that draws has to be seeded" if "examples" in changed else ""),
            )
        self._header = wanted
        self._known = records[1:] if header is not None else []
        self._kept: list[dict[str, Any]] = []
        self._started = False
        self.resumed = len(self._known)
        self.landscape_failed = world.broadcast(not fresh and (folder / _UNDRAWN).exists())

    def _others(self) -> list[str]:
        """What is in the way: files of another kind in the state's folder, or one of its name."""
        try:
            there = {path.name for path in self.folder.iterdir()}
        except NotADirectoryError:
            return ["a file of that name"]
        except OSError:
            return []
        return sorted(there.difference(_FILES))

    def _problem(self) -> OutputError | None:
        """Why the state that is there cannot be gone on with; takes hold of it otherwise."""
        try:
            taken = not self.folder.is_dir() or self._lock.take()
        except OSError as error:
            return _not_written(self.folder, error)
        return None if taken else _in_use(self.folder)

    def _read(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        try:
            text = (self.folder / _STATE).read_text(errors="replace")
        except OSError:
            return []
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                # The last line of a run that was killed while it wrote.
                break
            expected = _COLUMNS if records else _HEADER
            if not (isinstance(record, dict) and record.keys() >= expected):
                break
            if not (records or isinstance(record["run"], dict)):
                break
            records.append(record)
        return records

    def answer(
        self, stage: str, chart: Chart, function: Function, examples: Sequence[int]
    ) -> Function:
        """``function``, with the evaluations that the log knows answered from it.

        Args:
            examples: positions of those that the function is evaluated on.
        """
        sample = tuple(examples)

        def logged(z: Tensor) -> tuple[float, Tensor]:
            mark, found = _mark(chart.alphas(z)), None
            if self._known:
                record = self._known.pop(0)
                if (
                    record["stage"] == stage
                    and _same_place(record["z"], z)
                    and abs(record["mark"] - mark) < 1e-9
                ):
                    found = None if sample in self._checked else function(z)
                    if found is None or _alike(found[0], record["loss"]):
                        self._checked.add(sample)
                        self._kept.append(record)
                        return record["loss"], torch.tensor(record["gradient"], dtype=torch.float64)
                # Another way: say on another machine, or with another number of processes.
                self._progress(Noted(_ANOTHER_WAY if found is None else _CHANGED))
                self._known.clear()
            loss, gradient = found or function(z)
            self._append(
                {
                    "stage": stage,
                    "z": z.tolist(),
                    "mark": mark,
                    "loss": loss,
                    "gradient": gradient.tolist(),
                }
            )
            return loss, gradient

        return logged

    def _append(self, record: dict[str, Any]) -> None:
        if not self._world.is_zero:
            return
        try:
            # Another run with the same output that has ended takes the folder with it.
            if not (self._started and self.folder.is_dir()):
                self._restart()
            with (self.folder / _STATE).open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _not_written(self.folder, error) from error

    def _restart(self) -> None:
        """Keeps what the log answered so far and drops the rest; an untouched folder stays so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.take():
            raise _in_use(self.folder)
        scratch = self.folder / _SCRATCH
        lines = [json.dumps(r) for r in [{"run": self._header}, *self._kept]]
        scratch.write_text("".join(line + "\n" for line in lines))
        scratch.replace(self.folder / _STATE)
        if not self.landscape_failed:
            (self.folder / _UNDRAWN).unlink(missing_ok=True)
        self._started = True

    def fail_landscape(self) -> None:
        """Has a repeated run do without the landscape; called by the rank that cannot go on."""
        with contextlib.suppress(OSError):
            (self.folder / _UNDRAWN).touch()

    def remove(self) -> None:
        """Removes the state, and nothing else that is there by now: the run has ended."""
        if self._world.is_zero:
            self._lock.release()
            with contextlib.suppress(OSError):
                for name in _FILES:
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()


def _not_written(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        "The state of the run cannot be written.",
        checkpoint=folder,
        found=error.strerror,
        remedy="make room, or choose another output folder with -o",
    )


def _in_use(folder: Path) -> OutputError:
    return OutputError(
        "Another run with the same output is going on.",
        expected="one run at a time for an output folder",
        found=f"{folder}, in use by another process",
        remedy="wait until it has ended, or choose another output folder with -o",
    )


def _same_place(known: list[float], z: Tensor) -> bool:
    """Whether coordinates are those of the log, up to what another number of processes rounds."""
    place = torch.tensor(known, dtype=torch.float64)
    return place.shape == z.shape and torch.allclose(place, z, rtol=1e-9, atol=1e-12)


def _alike(loss: float, known: float) -> bool:
    """The same evaluation on other processes or another machine, or another one altogether."""
    if not (math.isfinite(loss) and math.isfinite(known)):
        return math.isfinite(loss) == math.isfinite(known)
    return math.isclose(loss, known, rel_tol=_ALIKE, abs_tol=1e-9)


def _mark(alphas: Tensor) -> float:
    """One number that tells two sets of coefficients apart."""
    weights = torch.cos(torch.arange(1, alphas.numel() + 1, dtype=torch.float64))
    return float(weights @ alphas.reshape(-1))
