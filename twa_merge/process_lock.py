"""A file that one process holds at a time, for as long as it lives."""

from __future__ import annotations

from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is held there
    fcntl = None  # type: ignore[assignment]


class ProcessLock:
    """A lock of this process on a file; it ends with this object, and with the process at latest.

    Not held where the file system knows no locks.

    Args:
        path: of the file, which is made when the lock is taken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def take(self) -> bool:
        """Holds the file, unless another process does; its folder has to exist.

        Raises:
            OSError: the file cannot be written.
        """
        # Any handle that closes lets go of the file: the old one first.
        self.release()
        file = self._path.open("ab")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError:
            pass  # a file system without locks
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.release()
