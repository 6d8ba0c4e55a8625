"""Spreads a model over the ranks with FSDP2: each owns rows, and layers are gathered in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .distributed import World, ensure_group
from .errors import TaskError, listing
from .gradient_sums import SumOverRanks
from .layer_calls import OwnWeights, keep_writes
from .layers import gathered_layers, has_weights, numbers, outermost
from .task import Task

T = TypeVar("T")

# Comes after the last layer of a pass.
_END = "the end of the pass"


class Sharded(nn.Module):
    """What is sharded as the root: a loss may call any part of its model, not its forward alone.

    Args:
        narrow: passes are in bfloat16. FSDP2 narrows parameters and inputs; autocast narrows what a
            model makes of its buffers, which stay as they are.

    Attributes:
        layer_numel: numbers in the largest layer that is gathered by itself, and in what is
            gathered with the root.
        sums_over_ranks: of the gradients of each part, on a CPU.
    """

    own_weights: OwnWeights

    def __init__(self, module: nn.Module, world: World, narrow: bool) -> None:
        super().__init__()
        self.module = module
        self.order = _Order(world)
        self._autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=narrow)
        self.layer_numel = (0, 0)
        self.sums_over_ranks: list[SumOverRanks] = []

    def forward(self, use: Callable[[nn.Module], T], kind: str) -> T:
        """What ``use`` makes of the module.

        Args:
            kind: every use of one kind has to come to the same layers in the same order.

        Raises:
            TaskError: it does not, or it makes use of other weights than the module's.
        """
        self.order.begin(kind)
        try:
            with self._autocast, self.own_weights.used():
                result = use(self.module)
            return self.order.end(result)
        finally:
            self.order.leave()


class _Order:
    """The order in which a pass comes to the layers that are gathered one by one.

    Gathering is collective. Ranks that came to different layers at once would mix the rows of
    both without noticing, or wait for each other for ever. So the ranks compare notes in the
    first pass of a kind, before each layer, and each holds the later ones against it. Backward
    passes go through all of them in reverse, whatever the loss has been computed from.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._kind = ""
        self._known: dict[str, list[str]] = {}
        self._came_to: list[str] | None = None
        self._outputs: list[Tensor] = []

    def begin(self, kind: str) -> None:
        self._kind, self._came_to = kind, []

    def end(self, result: T) -> T:
        assert self._came_to is not None
        self._require_same(_END)
        self._known.setdefault(self._kind, [*self._came_to, _END])
        if isinstance(result, Tensor) and result.requires_grad and self._outputs:
            return _Reached.apply(result, *self._outputs)  # type: ignore[no-any-return]
        return result

    def leave(self) -> None:
        # What a backward pass recomputes is called outside of any pass.
        self._came_to = None
        self._outputs = []

    def watch(self, layer: nn.Module, name: str) -> None:
        def come_to(*_: object) -> None:
            if self._came_to is not None:
                self._require_same(name)
                self._came_to.append(name)

        def leave(_: nn.Module, __: object, output: object) -> None:
            if self._came_to is not None:
                leaves = tree_leaves(output)
                self._outputs += [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]

        # Before FSDP2's own hook, which gathers.
        layer.register_forward_pre_hook(come_to, prepend=True)
        layer.register_forward_hook(leave)

    def _require_same(self, name: str) -> None:
        assert self._came_to is not None
        known = self._known.get(self._kind)
        if known is None:
            with torch._C._DisableFuncTorch():  # its tensors have no memory to be sent
                expected = self._world.gather(name)
        else:
            expected = [known[len(self._came_to)]]
        others = [other for other in expected if other != name]
        if others:
            raise TaskError(
                "Not every batch comes to the same layers of the model, in the same order.",
                expected=others[0],
                found=name,
                remedy="name in the task's no_split_modules the classes of layers that every batch "
                "comes to, an empty list where there are none: what is not named is gathered as a "
                "whole before each pass (batch norm is not, with --precision bf16); or use one "
                "process",
            )


