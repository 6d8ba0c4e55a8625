"""Reads what torch.distributed.checkpoint wrote: ``.metadata`` and ``.distcp`` files."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..dtypes import Array, Dtype
from ..errors import CheckpointError
from ..tensors import dtype_of, torch_dtype
from .base import TensorInfo, WeightFile, reading, require_file
from .chunks import Box, Part, Shape, Tiling
from .distributed_metadata import DistributedMetadata, Item, damage
from .foreign import flat_parameters, unread_distributed
from .names import is_extra_state, resolve_names
from .open_files import Identity, SeenFiles, identity
from .pickles import load, refused
from .shards import require_present
from .state_dicts import STEP_KEYS, count_of, is_plain, state_dict_of

_WEIGHTS_ALONE = (
    "save the weights alone, with dcp.save(get_model_state_dict(model), checkpoint_id=folder), and"
    " merge those"
)
_AGAIN = "save or copy the checkpoint again, or leave it out"
_EPOCH_KEYS = ("epoch",)
# What FSDP 1 puts in the place of all tensors of a module.
_FLAT = "_flat_param"
_LOCAL_HEADER = struct.Struct("<26xHH")


class DistributedReader:
    """Reads a checkpoint that several processes have saved together, or one as they do.

    Each of them has written its parts of all tensors, each part with ``torch.save``, one after the
    other in a file of its own; ``.metadata`` says where. The heads of those parts are read when
    their numbers are asked for, since a checkpoint has as many as tensors times processes.

    Args:
        folder: of the files.
        home: the checkpoint, as the user would call it.

    Attributes:
        step, epoch, entry, extra_states, left_out: as a ``PickleReader`` has them.

    Raises:
        CheckpointError: a file is missing or cut short, the metadata are damaged or ask for code to
            be run, or there are no weights.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        self._home = home
        metadata = DistributedMetadata(folder, home)
        document, fqns = _document(metadata)
        state = state_dict_of(document, metadata.path, _WEIGHTS_ALONE)
        flat = next((n for n in state.tensors if n.rpartition(".")[2] == _FLAT), None)
        if flat:
            raise flat_parameters(metadata.path, flat)
        short = resolve_names((*state.tensors, *state.extra_states))
        saved = {short[n]: fqns[*state.keys, n] for n in state.tensors}
        self.tensors: Mapping[str, TensorInfo] = {n: metadata.tensors[q] for n, q in saved.items()}
        boxes = {name: metadata.boxes(fqn) for name, fqn in saved.items()}
        _require_whole(metadata, self.tensors, boxes)
        self._tilings = {n: Tiling(info.shape, boxes[n]) for n, info in self.tensors.items()}
        self.files = _files(boxes, {short[n]: n for n in state.tensors})
        self._bytes = SeenFiles({file.path: _seen(file.path) for file in self.files})
        self._places: dict[Item, int | Array] = {}
        self._heads: dict[tuple[Shape, Dtype], _Head] = {}
        self.aliases: Mapping[str, str] = {}
        self.step = count_of(document, STEP_KEYS)
        self.epoch = count_of(document, _EPOCH_KEYS)
        self.entry = state.entry
        self.left_out = state.left_out
        self.extra_states: Mapping[str, str] = {short[n]: k for n, k in state.extra_states.items()}

    def read(self, name: str, first: int, out: Array) -> None:
        for part in self._tilings[name].parts(first, out.size):
            piece = out[part.base : part.base + math.prod(part.sizes)].reshape(part.sizes)
            target = piece[part.where]
            if target.flags.c_contiguous:
                self._read_part(name, part, target.reshape(-1))
            else:
                numbers = np.empty(target.size, out.dtype)
                self._read_part(name, part, numbers)
                target[...] = numbers.reshape(target.shape)

    def close(self) -> None:
        self._bytes.close()
        self._places = {}

    def _read_part(self, name: str, part: Part[Item], out: Array) -> None:
        """Numbers ``part.first`` and the next ones of what one process has saved, (m,)."""
        item = part.box.item
        place = self._places.get(item)
        if place is None:
            place = self._places[item] = self._place(name, part.box)
        if isinstance(place, int):
            position = place + part.first * out.itemsize
            self._bytes.read(item.path, position, out.view("u1").data, name)
        else:
            out[:] = place.flat[part.first : part.first + out.size]

    def _place(self, name: str, box: Box[Item]) -> int | Array:
        """Where in the file the numbers of a part begin, or these themselves, mapped.

        They are mapped where they do not lie in the file row by row, as those of a transposed
        tensor.

        Raises:
            CheckpointError: it is no tensor of the shape and dtype that the metadata speak of, or
                none whose numbers lie in the file as they are.
        """
        item, dtype = box.item, self.tensors[name].dtype
        alike = box.sizes, dtype
        head = self._heads.get(alike)
        if head is None or not self._has(item, head, name):
            head = self._heads[alike] = self._head(name, box)
        begin = item.begin + head.begin
        if head.strides is None:
            return begin
        self._bytes.require_same(item.path, name)
        with reading(item.path):
            size = item.path.stat().st_size
        file = torch.from_file(str(item.path), shared=False, size=size, dtype=torch.uint8)
        strides = [step * dtype.itemsize for step in head.strides]
        return np.ndarray(box.sizes, dtype.array, file.numpy(), begin, strides)

    def _has(self, item: Item, head: _Head, name: str) -> bool:
        """Whether an item begins with the very bytes of another one whose head is known.

        They say all that there is to know of its numbers, and parts of one shape differ in none of
        them. To unpickle them takes fifty times as long.
        """
        if head.end > item.length:
            return False
        content = bytearray(len(head.content))
        self._bytes.read(item.path, item.begin, memoryview(content), name)
        return content == head.content

    def _head(self, name: str, box: Box[Item]) -> _Head:
        item, dtype = box.item, self.tensors[name].dtype
        file = io.BufferedReader(_ItemBytes(self._bytes, item, name))
        try:
            record = _record_of(file)
            # With numbers of another byte order torch would end the process here.
            tensor = None if record.swapped else _without_numbers(file)
        except CheckpointError:
            raise
        except Exception as error:  # a hostile pickle can end in any exception there is
            raise refused(item.path, error, file, name) from error
        if tensor is None or tensor.is_conj() or tensor.is_neg() or record.compressed:
            raise unread_distributed(
                item.path.parent,
                self._home,
                tensor=name,
                expected="numbers as they are, the lowest byte first",
                found="numbers that are compressed, conjugated, or of another byte order",
            )
        first = int(tensor.storage_offset())
        last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        end = record.begin + (last + 1) * dtype.itemsize
        if (
            tuple(tensor.shape) != box.sizes
            or dtype_of(tensor.dtype) != dtype
            or tensor.layout != torch.strided
            or end > min(record.begin + record.length, item.length)
        ):
            raise CheckpointError(
                "A part of a tensor is not what the metadata of the checkpoint say.",
                checkpoint=item.path,
                tensor=name,
                expected=f"{dtype} of shape {list(box.sizes)}",
                found=f"{dtype_of(tensor.dtype)} of shape {list(tensor.shape)}, {tensor.layout},"
                f" {record.length} bytes",
                remedy=_AGAIN,
            )
        strides = None if tensor.is_contiguous() else tuple(tensor.stride())
        file.seek(0)
        content = file.read(record.begin)
        return _Head(content, record.begin + first * dtype.itemsize, int(end), strides)


