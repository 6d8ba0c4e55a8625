"""Candidates as they come out without a fold of the fit examples, and their losses on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .candidates import Candidate, greedy
from .fitted import Fitted
from .guard import Scored
from .run import Run


class Soups:
    """Greedy soups of the single checkpoints: of all fit examples, and without a fold of them."""

    def __init__(self, run: Run) -> None:
        self._fitter = run.fitter
        losses = run.fitter.single_losses(run.n)
        self._cost = run.fitter.units(losses.numel())
        sample = range(losses.shape[1])
        # An example without a finite loss of any checkpoint would decide nothing, and spoil all.
        finite = losses.isfinite().any(0)
        self._sample = [p for p in sample if finite[p]]
        self._losses = losses[:, finite]

    def of_all(self) -> Candidate:
        """The soup that is chosen by all examples."""
        spent = self._fitter.evaluations
        soup = self.without(())
        cost = self._cost + self._fitter.evaluations - spent
        return dataclasses.replace(soup, cost=cost)

    def without(self, unseen: Collection[int]) -> Candidate:
        """The soup that is chosen without the examples at these positions."""
        columns = [i for i, p in enumerate(self._sample) if p not in unseen]
        kept = [self._sample[i] for i in columns]

        def score(alphas: Tensor) -> float:
            return self._fitter.score(alphas, kept) if kept else math.inf

        return greedy(self._losses[:, columns].mean(1), score)


class HeldOut:
    """Candidates as they come out without each fold of the ridge's cross-validation.

    Attributes:
        parts: positions of the fit examples of each fold; none without a cross-validation.
        groups: their labels, one fold after the other, (M,) int64.
    """

    def __init__(self, run: Run, fitted: Sequence[Fitted], soups: Soups | None) -> None:
        self._fitter, self._jury = run.fitter, run.jury
        # A metric other than the loss is known on the guard split alone.
        known = run.choices.guard.select == "loss"
        whole, *by_block = fitted
        last = fitted[-1].path if known else None
        self.parts = last.parts[: last.folds] if last else []
        self.groups = last.unseen_groups if last and self.parts else None
        self._kept: Tensor | None = None
        self._losses: dict[str, Tensor] = {}
        self._alphas: dict[str, list[Tensor]] = {}
        if last is None or not self.parts:
            return
        folds = range(len(self.parts))
        self._alphas[whole.name] = [whole.without(k) for k in folds]
        # The base of the other stages' folds.
        self._losses[whole.name] = torch.cat(last.losses[math.inf if by_block else last.choice()])
        for stage in by_block:
            assert stage.path is not None
            self._alphas[stage.name] = [stage.without(k, whole) for k in folds]
            self._losses[stage.name] = torch.cat(stage.path.losses[stage.path.choice()])
        if run.jury.engine is not run.engine:
            # These are of what the fit's store rounds.
            self._losses.clear()
        if soups:
            self._alphas["greedy"] = [soups.without(part).alphas for part in self.parts]

    def add(self, name: str, alphas: Sequence[Tensor]) -> None:
        """What a candidate that is made of others comes to without each fold."""
        self._alphas[name] = list(alphas)

    def alphas(self, candidate: Candidate) -> list[Tensor]:
        """Its coefficients without each fold; what has not been fitted stays as it is."""
        return self._alphas.get(candidate.name) or [candidate.alphas] * len(self.parts)

    def judge(self, item: Scored) -> None:
        """Adds its losses on the parts."""
        losses = self._losses_on_parts(item)
        item.unseen = losses if self._kept is None else losses[self._kept]
        item.unseen_groups = self.groups

    def leave_out_broken(self, items: Sequence[Scored]) -> None:
        """Leaves out the examples of which no judged candidate has a finite loss.

        They tell none from another, and the mean of all losses would be finite for none.
        """
        losses = torch.stack([item.unseen for item in items if item.unseen is not None])
        self._kept = losses.isfinite().any(0)
        if self.groups is not None:
            self.groups = self.groups[self._kept]
        for item, found in zip(items, losses, strict=True):
            item.unseen, item.unseen_groups = found[self._kept], self.groups

    def _losses_on_parts(self, item: Scored) -> Tensor:
        """One after the other, (M,)."""
        candidate, mode = item.candidate, item.batch_norm
        if candidate.name in self._losses and mode is None:
            return self._losses[candidate.name]
        if candidate.name in self._alphas:
            return self._measured(self._alphas[candidate.name], mode)
        # Fold by fold like the others: what a loss draws at random depends on the batch.
        return self._losses_of(candidate.alphas, mode, *self.parts)

    def _measured(self, alphas: Sequence[Tensor], mode: str | None) -> Tensor:
        """Losses on the parts with other coefficients for each, (M,)."""
        found = zip(alphas, self.parts, strict=True)
        return torch.cat([self._losses_of(a, mode, part) for a, part in found])

    def _losses_of(self, alphas: Tensor, mode: str | None, *parts: Sequence[int]) -> Tensor:
        """With batch norm as it would be written: the fit's own losses normalise by the batch."""
        if mode is not None:
            return self._jury.losses(alphas, mode, *parts)
        engine = self._jury.engine
        engine.set_weights(alphas)
        return engine.losses_of_parts(self._fitter.batches, parts, by_batch=True)
