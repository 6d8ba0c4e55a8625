"""Reads safetensors: bare files, and the shards of a Hugging Face folder."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..dtypes import BY_CODE, Array
from ..errors import CheckpointError
from .base import TensorInfo, WeightFile, reading, require_file
from .foreign import sharded_safetensors
from .names import resolve_names
from .open_files import Identity, SeenFiles, identity
from .shards import read_index, require_all_shards, require_consistent

# The format's own limit.
_MAX_HEADER = 100_000_000
_SHARDING = "DCP_SHARDING_INFO"
_AGAIN = "save or download this file again, or leave the checkpoint out"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds: name → shape and dtype, in the order of its bytes.

    Attributes:
        begins: name → where in the file its bytes begin.
        seen: what tells this file from one that was written later.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    begins: Mapping[str, int]
    seen: Identity


class SafetensorsReader:
    """Reads a checkpoint from one safetensors file, or from several.

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
        self._place = {
            short[name]: (path, begin)
            for path, h in headers.items()
            for name, begin in h.begins.items()
        }
        self.tensors: Mapping[str, TensorInfo] = {
            short[name]: info for h in headers.values() for name, info in h.tensors.items()
        }
        self.files = tuple(
            WeightFile(path, tuple(short[n] for n in h.tensors), h.metadata, tuple(h.tensors))
            for path, h in headers.items()
        )
        self.aliases: Mapping[str, str] = {}
        self._files = SeenFiles({path: h.seen for path, h in headers.items()})

    def read(self, name: str, first: int, out: Array) -> None:
        path, begin = self._place[name]
        self._files.read(path, begin + first * out.itemsize, out.view("u1").data, name)

    def close(self) -> None:
        self._files.close()


def read_header(path: Path) -> Header:
    """Reads and checks the header of one file; the tensors themselves are not touched.

    Raises:
        CheckpointError: the header is damaged, or does not fit the size of the file.
    """
    size = require_file(path)
    with reading(path), path.open("rb") as file:
        seen = identity(os.fstat(file.fileno()))
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
    _require_whole(path, metadata)
    places = {name: _place(path, name, entry) for name, entry in document.items()}
    ordered = sorted(places.items(), key=lambda item: item[1][1:])
    _require_covered(path, ordered, size - 8 - length)
    return Header(
        {name: info for name, (info, _, _) in ordered},
        metadata,
        {name: 8 + length + begin for name, (_, begin, _) in ordered},
        seen,
    )


def _require_whole(path: Path, metadata: Mapping[str, str]) -> None:
    """torch.distributed.checkpoint notes where the rows of each tensor in a file begin.

    Those of a whole model begin at 0. So do the first shard's, which its name tells apart.
    """
    if _SHARDING not in metadata:
        return
    try:
        begins = [entry["saved_offsets"] for entry in json.loads(metadata[_SHARDING]).values()]
        whole = not any(map(any, begins))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise sharded_safetensors(path)


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
    if not isinstance(kind, str) or kind not in BY_CODE:
        raise CheckpointError(
            "A tensor has a dtype that cannot be averaged.",
            checkpoint=path,
            tensor=name,
            expected=", ".join(BY_CODE),
            found=kind,
            remedy="merge the checkpoints before they are quantised",
        )
    info = TensorInfo(tuple(shape), BY_CODE[kind])
    # An empty tensor's other dimensions are bounded by nothing else, and overflow elsewhere.
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
