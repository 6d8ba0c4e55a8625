"""A folder that appears complete or not at all, and never in place of something else."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .checkpoints.base import Checkpoint
from .errors import OutputError, listing
from .json_files import read_json
from .leftovers import (
    DELETED,
    DOCUMENT,
    REPLACED,
    WRITING,
    clear,
    set_aside,
    temporary,
    to_restore,
)

# What a merge may hold besides weights and sidecars.
_DOCUMENTS = (DOCUMENT, "README.md", "report.html")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def require_place(output: Path, checkpoints: Sequence[Checkpoint], overwrite: bool) -> None:
    """Checks that ``output`` can become a new folder. Changes nothing.

    Raises:
        OutputError: it exists and may not be replaced, holds or lies in a checkpoint, or its
            parent folder cannot be written.
    """
    with writing(output):
        target = _real(output)
        for checkpoint in checkpoints:
            _require_apart(output, target, checkpoint)
        _require_movable(output, target)
        earlier = set_aside(target)
        if earlier and not overwrite:
            raise _still_there(output, target, earlier)
        _require_replaceable(output, earlier or target, overwrite)
        parent = existing_parent(output)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"{output} cannot be written.",
                expected="a parent folder that can be written",
                found=f"{parent}, " + ("without permission" if parent.is_dir() else "a file"),
                remedy="choose another output folder",
            )


def require_space(output: Path, needed: int) -> None:
    """Raises OutputError if fewer than ``needed`` bytes are free where ``output`` will be."""
    with writing(output):
        free = shutil.disk_usage(existing_parent(output)).free
    if free < needed:
        raise _full(output, needed)


@contextmanager
def writing(output: Path, needed: int = 0) -> Iterator[None]:
    """Turns an OSError inside into the OutputError that says what is wrong with ``output``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(output, needed, error) from error
        raise OutputError(
            f"{output} cannot be written.",
            found=error,
            remedy="check the permissions there, or choose another output folder",
        ) from error


def record(names: Iterable[str]) -> dict[str, list[str]]:
    """What the document of a merge says of its files: --overwrite takes away no others.

    Args:
        names: of weights and sidecars.
    """
    return {"files": sorted({*names, *_DOCUMENTS})}


class Staging:
    """A temporary sibling of the output folder, which one rename turns into the output.

    Args:
        output: the folder to come.

    Attributes:
        folder: where to write meanwhile; exists from ``create`` until ``commit`` or ``discard``.
    """

    def __init__(self, output: Path) -> None:
        self._output = _real(output)
        self.folder = temporary(self._output, WRITING)
        self._old = temporary(self._output, REPLACED)
        self._made: list[Path] = []

    def create(self) -> None:
        """Makes the folder, and clears away what killed runs with the same output have left.

        What one of them has moved aside gets its name back: this run may fail, too.
        """
        parent = self._output.parent
        while not parent.exists():
            self._made.append(parent)
            parent = parent.parent
        self._output.parent.mkdir(parents=True, exist_ok=True)
        if earlier := set_aside(self._output):
            os.rename(earlier, self._output)
        clear(self._output, WRITING, DELETED)
        self.folder.mkdir()

    def require_shared(self) -> None:
        """Raises OutputError where this process does not see the folder of rank zero."""
        if not self.folder.is_dir():
            raise OutputError(
                f"{self._output} is not the same folder for all processes.",
                expected=f"{self.folder} on {socket.gethostname()}",
                found="nothing",
                remedy="choose an output folder on a disk that all nodes share",
            )

    def commit(self, overwrite: bool) -> None:
        """Turns the folder into the output.

        Raises:
            OutputError: something else has appeared there in the meantime.
        """
        sync_folder(self.folder)
        _require_replaceable(self._output, self._output, overwrite)
        if self._output.is_dir() and any(self._output.iterdir()):
            os.rename(self._output, self._old)
            try:
                os.rename(self.folder, self._output)
            except BaseException:
                os.rename(self._old, self._output)
                raise
        else:
            os.rename(self.folder, self._output)
        self._made.clear()
        sync_folder(self._output.parent)
        # Not before: an earlier merge may have been the only one there was.
        clear(self._output, REPLACED)

    def discard(self) -> None:
        """Leaves nothing behind of a merge that was not committed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def sync_folder(folder: Path) -> None:
    """Has the disk keep the names in ``folder``, where its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _require_apart(output: Path, target: Path, checkpoint: Checkpoint) -> None:
    home = _real(checkpoint.path)
    inside = target == home or home in target.parents
    around = any(target in p.parents for p in (home, *(_real(f.path) for f in checkpoint.files)))
    if inside or around:
        raise OutputError(
            f"{output} cannot be the output: it "
            + ("is, or lies in, a checkpoint." if inside else "holds a checkpoint."),
            checkpoint=checkpoint.path,
            expected="a folder of its own",
            remedy="choose another output folder",
        )


