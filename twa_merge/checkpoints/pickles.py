"""Reads what torch.save wrote: .pt, .pth, .bin and .ckpt files, never running code from them."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..dtypes import Array
from ..errors import CheckpointError, listing
from ..tensors import as_tensor, dtype_of
from .base import TensorInfo, WeightFile, reading, require_file
from .foreign import spread_tensors
from .names import resolve_names
from .shards import read_index, require_all_shards, require_consistent
from .state_dicts import (
    SPREAD,
    STEP_KEYS,
    WEIGHTS_ALONE,
    StateDict,
    aliases_of,
    count_of,
    is_plain,
    named_tensors,
    require_dense,
    state_dict_of,
)

# What command lines are parsed into, which training scripts save beside the weights: attributes,
# and nothing that runs.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]


class PickleReader:
    """Reads a checkpoint from one pickle, or from the shards that an index names.

    Files in torch.save's zip format are mapped; the older format has to be loaded into memory.

    Args:
        files: one file, or all shards; ignored where there is an index.
        index: ``pytorch_model.bin.index.json`` or another like it.

    Attributes:
        step, epoch: that the file itself speaks of, if it does.
        entry, extra_states, left_out: as a ``Checkpoint`` has them.

    Raises:
        CheckpointError: a file is missing, damaged, holds no weights, or asks for code to be run.
    """

    def __init__(self, files: Sequence[Path], index: Path | None = None) -> None:
        weight_map = read_index(index) if index else {}
        paths = sorted(set(weight_map.values())) if index else list(files)
        if not index:
            require_all_shards(paths)
        loaded = {path: load(path) for path in paths}
        states = {path: _dense(state_dict_of(doc, path), path) for path, doc in loaded.items()}
        require_consistent(index, weight_map, {path: s.tensors for path, s in states.items()})
        short = resolve_names(n for s in states.values() for n in (*s.tensors, *s.extra_states))
        self._tensors = {short[n]: t for s in states.values() for n, t in s.tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(t.shape), dtype_of(t.dtype)) for name, t in self._tensors.items()
        }
        self.files = tuple(
            WeightFile(path, tuple(short[n] for n in s.tensors), raw_names=tuple(s.tensors))
            for path, s in states.items()
        )
        self.aliases: Mapping[str, str] = aliases_of(self._tensors)
        first = loaded[paths[0]]
        self.step = count_of(first, STEP_KEYS)
        self.epoch = count_of(first, ("epoch",))
        self.entry = states[paths[0]].entry
        self.left_out = states[paths[0]].left_out
        self.extra_states: Mapping[str, str] = {
            short[name]: kind for s in states.values() for name, kind in s.extra_states.items()
        }

    def read(self, name: str, first: int, out: Array) -> None:
        info, tensor = self.tensors[name], self._tensors[name]
        if not out.size:
            return
        if tensor.is_contiguous():
            flat = tensor.view(-1)
        else:
            # Only the rows in question: a transposed tensor is copied to be read row by row.
            start, stop = first // info.row_numel, -(-(first + out.size) // info.row_numel)
            flat, first = tensor[start:stop].reshape(-1), first - start * info.row_numel
        as_tensor(out, info.dtype).copy_(flat[first : first + out.size])

    def close(self) -> None:
        self._tensors = {}


def _dense(state: StateDict, path: Path) -> StateDict:
    for name, tensor in state.tensors.items():
        require_dense(path, name, tensor)
    return replace(state, tensors={name: t.detach() for name, t in state.tensors.items()})


def load(path: Path, part: BinaryIO | None = None) -> Any:
    """Whatever torch.save put into the file, tensors on the CPU and mapped where possible.

    Args:
        part: what to read, where that is one of several things that were saved in the file.

    Raises:
        CheckpointError: the file is damaged, or asks for more than tensors and plain containers.
    """
    require_file(path)
    try:
        with reading(path), warnings.catch_warnings():
            # The unpickler's own warnings would reach the user without the name of the file.
            warnings.simplefilter("ignore")
            entries = [] if part else _entries(path)
            mapped = bool(entries) and all(e.compress_type == zipfile.ZIP_STORED for e in entries)
            with torch.serialization.safe_globals(_HARMLESS):
                document = torch.load(
                    part or path, map_location="cpu", weights_only=True, mmap=mapped
                )
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can end in any exception there is
        raise refused(path, error, part) from error
    if mapped and isinstance(document, Mapping):
        _require_records(path, document, entries)
    return document


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    """What the zip archive holds; nothing for the older format, which is none.

    Raises:
        CheckpointError: it is a TorchScript archive.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return []
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(
            "A file is a TorchScript program, not a set of weights.",
            checkpoint=path,
            remedy="torch.save(torch.jit.load(path).state_dict(), new_path), and merge those",
        )
    return entries


def _require_records(
    path: Path, document: Mapping[Any, Any], entries: Sequence[zipfile.ZipInfo]
) -> None:
    """Checks that tensors are as long as their records: a mapping would read on into the next."""
    records = Counter(entry.file_size for entry in entries if "/data/" in entry.filename)
    storages = {}
    for state in named_tensors(document):
        for name, tensor in state.tensors.items():
            if is_plain(tensor) and tensor.layout == torch.strided and not tensor.is_meta:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = (storage.nbytes(), name)
    for nbytes, name in storages.values():
        if nbytes and records[nbytes] == 0:
            raise CheckpointError(
                "A tensor is not as long as the file says.",
                checkpoint=path,
                tensor=name,
                expected=f"a record of {nbytes} bytes",
                found="no such record",
                remedy="save or download this file again, or leave it out",
            )
        records[nbytes] -= 1


def refused(
    path: Path, error: Exception, part: BinaryIO | None = None, tensor: str | None = None
) -> CheckpointError:
    """The error to raise for what torch.load has raised, having refused to run code or failed."""
    wanted = _refused_globals(part or path, str(error))
    if any(name.startswith(SPREAD) for name in wanted):
        return spread_tensors(path, listing(wanted), tensor)
    if wanted:
        return CheckpointError(
            "A pickle asks for more than tensors, which could run code, and was refused.",
            checkpoint=path,
            tensor=tensor,
            expected="tensors, numbers, texts and containers of them",
            found=listing(wanted),
            remedy=WEIGHTS_ALONE,
        )
    said = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    text = said[1] if said else (str(error).strip() or "nothing more is known").splitlines()[0]
    return CheckpointError(
        "A file is damaged, or torch.save did not write it.",
        checkpoint=path,
        tensor=tensor,
        found=f"{type(error).__name__}: {text[:200]}",
        remedy="save or download this file again, or leave it out",
    )


def _refused_globals(source: Path | BinaryIO, message: str) -> list[str]:
    """What the pickle wanted to import: all of it where that can be told, else the first."""
    first = re.findall(
        r"(?:GLOBAL|unrecognized function|imported to load) (.+?)(?: was not|[ .]*$| whose)",
        message,
        re.M,
    )
    if not first:
        return []
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            every = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:  # not a zip archive, or damaged beyond what was read so far
        every = []
    return sorted({first[0], *every})
