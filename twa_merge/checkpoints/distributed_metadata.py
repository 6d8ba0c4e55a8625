"""Reads ``.metadata`` of torch.distributed.checkpoint: a pickle, of which nothing is ever run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import CheckpointError
from ..tensors import dtype_of
from .base import TensorInfo, reading, require_file
from .chunks import Box, are_apart
from .distributed_items import Item
from .folders import METADATA
from .foreign import conversion, unread_distributed
from .shards import require_plain_name

_AGAIN = "save or copy the checkpoint again, or leave it out"
# What metadata is made of, with the names that older versions of torch have saved.
_RECORDS = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        filesystem._StorageInfo,
    )
} | {("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): TensorProperties}
# What nobody needs of it: memory formats, which numbers in files do not have, and the path that it
# was saved at.
_UNUSED = {
    (TensorProperties.__module__, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    *(
        (module, f"{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows", "PurePosix", "PureWindows")
    ),
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


class DistributedMetadata:
    """What a distributed checkpoint says it holds.

    Args:
        folder: in which the files lie.
        home: the checkpoint, as the user would call it.

    Attributes:
        tensors: name → shape and dtype; names as the checkpoint has them, keys joined by dots.
        values: the names of what is no tensor.

    Raises:
        CheckpointError: ``.metadata`` is damaged, or asks for more than torch itself saves in it.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        self.path = folder / METADATA
        self._home = home
        self._files: dict[str, Path] = {}
        with damage(self.path):
            document = _unpickled(self.path, home)
            entries = document.state_dict_metadata
            if not all(isinstance(name, str) for name in entries):
                raise TypeError("a name that is no text")
            self._keys = document.planner_data
            self._places = {
                (index.fqn, index.offset and tuple(index.offset)): place
                for index, place in document.storage_data.items()
            }
            self._saved = {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}
            self.values = [n for n, e in entries.items() if isinstance(e, BytesStorageMetadata)]
        self.tensors = {name: self._info(name, saved) for name, saved in self._saved.items()}

    def keys(self, name: str) -> tuple[str | int, ...]:
        """Where a tensor or value stood in what was saved: keys of mappings, indices in lists."""
        keys = self._keys.get(name) if isinstance(self._keys, Mapping) else None
        if isinstance(keys, tuple) and keys and all(isinstance(key, str | int) for key in keys):
            return keys
        return (name,)

    def item(self, name: str, corner: tuple[int, ...] | None = None) -> Item:
        """Where the part of a tensor that begins at ``corner`` lies, or a value.

        Raises:
            CheckpointError: nowhere, outside of the folder, or in a form that is not read here.
        """
        with damage(self.path, name):
            place = self._places.get((name, corner))
            if place is None:
                raise LookupError(f"no place for the part at {corner}")
            path, begin, length = place.relative_path, place.offset, place.length
            if not (_is_size(begin) and _is_size(length)):
                raise ValueError(f"bytes {begin!r}, {length!r} of a file")
            plain = require_plain_name(path, self.path, name)
            file = self._files.setdefault(plain, self.path.with_name(plain))
            if place.transform_descriptors:
                raise self._unread(
                    name, "items as torch.save writes them", place.transform_descriptors
                )
        return Item(file, begin, length)

    def boxes(self, name: str) -> list[Box[Item]]:
        """The parts that a tensor was saved in, without empty ones; together they are the tensor.

        Raises:
            CheckpointError: they are not, or as ``item``.
        """
        info, layout = self.tensors[name], self._saved[name].properties.layout
        if layout != torch.strided:
            raise self._unread(name, "dense tensors", layout)
        with damage(self.path, name):
            # A set: replicas of one part are one.
            chunks = {(tuple(c.offsets), tuple(c.sizes)) for c in self._saved[name].chunks}
            for corner, sizes in chunks:
                if not _is_inside(corner, sizes, info.shape):
                    raise ValueError(f"a part of shape {sizes} at {corner} of {info.shape}")
            boxes = [
                Box(corner, sizes, self.item(name, corner))
                for corner, sizes in sorted(chunks)
                if 0 not in sizes
            ]
            saved = sum(box.numel for box in boxes)
            if saved != info.numel or not are_apart(boxes):
                raise CheckpointError(
                    "The parts of a tensor do not make up the tensor.",
                    checkpoint=self.path,
                    tensor=name,
                    expected=f"all {info.numel} numbers of shape {list(info.shape)}, in one part"
                    " each",
                    found=f"{len(boxes)} parts with {saved} numbers",
                    remedy=_AGAIN,
                )
        return boxes

    def _info(self, name: str, saved: TensorStorageMetadata) -> TensorInfo:
        with damage(self.path, name):
            shape, dtype = tuple(saved.size), saved.properties.dtype
            # What is empty is bounded by nothing else, and overflows elsewhere.
            bounded = math.prod(max(1, n) for n in shape) * dtype.itemsize < 2**63
            if not (bounded and all(map(_is_size, shape))):
                raise ValueError(f"a tensor of shape {shape}")
            return TensorInfo(shape, dtype_of(dtype))

    def _unread(self, tensor: str, expected: str, found: object) -> CheckpointError:
        return unread_distributed(
            self.path.parent, self._home, tensor=tensor, expected=expected, found=str(found)[:200]
        )


