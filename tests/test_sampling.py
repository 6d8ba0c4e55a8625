"""Errors of means, where examples are alike and where they are not."""

from __future__ import annotations

import math

import pytest
import torch

from twa_merge.sampling import (
    bootstrap_interval,
    independent,
    likeness,
    paired,
    standard_error,
)


def alike(groups: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values of which the members of a group share the half of their variance."""
    shared = torch.randn(int(groups.max()) + 1, generator=generator, dtype=torch.float64)
    own = torch.randn(len(groups), generator=generator, dtype=torch.float64)
    return 0.3 + shared[groups] + own


# Plain percentiles cover it in 88 % of cases with 8 values.
@pytest.mark.parametrize("count", [8, 60])
def test_the_interval_covers_the_true_mean_about_95_times_in_100(count):
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(400):
        values = 0.3 + torch.randn(count, generator=generator, dtype=torch.float64)
        low, high = bootstrap_interval(values, trial)
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("sizes", [[8] * 12, [1, 2, 3, 4, 6, 8, 12, 20] * 3])
def test_the_interval_of_groups_covers_the_true_mean_about_95_times_in_100(sizes):
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    hits, apart = 0, 0
    for trial in range(400):
        values = alike(groups, generator)
        low, high = bootstrap_interval(values, trial, groups)
        hits += low <= 0.3 <= high
        low, high = bootstrap_interval(values, trial)
        apart += low <= 0.3 <= high
    assert 0.91 <= hits / 400 <= 0.98
    assert apart / 400 < 0.8, "as if they were not alike"


def test_the_error_of_a_mean_over_groups_is_what_it_varies_by():
    groups = torch.arange(24).repeat_interleave(torch.tensor([1, 2, 3, 4, 6, 8, 12, 20] * 3))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([alike(groups, generator) for _ in range(2000)])
    found = float(standard_error(drawn, groups).square().mean().sqrt())
    assert found == pytest.approx(float(drawn.mean(1).std()), rel=0.1)


@pytest.mark.parametrize("sizes", [[8] * 40, [1, 2, 3, 4, 6, 8, 12, 20] * 5])
def test_likeness_is_the_share_of_the_variance_between_groups(sizes):
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    found = [likeness(alike(groups, generator), groups) for _ in range(200)]
    assert sum(found) / 200 == pytest.approx(0.5, abs=0.02)
    assert likeness(groups.double(), groups) == 1.0
    own = torch.randn(len(groups), generator=generator, dtype=torch.float64)
    assert abs(likeness(own, groups)) < 0.15
    assert likeness(own, torch.arange(len(groups))) == 0.0
    assert likeness(own, torch.zeros(len(groups), dtype=torch.int64)) == 0.0


def test_examples_that_are_groups_of_their_own_change_nothing():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator, dtype=torch.float64)
    own = torch.randperm(50, generator=generator)
    assert standard_error(values, own) == standard_error(values)
    assert bootstrap_interval(values, 3, own) == bootstrap_interval(values, 3)
    assert independent(50, own) == 50


def test_one_group_says_nothing_of_its_error():
    values, groups = torch.arange(5.0).double(), torch.ones(5, dtype=torch.int64)
    assert standard_error(values, groups) == math.inf
    assert all(map(math.isnan, bootstrap_interval(values, 0, groups)))
    assert all(map(math.isnan, bootstrap_interval(values[:1], 0)))
    assert paired(values, 0 * values, groups) == (2.0, math.inf)


def test_paired_differences():
    a, b = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    mean, error = paired(a, b)
    assert abs(mean - 4 / 3) < 1e-12
    assert abs(error - (1 / 3) ** 0.5 / 3**0.5) < 1e-12
    assert paired(a, a) == (0.0, 0.0)


def test_differences_of_losses_that_are_not_finite():
    a = torch.tensor([1.0, math.inf, math.nan, 2.0]).double()
    b = torch.tensor([0.0, math.inf, math.inf, 1.5]).double()
    assert paired(a, b)[0] == 0.75, "what both lack tells nothing"
    b[1] = 3.0
    assert paired(a, b)[0] == math.inf
    assert paired(b, a)[0] == -math.inf
    b[3] = math.nan
    assert math.isnan(paired(a, b)[0])
