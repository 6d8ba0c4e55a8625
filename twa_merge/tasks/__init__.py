"""From the name of a task, as --task gives it, to the task itself."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import TaskError, listing
from ..task import Task, call_factory
from ..user_code import blamed
from .causal_lm import CausalLM

BUILT_IN = {"causal-lm": CausalLM}
_DEFAULT_FUNCTION = "task"


def load_task(
    spec: str,
    *,
    data: str | None,
    checkpoint: Path | None,
    options: Mapping[str, object],
    data_option: str = "--data",
) -> Task:
    """The task that ``spec`` names.

    Args:
        spec: ``causal-lm``, ``path/task.py``, ``path/task.py:function`` or
            ``package.module:function``; the function is called ``task`` by default. Files can
            import their neighbours, modules are looked for in the working directory as well.
        data: the argument of ``data_option``.
        checkpoint: one of the checkpoints, whose folder a built-in task may read.
        options: keyword arguments of a built-in task; those that are None or False are not given.

    Raises:
        TaskError: there is no such task, it does not take an option, or its code raises.
    """
    given = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    if spec in BUILT_IN:
        return _built_in(spec, data, checkpoint, given)
    target, _, function = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if not target.endswith(".py") and not (function and _is_dotted(target)):
        raise _unknown(spec)
    if given:
        raise TaskError(
            f"The task {spec} does not take {_flags(given)}.",
            expected="only --data is handed to a task of your own",
            remedy="leave it out, or set it inside the task",
        )
    # An error of the user's code is told with the user's line, not with a traceback of ours.
    with blamed(f"The task {spec} cannot be loaded."):
        module = _load_file(Path(target)) if target.endswith(".py") else _load_module(target)
        factory = _function(module, function or _DEFAULT_FUNCTION, spec)
        return call_factory(factory, spec, data, data_option)


def _built_in(
    spec: str, data: str | None, checkpoint: Path | None, options: Mapping[str, Any]
) -> Task:
    kind = BUILT_IN[spec]
    known = set(inspect.signature(kind).parameters) - {"data", "checkpoint"}
    if not options.keys() <= known:
        raise TaskError(
            f"The task {spec} does not take {_flags(options.keys() - known)}.",
            expected=_flags(known),
            remedy="leave it out",
        )
    if data is None:
        raise TaskError(f"The task {spec} needs data.", found="no --data", remedy="give --data")
    return kind(data, checkpoint, **options)


def _load_file(path: Path) -> ModuleType:
    """The module in a file, whose neighbours it can import by name or relatively."""
    path = path.expanduser().absolute()
    if not path.is_file():
        raise TaskError(f"There is no task file {path}.", remedy="check --task")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # A package of its own for the folder: `from . import neighbour` works, and files of the same
    # name elsewhere stay apart.
    package = ModuleType(f"twa_merge_task_{hashlib.sha256(folder.encode()).hexdigest()[:12]}")
    package.__path__ = [folder]
    sys.modules.setdefault(package.__name__, package)
    name = f"{package.__name__}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    # The command's own folder, not the working directory, comes first in a console script.
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise TaskError(
            f"There is no module {name}.",
            found=str(error),
            remedy="check --task, and that the module can be imported from here",
        ) from error


def _function(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        own = [
            n
            for n, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        raise TaskError(
            f"The task {spec} defines no function {name!r}.",
            expected=f"def {name}(): ... that returns a task",
            found=listing(own, 20) or "no functions",
            remedy="name the function after a colon: --task FILE.py:FUNCTION",
        )
    return found


def _unknown(spec: str) -> TaskError:
    known = difflib.get_close_matches(spec.replace("_", "-").lower(), BUILT_IN, n=1)
    near = known or ([f"{spec}.py"] if Path(f"{spec}.py").is_file() else [])
    if not near and _is_dotted(spec) and "." in spec:
        near = [f"{spec}:{_DEFAULT_FUNCTION}"]
    return TaskError(
        f"There is no task called {spec!r}.",
        expected=f"{listing(BUILT_IN)}, path/task.py[:function] or package.module:function",
        remedy=f"did you mean {near[0]}?" if near else "check --task",
    )


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _flags(names: Any) -> str:
    return listing((f"--{name.replace('_', '-')}" for name in sorted(names)), 20)
