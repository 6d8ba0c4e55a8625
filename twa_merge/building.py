"""The task's module as it is before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import TaskError
from .layout import Layout
from .task import Task
from .tensors import torch_dtype
from .user_code import user_code


def build_module(task: Task, *, meta: bool) -> nn.Module:
    """What the task builds, its parameters on the meta device if ``meta``.

    Raises:
        TaskError: it cannot be built, or is no module.
    """
    expected = "build_model() returns a torch.nn.Module"
    with user_code("build its model", expected=expected):
        module = _on_meta(task.build_model) if meta else task.build_model()
    if not isinstance(module, nn.Module):
        raise TaskError(
            "The task did not build a model.",
            expected=expected,
            found=type(module).__name__,
        )
    return module


def _on_meta(build_model: Callable[[], nn.Module]) -> nn.Module:
    """The module with its parameters on the meta device.

    A constructor that looks at the numbers of its parameters cannot be run there. Such a model is
    made whole first, and its numbers are dropped at once.
    """
    try:
        with parameters_on_meta():
            return build_model()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
    module = build_model()
    known: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                part._parameters[name] = known.setdefault(own, _without_numbers(own))
    return module


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
        # The store and FSDP2 take numbers in order, not channels last.
        tensor.data = tensor.data.contiguous()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside hold their parameters on the meta device, their buffers for real.

    Buffers that are computed when a module is made and never saved (rotary frequencies) would be
    lost on the meta device.
    """
    register = nn.Module.register_parameter
    # A constructor may give one parameter to two modules. It alone keeps the numbers alive.
    made = WeakIdKeyDictionary()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
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
