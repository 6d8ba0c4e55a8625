"""Minimises a smooth function of a small vector: L-BFGS by default, the paper's SGD and AdamW."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[float, Tensor]]


@dataclass
class FitResult:
    """Where a fit ended.

    Attributes:
        z: the best point that was evaluated, (size,) float64.
        loss: the objective there.
        trace: (evaluation, loss) of every evaluation, in order; non-finite losses as they came.
        converged: whether the optimizer stopped by itself rather than at its limit.
        path: the points at which the best loss so far was improved.
        ridge: that the objective held.
        gradient: of the objective at ``z``, (size,) float64; None where it is not known.
    """

    z: Tensor
    loss: float
    trace: list[tuple[int, float]]
    converged: bool
    path: list[Tensor] = field(default_factory=list)
    ridge: float = 0.0
    gradient: Tensor | None = None

    def with_ridge(self, ridge: float) -> tuple[float, Tensor] | None:
        """Loss and gradient of the objective at ``z`` if its ridge were another one."""
        if self.gradient is None:
            return None
        more = ridge - self.ridge
        return self.loss + more / 2 * float(self.z @ self.z), self.gradient + more * self.z


# Losses from here on are left in their own unit.
_SMALL = 2.0**-10


class _Stop(Exception):
    pass


@dataclass
class _Recorder:
    """Keeps the best point, and keeps the optimizer on finite ground."""

    function: Function
    limit: int
    ridge: float
    observe: Callable[[int, float, float], None]
    best: float = math.inf
    z: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    trace: list[tuple[int, float]] = field(default_factory=list)
    path: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    unit: float = 1.0

    def __call__(self, z: Tensor) -> tuple[float, Tensor]:
        if len(self.trace) >= self.limit:
            raise _Stop
        loss, gradient = self.function(z)
        self.trace.append((len(self.trace) + 1, loss))
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            if not self.path:
                raise _Stop
            # A wall that the line search backs away from.
            self.observe(len(self.trace), loss, self.best)
            return self.best + 1e3 * (self.unit + abs(self.best)), torch.zeros_like(z)
        if loss < self.best:
            self.take(z, loss, gradient)
        self.observe(len(self.trace), loss, self.best)
        return loss, gradient

    def take(self, z: Tensor, loss: float, gradient: Tensor) -> None:
        self.best, self.z, self.gradient = loss, z.clone(), gradient.clone()
        self.path.append(self.z)

    def result(self, start: Tensor, converged: bool) -> FitResult:
        z = self.z if self.path else start
        return FitResult(z, self.best, self.trace, converged, self.path, self.ridge, self.gradient)


def ignore(number: int, loss: float, best: float) -> None:
    """Observes nothing."""


def lbfgs(
    function: Function,
    start: Tensor,
    *,
    max_evaluations: int,
    tolerance: float,
    ridge: float = 0.0,
    observe: Callable[[int, float, float], None] = ignore,
    at_start: tuple[float, Tensor] | None = None,
) -> FitResult:
    """Full-batch L-BFGS with strong-Wolfe line search (Nocedal and Wright, algorithm 7.5).

    In coordinates whose unit is one standard deviation of the checkpoints it needs no learning
    rate. A loss that is not finite counts as a wall; when the start itself is not finite, the
    result's loss is infinite.

    Args:
        function: z (size,) float64 → loss and gradient (size,) float64.
        tolerance: stops when an iteration lowers the loss by less than this share of it.
        ridge: that the function holds, a least curvature.
        at_start: loss and gradient at the start where they are known, one of the evaluations.
    """
    record = _Recorder(function, max_evaluations - (at_start is not None), ridge, observe)
    if start.numel() == 0:
        with contextlib.suppress(_Stop):
            record(start)
        return record.result(start, True)
    z = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [z],
        lr=1.0,
        max_iter=1,
        max_eval=max_evaluations,
        history_size=min(20, max(1, max_evaluations)),
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    known: dict[tuple[float, ...], tuple[float, Tensor]] = {}
    if at_start is not None:
        record.take(start, *at_start)
        known[tuple(start.tolist())] = at_start

    def closure() -> Tensor:
        # Each call of step() asks again for the point that the line search ended at.
        key = tuple(z.tolist())
        if key not in known:
            known[key] = record(z.detach().clone())
        loss, gradient = known[key]
        z.grad = gradient / record.unit
        return torch.tensor(loss / record.unit, dtype=torch.float64)

    converged = False
    try:
        record.unit = _unit(float(closure()), z.grad)
        closure()
        group = optimizer.param_groups[0]
        group["lr"] = _first_step(z.grad, ridge / record.unit)
        while not converged:
            before, where = record.best, z.detach().clone()
            optimizer.step(closure)
            group["lr"] = 1.0
            gain = before - record.best
            still = torch.equal(where, z.detach())
            converged = still or (math.isfinite(before) and gain <= tolerance * abs(record.best))
    except _Stop:
        pass
    return record.result(start, converged)


def _unit(loss: float, gradient: Tensor | None) -> float:
    """What a loss is divided by that is far smaller than one, a power of two.

    torch's LBFGS and its line search hold constants that are meant for losses near one: of smaller
    ones they drop what the gradients say of the curvature.
    """
    size = max(abs(loss), 0.0 if gradient is None else float(gradient.norm()))
    return 2.0 ** round(math.log2(size)) if 0.0 < size < _SMALL else 1.0


def _first_step(gradient: Tensor | None, ridge: float) -> float:
    """The ``lr`` that makes LBFGS try a first step of one standard deviation.

    Its own first step, minus the gradient, is often far shorter than what follows. A line search
    that extrapolates from two such neighbours divides rounding errors by next to nothing. Where
    the ridge alone would stop sooner, the step ends there.
    """
    norm = 0.0 if gradient is None else float(gradient.norm())
    if gradient is None or norm == 0.0:
        return 1.0
    length = min(1.0, norm / ridge) if ridge else 1.0
    return length / norm * max(1.0, float(gradient.abs().sum()))


def schedule_factor(schedule: str, step: int, steps: int) -> float:
    """Factor of the learning rate at ``step`` of ``steps``: constant, step, linear or cosine.

    ``step`` divides by ten after half and after three quarters, as is customary for SGD.
    """
    done = step / max(1, steps)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "step":
        return 0.1 ** ((done >= 0.5) + (done >= 0.75))
    return 1.0
