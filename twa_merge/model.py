"""The live model: built from the task, its weights replaced in place, its gradients read off.

Every rank owns the rows of every parameter that FSDP2's ``Shard(0)`` gives it; with one process
that is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from .building import (
    build_module,
    drop_numbers,
    make_buffers,
    narrow,
    require_registered,
    widen,
)
from .checkpoints.base import Checkpoint
from .distributed import World, is_sharded, local_rows
from .dtypes import Dtype
from .errors import TaskError
from .gradient_sums import GradientSums
from .layout import Entry, Layout, require_tensors_alone
from .matching import extra_states, frozen_and_unsaved, match_names, renamed_by, require_cover
from .sharding import Sharded, checkpoint_activations, in_one_piece, shard
from .task import Task
from .tensors import tensor_rows, torch_dtype
from .threads import one_thread_each
from .user_code import user_code

T = TypeVar("T")


class LiveModel:
    """A module whose parameters and buffers are addressed by the names in the checkpoints.

    Attributes:
        module: in evaluation mode, float parameters in float32.
        names: checkpoint tensor → name in the module; tensors the module lacks are left out.
        as_built: frozen parameters that the checkpoints lack.
        states_as_built: extra states that the module would take and the checkpoints lack.
        unlike: tensors saved as floats that the module keeps as whole numbers or booleans, such as
            counters of a state dict that was halved as a whole: it has the newest checkpoint's.
        small_batches: one thread works through each, however many there are. What torch adds up
            within a batch then depends on their number no more.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[str, str],
        layout: Layout,
        sums: GradientSums,
        *,
        whole: Sharded | None = None,
        gathered_once: bool = False,
        as_built: Sequence[str] = (),
        states_as_built: Sequence[str] = (),
        unlike: Collection[str] = (),
    ) -> None:
        self.module = module
        self.as_built = tuple(as_built)
        self.states_as_built = tuple(states_as_built)
        self.unlike = frozenset(unlike)
        self.small_batches = False
        self._frozen: list[nn.Parameter] = []
        self._sums = sums
        self._whole = whole
        self._gathered_once = gathered_once
        self.names = dict(names)
        self._layout = layout
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._buffers = dict(module.named_buffers(remove_duplicate=False))

    def run(self, use: Callable[[nn.Module], T], kind: str = "loss") -> T:
        """What ``use`` makes of the module: any use of its weights goes through here.

        Args:
            kind: on several processes, every use of one kind has to come to the same layers.
        """
        with self._threads():
            return use(self.module) if self._whole is None else self._whole(use, kind)

    def _threads(self) -> AbstractContextManager[None]:
        return one_thread_each() if self.small_batches else nullcontext()

    @property
    def layer_numel(self) -> tuple[int, int] | None:
        """Numbers in the largest layer that is gathered by itself, and in what is not."""
        return self._whole.layer_numel if self._whole is not None else None

    def targets(self) -> dict[str, Tensor]:
        """This rank's rows of every averaged tensor: name → tensor, written to in place.

        Parameters that the module ties come once. What has been gathered of the other ranks' rows
        is given up: it would not follow what is written.
        """
        if self._gathered_once and self._whole is not None:
            for part in self._whole.modules():
                if hasattr(part, "reshard"):
                    part.reshard()  # type: ignore[operator]
        seen: set[int] = set()
        targets = {}
        for name, own in self.names.items():
            if not self._layout[name].averaged:
                continue
            tensor = self._parameters.get(own, self._buffers.get(own))
            assert tensor is not None
            if id(tensor) not in seen:
                seen.add(id(tensor))
                targets[name] = local_rows(tensor.detach())
        return targets

    def gradients(self) -> dict[str, Tensor]:
        """This rank's rows of the gradients: name → tensor of the same shape as in ``targets``.

        A collective, once after the last pass of an evaluation.
        """
        self._sums.join()
        return {
            name: gradient
            for name in self.targets()
            if (parameter := self._parameters.get(self.names[name])) is not None
            and (gradient := self._sums.of(parameter)) is not None
        }

    def before_pass(self, *, last: bool) -> None:
        """Says whether the coming backward pass is the last one with the weights as they are.

        Where the model is gathered once, gradients stay on their ranks until then, and are summed
        over the ranks in that pass.
        """
        self._sums.before_pass(last=last)
        if self._gathered_once and self._whole is not None:
            self._whole.set_requires_gradient_sync(last)  # type: ignore[operator]
            self._whole.set_reshard_after_backward(last)  # type: ignore[operator]

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients.

        Raises:
            TaskError: gradients of two widths meet where the model is gathered once.
        """
        try:
            with self._threads(), self._sums.adding():
                loss.backward()  # type: ignore[no-untyped-call]
        except AssertionError as error:
            if not (self._gathered_once and "uniform gradient dtype" in str(error)):
                raise
            raise TaskError(
                "Not every batch makes use of all parameters, so that gradients in bfloat16 and "
                "their sums in float32 cannot be added up over the processes.",
                remedy="--gather layer, or --precision fp32",
            ) from error

    def zero_gradients(self) -> None:
        self._sums.clear()
        self.module.zero_grad()

    def freeze(self, names: Iterable[str]) -> None:
        """Takes no gradients of these tensors, until ``thaw``.

        For one process: of several, some might come to nothing that is left to take gradients of,
        while others sum up theirs.
        """
        for name in names:
            parameter = self._parameters.get(self.names.get(name, ""))
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def thaw(self) -> bool:
        """Takes gradients of everything again; returns whether any were not taken."""
        found, self._frozen = self._frozen, []
        for parameter in found:
            parameter.requires_grad_(True)
        return bool(found)

    def copied(self) -> dict[str, Tensor]:
        """Tensors that are not averaged: name → tensor of the module, written to in place."""
        return {
            name: self._parameters.get(own, self._buffers.get(own)).detach()  # type: ignore[union-attr]
            for name, own in self.names.items()
            if not self._layout[name].averaged
        }

    def is_statistic(self, name: str) -> bool:
        """Whether the tensor is a running statistic of batch norm."""
        return self._layout[name].statistic

    def is_singular_vector(self, name: str) -> bool:
        """Whether the tensor is a singular vector of spectral norm."""
        return self._layout[name].singular

    def is_buffer(self, name: str) -> bool:
        return self.names.get(name) in self._buffers

    def is_shared(self, name: str) -> bool:
        """Whether every rank holds all rows of this tensor.

        Buffers are not sharded, nor are scalars, parameters without any numbers, and those that
        are copied.

        The gradient of such a parameter is of the rank's own batches; only sums over the ranks of
        what is projected from it mean anything.
        """
        info = self._layout[name].info
        whole = not info.shape or not info.numel or not info.dtype.is_float
        return self.is_buffer(name) or (name in self.names and whole)

    def tied_groups(self) -> dict[str, str]:
        """Checkpoint tensor → the first one that the module keeps in the same parameter."""
        first: dict[int, str] = {}
        return {
            name: first.setdefault(id(self._parameters.get(own, self._buffers.get(own))), name)
            for name, own in self.names.items()
        }

    @torch.no_grad()
    def round_to_saved(self, dtype: Dtype | None = None) -> None:
        """Rounds the weights to the dtype that they will be written in."""
        for name, target in self.targets().items():
            saved = dtype or self._layout[name].info.dtype
            if saved.itemsize < target.element_size():
                target.copy_(target.to(torch_dtype(saved)))


def build(
    task: Task,
    layout: Layout,
    newest: Checkpoint,
    world: World,
    *,
    precision: str = "fp32",
    activation_checkpointing: bool = False,
    gather: str = "layer",
) -> LiveModel:
    """Builds the task's model on this rank's device, without weights.

    With several processes it is built on the meta device and sharded by FSDP2 before any memory
    is taken. Tensors that are not averaged come from ``newest``. Frozen parameters that no
    checkpoint holds stay as they are built, whole on every rank.

    Raises:
        TaskError: the model cannot be built, or lacks or adds parameters.
        CheckpointError: it takes an extra state that is no tensor in the checkpoints.
    """
    meta = world.size > 1
    once = meta and gather == "model"  # one process has all rows
    module = build_module(task, layout, meta=meta)
    if meta:
        make_buffers(module, layout)
    names = match_names(module, layout, renamed_by(task, module, layout))
    as_built = frozen_and_unsaved(module, names)
    if as_built and meta:
        module = build_module(task, layout, meta=False)
        drop_numbers(module, but=as_built)
    own_states = extra_states(module)
    states = {name: own for name, own in names.items() if own in own_states}
    require_tensors_alone(layout, states)
    names = {name: own for name, own in names.items() if name not in states}
    require_cover(module, names, layout, as_built)
    unlike = {name: own for name, own in names.items() if _is_unlike(module, own, layout[name])}
    names = {name: own for name, own in names.items() if name not in unlike}
    widen(module, {own for name, own in names.items() if layout[name].averaged})
    if precision == "bf16":
        narrow(module, as_built)
    if activation_checkpointing:
        checkpoint_activations(module, task)
    if not meta and precision == "fp32" and world.device.type == "cpu":
        in_one_piece(module, task)
    whole = None
    if meta or precision == "bf16":
        require_registered(module)
        copied = {own for name, own in names.items() if not layout[name].averaged}
        copied.update(unlike.values(), as_built)
        whole = shard(module, task, world, precision, reshard=not once, copied=copied)
    module._apply(
        lambda t: torch.empty_like(t, device=world.device) if t.is_meta else t.to(world.device)
    )
    module.eval()
    live = LiveModel(
        module,
        names,
        layout,
        _gradient_sums(module, whole, world),
        whole=whole,
        gathered_once=once,
        as_built=as_built,
        states_as_built=[own for own in own_states if own not in states.values()],
        unlike=unlike,
    )
    with torch.no_grad():
        for name, target in live.copied().items():
            target.copy_(tensor_rows(newest, name))
        for name, own in unlike.items():
            _tensor_of(module, own).copy_(tensor_rows(newest, name))
    for name, own in states.items():
        with user_code(f"take the extra state {name}"):
            own_states[own].set_extra_state(tensor_rows(newest, name))
    return live


def _is_unlike(module: nn.Module, own: str, entry: Entry) -> bool:
    return entry.averaged and not _tensor_of(module, own).is_floating_point()


def _tensor_of(module: nn.Module, own: str) -> Tensor:
    """A parameter or buffer by its name."""
    path, _, name = own.rpartition(".")
    return getattr(module.get_submodule(path), name).detach()


def _gradient_sums(module: nn.Module, whole: Sharded | None, world: World) -> GradientSums:
    """On a CPU; elsewhere they stay as autograd and FSDP2 make them, in float32."""
    parameters = list(module.parameters()) if world.device.type == "cpu" else []
    sharded = [p for p in parameters if world.size > 1 and is_sharded(p)]
    own = [p for p in parameters if not (world.size > 1 and is_sharded(p))]
    return GradientSums(world, own, sharded, whole.sums_over_ranks if whole is not None else ())
