"""Which ridge: a path of fits, judged by losses on examples that none of them has seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sampling import independent, likeness, paired

# Weights of ‖z‖²/2 that `auto` tries, strongest first, so that each fit starts near the next; for
# losses whose standard deviation over the examples is about this, as that of likelihoods in nats.
RIDGES = (0.1, 0.01, 0.003, 0.001, 0.0003)
_USUAL_SPREAD = 0.4
FOLDS = 4
# A gain of a smaller share of the loss than this is not worth a further fold.
_HARDLY = 0.005
# Standard errors: the choice among several ridges looks better on the examples it was made on
# than it is, so two are not enough.
_CERTAIN = 3.0
# Of fewer examples, or groups of them, than these a standard error is itself a guess. By Student's
# t three of them are no more certain with eight groups than two of them are with many.
_FEWEST, _FEWEST_GROUPS = 30, 8
# Nats that an example pays for the way from the base. One direction gone by as much as the
# checkpoints differ in it, one standard deviation, is half a nat from a normal prior. Losses on
# unseen examples alone do not do: where all of few examples are easy, they are better the further
# a fit extrapolates, and the rare hard ones then cost more than was ever gained.
_AN_EXAMPLE_PAYS = 0.125
# Share of the losses' variance between groups from which a fold takes them as a whole. Sequences of
# source files and of docstrings have 0.2 to 0.3, copies and crops of one image nearly 1.
_ALIKE = 0.5
# A difference of this share of the loss is a tie: rounding errors must not choose between ridges.
TIE = 1e-4


@dataclass
class RidgePath:
    """Losses on unseen examples along the ridges, over the folds so far; inf is the chart's base.

    Attributes:
        groups: label of each example that takes part, (N,) int64; those of one group are alike.
        parts: the unseen examples of each fold there may be.
        scale: of the ridges that are tried.
        ends: ridge → where the fit of each fold ended.
        losses: ridge → one loss an unseen example, fold after fold.
    """

    groups: Tensor
    parts: list[list[int]]
    scale: float = 1.0
    ends: dict[float, list[Tensor]] = field(default_factory=dict)
    losses: dict[float, list[Tensor]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.groups)

    @property
    def ridges(self) -> tuple[float, ...]:
        return tuple(float(f"{self.scale * ridge:.3g}") for ridge in RIDGES)

    @property
    def folds(self) -> int:
        return len(self.losses.get(math.inf, []))

    def without(self, fold: int) -> list[int]:
        """The examples that are not in the fold."""
        unseen = set(self.parts[fold])
        return [p for p in range(self.size) if p not in unseen]

    @property
    def unseen_groups(self) -> Tensor:
        """Labels of the unseen examples, fold after fold."""
        return torch.cat([self.groups[part] for part in self.parts[: self.folds]])

    def add(self, ridge: float, z: Tensor, losses: Tensor) -> None:
        self.ends.setdefault(ridge, []).append(z)
        self.losses.setdefault(ridge, []).append(losses.nan_to_num(math.inf, posinf=math.inf))

    def complete(self) -> dict[float, Tensor]:
        """Ridges that took part in every fold → (examples,) losses."""
        return {r: torch.cat(parts) for r, parts in self.losses.items() if len(parts) == self.folds}

    def scores(self) -> dict[float, float]:
        """Ridge → mean loss on unseen examples, of those that any ridge has a finite loss of."""
        found = self.complete()
        if not found:
            return {}
        known = torch.stack(list(found.values())).isfinite().any(0)
        return {
            r: float(losses[known].mean()) if known.any() else math.inf
            for r, losses in found.items()
        }

    def best(self) -> float:
        """The ridge of least loss; inf where nothing beats the base."""
        scores = self.scores()
        return min(scores, key=lambda r: (scores[r], -r), default=math.inf)

    def choice(self) -> float:
        """The best ridge; of those that tie with it, the one that stays closest to the base.

        Where nothing beats the base that is the strongest. Not the one-standard-error rule: the
        folds train on three quarters of the examples and lean towards a strong ridge already
        (bench/quality).
        """
        scores, best = self.scores(), self.best()
        if best == math.inf:
            return self.ridges[0]
        most = scores[best] + TIE * abs(scores[best])
        return max(ridge for ridge in scores if ridge < math.inf and scores[ridge] <= most)

    def settled(self) -> bool:
        """Whether further folds would say little more.

        That is so when the choice beats the base for certain, or when even two standard errors
        more than what was found would hardly change the loss.
        """
        losses, groups = self.complete(), self.unseen_groups
        if len(groups) < _FEWEST or independent(len(groups), groups) < _FEWEST_GROUPS:
            return False
        gain, error = paired(losses[math.inf], losses[self.choice()], groups)
        return gain > _CERTAIN * error or gain + 2.0 * error < _HARDLY * self.scores()[math.inf]

    def hopeless(self, ridge: float) -> bool:
        """Whether a stronger ridge than this one does worse than the best for certain."""
        losses = self.complete()
        weakest = min(losses)
        mean, error = paired(losses[weakest], losses[self.best()], self.unseen_groups)
        return ridge < weakest < self.ridges[0] and mean > error


def scale_of(losses: Tensor) -> float:
    """The power of ten that suits the ridges to the unit of the loss, from losses (N,).

    A squared error of pixels may be 1e-4, a sum over tokens 1e3; what a ridge of 0.01 means depends
    on that. The order of magnitude is enough, the path does the rest.
    """
    spread = float(losses.std()) if len(losses) > 1 else 0.0
    if not (math.isfinite(spread) and spread > 0.0):
        return 1.0
    return 10.0 ** min(30, max(-30, round(math.log10(spread / _USUAL_SPREAD))))


def too_far(z: Tensor, examples: int) -> bool:
    """Whether coordinates (size,) are further from the base than so many examples pay for."""
    return float(z @ z) / 2 > _AN_EXAMPLE_PAYS * examples


def weaker_than(ridge: float) -> float:
    """The next ridge after those of a path: about half a power of ten further down."""
    return float(f"{ridge / 10**0.5:.2g}")


def much_alike(losses: Tensor, groups: Tensor) -> bool:
    """Whether one example's loss tells those of the others of its group, from losses (N,)."""
    # Of losses that are not finite nothing is known: they count as alike.
    return not likeness(losses, groups) < _ALIKE


def folds_of(groups: Tensor, losses: Tensor) -> list[list[int]]:
    """Positions of the unseen examples of each of four folds, or as many as there are groups.

    Whole groups go to one fold where their members are much alike, or a fit would know of each
    unseen example what the others of its group tell. Where they are not, as sequences of one text,
    it costs more to do without whole groups than is feigned (bench/quality). No folds for fewer
    examples.

    Args:
        groups: label of each example, (N,) int64.
        losses: of each example at the chart's base, (N,).
    """
    labels = groups.tolist() if much_alike(losses, groups) else range(len(groups))
    if len(labels) < FOLDS:
        return []
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    folds: list[list[int]] = [[] for _ in range(min(FOLDS, len(members)))]
    for group in sorted(members.values(), key=len, reverse=True):
        # From the last one on, and always to the shortest.
        min(reversed(folds), key=len).extend(group)
    return [sorted(fold) for fold in folds]
