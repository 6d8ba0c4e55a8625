"""Writes safetensors files in pieces, so that no more of a model is held than the piece in flight.

The format: the header's length as a little-endian uint64, the header as JSON padded with spaces to
a multiple of 8 bytes, then the tensors' bytes without gaps.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .checkpoints.base import TensorInfo

# Bytes after which what has been written is sent on to the disk, while more is being computed.
_SYNC_BYTES = 32 << 20
# macOS has no fdatasync.
_datasync = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file to be written.

    Attributes:
        name: in the layout.
        raw_name: in the file.
        info: shape, and the dtype that it is saved in.
    """

    name: str
    raw_name: str
    info: TensorInfo


def aligned(tensors: Iterable[SavedTensor]) -> tuple[SavedTensor, ...]:
    """The tensors in an order in which each begins at a multiple of its dtype's width.

    Wide dtypes come first and file order is kept among equals, which leaves the order of files
    written by safetensors itself as it is. Without it mapped tensors could not be read in place.
    """
    return tuple(sorted(tensors, key=lambda t: -t.info.dtype.itemsize))


def header(tensors: Sequence[SavedTensor], metadata: Mapping[str, str]) -> bytes:
    """Everything that stands before the first tensor's bytes."""
    document: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.info.nbytes
        document[tensor.raw_name] = {
            "dtype": tensor.info.dtype.code,
            "shape": tensor.info.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class SafetensorsFile:
    """One file, written in pieces that may come in any order and from several threads.

    Leaving the ``with`` block puts the file on the disk for good, unless an error is on its way.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """

    def __init__(
        self, path: Path, tensors: Sequence[SavedTensor], metadata: Mapping[str, str]
    ) -> None:
        self._header = header(tensors, metadata)
        self._begin: dict[str, int] = {}
        position = len(self._header)
        for tensor in tensors:
            self._begin[tensor.name] = position
            position += tensor.info.nbytes
        self._path = path
        self._pool = ThreadPoolExecutor(1, "twa-merge-sync")
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> SafetensorsFile:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(self._file, memoryview(self._header), 0)
        except BaseException:
            os.close(self._file)
            raise
        return self

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Puts ``data`` at byte ``begin`` of a tensor, named as in the layout."""
        _write_all(self._file, data, self._begin[name] + begin)

    def written(self, nbytes: int) -> None:
        """Counts what has been written, and now and then has the disk take it. One thread only."""
        self._unsynced += nbytes
        if self._unsynced < _SYNC_BYTES or not (self._syncing is None or self._syncing.done()):
            return
        if self._syncing is not None:
            self._syncing.result()
        self._unsynced = 0
        self._syncing = self._pool.submit(_datasync, self._file)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        try:
            if error is None:
                if self._syncing is not None:
                    self._syncing.result()
                os.fsync(self._file)
        finally:
            os.close(self._file)


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        # A disk that fills up takes a part first and fails on the rest.
        count = os.pwrite(file, data, position)
        data, position = data[count:], position + count
