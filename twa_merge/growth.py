"""A fit whose sample grows until the answer no longer moves by more than its statistical error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .fits import Fits
from .optimize import FitResult
from .ridge import TIE, much_alike, weaker_than
from .sampling import paired
from .subspace import Chart


def grow(
    fits: Fits, name: str, chart: Chart, ridge: float, *, weaker: bool
) -> tuple[FitResult, int]:
    """Fits a sample that doubles until the answer moves by less than its statistical error.

    Args:
        weaker: look for a weaker ridge each time, too; where there is one, it goes on.

    Returns:
        The last fit and the number of examples it used.
    """
    size = fits.grown()
    # Not where the ridge's path ended: its short fits amplify rounding errors.
    start = torch.zeros(chart.size, dtype=torch.float64)
    result = fits.minimise(name, chart, range(size), ridge, start, fits.whole(size))
    moved = True
    while size < fits.limit and math.isfinite(result.loss):
        larger, found = fits.grown(2 * size), result
        if weaker:
            found = _weakened(fits, name, chart, range(size), range(size, larger), result)
            ridge = float(f"{found.ridge * size / larger:.3g}")
        if not moved and found is result:
            break
        size = larger
        result = fits.minimise(name, chart, range(size), ridge, found.z, fits.whole(size))
        moved = _still_moves(fits, chart, found.z, result.z, range(size))
    return result, size


def _weakened(
    fits: Fits, name: str, chart: Chart, known: range, fresh: range, result: FitResult
) -> FitResult:
    """The fit of the known examples whose ridge the fresh ones prefer, from ``result``'s on.

    What holds a fit of few examples back costs one of many: against a prior of one and the
    same width the ridge of a mean over N examples falls as 1/N.
    """
    if not chart.size:
        return result
    base, losses = (fits.losses(a, fresh) for a in (chart.base, chart.alphas(result.z)))
    unseen = _unlike(fits, losses, known, fresh)
    groups = fits.batches.groups(fresh)[unseen]
    least = TIE * abs(float(base[base.isfinite()].mean()))
    while len(unseen):
        other = fits.minimise(name, chart, known, weaker_than(result.ridge), result, fits.trial())
        others = fits.losses(chart.alphas(other.z), fresh)
        gain, error = paired(losses[unseen], others[unseen], groups)
        if not gain > max(error, least):
            break
        result, losses = other, others
    return result


def _unlike(fits: Fits, losses: Tensor, known: range, fresh: range) -> Tensor:
    """Which of the fresh examples, with these losses, the known ones do not tell of."""
    groups = fits.batches.groups(fresh)
    if not much_alike(losses, groups):
        return torch.arange(len(fresh))
    told = torch.isin(groups, fits.batches.groups(known))
    return (~told).nonzero().flatten()


def _still_moves(fits: Fits, chart: Chart, old: Tensor, new: Tensor, chosen: Sequence[int]) -> bool:
    """Whether the larger sample's answer is better on it by more than one standard error."""
    if torch.equal(old, new):
        return False
    losses, others = (fits.losses(chart.alphas(z), chosen) for z in (old, new))
    gain, error = paired(losses, others, fits.batches.groups(chosen))
    return gain > error