@dataclass(frozen=True)
class _Head:
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


def _document(metadata: DistributedMetadata) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """What was saved, nested as it was, and the names in the metadata of what is at which keys.

    Tensors are without their numbers, on the device meta. Of what is no tensor, only what tells
    steps and what modules have saved as their extra state is read; the rest is None. So is what
    lists hold, where nobody looks for weights.
    """
    document: dict[str, Any] = {}
    names: dict[tuple[str, ...], str] = {}
    for name in (*metadata.tensors, *metadata.values):
        found = metadata.keys(name)
        keys = tuple(str(key) for key in takewhile(lambda key: isinstance(key, str), found))
        with damage(metadata.path, name):
            inside = document
            for key in keys[:-1]:
                inside = inside.setdefault(key, {})
            if keys != found:
                inside.setdefault(keys[-1], [name])
            elif keys[-1] in inside:
                raise ValueError("it stands where another one does")
            else:
                inside[keys[-1]] = _value(metadata, name, keys)
                names[keys] = name
    return document, names


def _value(metadata: DistributedMetadata, name: str, keys: tuple[str, ...]) -> Any:
    info = metadata.tensors.get(name)
    if len(keys) == 1 and keys[0] in (*STEP_KEYS, *_EPOCH_KEYS) and (not info or info.numel == 1):
        try:
            return _loaded(metadata.item(name, (0,) * len(info.shape) if info else None))
        except CheckpointError:
            # A count that is of a class of its own is not worth refusing the weights.
            return None
    if info:
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
    return _loaded(metadata.item(name)) if is_extra_state(keys[-1]) else None


def _loaded(item: Item) -> Any:
    _require_bytes(item, require_file(item.path))
    with reading(item.path), item.path.open("rb") as file:
        file.seek(item.begin)
        content = file.read(item.length)
    return load(item.path, io.BytesIO(content))


def _require_whole(
    metadata: DistributedMetadata,
    tensors: Mapping[str, TensorInfo],
    boxes: Mapping[str, Sequence[Box[Item]]],
) -> None:
    """Checks that all files are there, and long enough for what they are to hold."""
    paths = list(dict.fromkeys(box.item.path for name in boxes for box in boxes[name]))
    require_present(metadata.path, paths)
    sizes = {path: require_file(path) for path in paths}
    for name, parts in boxes.items():
        for box in parts:
            needed = box.numel * tensors[name].dtype.itemsize
            _require_bytes(box.item, sizes[box.item.path], name, needed)


def _require_bytes(item: Item, size: int, tensor: str | None = None, needed: int = 0) -> None:
    if item.begin + max(item.length, needed) > size or needed > item.length:
        raise CheckpointError(
            "A file is shorter than the metadata of the checkpoint say: it was cut short.",
            checkpoint=item.path,
            tensor=tensor,
            expected=f"{max(item.length, needed)} bytes from {item.begin} on",
            found=f"{item.length} bytes there, and {size} in the whole file",
            remedy=_AGAIN,
        )


def _files(
    boxes: Mapping[str, Sequence[Box[Item]]], raw: Mapping[str, str]
) -> tuple[WeightFile, ...]:
    """Each file, with the tensors of which it has a part."""
    names: dict[Path, list[str]] = {}
    for name, parts in boxes.items():
        for path in dict.fromkeys(box.item.path for box in parts):
            names.setdefault(path, []).append(name)
    return tuple(
        WeightFile(path, tuple(inside), raw_names=tuple(raw[n] for n in inside))
        for path, inside in sorted(names.items())
    )


def _seen(path: Path) -> Identity:
    with reading(path):
        return identity(path.stat())