def _require_movable(output: Path, target: Path) -> None:
    """The result is a folder that takes this one's place, which some cannot give up."""
    found = None
    if os.path.ismount(target):
        found = "where a disk is mounted"
    elif target == Path.cwd() or target in Path.cwd().parents:
        found = "where this command was started"
    if found:
        raise OutputError(
            f"{output} cannot be replaced by a new folder.",
            expected="a new folder, or one that can be moved",
            found=f"{target}, {found}",
            remedy=f"name a folder inside it, such as {output / 'merged'}",
        )


def _still_there(output: Path, target: Path, earlier: Path) -> OutputError:
    return OutputError(
        f"{output} exists already, under another name: a run that was to replace it was killed.",
        expected="a new or empty folder",
        found=f"an earlier merge in {earlier}",
        remedy=f"{to_restore(target, earlier)}; or choose another output folder, or give "
        "--overwrite to replace it",
    )


def _require_replaceable(output: Path, target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(
            f"{output} is a file.",
            expected="a new or empty folder",
            remedy="choose another output folder",
        )
    content = sorted(path.name for path in target.iterdir())
    ours = DOCUMENT in content
    if content and not (ours and overwrite):
        raise OutputError(
            f"{output} exists already.",
            expected="a new or empty folder" + (", or an earlier merge" if overwrite else ""),
            found="an earlier merge" if ours else f"a folder without {DOCUMENT}",
            remedy="choose another output folder"
            + (", or give --overwrite to replace it" if ours else ""),
        )
    if ours:
        _require_nothing_else(output, target)


def _require_nothing_else(output: Path, target: Path) -> None:
    """Raises OutputError where an earlier merge has got company that would be lost with it."""
    try:
        own = {DOCUMENT, *read_json(target / DOCUMENT)["files"]}
    except (KeyError, TypeError):
        own = {DOCUMENT}
    there = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted({path.relative_to(target).as_posix() for path in there} - own)
    if others:
        raise OutputError(
            f"{output} holds more than an earlier merge, which --overwrite would delete.",
            expected=f"the files that {DOCUMENT} names, and no others",
            found=listing(others),
            remedy="move them elsewhere, or choose another output folder",
        )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def state_folder(output: Path) -> Path:
    """Where a run keeps what an interrupted one continues from: beside its output."""
    if output.name in ("", ".."):
        output = Path(os.path.abspath(output))
    return output.parent / f"{output.name}.partial"


def existing_parent(output: Path) -> Path:
    """The folder that is there already of those that ``output`` will lie in."""
    return next(p for p in _real(output).parents if os.path.lexists(p))


def _full(output: Path, needed: int, error: OSError | None = None) -> OutputError:
    free: object = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(existing_parent(output)).free:,} bytes free"
    return OutputError(
        f"There is too little space to write {output}; nothing was written.",
        expected=f"{needed:,} bytes free" if needed else None,
        found=f"{free} ({error.strerror})" if error else free,
        remedy="free some space, or choose an output folder on another disk",
    )
