"""Trains the coefficients: the whole model first, then block by block around that solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import Batches
from .candidates import single, window
from .config import FitConfig
from .first_order import first_order
from .guard import finite_mean
from .objective import Engine, Objective
from .optimize import FitResult, Function, lbfgs
from .progress import Advanced, Evaluated, Progress, Started
from .resume import EvaluationLog
from .ridge import TIE, RidgePath, folds_of, much_alike, scale_of, too_far, weaker_than
from .sampling import paired
from .subspace import Chart

# On the path a fit needs to be good enough to compare ridges, no more; each begins where the one
# with a stronger ridge ended. Much shorter ones would not tell how far the last fit goes.
_ON_THE_PATH = 12, 3e-4  # evaluations, tolerance
_RIDGE_SAMPLE = 256
_START_EXAMPLES = 256
# All checkpoints are evaluated on these. A greedy soup takes as many evaluations again; on more
# examples it would cost more than the fit. Three quarters of them are the 128 that are left without
# a fold.
_SINGLES_EXAMPLES = 171
# The fit begins with this many examples and takes twice as many as long as that moves it.
_FIRST_SAMPLE = 256
_ALL_FROM = 1.75


@dataclass
class Fitted:
    """Coefficients that a stage ended with.

    Attributes:
        alphas: (B, n) float64.
        ridge: of the last fit.
        result: of the last fit, over the whole sample.
        path: what the ridge of the first fit was chosen by; None where it was not.
        evaluations: of loss and gradient, in units of all examples that the fit may use.
        examples: that the last fit used.
    """

    name: str
    chart: Chart
    alphas: Tensor
    ridge: float
    result: FitResult
    path: RidgePath | None = None
    evaluations: float = 0.0
    examples: int = 0

    def without(self, fold: int, before: Fitted | None = None) -> Tensor:
        """Coefficients (B, n) that the stage came to without a fold of its cross-validation.

        Args:
            before: the stage whose solution the chart's base is.
        """
        assert self.path is not None
        chart = self.chart if before is None else self.chart.around(before.without(fold))
        return chart.alphas(self.path.ends[self.path.choice()][fold])

    @property
    def scores(self) -> dict[float, float]:
        """Ridge → mean loss on examples that its fits did not see; inf is the chart's base."""
        return self.path.scores() if self.path else {}


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
    _singles: Tensor | None = None

    def single_losses(self, n: int) -> Tensor:
        """Losses of the n checkpoints by themselves on examples of the fit split, (n, M) float64.

        Evaluated once.
        """
        if self._singles is None:
            sample = range(min(self.limit, _SINGLES_EXAMPLES))
            self.progress(Started("Looking at the checkpoints", n, "checkpoints"))
            losses = []
            for i in range(n):
                losses.append(self.losses(single(n, i)[None], sample))
                self.progress(Advanced())
            self._singles = torch.stack(losses)
        return self._singles

    def start(self, n: int, *, singles: bool = False) -> Tensor:
        """Coefficients (1, n) that the fit starts at, the centre of its ridge.

        ``auto``: the best of the windows of the last 1, 2, 4, …, n checkpoints on a sample of the
        fit split. Far from the mean the loss is not convex: early checkpoints can ruin the mean.
        Where a training has got worse they all may be ruined: then it is the best checkpoint.

        Args:
            singles: look at all checkpoints, too.
        """
        word = self.config.start
        if word == "mean":
            return window(n, n)[None]
        if word == "last":
            return single(n, n - 1)[None]
        if word != "auto":
            return single(n, list(self.steps).index(int(word)))[None]
        sizes = [*(2**i for i in range(n.bit_length()) if 2**i < n), n]
        sample = range(min(self.limit, _START_EXAMPLES))
        self.progress(Started("Looking for a start", len(sizes), "windows"))
        losses = []
        for k in sizes:
            losses.append(self.losses(window(n, k)[None], sample))
            self.progress(Advanced())
        best = min(range(len(sizes)), key=lambda i: (finite_mean(losses[i]), i))
        ahead = self._ahead_of(losses[best], n, sample) if singles else None
        return (window(n, sizes[best]) if ahead is None else single(n, ahead))[None]

    def _ahead_of(self, losses: Tensor, n: int, sample: Sequence[int]) -> int | None:
        """The best checkpoint, if it is ahead of these losses by a standard error."""
        singles = self.single_losses(n)
        best = min(range(n), key=lambda i: finite_mean(singles[i]))
        # In the same batches: the loss of an example may depend on the others of its batch.
        found = self.losses(single(n, best)[None], sample)
        gain, error = paired(losses, found, self.batches.groups(sample))
        return best if gain > error else None

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

    def stage(
        self, name: str, chart: Chart, before: Fitted | None = None, folds: int | None = None
    ) -> Fitted:
        """Fits one chart from its base, with the ridge that unseen examples prefer.

        Args:
            before: the stage whose solution the base is. In each fold of the cross-validation
                the base is what that stage came to without the fold.
            folds: of the cross-validation; None: until its result is settled.
        """
        spent = self.evaluations
        self.progress(Started(f"Training coefficients ({name})", None, "evaluations"))
        path: RidgePath | None = None
        ridge = self.config.ridge or 0.0
        if self.config.optimizer != "lbfgs":
            result, examples = self._first_order(name, chart), self.limit
        else:
            if self.config.ridge is None:
                path = self._path(name, chart, before, folds)
                ridge = path.choice()
            result, examples = self._grow(name, chart, ridge, weaker=path is not None)
            ridge = result.ridge
        alphas = chart.alphas(result.z) if math.isfinite(result.loss) else chart.base
        spent = self.evaluations - spent
        return Fitted(name, chart, alphas, ridge, result, path, spent, examples)

    @property
    def limit(self) -> int:
        """Examples that the fit may use."""
        return min(self.batches.size, self.sample or self.batches.size)

    def _grow(
        self, name: str, chart: Chart, ridge: float, *, weaker: bool
    ) -> tuple[FitResult, int]:
        """Fits a sample that doubles until the answer moves by less than its statistical error.

        Args:
            weaker: look for a weaker ridge each time, too; where there is one, it goes on.

        Returns:
            The last fit and the number of examples it used.
        """
        size = self._grown(_FIRST_SAMPLE)
        whole = self.config.max_evaluations, self.config.tolerance
        # Not where the ridge's path ended: its short fits amplify rounding errors.
        start = torch.zeros(chart.size, dtype=torch.float64)
        result, moved = self._minimise(name, chart, range(size), ridge, start, *whole), True
        while size < self.limit and math.isfinite(result.loss):
            larger, found = self._grown(2 * size), result
            if weaker:
                found = self._weakened(name, chart, range(size), range(size, larger), result)
                ridge = float(f"{found.ridge * size / larger:.3g}")
            if not moved and found is result:
                break
            size = larger
            result = self._minimise(name, chart, range(size), ridge, found.z, *whole)
            moved = self._still_moves(chart, found.z, result.z, range(size))
        return result, size

    def _weakened(
        self, name: str, chart: Chart, known: range, fresh: range, result: FitResult
    ) -> FitResult:
        """The fit of the known examples whose ridge the fresh ones prefer, from ``result``'s on.

        What holds a fit of few examples back costs one of many: against a prior of one and the
        same width the ridge of a mean over N examples falls as 1/N.
        """
        if not chart.size:
            return result
        base, losses = (self.losses(a, fresh) for a in (chart.base, chart.alphas(result.z)))
        unseen = self._unlike(losses, known, fresh)
        groups = self.batches.groups(fresh)[unseen]
        least = TIE * abs(float(base[base.isfinite()].mean()))
        while len(unseen):
            other = self._minimise(
                name, chart, known, weaker_than(result.ridge), result, *_ON_THE_PATH
            )
            others = self.losses(chart.alphas(other.z), fresh)
            gain, error = paired(losses[unseen], others[unseen], groups)
            if not gain > max(error, least):
                break
            result, losses = other, others
        return result

    def _unlike(self, losses: Tensor, known: range, fresh: range) -> Tensor:
        """Which of the fresh examples, with these losses, the known ones do not tell of."""
        groups = self.batches.groups(fresh)
        if not much_alike(losses, groups):
            return torch.arange(len(fresh))
        told = torch.isin(groups, self.batches.groups(known))
        return (~told).nonzero().flatten()

    def _grown(self, size: int) -> int:
        """``size``, or all there are where a further doubling would hardly add any."""
        return size if self.limit > _ALL_FROM * size else self.limit

    def _still_moves(self, chart: Chart, old: Tensor, new: Tensor, chosen: Sequence[int]) -> bool:
        """Whether the larger sample's answer is better on it by more than one standard error."""
        if torch.equal(old, new):
            return False
        losses, others = (self.losses(chart.alphas(z), chosen) for z in (old, new))
        gain, error = paired(losses, others, self.batches.groups(chosen))
        return gain > error

    def _path(self, name: str, chart: Chart, before: Fitted | None, folds: int | None) -> RidgePath:
        """Cross-validates the ridge, fold by fold until its gain on unseen examples is settled."""
        sample = range(min(self.limit, _RIDGE_SAMPLE))
        groups, fewest = self.batches.groups(sample), 1
        if before and before.path:
            path = RidgePath(groups, before.path.parts, before.path.scale)
            fewest = before.path.folds
        elif chart.size:
            losses = self.losses(chart.base, sample)
            path = RidgePath(groups, folds_of(groups, losses), scale_of(losses))
        else:
            path = RidgePath(groups, [])
        for fold in range(len(path.parts[:folds]) if chart.size else 0):
            self._extend(path, name, self._without(chart, before, path, fold), fold)
            if folds is None and path.folds >= fewest and path.settled():
                break
        return path

    def _without(self, chart: Chart, before: Fitted | None, path: RidgePath, fold: int) -> Chart:
        """The chart around what the stage before comes to without the examples of a fold."""
        if before is None or before.path is None:
            return chart
        ridge = before.path.choice()
        ends = before.path.ends[ridge]
        if fold == len(ends):
            stage, train = f"{before.name}/fold{fold}", path.without(fold)
            # The other folds' ends know the examples of this one.
            start = torch.zeros(before.chart.size, dtype=torch.float64)
            ends.append(self._minimise(stage, before.chart, train, ridge, start, *_ON_THE_PATH).z)
        return chart.around(before.without(fold))

    def _extend(self, path: RidgePath, name: str, chart: Chart, fold: int) -> None:
        """One more fold: fits with ever weaker ridge, each from the last one's end.

        In the first one all ridges become stronger where even the strongest lets the fit go too
        far: of few examples the spread of the losses says little of their unit.
        """
        train, unseen = path.without(fold), path.parts[fold]

        def add(ridge: float, z: Tensor) -> None:
            path.add(ridge, z, self.losses(chart.alphas(z), unseen))

        def fit(ridge: float, start: Tensor | FitResult) -> FitResult:
            return self._minimise(f"{name}/fold{fold}", chart, train, ridge, start, *_ON_THE_PATH)

        z = torch.zeros(chart.size, dtype=torch.float64)
        add(math.inf, z)
        end = fit(path.ridges[0], z)
        while path.folds == 1 and too_far(end.z, len(train)):
            path.scale *= 10.0
            end = fit(path.ridges[0], z)
        add(path.ridges[0], end.z)
        for ridge in path.ridges[1:]:
            if path.hopeless(ridge):
                break
            end = fit(ridge, end)
            if too_far(end.z, len(train)):
                break
            add(ridge, end.z)

    def _minimise(
        self,
        name: str,
        chart: Chart,
        chosen: Sequence[int],
        ridge: float,
        start: Tensor | FitResult,
        limit: int,
        tolerance: float,
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
                max_evaluations=limit,
                tolerance=tolerance,
                ridge=ridge,
                observe=self._observe,
                at_start=known,
            )

        return self.engine.world.led(evaluate, fit)

    def _first_order(self, name: str, chart: Chart) -> FitResult:
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
