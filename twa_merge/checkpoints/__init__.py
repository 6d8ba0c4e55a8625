"""Folder → ordered checkpoints, checked from headers only."""

from .base import Checkpoint, Reader, TensorInfo, WeightFile
from .discover import is_run, open_checkpoints
from .folders import sidecars
from .names import extra_state_of, is_extra_state, resolve_names

__all__ = [
    "Checkpoint",
    "Reader",
    "TensorInfo",
    "WeightFile",
    "extra_state_of",
    "is_extra_state",
    "is_run",
    "open_checkpoints",
    "resolve_names",
    "sidecars",
]
