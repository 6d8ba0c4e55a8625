"""Picks the winner on the guard split, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .candidates import Candidate
from .sampling import bootstrap_interval, independent, paired

# Fewer paired differences can all have the same sign by chance, in more than 5 % of cases
# (2 · 2^-5), and a bootstrap of them knows nothing else.
_FEWEST = 6


@dataclass
class Scored:
    """A candidate and how it did.

    Attributes:
        guard: loss per example of the guard split, (N,) float64.
        metrics: name → (N,) float64, on the guard split.
        groups: label of each example of the guard split, (N,) int64; those of one group are alike.
        unseen: (M,) float64, loss of examples of the fit split, where it was taken: each by
            coefficients that were fitted without it.
        unseen_groups: their labels, (M,) int64; no group is on both sides.
        crossed: (N + M,) float64, what stands for both where the candidate is the best of several:
            losses of the one that the other half of the examples would have picked.
        fit_loss, test_loss: means, where they were taken.
        batch_norm: where its running statistics came from, where there are any.
    """

    candidate: Candidate
    guard: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    groups: Tensor | None = None
    unseen: Tensor | None = None
    unseen_groups: Tensor | None = None
    crossed: Tensor | None = None
    fit_loss: float | None = None
    test_loss: float | None = None
    test_metrics: dict[str, float] = field(default_factory=dict)
    batch_norm: str | None = None

    @property
    def name(self) -> str:
        return self.candidate.name

    def cost_of(self, select: str) -> Tensor:
        """What the winner has least of, per example: the loss, or minus the selected metric."""
        return self.guard if select == "loss" else -self.metrics[select.removeprefix("metric:")]

    def evidence(self, select: str) -> Tensor:
        """Cost of every example that the candidate can be judged by, (N,) or (N + M,)."""
        if self.crossed is not None:
            return self.crossed
        cost = self.cost_of(select)
        return cost if self.unseen is None else torch.cat([cost, self.unseen])

    @property
    def evidence_groups(self) -> Tensor | None:
        """Labels of the examples of ``evidence``; None: every example is a group of its own."""
        if self.groups is None or self.unseen is None or self.unseen_groups is None:
            return self.groups
        return torch.cat([self.groups, self.unseen_groups + int(self.groups.max()) + 1])


def finite_mean(losses: Tensor) -> float:
    """The mean, or infinity where it is not finite."""
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf


def first_unless_beaten(variants: Sequence[Scored], select: str) -> Scored:
    """The first of one candidate's variants, or one that beats it by two standard errors.

    The least of several means on a small guard split is luck more often than not, and the error of
    very few differences is itself a guess.
    """
    first = variants[0]
    beating, known = [first], independent(len(first.guard), first.groups)
    for other in variants[1:] if known >= _FEWEST else ():
        gain, error = paired(first.cost_of(select), other.cost_of(select), first.groups)
        if gain > 2.0 * error:
            beating.append(other)
    return min(beating, key=lambda s: finite_mean(s.cost_of(select)))


@dataclass(frozen=True)
class Improvement:
    """Mean of a paired difference on the guard split and its 95 % interval; positive is better.

    Attributes:
        low, high: of the interval; NaN where all examples are of one group.
        groups: of examples that are alike, drawn as a whole; as many as examples where there are
            none.
    """

    over: str
    mean: float
    low: float
    high: float
    examples: int
    groups: int

    @property
    def enough(self) -> bool:
        """Whether there are groups enough for the interval to mean anything."""
        return self.groups >= _FEWEST

    @property
    def certain(self) -> bool:
        """Whether the interval lies above zero. One without width is of one example, repeated."""
        return self.high > self.low > 0.0 and self.enough


def pick(scored: Sequence[Scored], select: str) -> Scored:
    """The candidate of least mean cost; ties go to the simpler one, then to the earlier one.

    Ties of a metric, which may have few values, go to the lower loss before that. Candidates whose
    guard loss or mean cost is not finite cannot win.
    """

    def key(item: Scored) -> tuple[bool, float, float, int]:
        mean = _mean_cost(item, select)
        finite = bool(item.guard.isfinite().all()) and math.isfinite(mean)
        loss = mean if select == "loss" else float(f"{float(item.guard.mean()):.7g}")
        return not finite, mean, loss, item.candidate.complexity

    return min(scored, key=key)


def stands(cautious: Scored, best: Scored) -> bool:
    """Whether a cautious choice stays although another has less loss: by less than one error.

    The least of several noisy means flatters itself, and on few examples a bold candidate can be
    ahead because they hold no outlier. Equal losses are a tie, which nothing needs to withstand.
    """
    losses = cautious.evidence("loss"), best.evidence("loss")
    gain, error = paired(*losses, cautious.evidence_groups)
    return gain <= error and is_ahead(best, cautious)


def is_ahead(one: Scored, other: Scored) -> bool:
    """Whether its mean loss is less than the other's."""
    return _mean_cost(one, "loss") < _mean_cost(other, "loss")


def _mean_cost(item: Scored, select: str) -> float:
    """Means that are equal up to the rounding of a mean over float32 losses are a tie."""
    return float(f"{float(item.evidence(select).mean()):.7g}")


def improvement(winner: Scored, other: Scored, select: str, seed: int) -> Improvement:
    """How much better the winner is than another candidate on the same examples.

    A paired percentile bootstrap over examples, or their groups: 2,000 resamples, drawn from
    ``seed``.
    """
    difference = other.cost_of(select) - winner.cost_of(select)
    low, high = bootstrap_interval(difference, seed, winner.groups)
    size = len(difference)
    known = independent(size, winner.groups)
    return Improvement(other.name, float(difference.mean()), low, high, size, known)
