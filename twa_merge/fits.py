"""Fits of chosen examples of the fit split, and their losses: counted, and logged where trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import Batches
from .config import FitConfig
from .first_order import first_order
from .guard import finite_mean
from .objective import Engine, Objective
from .optimize import FitResult, Function, lbfgs
from .progress import Evaluated, Progress
from .resume import EvaluationLog
from .subspace import Chart

# Fits that ridges are compared by need to be good enough for that, no more; each begins where the
# one with a stronger ridge ended. Much shorter ones would not tell how far the last fit goes.
_SHORT = 12, 3e-4


@dataclass(frozen=True)
class Effort:
    """How far a fit goes: evaluations at most, and the relative decrease that ends it."""

    evaluations: int
    tolerance: float


@dataclass
class Fits:
    """Fits of charts to chosen examples of the fit split.

    Attributes:
        sample: examples that may be used at most; None: all.
        evaluations: of loss and gradient so far, in units of all examples that may be used.
    """

    engine: Engine
    batches: Batches
    config: FitConfig
    log: EvaluationLog
    progress: Progress
    sample: int | None = None
    evaluations: float = 0.0
    _number: int = 0

    @property
    def limit(self) -> int:
        """Examples that the fit may use."""
        return min(self.batches.size, self.sample or self.batches.size)

    @property
    def whole(self) -> Effort:
        """Of the fit that counts."""
        return Effort(self.config.max_evaluations, self.config.tolerance)

    @property
    def short(self) -> Effort:
        """Of fits that a ridge is chosen by, which go no further than the one that counts."""
        evaluations, tolerance = _SHORT
        whole = self.whole
        return Effort(min(evaluations, whole.evaluations), max(tolerance, whole.tolerance))

    def losses(self, alphas: Tensor, *parts: Sequence[int]) -> Tensor:
        """Loss (no gradient) of each chosen example of the fit split, (M,) float64.

        Args:
            parts: the chosen ones; no batch holds examples of two parts.
        """
        self.engine.set_weights(alphas)
        self.evaluations += self.units(sum(map(len, parts)))
        found = [self.engine.example_losses(self.batches, p, by_batch=True)[0] for p in parts]
        return torch.cat(found)

    def units(self, losses: int) -> float:
        """What so many losses take, in evaluations of loss and gradient of all examples."""
        return losses / self.limit / 3

    def score(self, alphas: Tensor, chosen: Sequence[int]) -> float:
        """Mean loss over chosen examples; infinite where it is not a number."""
        return finite_mean(self.losses(alphas, chosen))

    def minimise(
        self,
        name: str,
        chart: Chart,
        chosen: Sequence[int],
        ridge: float,
        start: Tensor | FitResult,
        effort: Effort,
    ) -> FitResult:
        """Fits the chosen examples.

        Args:
            start: coordinates, or where a fit of the same examples with another ridge ended.
        """
        known = start.with_ridge(ridge) if isinstance(start, FitResult) else None
        log_name = f"{name}/ridge{ridge:g}"

        def evaluate(z: Tensor) -> tuple[float, Tensor]:
            return self._evaluate(log_name, chart, chosen, ridge, z)

        def fit(function: Function) -> FitResult:
            return lbfgs(
                function,
                start.z if isinstance(start, FitResult) else start,
                max_evaluations=effort.evaluations,
                tolerance=effort.tolerance,
                ridge=ridge,
                observe=self._observe,
                at_start=known,
            )

        return self.engine.world.led(evaluate, fit)

    def first_order(self, name: str, chart: Chart) -> FitResult:
        """Fits all examples as the paper does, by one of its optimizers."""
        ridge = self.config.ridge or 0.0

        def evaluate(z: Tensor, chosen: Sequence[int]) -> tuple[float, Tensor]:
            return self._evaluate(f"{name}/{chosen[0]}", chart, chosen, ridge, z)

        def fit(function: Callable[[Tensor, Sequence[int]], tuple[float, Tensor]]) -> FitResult:
            return first_order(
                function, chart, self.batches, self.config, self._observe, self.limit
            )

        return self.engine.world.led(evaluate, fit)

    def _evaluate(
        self, name: str, chart: Chart, chosen: Sequence[int], ridge: float, z: Tensor
    ) -> tuple[float, Tensor]:
        """Loss and gradient at coordinates z, from the log where it knows them."""
        self.evaluations += len(chosen) / self.limit
        objective = Objective(self.engine, chart, self.batches, chosen, ridge)
        return self.log.answer(name, chart, objective, chosen)(z)

    def _observe(self, number: int, loss: float, best: float) -> None:
        self._number += 1
        self.progress(Evaluated(self._number, loss, best))
