"""What all processes of a run have to agree on first: what they read, and where they write.

Every process opens the checkpoints by itself, on a node of its own perhaps. Rows of one set of
weights beside rows of another would make a model that looks like any other.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .checkpoints.base import Checkpoint, reading
from .errors import CheckpointError, ConfigError, OutputError
from .output_folder import existing_parent, writing
from .ranks import Ranks

T = TypeVar("T")

# Pieces of a file, evenly from its start to its end, that tell it from another one of its size:
# many, as most of a model may be frozen.
_PIECES, _PIECE_BYTES = 64, 4096


def sample_of(file: Path) -> tuple[int, str]:
    """What tells a file from another: its size, and a hash of parts of it.

    Not its time: one that was lost and copied back is the same.
    """
    digest = hashlib.blake2b(digest_size=16)
    with reading(file), file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        for k in range(_PIECES):
            opened.seek(max(0, size - _PIECE_BYTES) * k // (_PIECES - 1))
            digest.update(opened.read(_PIECE_BYTES))
    return size, digest.hexdigest()


def files_of(checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """The files of weights, each once."""
    return list(dict.fromkeys(f.path for c in checkpoints for f in c.files))


def heard_from_all(mine: T, world: Ranks) -> list[tuple[str, T]]:
    """Who says it (``process 1 on HOST``) and what, of every process in order of rank."""
    found = world.gather((socket.gethostname(), mine))
    return [(f"process {rank} on {host}", said) for rank, (host, said) in enumerate(found)]


def require_same_files(checkpoints: Sequence[Checkpoint], world: Ranks) -> None:
    """Checks that all processes read the same files, by their names, sizes and parts of them.

    Raises:
        CheckpointError: on every process alike, where one of them does not.
    """
    if world.size == 1:
        return
    mine = [(str(path), path.name, *sample_of(path)) for path in files_of(checkpoints)]
    first, *others = heard_from_all(mine, world)
    for other in others:
        if [file[1:] for file in other[1]] != [file[1:] for file in first[1]]:
            raise _other_files(first, other)


def _other_files(first: tuple[str, Any], other: tuple[str, Any]) -> CheckpointError:
    (one, files), (another, other_files) = first, other
    expected, found = f"{len(files)} files", f"{len(other_files)} files"
    pairs = zip(files, other_files, strict=False)
    differing = next(((a, b) for a, b in pairs if a[1:] != b[1:]), None)
    if differing:
        expected, found = (f"{file[0]}, {file[2]:,} bytes" for file in differing)
        if differing[0][1:3] == differing[1][1:3]:
            found += ", with other numbers in it"
    return CheckpointError(
        "The processes of this run do not read the same checkpoints.",
        expected=f"{expected} ({one})",
        found=f"{found} ({another})",
        remedy="give every node the same files; if the run folder is still growing, wait until it "
        "is complete or name the checkpoints with --to-step",
    )


def require_same_choices(choices: Mapping[str, Any], world: Ranks) -> None:
    """Checks that all processes have been asked for the same.

    Raises:
        ConfigError: on every process alike, where one of them has not.
    """
    (one, first), *others = heard_from_all(dict(choices), world)
    for another, other in others:
        for name, value in first.items():
            if other[name] != value:
                raise ConfigError(
                    f"The processes of this run do not have the same {name}.",
                    expected=f"{value} ({one})",
                    found=f"{other[name]} ({another})",
                    remedy="start all of them with the same command, task and data",
                )


def require_shared_place(output: Path, world: Ranks) -> None:
    """Checks that all processes would write to the same folder, before they work for it.

    Raises:
        OutputError: on every process alike, where the place is another one for one of them.
    """
    if world.size == 1:
        return
    mark = world.broadcast(_mark(output) if world.is_zero else None)
    seen = world.gather((socket.gethostname(), isinstance(mark, Path) and mark.exists()))
    if world.is_zero and isinstance(mark, Path):
        mark.unlink(missing_ok=True)
    if isinstance(mark, OutputError):
        raise mark
    for rank, (host, is_there) in enumerate(seen):
        if not is_there:
            raise OutputError(
                f"{output} is not the same folder for all processes.",
                expected=f"{mark.parent} of {seen[0][0]}",
                found=f"another one, or none, on {host} (process {rank})",
                remedy="choose an output folder on a disk that all nodes share",
            )


def _mark(output: Path) -> Path | OutputError:
    """An empty file beside the output, or why there is none: all processes wait to hear of it."""
    try:
        with writing(output):
            handle, name = tempfile.mkstemp(prefix=".twa-merge-", dir=existing_parent(output))
            os.close(handle)
    except OutputError as error:
        return error
    return Path(name)
