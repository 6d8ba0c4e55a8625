"""Σ α_i w_i → files, sidecars and documents: the folder appears complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .checkpoints.base import Checkpoint
from .combination import Combination, write_file
from .dtypes import Array, Dtype, Float64
from .errors import TwaMergeError
from .layout import Blocks, Layout
from .output_folder import Staging, require_place, require_space, writing
from .output_plan import OutputPlan, PlannedFile, plan_output
from .progress import Progress, Started, silent
from .ranks import Alone, Ranks

T = TypeVar("T")

_CONFIG = "config.json"
_CONFIG_DTYPE = re.compile(rb'("(?:torch_)?dtype"\s*:\s*")b?float\w+(")')


def check_output(
    output: Path,
    checkpoints: Sequence[Checkpoint],
    overwrite: bool = False,
    *,
    dtype: Dtype | None = None,
) -> list[str]:
    """Checks that a merge of ``checkpoints`` can be written to ``output``. Changes nothing.

    To be called before hours of training; ``write_merge`` calls it again.

    Returns:
        Names of the files that it would hold besides documents.

    Raises:
        OutputError: the folder exists and may not be replaced, holds or lies in a checkpoint or
            cannot be written, the disk has too little space, or a dtype cannot be saved.
    """
    return _checked_plan(output, checkpoints, overwrite, dtype).names


def write_merge(
    checkpoints: Sequence[Checkpoint],
    layout: Layout,
    blocks: Blocks,
    alphas: Float64,
    output: Path,
    *,
    dtype: Dtype | None = None,
    overrides: Mapping[str, Array] | None = None,
    documents: Mapping[str, str] | None = None,
    overwrite: bool = False,
    world: Ranks | None = None,
    progress: Progress = silent,
) -> None:
    """Writes the merge as a folder, computed afresh from the original files.

    Each number is Σ α_i w_i over the checkpoints in order, products and sums in float64, converted
    once to the saved dtype. A checkpoint whose α is exactly zero is not read for the tensors of
    that block, so what is wrong with its numbers does no harm. Files and names of the weights are
    the first checkpoint's; tensors that are not averaged, and all sidecars, are the newest's. With
    several ranks each writes whole files; rank zero alone writes the rest.

    Args:
        alphas: coefficients (B, n) float64, or (1, n) for all blocks.
        dtype: of averaged real tensors; each keeps its saved dtype without it.
        overrides: numbers that replace the result, converted to the saved dtype: float64 where a
            tensor is averaged, of any dtype where it is copied.
        documents: name → text of further files; they go before sidecars of the same name.
        overwrite: replace an earlier merge in the same place.

    Raises:
        OutputError: as ``check_output``, or the disk has filled up meanwhile.
        CheckpointError: a checkpoint that takes part holds a NaN or an infinity.
    """
    world = world or Alone()
    combination = Combination(checkpoints, layout, blocks, alphas, overrides or {})
    staging = world.broadcast(Staging(output))

    def prepare() -> OutputPlan:
        plan = _checked_plan(output, checkpoints, overwrite, dtype)
        with writing(output):
            staging.create()
        return plan

    def weights() -> None:
        with writing(output, plan.nbytes):
            staging.require_shared()
            for file in mine:
                path = _child(staging.folder, file.name)
                write_file(path, file.tensors, file.metadata, combination, progress)

    def rest() -> None:
        with writing(output, plan.nbytes):
            _write_rest(staging.folder, plan, documents or {}, dtype)
            staging.commit(overwrite)

    try:
        plan = _on_zero(world, prepare)
        mine = _share(plan.files, world)
        progress(Started("write", sum(t.info.nbytes for f in mine for t in f.tensors), "bytes"))
        _together(world, weights)
        _on_zero(world, rest)
    except BaseException:
        if world.is_zero:
            staging.discard()
        raise


def _checked_plan(
    output: Path, checkpoints: Sequence[Checkpoint], overwrite: bool, dtype: Dtype | None
) -> OutputPlan:
    require_place(output, checkpoints, overwrite)
    with writing(output):
        plan = plan_output(checkpoints, dtype)
        needed = plan.nbytes
    require_space(output, needed)
    return plan


def _on_zero(world: Ranks, work: Callable[[], T]) -> T:
    """Rank zero's ``work()``, on every rank; so is its error."""
    return world.broadcast(_together(world, lambda: work() if world.is_zero else None))


def _together(world: Ranks, work: Callable[[], T]) -> T:
    """``work()`` on every rank; an error on one is raised on all, so that none waits for it.

    Raises:
        RuntimeError: on the other ranks, where the error was no TwaMergeError.
    """
    error: Exception | None = None
    result: T
    try:
        result = work()
    except Exception as caught:
        error = caught
    known = error is None or isinstance(error, TwaMergeError)
    reports = world.gather(error if known else RuntimeError(f"rank {world.rank}: {error!r}"))
    if error is not None:
        raise error
    for report in reports:
        if report is not None:
            raise report
    return result


def _share(files: Sequence[PlannedFile], world: Ranks) -> list[PlannedFile]:
    """The files that this rank writes: the largest first, each to the rank with the least."""
    load = [0] * world.size
    mine = []
    for file in sorted(files, key=lambda f: -f.nbytes):
        rank = load.index(min(load))
        load[rank] += file.nbytes
        if rank == world.rank:
            mine.append(file)
    return mine


def _write_rest(
    folder: Path, plan: OutputPlan, documents: Mapping[str, str], dtype: Dtype | None
) -> None:
    for name, source in plan.sidecars.items():
        path = _child(folder, name)
        if name == _CONFIG and dtype is not None:
            # The one edit: readers would otherwise convert the weights back.
            word = dtype.name.encode()
            config = _CONFIG_DTYPE.sub(rb"\g<1>" + word + rb"\g<2>", source.read_bytes())
            _write_bytes(path, config)
        else:
            shutil.copyfile(source, path)
            _sync(path)
    for name, text in documents.items():
        _write_bytes(_child(folder, name), text.encode())
    if plan.index:
        _write_bytes(folder / plan.index[0], plan.index[1])


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _child(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
