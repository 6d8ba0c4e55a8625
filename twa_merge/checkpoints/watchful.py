"""Readers that notice when the files of a run change while it goes on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from ..dtypes import Array
from ..errors import CheckpointError
from .base import Checkpoint, Reader


def watched(checkpoints: Sequence[Checkpoint], *, in_place: bool = False) -> list[Checkpoint]:
    """The checkpoints, whose files are looked at from now on before anything is read of them.

    Args:
        in_place: only files that are written over count. One that has been removed, or replaced by
            another one, can still be read where it is open already.
    """
    return [dataclasses.replace(c, reader=_WatchfulReader(c.reader, in_place)) for c in checkpoints]


class _WatchfulReader:
    """A reader that looks at its files before it reads them.

    Another set of numbers in the middle of a fit, or between the fit and what is written, would be
    noticed by nobody, and touching a mapped page beyond the end of a pickle kills the process
    without a word.
    """

    def __init__(self, reader: Reader, in_place: bool) -> None:
        self._reader = reader
        self._in_place = in_place
        self.tensors = reader.tensors
        self.files = reader.files
        self.aliases = reader.aliases
        self._paths: dict[str, list[Path]] = {}
        for file in reader.files:
            for name in file.names:
                self._paths.setdefault(name, []).append(file.path)
        self._seen = {file.path: _look(file.path) for file in reader.files}

    def read(self, name: str, first: int, out: Array) -> None:
        self._require_unchanged(name)
        self._reader.read(name, first, out)

    def close(self) -> None:
        self._reader.close()

    def _require_unchanged(self, name: str) -> None:
        """Raises CheckpointError if a file that holds this tensor is not what it was."""
        for path in self._paths.get(name, self._seen):
            now, before = _look(path), self._seen[path]
            if now != before and not (self._in_place and now.place != before.place):
                again = "bring the file back and run the same command again"
                raise CheckpointError(
                    "A file of weights has vanished or changed while it was in use.",
                    checkpoint=path,
                    expected=f"{before.size} bytes, unchanged since the run began",
                    found=f"{now.size} bytes, written to since" if now.time else "nothing there",
                    remedy=again
                    if self._in_place
                    else f"{again}; with --store host or device the files are read only at the "
                    "beginning and the end",
                )


@dataclasses.dataclass(frozen=True)
class _Look:
    """Size, time of the last change and place on the disk of a file; zeros where there is none."""

    size: int = 0
    time: int = 0
    place: tuple[int, int] = (0, 0)


def _look(path: Path) -> _Look:
    try:
        found = os.stat(path)
    except OSError:
        return _Look()
    return _Look(found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))
