"""Evaluates candidates as they would be written: rounded, with statistics that fit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import Batches
from .batchnorm import has_batch_norm, reestimate, statistics, take_newest
from .candidates import Candidate
from .dtypes import Dtype
from .guard import Scored, first_unless_beaten
from .objective import Engine

# Statistics settle after some thousand examples; re-estimating them on all would dominate.
_STATISTICS_EXAMPLES = 2048
# Candidates are many; a thousand paired examples tell them apart.
_GUARD_EXAMPLES = 1024
# How far the winner is ahead is measured on more of them, where there are more.
_LEAD_EXAMPLES = 1 << 14
_FIT_EXAMPLES = 512
# Statistics of fewer examples are worse than averaged ones: a channel's variance is off by a fifth
# with 50 of them.
_FEWEST_FOR_STATISTICS = 64


@dataclass
class Jury:
    """Scores candidates on the guard split: by the store, or the files where it packs the offsets.

    Attributes:
        dtype: that averaged tensors are written in; None for the saved one of each.
        select: ``loss`` or ``metric:NAME``.
        batch_norm: ``auto``, ``reestimate``, ``average`` or ``newest``.
    """

    engine: Engine
    fit: Batches
    guard: Batches
    test: Batches | None
    n: int
    dtype: Dtype | None
    select: str
    batch_norm: str

    @property
    def guard_sample(self) -> range:
        """The examples of the guard split that candidates are compared on."""
        return range(min(self.guard.size, _GUARD_EXAMPLES))

    def modes(self, candidate: Candidate) -> list[str | None]:
        """Sources of running statistics to try; the first is taken unless another proves better.

        A checkpoint has statistics of its own; no training run has had a mean's weights.
        """
        if not has_batch_norm(self.engine.live.module):
            return [None]
        own = bool((candidate.alphas == 1.0).any(1).all())
        if self.batch_norm != "auto":
            return ["average" if own else self.batch_norm]
        if own or self.fit.size < _FEWEST_FOR_STATISTICS:
            return ["average", "reestimate", "newest"]
        return ["reestimate", "average", "newest"]

    def apply(self, alphas: Tensor, mode: str | None) -> None:
        """Sets the live model to what would be written."""
        self.engine.set_weights(alphas)
        self.engine.live.round_to_saved(self.dtype)
        if mode == "newest":
            take_newest(self.engine, self.n)
        elif mode == "reestimate":
            reestimate(self.engine, self.fit, range(min(self.fit.size, _STATISTICS_EXAMPLES)))
        if mode is not None:
            self.engine.live.round_to_saved(self.dtype)

    def score(self, candidate: Candidate) -> Scored:
        """The candidate on the guard split, with the running statistics that suit it best."""
        tried = []
        for mode in self.modes(candidate):
            self.apply(candidate.alphas, mode)
            losses, metrics = self.engine.example_losses(
                self.guard, self.guard_sample, with_metrics=self.select != "loss"
            )
            groups = self.guard.groups(self.guard_sample)
            tried.append(Scored(candidate, losses, metrics, groups, batch_norm=mode))
        return first_unless_beaten(tried, self.select)

    def on_more(self, items: Sequence[Scored]) -> list[Scored]:
        """The same with the rest of the guard split, as far as it takes part in measuring a lead.

        Nothing is chosen by the rest, so that one loss that is not finite there leaves them as they
        are.
        """
        used = len(self.guard_sample)
        rest = range(used, min(self.guard.size, _LEAD_EXAMPLES))
        if not rest:
            return list(items)
        groups, found = self.guard.groups(range(rest.stop)), []
        for item in items:
            self.apply(item.candidate.alphas, item.batch_norm)
            losses, metrics = self.engine.example_losses(
                self.guard, rest, with_metrics=self.select != "loss"
            )
            more = {name: torch.cat([item.metrics[name], metrics[name]]) for name in item.metrics}
            guard = torch.cat([item.guard, losses])
            found.append(dataclasses.replace(item, guard=guard, metrics=more, groups=groups))
        known = all(bool(item.cost_of(self.select).isfinite().all()) for item in found)
        return found if known else list(items)

    def losses(self, alphas: Tensor, mode: str | None, *parts: Sequence[int]) -> Tensor:
        """Losses of fit examples by what would be written, (M,) float64.

        Args:
            parts: the chosen ones; no batch holds examples of two parts.
        """
        self.apply(alphas, mode)
        return self.engine.losses_of_parts(self.fit, parts)

    def complete(self, scored: Sequence[Scored]) -> None:
        """Adds fit and test losses: reported, never chosen by."""
        fitted = range(min(self.fit.size, _FIT_EXAMPLES))
        for item in scored:
            self.apply(item.candidate.alphas, item.batch_norm)
            losses, _ = self.engine.example_losses(self.fit, fitted)
            item.fit_loss = float(losses.mean())
            if self.test is not None:
                losses, metrics = self.engine.example_losses(
                    self.test, range(self.test.size), with_metrics=True
                )
                item.test_loss = float(losses.mean())
                item.test_metrics = {k: float(v.mean()) for k, v in metrics.items()}

    def overrides(self, item: Scored) -> dict[str, Tensor]:
        """Running statistics to be written instead of averaged ones: name → tensor."""
        if item.batch_norm in (None, "average"):
            return {}
        self.apply(item.candidate.alphas, item.batch_norm)
        return statistics(self.engine)
