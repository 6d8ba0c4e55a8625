"""Where the numbers of a tensor lie in one item of a ``.distcp`` file, by the item itself."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..dtypes import Dtype
from ..errors import CheckpointError
from ..tensors import dtype_of
from .chunks import Box
from .foreign import unread_distributed
from .open_files import SeenFiles
from .pickles import refused
from .state_dicts import is_plain

_AGAIN = "save or copy the checkpoint again, or leave it out"
_LOCAL_HEADER = struct.Struct("<26xHH")


@dataclass(frozen=True, slots=True)
class Item:
    """What ``torch.save`` has put into a file, among other items: bytes [begin, begin + length)."""

    path: Path
    begin: int
    length: int


@dataclass(frozen=True)
class Head:
    """What an item says of the numbers of its tensor.

    Attributes:
        content: all bytes before them.
        begin, end: where in the item the first one begins, and the last one ends.
        strides: counted in numbers; None where they lie row by row.
    """

    content: bytes
    begin: int
    end: int
    strides: tuple[int, ...] | None


def head_of(files: SeenFiles, box: Box[Item], dtype: Dtype, tensor: str, home: Path) -> Head:
    """Reads the head of a part of a tensor; its numbers are not touched.

    Args:
        dtype: that it has by the metadata.
        tensor: its name, for errors.
        home: the checkpoint, as the user would call it.

    Raises:
        CheckpointError: it is no tensor of that shape and dtype, or none whose numbers lie in the
            file as they are.
    """
    item = box.item
    file = io.BufferedReader(_ItemBytes(files, item, tensor))
    try:
        record = _record_of(file)
        # With numbers of another byte order torch would end the process here.
        saved = None if record.swapped else _without_numbers(file)
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can end in any exception there is
        raise refused(item.path, error, file, tensor) from error
    if saved is None or saved.is_conj() or saved.is_neg() or record.compressed:
        raise unread_distributed(
            item.path.parent,
            home,
            tensor=tensor,
            expected="numbers as they are, the lowest byte first",
            found="numbers that are compressed, conjugated, or of another byte order",
        )
    room = min(record.length, item.length - record.begin)
    if (
        tuple(saved.shape) != box.sizes
        or dtype_of(saved.dtype) != dtype
        or saved.layout != torch.strided
        or _reach(saved) * dtype.itemsize > room
    ):
        raise CheckpointError(
            "A part of a tensor is not what the metadata of the checkpoint say.",
            checkpoint=item.path,
            tensor=tensor,
            expected=f"{dtype} of shape {list(box.sizes)}",
            found=f"{dtype_of(saved.dtype)} of shape {list(saved.shape)}, {saved.layout}, in"
            f" {room} bytes",
            remedy=_AGAIN,
        )
    file.seek(0)
    return Head(
        file.read(record.begin),
        record.begin + int(saved.storage_offset()) * dtype.itemsize,
        record.begin + _reach(saved) * dtype.itemsize,
        None if saved.is_contiguous() else tuple(saved.stride()),
    )


def has_head(files: SeenFiles, item: Item, head: Head, tensor: str) -> bool:
    """Whether an item begins with the very bytes that another one has, whose head is known.

    They tell all that there is to know, and parts of one shape rarely differ in them. To unpickle
    them again takes twenty times as long.

    Raises:
        CheckpointError: the file has changed, or cannot be read.
    """
    if head.end > item.length:
        return False
    content = bytearray(len(head.content))
    files.read(item.path, item.begin, memoryview(content), tensor)
    return content == head.content


def _reach(tensor: Tensor) -> int:
    """How many numbers of its storage a tensor reaches over; it is not empty."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + 1 + sum((n - 1) * step for n, step in steps)


@dataclass(frozen=True)
class _Record:
    """Where in an item the numbers of its tensor lie.

    Attributes:
        swapped: their highest byte comes first.
    """

    begin: int
    length: int
    compressed: bool
    swapped: bool


def _record_of(file: BinaryIO) -> _Record:
    with zipfile.ZipFile(file) as archive:
        entries = {e.filename.partition("/")[2]: e for e in archive.infolist()}
        numbers, order = entries["data/0"], entries.get("byteorder")
        swapped = order is not None and archive.read(order) != b"little"
    # The header before the numbers is not as long as what the directory has of it.
    file.seek(numbers.header_offset)
    name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    begin = numbers.header_offset + _LOCAL_HEADER.size + name + extra
    compressed = numbers.compress_type != zipfile.ZIP_STORED
    return _Record(begin, numbers.file_size, compressed, swapped)


def _without_numbers(file: BinaryIO) -> Tensor:
    """The tensor that ``torch.save`` has put into an item, on the device meta."""
    file.seek(0)
    tensor = torch.load(file, map_location="meta", weights_only=True)
    if not is_plain(tensor):
        raise TypeError(f"{type(tensor).__name__} in the place of a tensor")
    return tensor


class _ItemBytes(io.RawIOBase):
    """The bytes of one item as a file of their own."""

    def __init__(self, files: SeenFiles, item: Item, tensor: str) -> None:
        self._files = files
        self._item = item
        self._tensor = tensor
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._item.length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, out: Any) -> int:
        count = max(0, min(len(out), self._item.length - self._at))
        place = self._item.begin + self._at
        self._files.read(self._item.path, place, memoryview(out)[:count], self._tensor)
        self._at += count
        return count