@contextmanager
def damage(path: Path, tensor: str | None = None) -> Iterator[None]:
    """What is raised where something in metadata is not what it should be, as a CheckpointError."""
    try:
        with reading(path):
            yield
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can end in any exception there is
        raise CheckpointError(
            "The metadata of a distributed checkpoint is damaged.",
            checkpoint=path,
            tensor=tensor,
            expected="what torch.distributed.checkpoint saves in it",
            found=f"{type(error).__name__}: {error}"[:200],
            remedy=_AGAIN,
        ) from error


def _unpickled(path: Path, home: Path) -> Metadata:
    require_file(path)
    with path.open("rb") as file:
        document = _Unpickler(file, path, home).load()
    if not isinstance(document, Metadata):
        raise TypeError(f"{type(document).__name__} in the place of metadata")
    return document


class _Unpickler(pickle.Unpickler):
    """Makes records of torch's metadata classes, sizes and dtypes, and nothing else.

    Records are of subclasses that are made for one file, and nothing is an object that others use
    as well and that has attributes: a pickle can set those of whatever it gets hold of.
    """

    def __init__(self, file: BinaryIO, path: Path, home: Path) -> None:
        super().__init__(file)
        self._path = path
        self._home = home
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        asked = module, name
        if asked not in self._known:
            self._known[asked] = self._allowed(asked)
        return self._known[asked]

    def _allowed(self, asked: tuple[str, str]) -> type | torch.dtype | Callable[..., Any]:
        module, name = asked
        if asked in _RECORDS:
            kind = _RECORDS[asked]
            own = {"__setstate__": _set_properties} if kind is TensorProperties else {}
            return type(name, (kind,), own)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if asked == ("torch", "Size"):
            return torch.Size
        if asked == ("torch.serialization", "_get_layout"):
            return lambda text: _LAYOUTS[text]
        if asked in _UNUSED:
            return lambda *_: None
        raise CheckpointError(
            "The metadata of a distributed checkpoint asks for more than torch saves in it, which"
            " could run code, and was refused.",
            checkpoint=self._path,
            expected="classes of torch.distributed.checkpoint",
            found=f"{module}.{name}"[:200],
            remedy="do not trust it if it is not your own; otherwise "
            + conversion(self._path.parent, self._home),
        )


def _set_properties(properties: TensorProperties, state: tuple[Any, ...]) -> None:
    properties.dtype, properties.layout = state[:2]


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_inside(corner: tuple[Any, ...], sizes: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    return len(corner) == len(sizes) == len(shape) and all(
        _is_size(a) and _is_size(n) and a + n <= most
        for a, n, most in zip(corner, sizes, shape, strict=True)
    )