class _Reached(torch.autograd.Function):
    """A loss as it is, whose backward pass comes to all ``outputs`` too, with gradients of zero."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs: Tensor) -> Tensor:
        ctx.zeros = [(x.shape, x.dtype, x.device) for x in outputs]
        # Not a view: FSDP2 warns of those.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = (
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.zeros
        )
        return (*gradients, *zeros)


def shard(
    module: nn.Module,
    task: Task,
    world: World,
    precision: str,
    *,
    reshard: bool,
    copied: Collection[str] = (),
) -> Sharded:
    """Shards ``module`` in place, by repeated layer and at the root.

    Args:
        reshard: the rows of other ranks are given up after a layer's forward pass.
        copied: parameters that every rank keeps whole, as no gradient moves them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ensure_group(world)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
    )
    # FSDP2 refuses scalars, as temperatures and gates are, and fails on what is empty.
    whole_ones = {
        p
        for name, p in module.named_parameters(remove_duplicate=False)
        if not (p.ndim and p.numel() and p.is_floating_point()) or name in copied
    }
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "reshard_after_forward": reshard,
        "ignored_params": whole_ones,
    }
    norms: list[nn.Module] = []
    if precision == "bf16":
        # Running statistics stay in float32, and batch norm wants its weights as wide.
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        module.register_forward_pre_hook(_narrowed, with_kwargs=True)
    for norm in norms:
        fully_shard(norm, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    layers = [layer for layer in _apart(module, task) if layer not in norms]
    whole = Sharded(module, world, precision == "bf16")
    sizes = [numbers(layer) for layer in layers]
    whole.layer_numel = max(sizes, default=0), numbers(module) - sum(sizes)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(whole, **options)
    alone = [*norms, *layers]
    for layer in layers:
        keep_writes(layer)
    whole.own_weights = OwnWeights(module, alone)
    for name, part in module.named_modules():
        if part in alone and world.size > 1:
            whole.order.watch(part, name)
    for part in [*alone, whole]:
        _add_up(part)
        if world.device.type == "cpu":
            whole.sums_over_ranks.append(SumOverRanks())
            part.set_custom_reduce_scatter(whole.sums_over_ranks[-1])  # type: ignore[operator]
    return whole


def _apart(module: nn.Module, task: Task) -> list[nn.Module]:
    """The layers that share no parameter with the rest of the model, nor a layer that has some.

    FSDP2 wants what shares one in one group: here, in the root's.
    """
    owners = _owners(module)
    return [
        layer
        for layer in layers_of(module, task)
        if all(owners[held] == n for held, n in _owners(layer).items())
    ]


def _add_up(part: Any) -> None:
    """Has gradients added up over the ranks instead of averaged: batches carry their own weights.

    Of parts that no batch of this rank makes use of as well: experts and heads may be in use on
    another.
    """
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)
    part.set_reduce_scatter_unused_params(True)


def in_one_piece(module: nn.Module, task: Task) -> None:
    """Has gradients of what comes into a layer added up as where layers are gathered in turn.

    FSDP2 has the inputs of a layer go through a function of its own. Where some go elsewhere too,
    as an encoder's output does to all layers of a decoder, float32 sums of their gradients come to
    other last digits without that.
    """

    def through(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Others than these are left alone by FSDP2.
        leaves, spec = tree_flatten(
            (args, kwargs), lambda x: not isinstance(x, (dict, list, tuple))
        )
        of_grad = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if not (of_grad and torch.is_grad_enabled()):
            return None
        # What is made last is the first in a backward pass, which FSDP2 has in the order of inputs.
        for i in reversed(of_grad):
            leaves[i] = leaves[i].view_as(leaves[i])  # no copy, and a layer may still write to it
        found: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, spec)
        return found

    for layer in _apart(module, task):
        layer.register_forward_pre_hook(through, prepend=True, with_kwargs=True)
        keep_writes(layer)


def checkpoint_activations(module: nn.Module, task: Task) -> None:
    """Keeps each repeated layer's inputs only, and computes the rest once more for gradients."""
    from torch.distributed._composable import checkpoint

    for layer in layers_of(module, task) or gathered_layers(module):
        checkpoint(layer)


def layers_of(module: nn.Module, task: Task) -> list[nn.Module]:
    """What is gathered at a time: as the task says, or transformers, or else the module tree.

    Raises:
        TaskError: the task names layers that are not there.
    """
    named = getattr(task, "no_split_modules", None)
    classes = named if named is not None else getattr(module, "_no_split_modules", None) or ()
    found = outermost(module, lambda part: type(part).__name__ in classes)
    if named and not found:
        raise TaskError(
            "The task's no_split_modules names no layer of the model.",
            expected=listing(dict.fromkeys(type(part).__name__ for part in module.modules())),
            found=listing(named),
        )
    return found if found or named is not None else gathered_layers(module)


def _owners(module: nn.Module) -> Counter[nn.Parameter | nn.Module]:
    """Parameter, or module that has some → how many modules hold it."""
    found: Counter[nn.Parameter | nn.Module] = Counter()
    for part in module.modules():
        found.update(part.parameters(recurse=False))
        found.update(child for child in part.children() if has_weights(child))
    return found


def _narrowed(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's inputs in bfloat16, as FSDP2 narrows those of what it shards."""

    def narrow(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if floats else value

    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(narrow, (args, kwargs))
    return found
