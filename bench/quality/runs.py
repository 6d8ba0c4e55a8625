"""The training runs that the suites compare on, kept in a folder so that each is made once.

Every function takes that folder and a seed and gives a ``Suite``. On two CPU cores the byte-level
run takes about three minutes a seed.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twa_merge.demo import Training, decay_factor
from twa_merge.task import Task
from twa_merge.tasks.byte_lm import ByteTask, standard_library_text


@dataclass(frozen=True)
class Suite:
    """Checkpoints to merge, the data to do it with, and what to compare with besides.

    Attributes:
        name: of the kind of run.
        checkpoints: in order of training; what ``merge`` is given.
        task: its ``dataset()`` is held out (fit and guard parts come from it), its
            ``test_dataset()`` is what nothing is chosen on.
        references: single checkpoints that take no part in the merge: what they are → the path.
    """

    name: str
    seed: int
    checkpoints: list[Path]
    task: Task
    references: Mapping[str, Path] = field(default_factory=dict)


def cached(folder: Path, settings: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """``folder`` with what ``make`` leaves in it, made again only if ``settings`` differ.

    Raises:
        FileExistsError: the folder holds something else than an earlier (part of a) run.
    """
    done, begun = folder / "complete.json", folder / "settings.json"
    text = json.dumps(settings, sort_keys=True)
    if done.exists() and begun.read_text() == text:
        return folder
    if folder.exists():
        if not begun.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} exists and holds no benchmark run")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    begun.write_text(text)
    began = time.perf_counter()
    make(folder)
    done.write_text(json.dumps({"seconds": round(time.perf_counter() - began, 1)}))
    return folder


def numbered(folder: Path, pattern: str = "checkpoint-*") -> list[Path]:
    """Checkpoints in ``folder`` by the number that their names end with."""
    return sorted(folder.glob(pattern), key=lambda p: int(p.stem.rpartition("-")[2]))


def annealing(
    cache: Path,
    seed: int,
    *,
    steps: int = 2400,
    every: int = 20,
    learning_rate: float = 3e-3,
    sequences: int | None = 512,
    test_sequences: int | None = 1024,
    from_step: int = 1220,
    merge_every: int = 40,
) -> Suite:
    """Suite 1: a byte-level transformer at a constant rate.

    The reference ``decayed`` is the same run with its learning rate really decayed, linearly to
    zero, over the last fifth of its steps.

    Args:
        every: steps between checkpoints that are saved.
        sequences: of 128 held-out bytes, for fit and guard together.
        from_step: the first checkpoint to merge.
        merge_every: steps between checkpoints that are merged.
    """
    text = standard_library_text(seed)

    def make(folder: Path) -> None:
        training = Training(text, seed=seed, learning_rate=learning_rate)
        for step in range(1, steps + 1):
            if decay_factor(step, steps) == 1.0:
                trunk_ended = step
                training.advance()
            else:
                if step == trunk_ended + 1:
                    decayed = copy.deepcopy(training)
                training.advance()
                decayed.advance(decay_factor(step, steps))
            if step % every == 0:
                training.save(folder / "constant")
        decayed.save(folder / "decayed")

    settings = {"steps": steps, "every": every, "learning_rate": learning_rate, "seed": seed}
    folder = cached(cache / f"bytes-{steps}-{seed}", settings, make)
    task = ByteTask(
        text.held_out, text.test, sequences=sequences, test_sequences=test_sequences, seed=seed
    )
    chosen = [
        p
        for p in numbered(folder / "constant")
        if step_of(p) >= from_step and step_of(p) % merge_every == 0
    ]
    return Suite("annealing", seed, chosen, task, {"decayed": numbered(folder / "decayed")[-1]})


def head(cache: Path, seed: int, *, share: float = 0.5, **options: Any) -> Suite:
    """Suite 2: the first ``share`` of the checkpoints of ``annealing``.

    The references are the later checkpoints of the run, ``step N``: the first of them that is as
    good as the merge says how many steps the merge saves.
    """
    whole = annealing(cache, seed, from_step=0, **options)
    last = share * step_of(whole.checkpoints[-1])
    early = [p for p in whole.checkpoints if step_of(p) <= last]
    later = {f"step {step_of(p)}": p for p in whole.checkpoints if step_of(p) > last}
    return Suite("head", seed, early, whole.task, later)


def step_of(checkpoint: Path) -> int:
    """Training step in the checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])
