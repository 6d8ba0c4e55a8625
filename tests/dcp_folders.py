"""Distributed checkpoints as one process writes them, and ways to damage them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata

from twa_merge.checkpoints import Checkpoint, open_checkpoints
from twa_merge.errors import CheckpointError


def save(folder: Path, content: Mapping[str, Any], **options: Any) -> Path:
    with warnings.catch_warnings():
        # One process saves what several would have saved together.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        writer = dcp.FileSystemWriter(folder, **options)
        dcp.save(dict(content), storage_writer=writer, no_dist=True)
    return folder


def converted(folder: Path, target: Path) -> Path:
    """What the command does that torch has for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp_to_torch_save(folder, target)
    return target


def one(path: Path) -> Checkpoint:
    (checkpoint,) = open_checkpoints([path])
    return checkpoint


def refused(path: Path, *, read: bool = False) -> CheckpointError:
    """What is raised when it is opened, or when all tensors are read one after the other."""
    with pytest.raises(CheckpointError) as caught:
        _open(path, read=read)
    assert len(str(caught.value)) < 1500
    return caught.value


def _open(path: Path, *, read: bool) -> None:
    checkpoint = one(path)
    for name, info in checkpoint.tensors.items() if read else ():
        checkpoint.rows(name, 0, info.rows)


def edit(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Changes what a checkpoint of our own says it holds."""
    path = folder / ".metadata"
    document = pickle.loads(path.read_bytes())
    changed = change(document)
    path.write_bytes(pickle.dumps(document if changed is None else changed))


STATE: dict[str, torch.Tensor] = {
    "a.weight": torch.arange(12.0).reshape(4, 3),
    "a.bias": torch.ones(4).bfloat16(),
    "n": torch.arange(5),
}
