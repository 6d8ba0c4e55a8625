"""A quick start for the commands that only stream through files."""

from __future__ import annotations

import gc
import os
import sys
from importlib import metadata
from types import ModuleType

# Kernels for tensors without data, with which compilers and sharded tensors find out shapes: a
# quarter of the time that `import torch` takes, an eighth of its memory, and nothing to do for
# sums over files. Only in versions of torch that have been tried without.
_LEFT_OUT, _TRIED = "torch._meta_registrations", "2.13."


def import_torch() -> None:
    """Imports torch in 1.4 seconds of CPU instead of 2.4.

    The garbage collector finds nothing in the half a million objects of an import: it is kept from
    looking through them then, and again at the exit. What else is left out can be imported later,
    and has to be before anything is compiled or sharded.
    """
    if "torch" in sys.modules:
        return
    placeholder = ModuleType(_LEFT_OUT)
    if "RANK" not in os.environ and _version().startswith(_TRIED):
        sys.modules[_LEFT_OUT] = placeholder
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        if sys.modules.get(_LEFT_OUT) is placeholder:
            del sys.modules[_LEFT_OUT]


def _version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
