"""Arguments of the user → checkpoints in order of training."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from ..config import Selection
from ..errors import CheckpointError, listing
from ..leftovers import DOCUMENT, set_aside, to_restore
from ..progress import Noted, Progress, silent
from .base import Checkpoint, reading
from .contents import require_unquantised, same_weights
from .folders import (
    PICKLES,
    SAFETENSORS,
    Weights,
    bare_or_usual,
    bare_weights,
    entries,
    is_model_file,
    is_training_state,
    weights_in,
    whole_model,
)
from .foreign import foreign_file, foreign_format, not_whole, parts_of_one_model
from .safetensors_files import SafetensorsReader
from .shards import group_shards
from .step_names import NamedStep, is_numbered, is_step_folder, named_steps
from .steps import in_order, select, trainer_step
from .times import Times

_KINDS = f"Hugging Face folders, {SAFETENSORS} files, or torch.save files ({', '.join(PICKLES)})"
_ALL = Selection()
# Lightning's name for a copy of the newest checkpoint.
_LAST = re.compile(r"last(-v\d+)?\.ckpt")


@dataclass(frozen=True)
class _Found:
    """A checkpoint that has been found.

    Attributes:
        path: the folder, or the first file.
        problem: why it cannot be opened, to be raised if it is chosen.
        opened: filled early where only the file itself can tell the step.
        times: when it was saved, as its name says.
        doubtful: its name has several numbers, and nothing says which of them is the step.
    """

    path: Path
    weights: Weights | None = None
    step: int | None = None
    problem: CheckpointError | None = None
    opened: Checkpoint | None = None
    times: Times = ()
    doubtful: bool = False


def open_checkpoints(
    paths: Sequence[str | PathLike[str]],
    selection: Selection = _ALL,
    progress: Progress = silent,
) -> list[Checkpoint]:
    """Finds, orders, selects and opens checkpoints; of the tensors only headers are read.

    Each path may be

    - a file: ``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.pth.tar``;
    - a folder that is one checkpoint: with Hugging Face's names for weights, or with one file (or
      one set of shards) of weights in it;
    - a run folder: the checkpoints directly in it, folders and files. Where there are two or more
      folders with checkpoints, weights that lie beside them are left out. So are earlier merges
      (folders with a ``twa_merge.json``), unless there is nothing else.

    A Trainer's output folder is both: it has the final model and ``checkpoint-*`` folders. Given
    alone, with two or more of those, it means them and not the final model, which is the last of
    them again (to have it nevertheless, name its file). Given among other paths it means the
    final model.

    So it is with the ``last.ckpt`` of Lightning: of the same step as another checkpoint of the run
    it is that one again. Any other checkpoint of a run folder without a number in its name
    (``model_best.pth``, ``final/``) is left out where it holds the weights of one with a number.

    Where safetensors and pickles of one model lie together, safetensors are read. A path that
    comes twice counts once. A folder in a format that is not read stands for what it has been
    converted to: weights in it, or a file of its name beside it.

    The training step is ``global_step`` of a ``trainer_state.json``, or what the name says, or for
    pickles whose names say nothing for certain what a script has saved in them. Order: by step
    where all have one; by the times in their names where all have those; otherwise as listed;
    inside one run folder those without a step come last, but for the best, which is not said to be
    the newest.

    Args:
        selection: which of them take part; see ``Selection``.
        progress: is told of names with several numbers, none of which is known to be the step, and
            of weights in pickles that are left out.

    Returns:
        At least one checkpoint, the newest last. The caller closes them.

    Raises:
        CheckpointError: there are none, none is left by the selection, or one of those chosen is
            damaged, incomplete, or in a format that is not read here.
    """
    paths = [paths] if isinstance(paths, (str, PathLike)) else paths
    if "" in paths:
        # Path("") is the current folder, which a variable that was never set does not mean.
        raise CheckpointError(
            "A path is empty.",
            expected=_KINDS,
            remedy="check the variable that it came from; the current folder is called .",
        )
    given = [Path(p) for p in paths]
    if not given:
        raise CheckpointError("No checkpoints were given.", expected=_KINDS)
    found = _without_copies(_with_steps(_once(_expand(given))), given)
    listed = len(given) > 1 or not given[0].is_dir()
    opened: list[Checkpoint] = []
    try:
        chosen = select(in_order(_distinct(found, given), listed=listed), selection)
        for each in chosen:
            opened.append(_open(each))
        _note_doubt(chosen, progress, listed=listed)
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
    return len(_once(_expand([Path(path)]))) > 1


def _expand(given: Sequence[Path]) -> list[_Found]:
    """Every path as the checkpoints that it stands for; shards given one by one as one of them."""
    given = list(dict.fromkeys(given))
    for path in given:
        with reading(path):
            if not path.exists():
                raise _missing(path)
    groups = {group[0]: group for group in group_shards(p for p in given if p.is_file())}
    found: list[_Found] = []
    for path in given:
        if path.is_dir():
            found += _in_folder(path, alone=len(given) == 1) or _nothing_in(path)
        elif path in groups or not path.is_file():
            found.append(_file(path, groups.get(path, (path,))))
    return _without_parts(found)


def _without_parts(found: Sequence[_Found]) -> list[_Found]:
    """With a problem wherever the file is, by its name, only a part of a model."""
    first = {f.path: f.weights.files[0] for f in found if f.weights and f.weights.files}
    problems = {file: problem for file in first.values() if (problem := foreign_file(file))}
    for parts in parts_of_one_model(list(first.values())):
        problems = dict.fromkeys(parts, not_whole(parts)) | problems
    return [replace(f, problem=f.problem or problems.get(first.get(f.path, f.path))) for f in found]


def _file(path: Path, group: tuple[Path, ...]) -> _Found:
    if problem := foreign_file(path):
        return _Found(path, problem=problem)
    if path.name.endswith((f"{SAFETENSORS}.index.json", ".bin.index.json")):
        return _Found(path.parent, Weights((), path))
    if not path.name.endswith((SAFETENSORS, *PICKLES)) or not path.is_file():
        raise CheckpointError(
            "A file is not a checkpoint that can be read.",
            checkpoint=path,
            expected=_KINDS,
            found=(path.suffix or "no suffix") if path.is_file() else "neither file nor folder",
        )
    return _Found(path, Weights(group))


def _in_folder(folder: Path, *, alone: bool) -> list[_Found]:
    """The folder itself as a checkpoint, or else those in it."""
    inside = entries(folder)
    held = [c for p in inside if p.is_dir() and (c := _child(p))]
    merges = [c for c in held if (c.path / DOCUMENT).is_file()]
    children = [c for c in held if c not in merges]
    whole = whole_model(folder)
    if whole:
        steps = [c for c in children if is_step_folder(c.path)]
        readable = [c for c in steps if not c.problem]
        return steps if alone and len(readable) > 1 else [_Found(folder, whole)]
    problem = foreign_format(folder)
    if not problem and is_step_folder(folder) and all(c.problem for c in children):
        problem = _foreign(folder)
    if problem:
        return [_converted(folder) or _Found(folder, problem=problem)]
    if len(children) > 1:
        return children
    bare = bare_weights([p for p in inside if p.is_file()])
    if len(bare) == 1 and not children:
        return [_Found(folder, bare[0])]
    return children + [_Found(weights.files[0], weights) for weights in bare] or merges


def _child(folder: Path) -> _Found | None:
    """A folder inside a run, if it is a checkpoint or should be one by its name."""
    if weights := weights_in(folder):
        return _Found(folder, weights)
    if problem := _foreign(folder):
        return _converted(folder) or _Found(folder, problem=problem)
    if not is_step_folder(folder):
        return None
    return _Found(folder, problem=_unclear(folder))


def _foreign(folder: Path) -> CheckpointError | None:
    """What is wrong with the format of a folder, or of one in it, unless it is training state."""
    places = [folder, *(p for p in entries(folder) if p.is_dir())]
    problems = (foreign_format(p, folder) for p in places if not is_training_state(p))
    return next(filter(None, problems), None)


def _converted(folder: Path) -> _Found | None:
    """What a folder in a foreign format has been converted to, in it or beside it by its name."""
    if weights := bare_or_usual([p for p in entries(folder) if p.is_file()]):
        return _Found(folder, weights)
    beside = (folder.parent / f"{folder.name}{suffix}" for suffix in (SAFETENSORS, *PICKLES))
    file = next((p for p in beside if p.is_file()), None)
    return _Found(file, Weights((file,))) if file else None


def _unclear(folder: Path) -> CheckpointError:
    inside = entries(folder)
    several = [w.files[0] for w in bare_weights([p for p in inside if p.is_file()])]
    for parts in parts_of_one_model(several):
        return not_whole(parts)
    if several:
        message = "It is not clear which file is the checkpoint."
        remedy = "list the files themselves"
    else:
        message = "A folder is named like a checkpoint, but holds no weights."
        remedy = "list the other checkpoints"
        if not inside:
            remedy = f"delete it if its save was interrupted, or {remedy}"
    return CheckpointError(
        message,
        checkpoint=folder,
        expected=_KINDS,
        found=listing(p.name for p in inside) or "an empty folder",
        remedy=remedy,
    )


def _once(found: Sequence[_Found]) -> list[_Found]:
    """Each place on disk once: a link to another checkpoint of the list gives way to that one."""
    places: dict[Path, _Found] = {}
    for each in found:
        with reading(each.path):
            place = each.path.resolve()
        if place not in places or (places[place].path.is_symlink() and not each.path.is_symlink()):
            places[place] = each
    return list(places.values())


def _distinct(found: Sequence[_Found], given: Sequence[Path]) -> list[_Found]:
    """Without files in a run folder that are called the last, where another one is of its step."""
    lasts = [f for f in found if _LAST.fullmatch(f.path.name) and f.path not in given]
    saved = {(f.path.parent, f.step) for f in found if f not in lasts and f.step is not None}
    return [f for f in found if f not in lasts or (f.path.parent, f.step) not in saved]


def _without_copies(found: Sequence[_Found], given: Sequence[Path]) -> list[_Found]:
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


def _originals(f: _Found, found: Sequence[_Found], given: Sequence[Path]) -> list[_Found]:
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


def _opened(found: _Found) -> _Found:
    try:
        return replace(found, opened=_open(found))
    except CheckpointError as problem:
        return replace(found, problem=problem)


def _with_steps(found: Sequence[_Found]) -> list[_Found]:
    names = named_steps([(f.path, f.weights.files if f.weights else ()) for f in found])
    return [_with_step(f, named) for f, named in zip(found, names, strict=True)]


def _with_step(found: _Found, named: NamedStep) -> _Found:
    folder = found.path if found.path.is_dir() else found.path.parent
    if (found.path == folder or is_model_file(found.path)) and (written := trainer_step(folder)):
        return replace(found, step=written)
    found = replace(found, step=named.number, times=named.times, doubtful=named.doubtful)
    if not found.weights or not found.weights.is_pickle or named.certain:
        return found
    try:
        opened = _open(replace(found, step=None))
    except CheckpointError as problem:
        return replace(found, problem=problem)
    step = found.step if opened.step is None else opened.step
    if step is None and named.doubtful:
        step = opened.epoch
    return replace(found, step=step, opened=replace(opened, step=step))


def _note_doubt(chosen: Sequence[_Found], progress: Progress, *, listed: bool) -> None:
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


def _note_left_out(opened: Sequence[Checkpoint], progress: Progress) -> None:
    places = sorted({place for checkpoint in opened for place in checkpoint.left_out})
    if places:
        progress(
            Noted(
                f"Pickles hold other weights beside the model's, under {listing(places)}: they are "
                "left out, and the result will not have them."
            )
        )


def _open(found: _Found) -> Checkpoint:
    if found.opened:
        return found.opened
    if found.problem or not found.weights:
        raise found.problem or CheckpointError("There are no weights.", checkpoint=found.path)
    files, index = found.weights.files, found.weights.index
    if found.weights.is_pickle:
        # Waits for torch, which safetensors have no need of.
        from .pickles import PickleReader

        pickle = PickleReader(files, index)
        step = pickle.step if found.step is None else found.step
        checkpoint = Checkpoint(
            found.path,
            step,
            "pickle",
            pickle,
            pickle.epoch,
            pickle.entry,
            pickle.extra_states,
            pickle.left_out,
        )
    else:
        kind = "huggingface" if found.path.is_dir() else "safetensors"
        checkpoint = Checkpoint(found.path, found.step, kind, SafetensorsReader(files, index))
    require_unquantised(checkpoint)
    return checkpoint


def _missing(path: Path) -> CheckpointError:
    if problem := _moved_aside(path):
        return problem
    like_a_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
    return CheckpointError(
        "There is no such file or folder.",
        checkpoint=path,
        expected=_KINDS,
        remedy=f"if it is the name of a model on the Hub, download it first: hf download {path}"
        f" --local-dir {path.name}"
        if like_a_hub_id
        else "check the path",
    )


def _moved_aside(path: Path) -> CheckpointError | None:
    """Of a merge that a run was to replace, and was killed before it had."""
    try:
        place = Path(os.path.realpath(path))
        merge = set_aside(place)
    except (OSError, ValueError):
        return None
    if not merge:
        return None
    return CheckpointError(
        "A merge is there under another name: a run that was to replace it was killed.",
        checkpoint=path,
        expected="a checkpoint of this name",
        found=merge,
        remedy=to_restore(place, merge),
    )


def _nothing_in(folder: Path) -> list[_Found]:
    if problem := _moved_aside(folder):
        raise problem
    deeper = [p for p in entries(folder) if p.is_dir() and _in_folder(p, alone=True)]
    raise CheckpointError(
        "There is no checkpoint in this folder.",
        checkpoint=folder,
        expected=_KINDS,
        found=listing(p.name for p in entries(folder)) or "an empty folder",
        remedy=f"give {listing(str(p) for p in deeper)}" if deeper else "check the path",
    )
