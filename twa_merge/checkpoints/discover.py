"""Arguments of the user → checkpoints in order of training."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Selection
from ..errors import CheckpointError, listing
from ..progress import Noted, Progress, silent
from .base import Checkpoint, reading
from .contents import require_unquantised, same_weights
from .folders import Weights, is_model_file, whole_model
from .found import KINDS, Found, expand
from .safetensors_files import SafetensorsReader
from .step_names import NamedStep, is_numbered, named_steps
from .steps import in_order, select, trainer_step

if TYPE_CHECKING:
    from .distributed_files import DistributedReader
    from .pickles import PickleReader

_ALL = Selection()
# Lightning's name for a copy of the newest checkpoint.
_LAST = re.compile(r"last(-v\d+)?\.ckpt")


def open_checkpoints(
    paths: Sequence[str | PathLike[str]],
    selection: Selection = _ALL,
    progress: Progress = silent,
) -> list[Checkpoint]:
    """Finds, orders, selects and opens checkpoints; of the tensors only headers are read.

    Each path may be

    - a file: ``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.pth.tar``;
    - a folder that is one checkpoint: with Hugging Face's names for weights, with one file (or
      one set of shards) of weights in it, or a distributed checkpoint of PyTorch's, the folders of
      accelerate and the Trainer around it included;
    - a run folder: the checkpoints directly in it, folders and files. Where there are two or more
      folders with checkpoints, weights that lie beside them are left out. So are earlier merges
      (folders with a ``twa_merge.json``), unless there is nothing else.

    A Trainer's output folder is both: it has the final model and ``checkpoint-*`` folders. Given
    alone, with two or more of those, it means them and not the final model, which is one of
    them again, or else is told. Given among other paths it means the final model.

    So it is with the ``last.ckpt`` of Lightning: of the same step as another checkpoint of the run
    it is that one again. Any other checkpoint of a run folder without a number in its name
    (``model_best.pth``, ``final/``) is left out where it holds the weights of one with a number.

    Where safetensors and pickles of one model lie together, safetensors are read. A path that
    comes twice counts once. A folder in a format that is not read stands for what it has been
    converted to: weights in it, or a file of its name beside it. So does a distributed checkpoint.

    The training step is ``global_step`` of a ``trainer_state.json``, or what the name says, or for
    pickles and distributed checkpoints whose names say nothing for certain what a script has saved
    in them. Order: by step
    where all have one; by the times in their names where all have those; otherwise as listed;
    inside one run folder those without a step come last, but for the best, which is not said to be
    the newest.

    Args:
        selection: which of them take part; see ``Selection``.
        progress: is told of names with several numbers, none of which is known to be the step, of
            several checkpoints of one step, and of weights that are left out: beside a model's in
            what was saved, and a final model that is none of the checkpoints again.

    Returns:
        At least one checkpoint, the newest last. Their files are closed when they are, or when
        nobody holds them any more.

    Raises:
        CheckpointError: there are none, none is left by the selection, or one of those chosen is
            damaged, incomplete, or in a format that is not read here.
    """
    paths = [paths] if isinstance(paths, (str, PathLike)) else paths
    if "" in paths:
        # Path("") is the current folder, which a variable that was never set does not mean.
        raise CheckpointError(
            "A path is empty.",
            expected=KINDS,
            remedy="check the variable that it came from; the current folder is called .",
        )
    given = [Path(p) for p in paths]
    if not given:
        raise CheckpointError("No checkpoints were given.", expected=KINDS)
    found = _without_copies(_with_steps(_once(expand(given))), given)
    listed = len(given) > 1 or not given[0].is_dir()
    opened: list[Checkpoint] = []
    try:
        chosen = select(in_order(_distinct(found, given), listed=listed), selection)
        for each in chosen:
            opened.append(_open(each))
        _note_doubt(chosen, progress, listed=listed)
        if not listed:
            _note_same_step(chosen, progress)
            _note_model_of_run(given[0], found, progress)
        _note_left_out(opened, progress)
        return opened
    except BaseException:
        for checkpoint in opened:
            checkpoint.close()
        raise
    finally:
        for early in found:
            if early.opened and early.opened not in opened:
                early.opened.close()


def is_run(path: str | PathLike[str]) -> bool:
    """Whether a path stands for several checkpoints.

    Raises:
        CheckpointError: there are none, or the path cannot be read.
    """
    return len(_once(expand([Path(path)]))) > 1


def _once(found: Sequence[Found]) -> list[Found]:
    """Each place on disk once: a link to another checkpoint of the list gives way to that one."""
    places: dict[Path, Found] = {}
    for each in found:
        with reading(each.path):
            place = each.path.resolve()
        if place not in places or (places[place].path.is_symlink() and not each.path.is_symlink()):
            places[place] = each
    return list(places.values())


def _distinct(found: Sequence[Found], given: Sequence[Path]) -> list[Found]:
    """Without files in a run folder that are called the last, where another one is of its step."""
    lasts = [f for f in found if _LAST.fullmatch(f.path.name) and f.path not in given]
    saved = {(f.path.parent, f.step) for f in found if f not in lasts and f.step is not None}
    return [f for f in found if f not in lasts or (f.path.parent, f.step) not in saved]


def _without_copies(found: Sequence[Found], given: Sequence[Path]) -> list[Found]:
    """Without what is in a run folder under a name without a number, and there again with one."""
    kept = {f.path: f for f in found}
    for f in found:
        for original in _originals(f, found, given):
            for path in (f.path, original.path):
                kept[path] = _opened(kept[path])
            one, other = kept[f.path].opened, kept[original.path].opened
            if one and other and same_weights(one, other):
                del kept[f.path]
                one.close()
                break
    return list(kept.values())


def _originals(f: Found, found: Sequence[Found], given: Sequence[Path]) -> list[Found]:
    """What a checkpoint may be a copy of: those of its run folder with a number, of its step."""
    if f.path in given or is_numbered(f.path):
        return []
    return [
        g
        for g in found
        if g.path.parent == f.path.parent
        and (f.step is None or g.step in (None, f.step))
        and is_numbered(g.path)
    ]


def _opened(found: Found) -> Found:
    try:
        return replace(found, opened=_open(found))
    except CheckpointError as problem:
        return replace(found, problem=problem)


def _with_steps(found: Sequence[Found]) -> list[Found]:
    names = named_steps([(f.path, f.weights.files if f.weights else ()) for f in found])
    return [_with_step(f, named) for f, named in zip(found, names, strict=True)]


def _with_step(found: Found, named: NamedStep) -> Found:
    folder = found.path if found.path.is_dir() else found.path.parent
    if found.path == folder or is_model_file(found.path):
        written = trainer_step(folder)
        if written is not None:
            return replace(found, step=written)
    found = replace(found, step=named.number, times=named.times, doubtful=named.doubtful)
    by_script = found.weights and (found.weights.is_pickle or found.weights.is_distributed)
    if not by_script or named.certain:
        return found
    try:
        opened = _open(replace(found, step=None))
    except CheckpointError as problem:
        return replace(found, problem=problem)
    step = found.step if opened.step is None else opened.step
    if step is None and named.doubtful:
        step = opened.epoch
    return replace(found, step=step, opened=replace(opened, step=step))


def _note_doubt(chosen: Sequence[Found], progress: Progress, *, listed: bool) -> None:
    doubtful = [f.path.name for f in chosen if f.doubtful and f.step is None]
    if len(doubtful) > 1:
        how = "as they were given" if listed else "in the order of their names"
        progress(
            Noted(
                f"The names of checkpoints differ in several numbers, and nothing says which of "
                f"them is the training step: they are taken {how}, from {doubtful[0]} to "
                f"{doubtful[-1]}, and --from-step and --to-step do not know them. If that is not "
                "the order of training, list the files in it, or call them step_100.pt and the "
                "like."
            )
        )


def _note_same_step(chosen: Sequence[Found], progress: Progress) -> None:
    """As raw and averaged weights of one moment are, side by side in one run folder."""
    of: dict[int, list[str]] = {}
    # Names that differ in their numbers alone count something within the step.
    kinds: set[tuple[int, str]] = set()
    for each in chosen:
        kind = re.sub(r"\d+", "", each.path.name)
        if each.step is not None and (each.step, kind) not in kinds:
            kinds.add((each.step, kind))
            of.setdefault(each.step, []).append(each.path.name)
    several = {step: names for step, names in of.items() if len(names) > 1}
    if several:
        step, names = next(iter(several.items()))
        progress(
            Noted(
                f"Several checkpoints are of one step ({listing(names)} of step {step}): all of "
                "them take part, in this order. If some are averages of the others, or of another "
                "run, name the files that are meant."
            )
        )


def _note_model_of_run(run: Path, found: Sequence[Found], progress: Progress) -> None:
    """Of a last model, of a step without a checkpoint, which some trainings leave there."""
    weights = whole_model(run)
    if not weights or any(f.path == run for f in found):
        return
    model = _opened(Found(run, weights)).opened
    if not model:
        return
    if not _holds(found, model):
        file = (weights.index or weights.files[0]).name
        progress(
            Noted(
                f"{file} in the run's own folder holds other weights than its checkpoints, and is "
                "left out. If it is the end of the training, list them in order, the folder last: "
                f"$(ls -dv {shlex.quote(str(run))}/checkpoint-*) {shlex.quote(str(run))}"
            )
        )
    model.close()


def _holds(found: Sequence[Found], model: Checkpoint) -> bool:
    for each in reversed(found):
        other = each.opened or _opened(each).opened
        if not other:
            continue
        same = same_weights(model, other)
        if not each.opened:
            other.close()
        if same:
            return True
    return False


def _note_left_out(opened: Sequence[Checkpoint], progress: Progress) -> None:
    places = sorted({place for checkpoint in opened for place in checkpoint.left_out})
    if places:
        progress(
            Noted(
                f"Checkpoints hold other weights beside the model's, under {listing(places)}: they "
                "are left out, and the result will not have them."
            )
        )


def _open(found: Found) -> Checkpoint:
    if found.opened:
        return found.opened
    if found.problem or not found.weights:
        raise found.problem or CheckpointError("There are no weights.", checkpoint=found.path)
    weights = found.weights
    if weights.is_pickle or weights.is_distributed:
        checkpoint = _open_saved_by_torch(found, weights)
    else:
        kind = "huggingface" if found.path.is_dir() else "safetensors"
        reader = SafetensorsReader(weights.files, weights.index)
        checkpoint = Checkpoint(found.path, found.step, kind, reader)
    require_unquantised(checkpoint)
    return checkpoint


def _open_saved_by_torch(found: Found, weights: Weights) -> Checkpoint:
    # These wait for torch, which safetensors have no need of.
    reader: PickleReader | DistributedReader
    if weights.is_distributed and weights.index:
        from .distributed_files import DistributedReader

        reader = DistributedReader(weights.index.parent, found.path)
    else:
        from .pickles import PickleReader

        reader = PickleReader(weights.files, weights.index)
    return Checkpoint(
        found.path,
        reader.step if found.step is None else found.step,
        "distributed" if weights.is_distributed else "pickle",
        reader,
        reader.epoch,
        reader.entry,
        reader.extra_states,
        reader.left_out,
    )
