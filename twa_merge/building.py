"""The task's module as it is before any weights are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import TaskError
from .layout import Layout
from .task import Task
from .tensors import torch_dtype
from .user_code import user_code


def build_module(task: Task, layout: Layout, *, meta: bool) -> nn.Module:
    """What the task builds, its parameters on the meta device if ``meta``.

    Raises:
        TaskError: it cannot be built, or is no module.
    """
    expected = "build_model() returns a torch.nn.Module"
    with user_code("build its model", expected=expected):
        module = _on_meta(task.build_model, layout) if meta else task.build_model()
    if not isinstance(module, nn.Module):
        raise TaskError(
            "The task did not build a model.",
            expected=expected,
            found=type(module).__name__,
        )
    return module


def _on_meta(build_model: Callable[[], nn.Module], layout: Layout) -> nn.Module:
    """The module with its parameters on the meta device.

    A constructor that looks at the numbers of its parameters cannot be run there, or makes of them
    what is lost. Such a model is made whole first, and its numbers are dropped at once.
    """
    # Whatever stops it there, if it is a mistake it stops the whole model too.
    with suppress(Exception), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        with parameters_on_meta():
            module = build_model()
        if isinstance(module, nn.Module) and not _lost(module, layout):
            return module
    module = build_model()
    if not isinstance(module, nn.Module):
        return module
    known: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                part._parameters[name] = known.setdefault(own, _without_numbers(own))
    return module


def _lost(module: nn.Module, layout: Layout) -> bool:
    """Whether a module on the meta device has made something of its parameters, to keep it there.

    What the checkpoints hold is loaded from them.
    """
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            unsaved = name in part._non_persistent_buffers_set
            known = not unsaved and (f"{path}.{name}" if path else name) in layout.entries
            if buffer.is_meta and not known:
                return True
        if any(isinstance(value, Tensor) and value.is_meta for value in vars(part).values()):
            return True
    return False


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
