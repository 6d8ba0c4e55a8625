"""The task's module as it is before any weights are loaded."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .errors import TaskError
from .layout import Layout
from .seeding import draw_one, generator_states, generators_kept
from .task import Task
from .tensors import torch_dtype
from .user_code import user_code


def build_module(task: Task, layout: Layout, *, meta: bool) -> nn.Module:
    """What the task builds, its parameters on the meta device if ``meta``; not compiled.

    Raises:
        TaskError: it cannot be built, is no module, or one that cannot be sharded.
    """
    expected = "build_model() returns a torch.nn.Module"

    def build() -> nn.Module:
        module = task.build_model()
        # Of torch.compile, which names it, and whose graphs FSDP2 breaks.
        return module._orig_mod if type(module).__name__ == "OptimizedModule" else module  # type: ignore[return-value]

    with user_code("build its model", expected=expected):
        module = _on_meta(build, layout) if meta else build()
    if not isinstance(module, nn.Module):
        raise TaskError(
            "The task did not build a model.",
            expected=expected,
            found=type(module).__name__,
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TaskError(
            "A TorchScript model cannot be trained with other weights.",
            expected=expected,
            found=type(module).__name__,
            remedy="let build_model() return the module that was scripted or traced: its tensors "
            "have the same names",
        )
    for part in module.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.__class__ = _by_own_batch(type(part))  # type: ignore[arg-type]
    return module


class _ByOwnBatch(nn.SyncBatchNorm):
    """Normalises by its process's batch alone, as the others hold batches of their own."""

    def forward(self, input: Tensor) -> Tensor:
        return _BatchNorm.forward(self, input)


@functools.cache
def _by_own_batch(kind: type[nn.SyncBatchNorm]) -> type[nn.SyncBatchNorm]:
    # By its own name, which a task may have among those of its layers. What a derived class does
    # besides stays.
    bases = (_ByOwnBatch,) if kind is nn.SyncBatchNorm else (kind, _ByOwnBatch)
    return type(kind.__name__, bases, {})


def _on_meta(build_model: Callable[[], nn.Module], layout: Layout) -> nn.Module:
    """The module with its parameters on the meta device.

    A constructor that looks at the numbers of its parameters cannot be run there, or makes of them
    what is lost; and one that draws other numbers after them draws others than it would. Such a
    model is made whole first, and its numbers are dropped at once.
    """
    # Whatever stops it there, if it is a mistake it stops the whole model too.
    with suppress(Exception), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        with generators_kept(), parameters_on_meta():
            before = generator_states()
            module = build_model()
            has_drawn = generator_states() != before
        kept = _unsaved(module, layout)
        if not any(isinstance(x, Tensor) and x.is_meta for x in kept):
            if not has_drawn:
                return module
            with generators_kept(), parameters_on_meta(drawing=True):
                again = _unsaved(build_model(), layout)
            if all(_is_same(a, b) for a, b in zip(kept, again, strict=True)):
                return module
    module = build_model()
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return module
    drop_numbers(module)
    return module


def drop_numbers(module: nn.Module, but: Collection[str] = ()) -> None:
    """Takes the parameters of a module that has been built to the meta device, but for these."""
    require_registered(module)
    parameters = module.named_parameters(remove_duplicate=False)
    kept = {parameter for name, parameter in parameters if name in but}
    known: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None and own not in kept:
                part._parameters[name] = known.setdefault(own, _without_numbers(own))


def _unsaved(module: nn.Module, layout: Layout) -> list[Any]:
    """Buffers and attributes that only the constructor can have made.

    What the checkpoints hold is loaded from them.
    """
    found: list[Any] = []
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            unsaved = name in part._non_persistent_buffers_set
            if unsaved or (f"{path}.{name}" if path else name) not in layout.entries:
                found.append(buffer)
        found += (x for _, x in _attributes(part))
    return found


def _attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds, in lists and dicts too, without being told to."""
    for name, value in vars(part).items():
        # Recurrent networks keep a list of their weights, and see to it that it stays true.
        known = isinstance(part, nn.RNNBase) and name == "_flat_weights"
        if not known and name not in ("_parameters", "_buffers", "_modules"):
            yield from ((name, x) for x in tree_leaves(value))


def _is_same(one: Any, other: Any) -> bool:
    """Whether they are of the same numbers; of what has none, nothing is known."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (np.ndarray, int, float)):
        return np.array_equal(one, other)
    return True


def require_registered(module: nn.Module) -> None:
    """Checks that all parameters can be replaced, as they are where the model is sharded.

    Raises:
        TaskError: a list or dict keeps one of them.
    """
    own = set(module.parameters())
    for part in module.modules():
        for name, x in _attributes(part):
            if isinstance(x, nn.Parameter) and x in own:
                raise TaskError(
                    "A list or dict keeps parameters of the model, which are to be replaced.",
                    expected="an nn.ParameterList or nn.ParameterDict of them",
                    found=f"{type(part).__name__}.{name}",
                    remedy="that, or one process and --precision fp32",
                )


def make_buffers(module: nn.Module, layout: Layout) -> None:
    """Makes buffers that a constructor computes from parameters, which the meta device has not.

    So it is with orthogonal parametrizations. They are loaded like all others.
    """
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            entry = layout.entries.get(f"{path}.{name}" if path else name)
            if buffer is None and entry is not None:
                shape, dtype = entry.info.shape, torch_dtype(entry.info.dtype)
                part._buffers[name] = torch.zeros(shape, dtype=dtype)


def widen(module: nn.Module, averaged: Container[str]) -> None:
    """Float parameters, and the buffers that are averaged, in float32; all of them contiguous."""
    for own, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
            # One that was frozen in training moves with the coefficients where checkpoints differ.
            parameter.requires_grad_(parameter.requires_grad or own in averaged)
    for own, buffer in module.named_buffers(remove_duplicate=False):
        # Narrow ones are of a model that was narrowed as a whole: its parameters are wide now.
        narrow = buffer.element_size() < 4
        if buffer.is_floating_point() and (own in averaged or narrow):
            buffer.data = buffer.data.float()
    for tensor in (*module.parameters(), *module.buffers()):
        # The store and FSDP2 take numbers in order, not channels last, and make new tensors of
        # them: convolutions go another way where the strides of a dimension of one differ.
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
            tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(
                tensor.data
            )


def narrow(module: nn.Module, names: Collection[str]) -> None:
    """These parameters in bfloat16, as FSDP2 makes of those that it shards; not of batch norm."""
    for path, part in module.named_modules():
        for name, own in part._parameters.items():
            mine = own is not None and (f"{path}.{name}" if path else name) in names
            if own is not None and mine and own.is_floating_point():
                own.data = own.data if isinstance(part, _BatchNorm) else own.data.bfloat16()


@contextmanager
def parameters_on_meta(*, drawing: bool = False) -> Iterator[None]:
    """Modules made inside hold their parameters on the meta device, their buffers for real.

    Buffers that are computed when a module is made and never saved (rotary frequencies) would be
    lost on the meta device.

    Args:
        drawing: a number is drawn for each parameter: random numbers that come after are others.
    """
    register = nn.Module.register_parameter
    # A constructor may give one parameter to two modules. It alone keeps the numbers alive.
    made = WeakIdKeyDictionary()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            if drawing:
                draw_one()
            if param not in made:
                made[param] = _without_numbers(param)
            self._parameters[name] = made[param]

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _without_numbers(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
