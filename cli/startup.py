"""A quick start for the commands that only stream through files."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# What `import torch` runs and sums over files have no use for, half of its time and a third of its
# memory: kernels for tensors without data, compilers, optimizers, quantisation, docstrings. Only
# in versions of torch that have been tried without.
_TRIED = "2.13."
_PUT_OFF = {
    "torch._higher_order_ops",
    "torch._meta_registrations",
    "torch._native",
    "torch._size_docs",
    "torch._storage_docs",
    "torch._tensor_docs",
    "torch.ao",
    "torch.compiler",
    "torch.distributed._meta_registrations",
    "torch.distributions",
    "torch.export",
    "torch.func",
    "torch.hub",
    "torch.masked",
    "torch.nested",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.optim",
    "torch.profiler",
    "torch.quantization",
    "torch.quasirandom",
}
# Packages that are imported in a circle with those, and may not be the first of it to run.
_CIRCLE = (
    "torch._d",
    "torch._functorch",
    "torch._inductor",
    "torch._prims",
    "torch._refs",
    "torch._subclasses",
    "torch.distributed._",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx",
)
# Functions that `import torch` takes out of these modules.
_FUNCTIONS = ("cond", "vmap", "while_loop")


def import_torch() -> None:
    """Imports torch in 0.7 seconds of CPU instead of 1.6.

    The garbage collector finds nothing in the half a million objects of an import: it is kept from
    looking through them then, and again at the exit. What is put off runs when somebody asks for
    any of it, or imports what hangs together with it.
    """
    if "torch" in sys.modules:
        return
    finder = None
    if "RANK" not in os.environ and _version().startswith(_TRIED):
        finder = _Finder()
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        if finder:
            finder.put_away()


def _version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


class _Later(ModuleType):
    """A module that has been found and not been run."""

    def __getattr__(self, name: str) -> Any:
        loader = vars(self)["__loader__"]
        if name in _FUNCTIONS and not loader.finder.away:
            return lambda *args, **named: getattr(self, name)(*args, **named)
        if loader.finder.away:
            loader.finder.catch_up()
        _run(self)
        return getattr(self, name)


def _run(module: ModuleType) -> None:
    if isinstance(module, _Later):
        loader = vars(module)["__loader__"]
        module.__class__ = ModuleType  # type: ignore[assignment]
        loader.real.exec_module(module)


class _Loader:
    """Puts off what the real loader would do."""

    def __init__(self, finder: _Finder, real: Any) -> None:
        self.finder, self.real = finder, real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Later


class _There:
    """Loads a module that somebody else has loaded while it was being looked for."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._before = module, module.__spec__
        # Python takes the spec from the module, whatever the finder answers.
        self.spec = module.__spec__ = ModuleSpec(module.__name__, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._before


class _Finder:
    """Finds the modules to put off, and later notices whoever wants more of torch.

    Torch's modules import each other in circles, so that not every order of them works. What has
    been put off therefore runs all at once, in the order in which torch itself would have run it.
    """

    def __init__(self) -> None:
        self.away = False
        self._waiting: dict[str, ModuleType] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.away:
            if name.startswith(_CIRCLE) or name in _PUT_OFF:
                self.catch_up()
            return _There(sys.modules[name]).spec if name in sys.modules else None
        if parent := sys.modules.get(name.rpartition(".")[0]):
            _run(parent)  # a module inside a package expects the package to have run
        spec = PathFinder.find_spec(name, path) if name in _PUT_OFF else None
        if spec is not None:
            spec.loader = _Loader(self, spec.loader)  # type: ignore[assignment]
        return spec

    def put_away(self) -> None:
        """To be called once torch is there: importing what waits has to come here again."""
        self.away = True
        self._waiting = {k: v for k, v in sys.modules.items() if isinstance(v, _Later)}
        for name in self._waiting:
            del sys.modules[name]

    def catch_up(self) -> None:
        """Runs everything that has been put off."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # type: ignore[arg-type]
        sys.modules |= self._waiting
        waiting, self._waiting = self._waiting, {}
        for module in waiting.values():
            _run(module)
