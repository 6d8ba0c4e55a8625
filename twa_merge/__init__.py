"""twa-merge: one better model out of the checkpoints of a training run."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that `twa-merge --help` does not wait for torch.
_PUBLIC = {
    "merge": "pipeline",
    "average": "averaging",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "Task": "task",
    "TwaMergeError": "errors",
}

__all__ = ["Task", "TwaMergeError", "__version__", "average", "evaluate", "inspect", "merge"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
