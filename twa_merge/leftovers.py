"""The temporary folders beside an output, and what killed runs have left of them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
from contextlib import suppress
from pathlib import Path

# Its presence says that a folder is a merge.
DOCUMENT = "twa_merge.json"
# A merge that is being written, an earlier one that makes room for it and is whole, and one that is
# being deleted.
WRITING, REPLACED, DELETED = "writing", "replaced", "deleted"


def temporary(output: Path, word: str) -> Path:
    """This process's own folder beside the output."""
    # Process numbers mean something on one host only, and folders are shared between hosts.
    return output.with_name(f"{_mark(output, word)}{socket.gethostname()}-{os.getpid()}")


def clear(output: Path, *words: str) -> None:
    """Deletes what dead processes of this host have left, and this one's own."""
    for word in words:
        for path, host, pid in _left(output, word):
            if host == socket.gethostname() and not _is_alive(pid):
                # Under this name nobody takes for whole what a kill leaves of it.
                doomed = path.with_name(
                    path.name.replace(_mark(output, word), _mark(output, DELETED), 1)
                )
                with suppress(OSError):
                    os.rename(path, doomed)
                    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(output: Path) -> Path | None:
    """The earlier merge that a run has moved aside before it was killed, if nothing took its place.

    Of any host, as containers change their names, and of any process, as numbers are used again.
    """
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        return None
    merges = [p for p, _, _ in _left(output, REPLACED) if (p / DOCUMENT).is_file()]
    return max(merges, key=lambda p: p.stat().st_mtime_ns, default=None)


def to_restore(output: Path, merge: Path) -> str:
    """What gives a merge that was set aside its name back."""
    empty = f"rmdir {shlex.quote(str(output))} && " if output.exists() else ""
    return f"give it its name back: {empty}mv {shlex.quote(str(merge))} {shlex.quote(str(output))}"


def _mark(output: Path, word: str) -> str:
    return f".{output.name}.{word}-"


def _left(output: Path, word: str) -> list[tuple[Path, str, int]]:
    """Folders beside the output, each with the host and the process that made it."""
    if not output.parent.is_dir():
        return []
    name = re.compile(re.escape(_mark(output, word)) + r"(?P<host>.+)-(?P<pid>\d+)")
    matches = [(path, name.fullmatch(path.name)) for path in output.parent.iterdir()]
    return [(path, match["host"], int(match["pid"])) for path, match in matches if match]


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
