"""The one interface through which every checkpoint format is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ..dtypes import Array, Dtype
from ..errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a saved tensor, as its header says."""

    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def rows(self) -> int:
        """Size of dimension 0; a 0-d tensor counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_numel(self) -> int:
        """Numbers in one row."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFile:
    """One file of weights inside a checkpoint: what the writer needs to write another like it.

    Attributes:
        names: the tensors in it, or parts of them, by the names of ``Checkpoint.tensors``.
        raw_names: the same tensors in the same order, by their names in the file, which may carry
            the prefixes of wrappers (``module.``, ``_orig_mod.``).
        metadata: the header's ``__metadata__``; empty for formats without one.
    """

    path: Path
    names: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    raw_names: tuple[str, ...] = ()


class Reader(Protocol):
    """Reads one checkpoint. Headers are read when it is built, rows when they are asked for.

    ``read`` may be called from several threads at once.
    """

    tensors: Mapping[str, TensorInfo]
    files: tuple[WeightFile, ...]
    aliases: Mapping[str, str]

    def read(self, name: str, first: int, out: Array) -> None:
        """Numbers ``first`` to ``first + m - 1`` of a tensor, in the saved dtype.

        Args:
            first: counted through the whole tensor, row by row.
            out: (m,) contiguous, of the tensor's ``dtype.array``; filled.

        Raises:
            CheckpointError: the file has changed since its header was read, or cannot be read.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """One saved set of weights.

    Attributes:
        path: the folder or file, as the user would name it.
        step: training step, where one is known.
        format: ``huggingface`` (a folder with safetensors), ``safetensors`` (bare files),
            ``pickle`` (whatever ``torch.save`` wrote, in a folder or bare) or ``distributed``
            (whatever ``torch.distributed.checkpoint`` wrote); more may follow.
        reader: reads it.
        epoch: what a script has saved under this name, beside the weights.
        entry: where in what it saved the weights were found, if not under one of the usual names.
        extra_states: what modules have saved that is neither a tensor nor empty
            (``torch.nn.Module.get_extra_state``), and is read no further: name → its type.
        left_out: where in what was saved other weights were found.
    """

    path: Path
    step: int | None
    format: str
    reader: Reader
    epoch: int | None = None
    entry: str | None = None
    extra_states: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → shape and dtype, in file order; names without the prefixes of wrappers."""
        return self.reader.tensors

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self.reader.files

    @property
    def aliases(self) -> Mapping[str, str]:
        """Name → name of the tensor that it shares its storage with (tied weights)."""
        return self.reader.aliases

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, first: int, out: Array) -> None:
        """As ``Reader.read``."""
        self.reader.read(name, first, out)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of dimension 0 as a new array of the tensor's ``dtype.array``.

        Shape (stop - start, *shape[1:]); a 0-d tensor is its own single row and comes back with
        shape (), or (0,) for no rows.

        Raises:
            CheckpointError: as ``Reader.read``.
        """
        info = self.tensors[name]
        rows = np.empty((stop - start) * info.row_numel, info.dtype.array)
        self.reader.read(name, start * info.row_numel, rows)
        shape = (stop - start, *info.shape[1:])
        return rows.reshape(shape if info.shape or start == stop else ())

    def close(self) -> None:
        self.reader.close()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the operating system says about ``path`` into an error for the user.

    Raises:
        CheckpointError: an OSError was raised inside.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "A file or folder cannot be read.",
        checkpoint=path,
        found=error.strerror or str(error),
        remedy="check the path and its permissions",
    )


def require_file(path: Path) -> int:
    """Size of the file in bytes.

    Raises:
        CheckpointError: it is missing, no regular file, or a Git LFS pointer instead of weights.
    """
    with reading(path):
        if not path.is_file():
            raise CheckpointError(
                "A file of weights is missing.",
                checkpoint=path,
                expected="a file",
                found="something else" if path.exists() else "nothing",
                remedy="copy or download the checkpoint again",
            )
        size = path.stat().st_size
        if size < 1024:
            with path.open("rb") as file:
                if file.read(24).startswith(b"version https://git-lfs"):
                    raise CheckpointError(
                        "A file is a Git LFS pointer, not the weights themselves.",
                        checkpoint=path,
                        remedy="run `git lfs pull` in that folder",
                    )
        return size
