"""Fits of chosen examples of the fit split, and their losses: counted, and logged where trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

# The fit begins with this many examples and takes twice as many as long as that moves it.
_FIRST_SAMPLE = 256
# A doubling after which less than this much of the sample would be left takes all there are.
_ALL_FROM = 1.75
# Fits that ridges are compared by need to be good enough for that, no more; each begins where the
# one with a stronger ridge ended. Much shorter ones would not tell how far the last fit goes.
_SHORT = 12, 3e-4


@dataclass(frozen=True)
class Effort:
    """How far a fit goes: evaluations at most, and the relative decrease that ends it.

    Attributes:
        ahead: evaluations that fits after it may take at most, as far as samples of its size go.
        growing: whether a larger sample may follow.
    """

    evaluations: int
    tolerance: float
    ahead: int = 0
    growing: bool = False


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

    def grown(self, size: int = _FIRST_SAMPLE) -> int:
        """``size``, or all there are where a further doubling would hardly add any."""
        return size if self.limit > _ALL_FROM * size else self.limit

    def whole(self, size: int) -> Effort:
        """Of the fit that counts, of a sample of this size."""
        config = self.config
        return Effort(config.max_evaluations, config.tolerance, growing=size < self.limit)

    def trial(self, later: int = 0) -> Effort:
        """Of a fit that a ridge is chosen by, which goes no further than the one that counts.

        Args:
            later: how many more of them may follow, before that one.
        """
        evaluations, tolerance = _SHORT
        whole = self.whole(self.grown())
        evaluations = min(evaluations, whole.evaluations)
        ahead = later * evaluations + whole.evaluations
        return Effort(evaluations, max(tolerance, whole.tolerance), ahead, whole.growing)

    def losses(self, alphas: Tensor, *parts: Sequence[int]) -> Tensor:
        """Loss (no gradient) of each chosen example of the fit split, (M,) float64.

        Args:
            parts: the chosen ones; no batch holds examples of two parts.
        """
        self.engine.set_weights(alphas)
        self.evaluations += self.units(sum(map(len, parts)))
        return self.engine.losses_of_parts(self.batches, parts, by_batch=True)

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

        def observe(number: int, loss: float, best: float) -> None:
            left = effort.ahead + effort.evaluations - number
            self._tell(loss, best, left, growing=effort.growing)

        def fit(function: Function) -> FitResult:
            return lbfgs(
                function,
                start.z if isinstance(start, FitResult) else start,
                max_evaluations=effort.evaluations,
                tolerance=effort.tolerance,
                ridge=ridge,
                observe=observe,
                at_start=known,
            )

        return self.engine.world.led(evaluate, fit)

    def first_order(self, name: str, chart: Chart) -> FitResult:
        """Fits all examples as the paper does, by one of its optimizers."""
        ridge = self.config.ridge or 0.0
        steps = self.config.epochs * len(self.batches.parts(range(self.limit)))

        def observe(step: int, loss: float, best: float) -> None:
            self._tell(loss, best, steps - step)

        def evaluate(z: Tensor, chosen: Sequence[int]) -> tuple[float, Tensor]:
            return self._evaluate(f"{name}/{chosen[0]}", chart, chosen, ridge, z)

        def fit(function: Callable[[Tensor, Sequence[int]], tuple[float, Tensor]]) -> FitResult:
            return first_order(function, chart, self.batches, self.config, observe, self.limit)

        return self.engine.world.led(evaluate, fit)

    def _evaluate(
        self, name: str, chart: Chart, chosen: Sequence[int], ridge: float, z: Tensor
    ) -> tuple[float, Tensor]:
        """Loss and gradient at coordinates z, from the log where it knows them."""
        self.evaluations += len(chosen) / self.limit
        objective = Objective(self.engine, chart, self.batches, chosen, ridge)
        return self.log.answer(name, chart, objective, chosen)(z)

    def _tell(self, loss: float, best: float, left: int, *, growing: bool = False) -> None:
        self._number += 1
        self.progress(Evaluated(self._number, loss, best, left, growing))
