"""All choices of one run, checked against each other, and the task that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_type_hints

from .candidates import BY_BLOCK, parse_families
from .checkpoints.base import Checkpoint
from .config import (
    STARTS,
    DataConfig,
    EngineConfig,
    FitConfig,
    GuardConfig,
    OutputConfig,
    Selection,
    StoreConfig,
    parse_subspace,
)
from .errors import ConfigError
from .layout import Layout
from .task import Splits, Task, check_task, split
from .tasks import load_task


@dataclass(frozen=True)
class Choices:
    """All choices of one run."""

    selection: Selection = field(default_factory=Selection)
    data: DataConfig = field(default_factory=DataConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError where one is of another class."""
        for name, kind in get_type_hints(type(self)).items():
            given = getattr(self, name)
            if not isinstance(given, kind):
                raise ConfigError(
                    f"The choices of {name} are of another class.",
                    expected=kind.__name__,
                    found=repr(given),
                )


def require_compatible(fit: FitConfig, candidates: str) -> None:
    """Checks that choices of blocks go together with the others.

    Args:
        candidates: as ``GuardConfig`` has them.

    Raises:
        ConfigError: a candidate is not known; blocks, or a span of checkpoints, were asked for
            beside random directions; or a candidate by block without blocks, or blocks without one.
    """
    by_block = BY_BLOCK in parse_families(candidates)
    if fit.blocks in ("layers", "tensors") and not by_block:
        raise ConfigError(
            "--blocks asks for a fit that no candidate comes from.",
            expected=f"twa-{fit.blocks} among the --candidates, or no --blocks",
            found=f"--blocks {fit.blocks} --candidates {candidates}",
        )
    if fit.blocks == "global" and by_block and candidates not in ("quick", "all"):
        raise ConfigError(
            "There is no fit by block with one block for the whole model.",
            expected="--blocks auto, tensors or layers, or other --candidates",
            found=f"--blocks {fit.blocks} --candidates {candidates}",
        )
    if parse_subspace(fit.subspace)[0] != "random":
        return
    if fit.blocks not in ("auto", "global"):
        raise ConfigError(
            "Random directions are of the whole model.",
            expected="--blocks global, or none",
            found=f"--blocks {fit.blocks} --subspace {fit.subspace}",
        )
    if fit.span != "affine":
        raise ConfigError(
            "Random directions do not lie in a span of the checkpoints.",
            expected="--span or --subspace random:R, not both",
            found=f"--span {fit.span} --subspace {fit.subspace}",
        )


def require_directions(fit: FitConfig, n: int, layout: Layout) -> None:
    """Checks that there can be as many directions as --subspace names.

    Raises:
        ConfigError: n checkpoints span fewer, or the model has fewer numbers.
    """
    word, wanted = parse_subspace(fit.subspace)
    most, found = {
        "pca": (n - 1, f"{n} checkpoints span {n - 1} directions at most"),
        "random": (layout.trained_numbers, f"a model of {layout.trained_numbers} numbers"),
    }.get(word, (0, ""))
    if wanted is not None and wanted > most:
        raise ConfigError(
            "--subspace names more directions than there are.",
            expected=f"at most {word}:{most}",
            found=f"{fit.subspace}, but {found}",
        )


def require_start(fit: FitConfig, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises ConfigError where --start names a step that no checkpoint has."""
    steps = [str(checkpoint.step) for checkpoint in checkpoints]
    if fit.start not in STARTS and str(int(fit.start)) not in steps:
        raise ConfigError(
            "--start names a step that no checkpoint has.",
            expected=", ".join(steps),
            found=fit.start,
        )


def task_and_splits(
    task: Task | str,
    data: str | None,
    test_data: str | None,
    newest: Checkpoint,
    options: dict[str, object],
    choices: Choices,
) -> tuple[Task, Splits]:
    """The task, loaded if it is named, and its data in parts.

    Args:
        newest: checkpoint, whose folder a built-in task may read.
        options: keyword arguments of a built-in task.

    Raises:
        ConfigError: a task object is given what only tasks by name take.
        TaskError: there is no such task, its code raises, or its data cannot be split.
    """
    seed, fraction = choices.data.seed, choices.data.guard_fraction
    if not isinstance(task, str):
        if data is not None or test_data is not None:
            raise ConfigError(
                "A task object brings its own data.", remedy="leave data and test_data out"
            )
        if choices.fit.label_smoothing:
            raise ConfigError(
                "A task object brings its own loss, which label smoothing is a part of.",
                remedy="smooth inside the task's loss, and leave label_smoothing out",
            )
        task = check_task(task, type(task).__name__)
        return task, split(task, fraction, seed)
    if choices.fit.label_smoothing:
        options["label_smoothing"] = choices.fit.label_smoothing

    def load(source: str | None, option: str) -> Task:
        return load_task(
            task, data=source, checkpoint=newest.path, options=options, data_option=option
        )

    test = load(test_data, "--test-data") if test_data is not None else None
    named = load(data, "--data")
    return named, split(named, fraction, seed, test)
