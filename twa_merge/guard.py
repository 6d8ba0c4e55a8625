"""Picks the winner on the guard split, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .candidates import Candidate

RESAMPLES = 2000
_DRAWN_AT_ONCE = 1 << 20
# Fewer paired differences can all have the same sign by chance, in more than 5 % of cases
# (2 · 2^-5), and a bootstrap of them knows nothing else.
_FEWEST = 6


@dataclass
class Scored:
    """A candidate and how it did.

    Attributes:
        guard: loss per example of the guard split, (N,) float64.
        metrics: name → (N,) float64, on the guard split.
        unseen: (M,) float64, loss of examples of the fit split, where it was taken: each by
            coefficients that were fitted without it.
        crossed: (N + M,) float64, what stands for both where the candidate is the best of several:
            losses of the one that the other half of the examples would have picked.
        fit_loss, test_loss: means, where they were taken.
        batch_norm: where its running statistics came from, where there are any.
    """

    candidate: Candidate
    guard: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    unseen: Tensor | None = None
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


def finite_mean(losses: Tensor) -> float:
    """The mean, or infinity where it is not finite."""
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf


def first_unless_beaten(variants: Sequence[Scored], select: str) -> Scored:
    """The first of one candidate's variants, or one that beats it by two standard errors.

    The least of several means on a small guard split is luck more often than not, and the error of
    very few differences is itself a guess.
    """
    beating = [variants[0]]
    for other in variants[1:] if len(variants[0].guard) >= _FEWEST else ():
        gain, error = paired(variants[0].cost_of(select), other.cost_of(select))
        if gain > 2.0 * error:
            beating.append(other)
    return min(beating, key=lambda s: finite_mean(s.cost_of(select)))


def paired(losses: Tensor, others: Tensor) -> tuple[float, float]:
    """Mean of ``losses − others`` (N,) and its standard error; (0, 0) for equal ones.

    A single difference has an infinite error; the mean is infinite where one is not finite.
    """
    if torch.equal(losses, others):
        return 0.0, 0.0
    difference = losses - others
    if not bool(difference.isfinite().all()):
        return math.inf, 0.0
    count = len(difference)
    error = float(difference.std()) / count**0.5 if count > 1 else math.inf
    return float(difference.mean()), error


@dataclass(frozen=True)
class Improvement:
    """Mean of a paired difference on the guard split and its 95 % interval; positive is better."""

    over: str
    mean: float
    low: float
    high: float
    examples: int

    @property
    def enough(self) -> bool:
        """Whether there are examples enough for the interval to mean anything."""
        return self.examples >= _FEWEST

    @property
    def certain(self) -> bool:
        """Whether the interval lies above zero. One without width is of one example, repeated."""
        return self.high > self.low > 0.0 and self.enough


def pick(scored: Sequence[Scored], select: str) -> Scored:
    """The candidate of least mean cost; ties go to the simpler one, then to the earlier one.

    Candidates whose guard loss or mean cost is not finite cannot win.
    """

    def key(item: Scored) -> tuple[bool, float, int]:
        mean = _mean_cost(item, select)
        finite = bool(item.guard.isfinite().all()) and math.isfinite(mean)
        return not finite, mean, item.candidate.rank

    return min(scored, key=key)


def stands(cautious: Scored, best: Scored) -> bool:
    """Whether a cautious choice stays although another has less loss: by less than one error.

    The least of several noisy means flatters itself, and on few examples a bold candidate can be
    ahead because they hold no outlier. Equal losses are a tie, which nothing needs to withstand.
    """
    gain, error = paired(cautious.evidence("loss"), best.evidence("loss"))
    return gain <= error and _mean_cost(best, "loss") < _mean_cost(cautious, "loss")


def _mean_cost(item: Scored, select: str) -> float:
    """Means that are equal up to the rounding of a mean over float32 losses are a tie."""
    return float(f"{float(item.evidence(select).mean()):.7g}")


def improvement(winner: Scored, other: Scored, select: str, seed: int) -> Improvement:
    """How much better the winner is than another candidate on the same examples.

    A paired percentile bootstrap over examples, 2,000 resamples, drawn from ``seed``.
    """
    difference = other.cost_of(select) - winner.cost_of(select)
    low, high = bootstrap_interval(difference, seed)
    return Improvement(other.name, float(difference.mean()), low, high, len(difference))


def bootstrap_interval(values: Tensor, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` (N,) float64: an expanded percentile bootstrap.

    Plain percentiles are too narrow for few values: with normal ones by what Student's t is wider
    than the normal distribution, and by √(N / (N − 1)). The levels are moved by that much
    (Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015,
    section 4.1.3); with 1,000 values it makes no difference.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    many = max(1, _DRAWN_AT_ONCE // size)
    means = []
    for first in range(0, RESAMPLES, many):
        shape = min(many, RESAMPLES - first), size
        means.append(values[torch.randint(size, shape, generator=generator)].mean(1))
    tail = _tail(size)
    levels = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), levels).tolist()
    return low, high


def _tail(size: int) -> float:
    """The level of an expanded percentile interval's lower end, for ``size`` values."""
    degrees = max(1, size - 1)
    # Student's quantile (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    z = 1.959964
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return math.erfc(t * math.sqrt((degrees + 1) / degrees) / math.sqrt(2.0)) / 2
