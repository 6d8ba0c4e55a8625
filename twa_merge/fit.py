"""Trains the coefficients: the whole model first, then block by block around that solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import single, window
from .cross_validation import cross_validate
from .fits import Fits
from .fitted import Fitted
from .growth import grow
from .guard import finite_mean
from .progress import Advanced, Started
from .ridge import RidgePath
from .sampling import paired
from .subspace import Chart

_START_EXAMPLES = 256
# All checkpoints are evaluated on these. A greedy soup takes as many evaluations again; on more
# examples it would cost more than the fit. Three quarters of them are the 128 that are left without
# a fold.
_SINGLES_EXAMPLES = 171


@dataclass
class Fitter(Fits):
    """Fits charts to the fit split, stage by stage.

    Attributes:
        steps: of the checkpoints, where they are known.
    """

    steps: Sequence[int | None] = ()
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
        self.progress(Started(f"Training {name}", None, "evaluations"))
        path: RidgePath | None = None
        ridge = self.config.ridge or 0.0
        if self.config.optimizer != "lbfgs":
            result, examples = self.first_order(name, chart), self.limit
        else:
            if self.config.ridge is None:
                path = cross_validate(self, name, chart, before, folds)
                ridge = path.choice()
            result, examples = grow(self, name, chart, ridge, weaker=path is not None)
            ridge = result.ridge
        alphas = chart.alphas(result.z) if math.isfinite(result.loss) else chart.base
        spent = self.evaluations - spent
        return Fitted(name, chart, alphas, ridge, result, path, spent, examples)
