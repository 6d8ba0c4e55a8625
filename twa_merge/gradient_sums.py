"""Gradients of many batches, added up in float64 on a CPU, to be rounded once.

In float32 a sum depends on its order, and so on how many processes add to it. That difference, 1e-8
of a gradient, grows to 1e-3 of a coefficient in fits of networks with kinks (ReLUs), whose
activations change sides in one of two such fits. In float64 it is below what float32 tells apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import World, local_rows
from .errors import TaskError

# Numbers added at a time: their float64 copy stays in a core's cache.
_PIECE = 1 << 18


class SumOverRanks:
    """FSDP2's reduce-scatter of one group of parameters, for all passes of an evaluation.

    Each rank sends every other one its rows as they are, as many bytes as in a ring, and adds up
    those of its own in rank order. FSDP2 gets zeros until the last pass, and then the sum. A layer
    that a pass makes use of several times is reduced several times: the sum of all is in what was
    given first, whose parts FSDP2 keeps as gradients, and it adds zeros.

    Attributes:
        last: this is the last pass with the weights as they are.
        adding: gradients count; those that a loss takes for itself do not.
    """

    def __init__(self) -> None:
        self.last = True
        self.adding = False
        self._calls, self._known_calls = 0, 0
        self.clear()

    def begin(self, *, last: bool) -> None:
        """Says that a pass is to come."""
        self.last = last
        self._known_calls = max(self._known_calls, self._calls)
        self._calls = 0

    def clear(self) -> None:
        self._sum: Tensor | None = None
        self._given: Tensor | None = None

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if not self.adding:
            raise TaskError(
                "The loss takes gradients itself, which layers that are gathered in turn do not "
                "bear.",
                remedy="an empty list for the task's no_split_modules, or one process",
            )
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        total = self._sum
        if total is None:
            total = torch.zeros_like(output_tensor, dtype=torch.float64)
        for rows in received.view(dist.get_world_size(group), -1):
            _add_up(total, rows)
        self._sum = total
        self._calls += 1
        if self.last and self._given is None:
            self._given = output_tensor.copy_(total)
        else:
            output_tensor.zero_()
            if self._given is not None:
                self._given.copy_(total)
        if self.last and self._calls == self._known_calls:
            self.clear()  # that was all of it


class GradientSums:
    """Sums of the gradients of parameters over the passes of an evaluation.

    Args:
        own: parameters whose gradients autograd or FSDP2 leaves on this rank pass by pass.
        sharded: those of which ``over_ranks`` makes the sums.
    """

    def __init__(
        self,
        world: World,
        own: Collection[nn.Parameter],
        sharded: Collection[nn.Parameter] = (),
        over_ranks: Collection[SumOverRanks] = (),
    ) -> None:
        self._world = world
        self._own = own
        self._over_ranks = over_ranks
        self._sums: dict[Tensor, Tensor] = {}
        self._last = True
        self._adding = False
        for parameters, hook in ((own, self._add), (sharded, self._drop)):
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(hook)

    def clear(self) -> None:
        """Forgets all gradients, those of an evaluation that never came to its end included."""
        for known in self._sums.values():
            known.zero_()
        # Before any pass: among what passes take and free they would leave holes.
        for parameter in self._own:
            if parameter.requires_grad:
                self._sum_of(parameter)
        for part in self._over_ranks:
            part.clear()

    def before_pass(self, *, last: bool) -> None:
        self._last = last
        for part in self._over_ranks:
            part.begin(last=last)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Gradients count inside; those that a loss takes for itself are its own."""
        self._set_adding(True)
        try:
            yield
        finally:
            self._set_adding(False)

    def _set_adding(self, adding: bool) -> None:
        self._adding = adding
        for part in self._over_ranks:
            part.adding = adding

    def join(self) -> None:
        """Sums up what is not sharded over the ranks: rank zero has the sums, the others zeros.

        Each rank's part rounded by itself would not come to the same. After the last pass.
        """
        for part in self._over_ranks:
            part.clear()
        if self._world.size == 1 or not self._sums:
            return
        sums = list(self._sums.values())
        totals = self._world.sum(torch.cat([known.reshape(-1) for known in sums]))
        parts = totals.split([known.numel() for known in sums])
        for known, part in zip(sums, parts, strict=True):
            if self._world.is_zero:
                known.copy_(part.view_as(known))
            else:
                known.zero_()

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's rows of the sum, float64 or float32; None where nothing depends on it.

        After the last pass of an evaluation, and ``join``.
        """
        if parameter in self._sums:
            return self._sums[parameter]
        return None if parameter.grad is None else _rows(parameter.grad)

    def _add(self, parameter: Tensor) -> None:
        if self._adding and parameter.grad is not None:
            _add_up(self._sum_of(parameter), local_rows(parameter.grad))
            parameter.grad = None

    def _sum_of(self, parameter: Tensor) -> Tensor:
        if parameter not in self._sums:
            rows = local_rows(parameter.detach())
            self._sums[parameter] = torch.zeros_like(rows, dtype=torch.float64)
        return self._sums[parameter]

    def _drop(self, parameter: Tensor) -> None:
        # Zeros, which would take memory until the end of the pass.
        if not self._last:
            parameter.grad = None


def _add_up(total: Tensor, rows: Tensor) -> None:
    """Adds float32 ``rows`` to ``total`` in float64, in place."""
    if rows.is_sparse:
        rows = rows.coalesce()
        total.index_add_(0, rows.indices()[0], rows.values().double())
    elif rows.numel() <= _PIECE:
        total.add_(rows)
    else:
        # All at once torch would make a float64 copy of them first: six times slower.
        pieces = total.view(-1).split(_PIECE), rows.reshape(-1).split(_PIECE)
        for to, part in zip(*pieces, strict=True):
            to.add_(part)


def _rows(gradient: Tensor) -> Tensor:
    rows = local_rows(gradient)
    return rows.to_dense() if rows.is_sparse else rows
