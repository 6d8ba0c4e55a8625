"""Reads what torch.distributed.checkpoint wrote: ``.metadata`` and ``.distcp`` files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..dtypes import Array, Dtype
from ..errors import CheckpointError
from ..tensors import torch_dtype
from .base import TensorInfo, WeightFile, reading, require_file
from .chunks import Box, Part, Shape, Tiling
from .distributed_items import Head, Item, has_head, head_of
from .distributed_metadata import DistributedMetadata, damage
from .foreign import flat_parameters
from .names import is_extra_state, resolve_names
from .open_files import Identity, SeenFiles, identity
from .pickles import load
from .shards import require_present
from .state_dicts import STEP_KEYS, count_of, state_dict_of

_WEIGHTS_ALONE = (
    "save the weights alone, with dcp.save(get_model_state_dict(model), checkpoint_id=folder), and"
    " merge those"
)
_AGAIN = "save or copy the checkpoint again, or leave it out"
_EPOCH_KEYS = ("epoch",)
# What FSDP 1 puts in the place of all tensors of a module.
_FLAT = "_flat_param"


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
        self._heads: dict[tuple[Shape, Dtype], Head] = {}
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
            CheckpointError: as ``head_of``.
        """
        item, dtype = box.item, self.tensors[name].dtype
        alike = box.sizes, dtype
        head = self._heads.get(alike)
        if head is None or not has_head(self._bytes, item, head, name):
            head = self._heads[alike] = head_of(self._bytes, box, dtype, name, self._home)
        begin = item.begin + head.begin
        if head.strides is None:
            return begin
        self._bytes.require_same(item.path, name)
        with reading(item.path):
            size = item.path.stat().st_size
        file = torch.from_file(str(item.path), shared=False, size=size, dtype=torch.uint8)
        strides = [step * dtype.itemsize for step in head.strides]
        return np.ndarray(box.sizes, dtype.array, file.numpy(), begin, strides)


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
