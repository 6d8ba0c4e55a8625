"""Folder → ordered checkpoints, checked from headers only."""

from .base import Checkpoint, Reader, TensorInfo, WeightFile
from .discover import is_run, open_checkpoints
from .folders import sidecars
from .names import resolve_names

__all__ = [
    "Checkpoint",
    "Reader",
    "TensorInfo",
    "WeightFile",
    "is_run",
    "open_checkpoints",
    "resolve_names",
    "sidecars",
]
