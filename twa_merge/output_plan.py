"""What the output folder will hold, from headers alone: files, names, dtypes, index, sidecars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoints import sidecars
from .checkpoints.base import Checkpoint, TensorInfo, reading
from .checkpoints.folders import is_model_file, require_own
from .dtypes import BY_CODE, Dtype
from .errors import OutputError
from .json_files import read_json
from .safetensors_writer import SavedTensor, aligned, header

# Hugging Face's names for a model's files.
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_SHARD = "model{suffix}.safetensors"


@dataclass(frozen=True)
class PlannedFile:
    """One file of weights; ``name`` is relative to the output folder."""

    name: str
    tensors: tuple[SavedTensor, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return len(header(self.tensors, self.metadata)) + sum(t.info.nbytes for t in self.tensors)


@dataclass(frozen=True)
class OutputPlan:
    """Everything in the output folder but its documents.

    Attributes:
        index: name and content of the file that says which tensor is where, if there is one.
        sidecars: name in the output folder → file to be copied there.
    """

    files: tuple[PlannedFile, ...]
    index: tuple[str, bytes] | None
    sidecars: Mapping[str, Path]

    @property
    def names(self) -> list[str]:
        index = [self.index[0]] if self.index else []
        return [*(file.name for file in self.files), *index, *self.sidecars]

    @property
    def nbytes(self) -> int:
        total = sum(file.nbytes for file in self.files)
        total += len(self.index[1]) if self.index else 0
        for source in self.sidecars.values():
            with reading(source):
                total += source.stat().st_size
        return total


def plan_output(checkpoints: Sequence[Checkpoint], dtype: Dtype | None) -> OutputPlan:
    """Files and names as in the first checkpoint, sidecars as in the newest.

    Pickles and distributed checkpoints become ``model.safetensors``, or shards of at most 5 GB; one
    bare file becomes ``model.safetensors``, unless it has another of Hugging Face's names.

    Args:
        dtype: of averaged real tensors; each keeps its saved dtype without it.

    Raises:
        OutputError: safetensors files cannot hold one of the dtypes.
    """
    first, newest = checkpoints[0], checkpoints[-1]
    files = _same_files(first, dtype) or _new_files(first, dtype)
    for file in files:
        for tensor in file.tensors:
            _require_savable(first, tensor)
    index = _index(first, files, converted=dtype is not None)
    taken = {file.name for file in files} | ({index[0]} if index else set())
    beside = {name: file for name, file in sidecars(newest).items() if name not in taken}
    for sidecar in beside.values():
        require_own(sidecar, newest)
    return OutputPlan(files, index, beside)


def _same_files(first: Checkpoint, dtype: Dtype | None) -> tuple[PlannedFile, ...]:
    """The first checkpoint's own files, where they are safetensors."""
    if any(file.path.suffix != ".safetensors" for file in first.files):
        return ()
    planned = []
    for file in first.files:
        if first.path.is_dir() and first.path in file.path.parents:
            name = file.path.relative_to(first.path).as_posix()
        else:
            unnamed = len(first.files) == 1 and not is_model_file(file.path)
            name = _SINGLE_FILE if unnamed else file.path.name
        pairs = zip(file.names, file.raw_names or file.names, strict=True)
        tensors = [SavedTensor(n, raw, _saved(first.tensors[n], dtype)) for n, raw in pairs]
        planned.append(PlannedFile(name, aligned(tensors), file.metadata))
    return tuple(planned)


def _new_files(first: Checkpoint, dtype: Dtype | None) -> tuple[PlannedFile, ...]:
    """Files for weights that were no safetensors.

    Tied tensors are written under all of their names: safetensors cannot share storage, and whoever
    loads them strictly expects every name.
    """
    # Only what torch has saved comes here, and whoever reads that has waited for torch already.
    from huggingface_hub import split_state_dict_into_shards_factory

    infos = {name: _saved(info, dtype) for name, info in first.tensors.items()}
    split = split_state_dict_into_shards_factory(
        infos,
        get_storage_size=lambda info: info.nbytes,
        filename_pattern=_SHARD,
    )
    return tuple(
        PlannedFile(name, aligned(SavedTensor(t, t, infos[t]) for t in tensors), {})
        for name, tensors in split.filename_to_tensors.items()
    )


def _saved(info: TensorInfo, dtype: Dtype | None) -> TensorInfo:
    return replace(info, dtype=dtype) if dtype and info.dtype.is_float else info


def _require_savable(first: Checkpoint, tensor: SavedTensor) -> None:
    if tensor.info.dtype.code is None:
        raise OutputError(
            "A tensor's dtype cannot be saved in a safetensors file.",
            checkpoint=first.path,
            tensor=tensor.name,
            expected=", ".join(BY_CODE),
            found=tensor.info.dtype,
            remedy="save the checkpoints with another dtype for this tensor",
        )


def _index(
    first: Checkpoint, files: Sequence[PlannedFile], *, converted: bool
) -> tuple[str, bytes] | None:
    """The first checkpoint's own index where there is one, byte for byte unless sizes change."""
    size = sum(tensor.info.nbytes for file in files for tensor in file.tensors)
    found = _find_index(first, {file.name for file in files})
    if found is None:
        if len(files) == 1:
            return None
        weight_map = {t.raw_name: file.name for file in files for t in file.tensors}
        fresh = {"metadata": {"total_size": size}, "weight_map": weight_map}
        return _INDEX_FILE, _as_json(fresh)
    path, document = found
    if not converted:
        return path.name, path.read_bytes()
    described = document.get("metadata")
    known = described if isinstance(described, dict) else {}
    document["metadata"] = {**known, "total_size": size}
    return path.name, _as_json(document)


def _find_index(first: Checkpoint, names: set[str]) -> tuple[Path, dict[str, Any]] | None:
    """The index file whose weight map speaks of just these files."""
    if not first.path.is_dir():
        return None
    for path in sorted(first.path.glob("*.safetensors.index.json")):
        document = read_json(path)
        try:
            if set(document["weight_map"].values()) == names:
                return path, document
        except (KeyError, AttributeError, TypeError):
            continue
    return None


def _as_json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
