"""Reads safetensors: bare files, and the shards of a Hugging Face folder."""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .base import TensorInfo, WeightFile, reading, require_file
from .names import original_names, resolve_names
from .shards import read_index, require_all_shards, require_consistent

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit.
_MAX_HEADER = 100_000_000
_AGAIN = "save or download this file again, or leave the checkpoint out"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds: name → shape and dtype, in the order of its bytes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


class SafetensorsReader:
    """Reads a checkpoint from one safetensors file, or from several.

    Files are mapped when the first row is asked of them; a mapping holds no file descriptor.

    Args:
        files: one file, or all shards; ignored where there is an index.
        index: the index that names the shards.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not fit the files.
    """

    def __init__(self, files: Sequence[Path], index: Path | None = None) -> None:
        weight_map = read_index(index) if index else {}
        paths = sorted(set(weight_map.values())) if index else list(files)
        if not index:
            require_all_shards(paths)
        headers = {path: read_header(path) for path in paths}
        require_consistent(index, weight_map, {p: h.tensors for p, h in headers.items()})
        short = resolve_names(name for h in headers.values() for name in h.tensors)
        self._raw = original_names(short)
        self._file = {short[name]: path for path, h in headers.items() for name in h.tensors}
        self.tensors: Mapping[str, TensorInfo] = {
            short[name]: info for h in headers.values() for name, info in h.tensors.items()
        }
        self.files = tuple(
            WeightFile(path, tuple(short[n] for n in h.tensors), h.metadata, tuple(h.tensors))
            for path, h in headers.items()
        )
        self.aliases: Mapping[str, str] = {}
        self._opened: dict[Path, Any] = {}
        self._opening = threading.Lock()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        path, info = self._file[name], self.tensors[name]
        try:
            with reading(path):
                file = self._mapped(path)
                if not info.shape:
                    whole = file.get_tensor(self._raw[name])
                    rows = whole if start < stop else whole.reshape(1)[:0]
                else:
                    rows = file.get_slice(self._raw[name])[start:stop]
        except SafetensorError as error:
            raise _changed(path, name, error) from error
        if rows.dtype != info.dtype or rows.shape[1:] != info.shape[1:]:
            raise _changed(path, name, f"{rows.dtype} {list(rows.shape)}")
        return rows

    def close(self) -> None:
        with self._opening:
            self._opened.clear()

    def _mapped(self, path: Path) -> Any:
        with self._opening:
            if path not in self._opened:
                self._opened[path] = safe_open(path, framework="pt")
            return self._opened[path]


def read_header(path: Path) -> Header:
    """Reads and checks the header of one file; the tensors themselves are not touched.

    Raises:
        CheckpointError: the header is damaged, or does not fit the size of the file.
    """
    size = require_file(path)
    with reading(path), path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                "A file does not begin like a safetensors file, or is cut short.",
                checkpoint=path,
                expected=f"a header inside the file's {size} bytes",
                found=f"a header of {length} bytes" if len(first) == 8 else f"{size} bytes",
                remedy=_AGAIN,
            )
        text = file.read(length)
    document = _parse(path, text)
    metadata = document.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "metadata of texts", metadata)
    places = {name: _place(path, name, entry) for name, entry in document.items()}
    ordered = sorted(places.items(), key=lambda item: item[1][1:])
    _require_covered(path, ordered, size - 8 - length)
    return Header({name: info for name, (info, _, _) in ordered}, metadata)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "valid JSON", error) from error
    if not isinstance(document, dict):
        raise _damaged(path, "a JSON object", type(document).__name__)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name stands in it twice")
    return document


def _place(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Shape and dtype of one tensor, and its bytes [begin, end) after the header."""
    if not isinstance(entry, dict):
        raise _damaged(path, "dtype, shape and data_offsets", entry, name)
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets)) or len(offsets) != 2:
        raise _damaged(path, "a shape and two offsets", f"{shape} and {offsets}", name)
    kind = entry.get("dtype")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise CheckpointError(
            "A tensor has a dtype that cannot be averaged.",
            checkpoint=path,
            tensor=name,
            expected=", ".join(_DTYPES),
            found=kind,
            remedy="merge the checkpoints before they are quantised",
        )
    info = TensorInfo(tuple(shape), _DTYPES[kind])
    # An empty tensor's other dimensions are bounded by nothing else, and overflow in torch.
    if math.prod(max(1, n) for n in shape) * info.dtype.itemsize >= 2**63:
        raise _damaged(path, "a shape that memory can hold", shape, name)
    begin, end = offsets
    if end - begin != info.nbytes:
        raise CheckpointError(
            "A tensor's bytes do not fit its shape.",
            checkpoint=path,
            tensor=name,
            expected=f"{info.nbytes} bytes for {kind} {shape}",
            found=f"{end - begin} bytes, from {begin} to {end}",
            remedy=_AGAIN,
        )
    return info, begin, end


def _require_covered(
    path: Path, ordered: Sequence[tuple[str, tuple[TensorInfo, int, int]]], size: int
) -> None:
    """The format asks for tensors one after the other, without gaps, up to the end of the file."""
    reached = 0
    for name, (_, begin, end) in ordered:
        if end > size:
            raise CheckpointError(
                "A file is shorter than its header says: it was cut short.",
                checkpoint=path,
                tensor=name,
                expected=f"at least {end} bytes of tensors",
                found=f"{size} bytes",
                remedy=_AGAIN,
            )
        if begin != reached:
            what = "begins inside another" if begin < reached else "leaves a gap before it"
            raise _damaged(path, f"a tensor at byte {reached}", f"one that {what}", name)
        reached = end
    if reached != size:
        raise _damaged(path, f"{reached} bytes of tensors", f"{size} bytes")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _damaged(
    path: Path, expected: str, found: object, tensor: str | None = None
) -> CheckpointError:
    text = str(found)
    return CheckpointError(
        "The header of a safetensors file is damaged.",
        checkpoint=path,
        tensor=tensor,
        expected=expected,
        found=text if len(text) <= 200 else f"{text[:200]}…",
        remedy=_AGAIN,
    )


def _changed(path: Path, tensor: str, found: object) -> CheckpointError:
    return CheckpointError(
        "A file has changed since its header was read.",
        checkpoint=path,
        tensor=tensor,
        found=found,
        remedy="wait until the training run has finished saving, then start again",
    )
