"""Files that stay open between two reads: however many checkpoints and shards, not too many."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

# Systems allow a process 256 to 1024 open files unless told otherwise.
_MOST = 128
# macOS has neither.
_PREADV, _FADVISE = hasattr(os, "preadv"), hasattr(os, "posix_fadvise")


class OpenFile:
    """A file open for reading, closed when nobody holds it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)

    @classmethod
    def at(cls, path: Path) -> OpenFile:
        """Opens it; OSError if that cannot be done."""
        file = cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if _FADVISE:
            # Several threads read on from several places: left to guess, the system takes that
            # for random access and reads nothing ahead, which takes twice as long.
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file

    def read(self, position: int, out: memoryview) -> bool:
        """Fills ``out`` with the bytes from ``position`` on; False if the file ends before."""
        while (count := _read_at(self.descriptor, out, position)) < len(out):
            if not count:
                return False
            out, position = out[count:], position + count
        return True


class OpenFiles:
    """The files that were read last, at most ``most`` of all owners together.

    A file that is being read while others push it out stays open until that read is done.
    """

    def __init__(self, most: int = _MOST) -> None:
        self.most = most
        self._files: OrderedDict[tuple[int, Path], OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._gone: deque[int] = deque()

    def register(self, owner: object) -> None:
        """Closes the owner's files once it is gone."""
        weakref.finalize(owner, self._collected, id(owner)).atexit = False

    def get(self, owner: object, path: Path) -> OpenFile | None:
        """The owner's file at ``path``, if it is still open."""
        key = id(owner), path
        with self._lock:
            self._forget()
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
            return file

    def keep(self, owner: object, path: Path, file: OpenFile) -> None:
        with self._lock:
            self._forget()
            self._files[id(owner), path] = file
            if len(self._files) > self.most:
                self._files.popitem(last=False)

    def close(self, owner: object) -> None:
        with self._lock:
            self._gone.append(id(owner))
            self._forget()

    def _collected(self, owner: int) -> None:
        """Collections happen anywhere, also in a thread that holds the lock: no waiting for it."""
        self._gone.append(owner)
        if self._lock.acquire(blocking=False):
            try:
                self._forget()
            finally:
                self._lock.release()

    def _forget(self) -> None:
        """Closes the files of owners that are gone. With the lock."""
        while self._gone:
            owner = self._gone.popleft()
            for key in [key for key in self._files if key[0] == owner]:
                del self._files[key]


def _read_at(descriptor: int, out: memoryview, position: int) -> int:
    if _PREADV:
        return os.preadv(descriptor, [out], position)
    data = os.pread(descriptor, len(out), position)
    out[: len(data)] = data
    return len(data)
