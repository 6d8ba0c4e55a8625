"""Trains the coefficients: the whole model first, then block by block around that solution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .candidates import single, window
from .config import FitConfig
from .errors import ConfigError
from .first_order import first_order
from .objective import Batches, Engine, Objective
from .optimize import FitResult, lbfgs
from .progress import Advanced, Evaluated, Progress, Started
from .resume import EvaluationLog
from .subspace import Chart

# Weights of ‖z‖²/2 that `auto` tries, strongest first, so that each fit starts near the next.
RIDGES = (0.1, 0.01, 0.001, 0.0001)
# On the path a fit needs to be good enough to compare ridges, no more.
_PATH_EVALUATIONS = 6
# Small splits are cross-validated in four folds; for larger ones a quarter held out says enough.
_FOUR_FOLDS_UP_TO = 48
_START_EXAMPLES = 256
# The fit begins with this many examples and takes twice as many as long as that moves it.
_FIRST_SAMPLE = 256


@dataclass
class Fitted:
    """Coefficients that a stage ended with.

    Attributes:
        alphas: (B, n) float64.
        ridge: the ridge that was used.
        result: of the last fit, over the whole sample.
        scores: ridge → loss on examples that its fit did not see.
        evaluations: of loss and gradient, in units of all examples that the fit may use.
        examples: that the last fit used.
    """

    name: str
    chart: Chart
    alphas: Tensor
    ridge: float
    result: FitResult
    scores: dict[float, float] = field(default_factory=dict)
    evaluations: float = 0.0
    examples: int = 0


@dataclass
class Fitter:
    """Fits charts to the fit split."""

    engine: Engine
    batches: Batches
    config: FitConfig
    log: EvaluationLog
    progress: Progress
    steps: Sequence[int | None] = ()
    sample: int | None = None
    evaluations: float = 0.0
    _number: int = 0

    def start(self, n: int) -> Tensor:
        """Coefficients (1, n) that the fit starts at, the centre of its ridge.

        ``auto``: the best of the windows of the last 1, 2, 4, …, n checkpoints on a sample of the
        fit split. Far from the mean the loss is not convex: early checkpoints can ruin the mean.

        Raises:
            ConfigError: there is no checkpoint of that step.
        """
        word = self.config.start
        if word == "mean":
            return window(n, n)[None]
        if word == "last":
            return single(n, n - 1)[None]
        if word != "auto":
            if int(word) not in self.steps:
                raise ConfigError(
                    "--start names a step that no checkpoint has.",
                    expected=", ".join(str(s) for s in self.steps),
                    found=word,
                )
            return single(n, list(self.steps).index(int(word)))[None]
        sizes = [*(2**i for i in range(n.bit_length()) if 2**i < n), n]
        sample = range(min(self.limit, _START_EXAMPLES))
        self.progress(Started("Looking for a start", len(sizes), "windows"))
        losses = []
        for k in sizes:
            losses.append(self.score(window(n, k)[None], sample))
            self.progress(Advanced())
        best = min(range(len(sizes)), key=lambda i: (losses[i], i))
        return window(n, sizes[best])[None]

    def score(self, alphas: Tensor, chosen: Sequence[int]) -> float:
        """Mean loss (no gradient) over chosen examples; infinite where it is not a number."""
        self.engine.set_weights(alphas)
        losses, _ = self.engine.example_losses(self.batches, chosen, by_batch=True)
        mean = float(losses.mean())
        self.evaluations += len(chosen) / self.limit / 3
        return mean if math.isfinite(mean) else math.inf

    def stage(self, name: str, chart: Chart) -> Fitted:
        """Fits one chart from its base, with the ridge that unseen examples prefer."""
        before = self.evaluations
        self.progress(Started(f"Training coefficients ({name})", None, "evaluations"))
        scores: dict[float, float] = {}
        if self.config.optimizer != "lbfgs":
            ridge = self.config.ridge or 0.0
            result, examples = self._first_order(name, chart), self.limit
        else:
            ridge, start, scores = self._choose_ridge(name, chart)
            result, examples = self._grow(name, chart, ridge, start)
        alphas = chart.alphas(result.z) if math.isfinite(result.loss) else chart.base
        spent = self.evaluations - before
        return Fitted(name, chart, alphas, ridge, result, scores, spent, examples)

    @property
    def limit(self) -> int:
        """Examples that the fit may use."""
        return min(self.batches.size, self.sample or self.batches.size)

    def _grow(self, name: str, chart: Chart, ridge: float, start: Tensor) -> tuple[FitResult, int]:
        """Fits a sample that doubles until the answer moves by less than its statistical error.

        Returns:
            The last fit and the number of examples it used.
        """
        size, most = min(self.limit, _FIRST_SAMPLE), self.config.max_evaluations
        result = self._minimise(name, chart, range(size), ridge, start, most)
        while size < self.limit and math.isfinite(result.loss):
            size = min(2 * size, self.limit)
            grown = self._minimise(name, chart, range(size), ridge, result.z, most)
            moved = self._still_moves(chart, result.z, grown.z, range(size))
            result = grown
            if not moved:
                break
        return result, size

    def _still_moves(self, chart: Chart, old: Tensor, new: Tensor, chosen: Sequence[int]) -> bool:
        """Whether the larger sample's answer is better on it by more than one standard error."""
        if torch.equal(old, new):
            return False
        columns = []
        for z in (old, new):
            self.engine.set_weights(chart.alphas(z))
            columns.append(self.engine.example_losses(self.batches, chosen, by_batch=True)[0])
            self.evaluations += len(chosen) / self.limit / 3
        gain = columns[0] - columns[1]
        return float(gain.mean()) > float(gain.std()) / len(gain) ** 0.5

    def _choose_ridge(self, name: str, chart: Chart) -> tuple[float, Tensor, dict[float, float]]:
        zero = torch.zeros(chart.size, dtype=torch.float64)
        size = min(self.limit, _FIRST_SAMPLE)
        if self.config.ridge is not None or size < 4 or chart.size == 0:
            ridge = RIDGES[0] if self.config.ridge is None else self.config.ridge
            return ridge, zero, {}
        totals = dict.fromkeys([math.inf, *RIDGES], 0.0)
        starts: dict[float, list[Tensor]] = {ridge: [] for ridge in totals}
        for fold, (train, unseen) in enumerate(folds(size)):
            path = self._path(f"{name}/fold{fold}", chart, train, unseen)
            for ridge, (z, loss) in path.items():
                totals[ridge] += loss * len(unseen)
                starts[ridge].append(z)
        held = sum(len(unseen) for _, unseen in folds(size))
        scores = {ridge: total / held for ridge, total in totals.items()}
        best = min(scores, key=lambda r: (scores[r], -r))
        if best == math.inf:
            # Nothing beats the base: stay as close to it as the path goes.
            best = RIDGES[0]
        return best, torch.stack(starts[best]).mean(0), scores

    def _path(
        self, name: str, chart: Chart, train: Sequence[int], unseen: Sequence[int]
    ) -> dict[float, tuple[Tensor, float]]:
        """Ridge → (z, loss on unseen examples), strongest ridge first, each from the last's end."""
        z = torch.zeros(chart.size, dtype=torch.float64)
        path = {math.inf: (z, self.score(chart.alphas(z), unseen))}
        rising = 0
        best = path[math.inf][1]
        for ridge in RIDGES:
            if rising == 0:
                z = self._minimise(name, chart, train, ridge, z, _PATH_EVALUATIONS).z
                loss = self.score(chart.alphas(z), unseen)
                # A weaker ridge that does worse: the rest overfits all the more.
                rising += loss >= best and ridge != RIDGES[0]
                best = min(best, loss)
                path[ridge] = (z, loss)
            else:
                path[ridge] = (z, math.inf)
        return path

    def _minimise(
        self,
        name: str,
        chart: Chart,
        chosen: Sequence[int],
        ridge: float,
        start: Tensor,
        limit: int,
    ) -> FitResult:
        objective = Objective(self.engine, chart, self.batches, chosen, ridge)
        share = len(chosen) / self.limit
        function = self.log.answer(f"{name}/ridge{ridge:g}", chart, objective)

        def observe(number: int, loss: float, best: float) -> None:
            self.evaluations += share
            self._number += 1
            self.progress(Evaluated(self._number, loss, best))

        return lbfgs(
            function,
            start,
            max_evaluations=limit,
            tolerance=self.config.tolerance,
            observe=observe,
        )

    def _first_order(self, name: str, chart: Chart) -> FitResult:
        def observe(number: int, loss: float, best: float) -> None:
            self.evaluations += self.batches.batch_size / self.limit
            self._number += 1
            self.progress(Evaluated(self._number, loss, best))

        def function(z: Tensor, chosen: Sequence[int]) -> tuple[float, Tensor]:
            ridge = self.config.ridge or 0.0
            key = f"{name}/{chosen[0]}"
            return self.log.answer(
                key, chart, Objective(self.engine, chart, self.batches, chosen, ridge)
            )(z)

        return first_order(function, chart, self.batches, self.config, observe, self.limit)


def folds(size: int) -> Iterator[tuple[list[int], list[int]]]:
    """(train, unseen) positions: four folds for small samples, one held-out quarter otherwise."""
    count = 4 if size <= _FOUR_FOLDS_UP_TO else 1
    for fold in range(count):
        unseen = [p for p in range(size) if p % 4 == 3 - fold]
        yield [p for p in range(size) if p % 4 != 3 - fold], unseen
