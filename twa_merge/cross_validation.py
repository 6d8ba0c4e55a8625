"""Cross-validates the ridge: fits without each fold of the fit examples, judged on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fits import Fits
from .fitted import Fitted
from .optimize import FitResult
from .ridge import RidgePath, folds_of, scale_of, too_far
from .subspace import Chart

_SAMPLE = 256


def cross_validate(
    fits: Fits, name: str, chart: Chart, before: Fitted | None, folds: int | None
) -> RidgePath:
    """Cross-validates the ridge, fold by fold until its gain on unseen examples is settled.

    Args:
        before: the stage whose solution the chart's base is; its folds are these.
        folds: how many of them; None: until it is settled.
    """
    sample = range(min(fits.limit, _SAMPLE))
    groups, fewest = fits.batches.groups(sample), 1
    if before and before.path:
        path = RidgePath(groups, before.path.parts, before.path.scale)
        fewest = before.path.folds
    elif chart.size:
        losses = fits.losses(chart.base, sample)
        path = RidgePath(groups, folds_of(groups, losses), scale_of(losses))
    else:
        path = RidgePath(groups, [])
    count = len(path.parts[:folds]) if chart.size else 0
    for fold in range(count):
        later = (count - fold - 1) * (len(path.ridges) + (before is not None))
        around = _without(fits, chart, before, path, fold, later + len(path.ridges))
        _extend(fits, path, name, around, fold, later)
        if folds is None and path.folds >= fewest and path.settled():
            break
    return path


def _without(
    fits: Fits, chart: Chart, before: Fitted | None, path: RidgePath, fold: int, later: int
) -> Chart:
    """The chart around what the stage before comes to without the examples of a fold.

    Args:
        later: fits that may follow.
    """
    if before is None or before.path is None:
        return chart
    ridge = before.path.choice()
    ends = before.path.ends[ridge]
    if fold == len(ends):
        stage, train = f"{before.name}/fold{fold}", path.without(fold)
        # The other folds' ends know the examples of this one.
        start = torch.zeros(before.chart.size, dtype=torch.float64)
        ends.append(fits.minimise(stage, before.chart, train, ridge, start, fits.trial(later)).z)
    return chart.around(before.without(fold))


def _extend(fits: Fits, path: RidgePath, name: str, chart: Chart, fold: int, later: int) -> None:
    """One more fold: fits with ever weaker ridge, each from the last one's end.

    In the first one all ridges become stronger where even the strongest lets the fit go too
    far: of few examples the spread of the losses says little of their unit.

    Args:
        later: fits that may follow those of this fold.
    """
    train, unseen = path.without(fold), path.parts[fold]

    def add(ridge: float, z: Tensor) -> None:
        path.add(ridge, z, fits.losses(chart.alphas(z), unseen))

    def fit(ridge: float, start: Tensor | FitResult) -> FitResult:
        effort = fits.trial(later + sum(other < ridge for other in path.ridges))
        return fits.minimise(f"{name}/fold{fold}", chart, train, ridge, start, effort)

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
