"""A quick start for the commands that only stream through files."""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType
from typing import Any

# Kernels for tensors without data, which compilers trace programs with: a quarter of the time that
# `import torch` takes, and an eighth of its memory.
_DEFERRED = "torch._meta_registrations"


def import_torch() -> None:
    """Imports torch in 1.4 seconds of CPU instead of 2.4.

    What is left out comes when something asks for it. The collector, which finds nothing in the
    half a million objects of an import, is kept from looking through them then and at the exit.
    """
    if "torch" in sys.modules:
        return
    placeholder = ModuleType(_DEFERRED)
    placeholder.__getattr__ = _load  # type: ignore[method-assign]
    sys.modules[_DEFERRED] = placeholder
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        if sys.modules.get(_DEFERRED) is placeholder:
            del sys.modules[_DEFERRED]


def _load(attribute: str) -> Any:
    # Looking through all modules, as `inspect` does, is not asking for this one.
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    sys.modules.pop(_DEFERRED, None)
    return getattr(importlib.import_module(_DEFERRED), attribute)
