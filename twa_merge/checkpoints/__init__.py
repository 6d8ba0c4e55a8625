"""Folder → ordered checkpoints, checked from headers only."""

from .base import Checkpoint, Reader, TensorInfo, WeightFile
from .discover import open_checkpoints
from .folders import sidecars
from .names import resolve_names

__all__ = [
    "Checkpoint",
    "Reader",
    "TensorInfo",
    "WeightFile",
    "open_checkpoints",
    "resolve_names",
    "sidecars",
]
