"""stdout and stderr while a command runs, whatever they lead to: nothing, a full disk, a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from twa_merge.errors import OutputError


class _Stream:
    """A text stream that says what it means that it cannot be written.

    A reader that has gone away is for the error boundary: ``BrokenPipeError`` passes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._watched():
            self._stream.write(text)
        if self._error:
            self._failed(self._error)
        return len(text)

    def flush(self) -> None:
        with self._watched():
            self._stream.flush()
        if self._error:
            self._failed(self._error)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            # Click tries a stream out with an empty text, and overlooks that error.
            self._error = error
            discard(self._stream)

    def _failed(self, error: OSError) -> None:
        """Messages and progress are no reason to lose the work that they are about."""


class _Result(_Stream):
    """Somebody waits for what goes to stdout."""

    def _failed(self, error: OSError) -> None:
        raise OutputError(
            "The result cannot be printed.",
            expected="room where standard output goes",
            found=error.strerror,
            remedy="print to another place; what -o names is complete if it is there",
        ) from error


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Inside, stdout raises ``OutputError`` where it cannot be written, and stderr is silent."""
    _open_closed_streams()
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Result(before[0]), _Stream(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_closed_streams() -> None:
    """Whoever starts a command with ``>&-`` wants to hear nothing; Python has no stream then.

    The descriptors are taken too, so that no file of weights gets the number of one.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            silence = os.open(os.devnull, os.O_WRONLY)
            if silence != number:
                os.dup2(silence, number)
                os.close(silence)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def discard(stream: Any) -> None:
    """Whatever is still buffered has no reader: the interpreter, which flushes it at exit, must
    not stumble over that (the note on SIGPIPE in Python's documentation of ``signal``)."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, stream.fileno())
        os.close(silence)
