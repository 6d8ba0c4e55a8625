"""Means over examples and how far they may be off, where examples of one group are alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RESAMPLES = 2000
_DRAWN_AT_ONCE = 1 << 20


def independent(size: int, groups: Tensor | None) -> int:
    """How many of ``size`` examples tell something of their own: the groups, where there are any.

    Args:
        groups: label of each example, (N,) int64; None: every example is a group of its own.
    """
    return size if groups is None else len(groups.unique())


def standard_error(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """Of the means of ``values`` (…, N) float64 over their last dimension, (…).

    Infinite for one independent value. With groups it is that of a ratio of sums over whole groups
    (Cochran, Sampling Techniques, 1977, section 9A.2: the ultimate cluster estimator).
    """
    size = values.shape[-1]
    count = independent(size, groups)
    if count < 2:
        return torch.full(values.shape[:-1], math.inf, dtype=torch.float64)
    if groups is None or count == size:
        return values.std(-1) / size**0.5
    sums = _sums(values - values.mean(-1, keepdim=True), groups)
    return (sums.square().sum(-1) * count / (count - 1)).sqrt() / size


def likeness(values: Tensor, groups: Tensor) -> float:
    """Share of the variance of ``values`` (N,) that lies between groups, up to 1.

    The intraclass correlation from the one-way analysis of variance (Donner, International
    Statistical Review 54, 1986, section 2), unbiased: below zero by chance. Zero where no group has
    two members, or there is but one.
    """
    labels, place, counts = groups.unique(return_inverse=True, return_counts=True)
    count, size, sizes = len(labels), len(values), counts.to(values.dtype)
    if count in (1, size):
        return 0.0
    means = _sums(values, groups) / sizes
    between = float((sizes * (means - values.mean()).square()).sum()) / (count - 1)
    within = float((values - means[place]).square().sum()) / (size - count)
    usual = (size - float(sizes.square().sum()) / size) / (count - 1)
    total = between + (usual - 1.0) * within
    return (between - within) / total if total else 0.0


def paired(losses: Tensor, others: Tensor, groups: Tensor | None = None) -> tuple[float, float]:
    """Mean of ``losses − others`` (N,) and its standard error; (0, 0) for equal ones.

    A single difference has an infinite error. Examples of which neither loss is finite tell
    nothing; where one side alone has losses that are not, the mean is infinite, of the sign that
    says which, and NaN where both have some.
    """
    known = losses.isfinite() | others.isfinite()
    losses, others = losses[known], others[known]
    groups = groups if groups is None else groups[known]
    if torch.equal(losses, others):
        return 0.0, 0.0
    difference = _infinite(losses) - _infinite(others)
    if not bool(difference.isfinite().all()):
        return float(difference.sum()), 0.0
    return float(difference.mean()), float(standard_error(difference, groups))


def _infinite(losses: Tensor) -> Tensor:
    return losses.nan_to_num(math.inf, posinf=math.inf, neginf=-math.inf)


def bootstrap_interval(
    values: Tensor, seed: int, groups: Tensor | None = None
) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` (N,) float64: an expanded percentile bootstrap.

    Whole groups are drawn, where there are any. Plain percentiles are too narrow for few values:
    with normal ones by what Student's t is wider than the normal distribution, and by
    √(N / (N − 1)). The levels are moved by that much (Hesterberg, What Teachers Should Know About
    the Bootstrap, The American Statistician 69, 2015, section 4.1.3); with 1,000 values it makes
    no difference.

    Returns:
        Low and high end; two times NaN where there is but one independent value.
    """
    size = independent(len(values), groups)
    if size < 2:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    sums, counts = values, None
    if groups is not None and size < len(values):
        sums, counts = _sums(values, groups), _sums(torch.ones_like(values), groups)
    many = max(1, _DRAWN_AT_ONCE // size)
    means = []
    for first in range(0, RESAMPLES, many):
        drawn = torch.randint(size, (min(many, RESAMPLES - first), size), generator=generator)
        mean = sums[drawn].mean(1)
        means.append(mean if counts is None else mean / counts[drawn].mean(1))
    tail = _tail(size)
    levels = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), levels).tolist()
    return low, high


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """Sums of values (…, N) over each group, (…, G)."""
    labels, place = groups.unique(return_inverse=True)
    sums = torch.zeros(*values.shape[:-1], len(labels), dtype=values.dtype)
    return sums.index_add_(-1, place, values)


def _tail(size: int) -> float:
    """The level of an expanded percentile interval's lower end, for ``size`` values."""
    degrees = max(1, size - 1)
    # Student's quantile (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    z = 1.959964
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return math.erfc(t * math.sqrt((degrees + 1) / degrees) / math.sqrt(2.0)) / 2
