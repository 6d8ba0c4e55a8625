"""Σ α_i w_i, computed afresh from the original files and written the way the first one was.

A checkpoint whose coefficient is exactly zero is not read for the tensors of that block, so a NaN
in it does no harm there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import constants, split_state_dict_into_shards_factory
from torch import Tensor

from .checkpoints import sidecars
from .checkpoints.base import Checkpoint, TensorInfo
from .combination import Combination, write_file
from .distributed import World
from .errors import OutputError, TwaMergeError
from .layout import Blocks, Layout
from .output_folder import Staging, require_place, require_space, sync_folder, writing
from .progress import Progress, Started, silent
from .safetensors_writer import DTYPE_NAMES, SavedTensor, aligned, header

T = TypeVar("T")

_CONFIG = Path("config.json")
_CONFIG_DTYPE = re.compile(rb'("(?:torch_)?dtype"\s*:\s*")b?float\d+(")')


@dataclass(frozen=True)
class PlannedFile:
    """One file of weights to be written; ``name`` is relative to the output folder."""

    name: str
    tensors: tuple[SavedTensor, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return len(header(self.tensors, self.metadata)) + sum(t.info.nbytes for t in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything to be written beside the documents: weights, index, sidecars."""

    files: tuple[PlannedFile, ...]
    index: tuple[str, bytes] | None
    sidecars: tuple[tuple[Path, Path], ...]

    @property
    def nbytes(self) -> int:
        index = len(self.index[1]) if self.index else 0
        beside = sum(source.stat().st_size for source, _ in self.sidecars)
        return sum(file.nbytes for file in self.files) + index + beside


def check_output(
    output: Path,
    checkpoints: Sequence[Checkpoint],
    overwrite: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Checks that a merge of ``checkpoints`` can be written to ``output``. Changes nothing.

    To be called before hours of training; ``write_merge`` calls it again.

    Raises:
        OutputError: the folder exists and may not be replaced, holds or lies in a checkpoint or
            cannot be written, the disk has too little space, or a dtype cannot be saved.
    """
    require_place(output, checkpoints, overwrite)
    with writing(output):
        needed = _plan(checkpoints, dtype).nbytes
    require_space(output, needed)


def write_merge(
    checkpoints: Sequence[Checkpoint],
    layout: Layout,
    blocks: Blocks,
    alphas: Tensor,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Tensor] | None = None,
    documents: Mapping[str, str] | None = None,
    overwrite: bool = False,
    world: World | None = None,
    progress: Progress = silent,
) -> None:
    """Writes the merge as a folder, which appears complete or not at all.

    Each number is Σ α_i w_i over the checkpoints in order, products and sums in float64, converted
    once to the saved dtype. Weights have the first checkpoint's files and names, or become
    ``model.safetensors`` where those are pickles or one bare file; tensors that are not averaged
    and all sidecars come from the newest. The ranks write whole files each.

    Args:
        alphas: coefficients (B, n) float64, or (1, n) for all blocks.
        dtype: of averaged real tensors; each keeps its saved dtype without it.
        overrides: tensors that replace the result, converted to the saved dtype.
        documents: name → text of further files; they go before sidecars of the same name.
        overwrite: replace an earlier merge in the same place.

    Raises:
        OutputError: as ``check_output``, or the disk has filled up meanwhile.
        CheckpointError: a checkpoint that takes part holds a NaN or an infinity.
    """
    world, documents = world or World(), documents or {}
    combination = Combination(checkpoints, layout, blocks, alphas, overrides or {})
    staging = Staging(output)
    needed = 0

    def prepare() -> tuple[Path, Plan, int]:
        check_output(output, checkpoints, overwrite, dtype=dtype)
        plan = _plan(checkpoints, dtype)
        with writing(output):
            staging.create()
        return staging.folder, plan, plan.nbytes

    def weights() -> None:
        with writing(output, needed):
            for file in mine:
                path = _child(folder, file.name)
                write_file(path, file.tensors, file.metadata, combination, progress)

    def finish() -> None:
        with writing(output, needed):
            _write_rest(folder, plan, documents, dtype)
            staging.commit(overwrite)

    try:
        prepared = _together(world, lambda: prepare() if world.is_zero else None)
        folder, plan, needed = world.broadcast(prepared)
        mine = _share(plan.files, world)
        progress(Started("write", sum(t.info.nbytes for f in mine for t in f.tensors), "bytes"))
        _together(world, weights)
        _together(world, lambda: finish() if world.is_zero else None)
    except BaseException:
        if world.is_zero:
            staging.discard()
        raise


def _together(world: World, work: Callable[[], T]) -> T:
    """``work()`` on every rank; an error on one is raised on all, so that none waits for it."""
    error: Exception | None = None
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


def _share(files: Sequence[PlannedFile], world: World) -> list[PlannedFile]:
    """The files that this rank writes: large ones first, each to the rank with the fewest bytes."""
    load = [0] * world.size
    mine = []
    for file in sorted(files, key=lambda f: -f.nbytes):
        rank = load.index(min(load))
        load[rank] += file.nbytes
        if rank == world.rank:
            mine.append(file)
    return mine


def _write_rest(
    folder: Path, plan: Plan, documents: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    for source, name in plan.sidecars:
        if name.as_posix() in documents:
            continue
        path = _child(folder, str(name))
        shutil.copyfile(source, path)
        if dtype is not None and name == _CONFIG:
            # The one edit: readers would otherwise convert the weights back.
            word = str(dtype).removeprefix("torch.").encode()
            path.write_bytes(_CONFIG_DTYPE.sub(rb"\g<1>" + word + rb"\g<2>", path.read_bytes()))
        _sync_file(path)
    texts = {name: text.encode() for name, text in documents.items()}
    for name, content in (texts | dict([plan.index] if plan.index else [])).items():
        path = _child(folder, name)
        path.write_bytes(content)
        _sync_file(path)


def _child(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
