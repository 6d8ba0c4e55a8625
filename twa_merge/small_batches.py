"""Batches that are too little work for several threads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .candidates import single
from .run import Run

# Of a forward pass, which then takes some two milliseconds.
_SMALL = 1e8
# A number that is read and written takes as long as so many operations on numbers in cache.
_OPERATIONS_A_NUMBER = 10


def settle_threads(run: Run) -> None:
    """Has one thread work through each batch where several would be no faster.

    Operations are counted, not timed: a run that is continued, or done again by other processes,
    has to come to the same answer. A collective.
    """
    several = run.world.broadcast(torch.get_num_threads() > 1)
    if run.world.device.type == "cpu" and several:
        run.engine.live.small_batches = _operations(run) <= _SMALL


def _operations(run: Run) -> float:
    """Floating-point operations of one batch's forward pass; infinite where they are not known."""
    batches, engine = run.fitter.batches, run.engine
    # A recurrent layer is a single operation, of which nothing is known here.
    if any(isinstance(part, nn.RNNBase) for part in engine.live.module.modules()):
        return math.inf
    engine.set_weights(single(run.n, run.n - 1)[None])
    try:
        with _Counting() as counted:
            engine.example_losses(batches, range(min(batches.size, batches.batch_size)))
    except Exception:
        # The passes to come will meet it too, and say what it is; other processes wait for this
        # one.
        if run.world.size > 1:
            raise
        return math.inf
    return counted.operations


class _Counting(TorchDispatchMode):
    """Counts the floating-point operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        found = func(*args, **given)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **given, out_val=found)
        numbers = sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        self.operations += _OPERATIONS_A_NUMBER * numbers
        return found
