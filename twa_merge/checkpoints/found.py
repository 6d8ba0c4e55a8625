"""Arguments of the user → what may be checkpoints there, before any of it is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, listing
from ..leftovers import DOCUMENT, set_aside, to_restore
from .base import Checkpoint, reading
from .folders import (
    METADATA,
    PICKLES,
    SAFETENSORS,
    Weights,
    bare_or_usual,
    bare_weights,
    checkpoint_of,
    distributed_in,
    entries,
    has_metadata,
    is_training_state,
    weights_in,
    whole_model,
)
from .foreign import foreign_file, foreign_format, not_whole, parts_of_one_model
from .shards import group_shards
from .step_names import is_step_folder
from .times import Times

KINDS = (
    f"Hugging Face folders, {SAFETENSORS} files, torch.save files ({', '.join(PICKLES)}),"
    " or folders of torch.distributed.checkpoint"
)


@dataclass(frozen=True)
class Found:
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


def expand(given: Sequence[Path]) -> list[Found]:
    """Every path as the checkpoints that it stands for; shards given one by one as one of them."""
    given = list(dict.fromkeys(given))
    for path in given:
        with reading(path):
            if not path.exists():
                raise _missing(path)
    groups = {group[0]: group for group in group_shards(p for p in given if p.is_file())}
    found: list[Found] = []
    for path in given:
        if path.is_dir():
            found += _in_folder(path, alone=len(given) == 1) or _nothing_in(path)
        elif path in groups or not path.is_file():
            found.append(_file(path, groups.get(path, (path,))))
    return _without_parts(found)


def _without_parts(found: Sequence[Found]) -> list[Found]:
    """With a problem wherever the file is, by its name, only a part of a model."""
    first = {f.path: f.weights.files[0] for f in found if f.weights and f.weights.files}
    problems = {file: problem for file in first.values() if (problem := foreign_file(file))}
    for parts in parts_of_one_model(list(first.values())):
        problems = dict.fromkeys(parts, not_whole(parts)) | problems
    return [replace(f, problem=f.problem or problems.get(first.get(f.path, f.path))) for f in found]


def _file(path: Path, group: tuple[Path, ...]) -> Found:
    if path.suffix == ".distcp" or path.name == METADATA:
        folder = path.parent
        if has_metadata(folder):
            return Found(checkpoint_of(folder), Weights((), folder / METADATA))
    if problem := foreign_file(path):
        return Found(path, problem=problem)
    if path.name.endswith((f"{SAFETENSORS}.index.json", ".bin.index.json")):
        return Found(path.parent, Weights((), path))
    if not path.name.endswith((SAFETENSORS, *PICKLES)) or not path.is_file():
        raise CheckpointError(
            "A file is not a checkpoint that can be read.",
            checkpoint=path,
            expected=KINDS,
            found=(path.suffix or "no suffix") if path.is_file() else "neither file nor folder",
        )
    return Found(path, Weights(group))


def _in_folder(folder: Path, *, alone: bool) -> list[Found]:
    """The folder itself as a checkpoint, or else those in it."""
    inside = entries(folder)
    held = [c for p in inside if p.is_dir() and (c := _child(p))]
    merges = [c for c in held if (c.path / DOCUMENT).is_file()]
    children = [c for c in held if c not in merges]
    whole = whole_model(folder)
    if whole:
        steps = [c for c in children if is_step_folder(c.path)]
        readable = [c for c in steps if not c.problem]
        return steps if alone and len(readable) > 1 else [_whole(folder, whole)]
    problem = foreign_format(folder) or _several_models(folder)
    if not problem and is_step_folder(folder) and all(c.problem for c in children):
        problem = _foreign(folder)
    if problem:
        return [_converted(folder) or Found(folder, problem=problem)]
    if len(children) > 1:
        return children
    bare = bare_weights([p for p in inside if p.is_file()])
    if len(bare) == 1 and not children:
        return [Found(folder, bare[0])]
    return children + [Found(weights.files[0], weights) for weights in bare] or merges


def _child(folder: Path) -> Found | None:
    """A folder inside a run, if it is a checkpoint or should be one by its name."""
    if is_training_state(folder) and distributed_in(folder) == [folder]:
        return None
    if weights := weights_in(folder):
        return _whole(folder, weights)
    if problem := _foreign(folder) or _several_models(folder):
        return _converted(folder) or Found(folder, problem=problem)
    if not is_step_folder(folder):
        return None
    return Found(folder, problem=_unclear(folder))


def _whole(folder: Path, weights: Weights) -> Found:
    """The folder as one checkpoint; a distributed one stands for what it has been converted to."""
    if not weights.is_distributed:
        return Found(folder, weights)
    return _beside(folder) or Found(checkpoint_of(folder), weights)


def _several_models(folder: Path) -> CheckpointError | None:
    inner = distributed_in(folder)
    if len(inner) < 2:
        return None
    return CheckpointError(
        "A folder holds several distributed checkpoints, and it is not clear which one is the"
        " model.",
        checkpoint=folder,
        expected="one",
        found=listing(p.name for p in inner),
        remedy="list the folders of one of them",
    )


def _foreign(folder: Path) -> CheckpointError | None:
    """What is wrong with the format of a folder, or of one in it, unless it is training state."""
    places = [folder, *(p for p in entries(folder) if p.is_dir())]
    problems = (foreign_format(p, folder) for p in places if not is_training_state(p))
    return next(filter(None, problems), None)


def _converted(folder: Path) -> Found | None:
    """What a folder in a foreign format has been converted to, in it or beside it by its name."""
    if weights := bare_or_usual([p for p in entries(folder) if p.is_file()]):
        return Found(folder, weights)
    return _beside(folder)


def _beside(folder: Path) -> Found | None:
    beside = (folder.parent / f"{folder.name}{suffix}" for suffix in (SAFETENSORS, *PICKLES))
    file = next((p for p in beside if p.is_file()), None)
    return Found(file, Weights((file,))) if file else None


def _unclear(folder: Path) -> CheckpointError:
    inside = entries(folder)
    several = [w.files[0] for w in bare_weights([p for p in inside if p.is_file()])]
    if parts := parts_of_one_model(several):
        return not_whole(parts[0])
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
        expected=KINDS,
        found=listing(p.name for p in inside) or "an empty folder",
        remedy=remedy,
    )


def _missing(path: Path) -> CheckpointError:
    if problem := _moved_aside(path):
        return problem
    like_a_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
    return CheckpointError(
        "There is no such file or folder.",
        checkpoint=path,
        expected=KINDS,
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


def _nothing_in(folder: Path) -> list[Found]:
    if problem := _moved_aside(folder):
        raise problem
    deeper = [p for p in entries(folder) if p.is_dir() and _in_folder(p, alone=True)]
    raise CheckpointError(
        "There is no checkpoint in this folder.",
        checkpoint=folder,
        expected=KINDS,
        found=listing(p.name for p in entries(folder)) or "an empty folder",
        remedy=f"give {listing(str(p) for p in deeper)}" if deeper else "check the path",
    )
