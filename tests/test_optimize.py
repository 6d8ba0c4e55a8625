"""Optimizers on functions whose minimum is known."""

from __future__ import annotations

import math

import pytest
import torch

from twa_merge.optimize import lbfgs, schedule_factor


def quadratic(size: int = 20, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian = a @ a.T / size + 0.2 * torch.eye(size, dtype=torch.float64)
    slope = torch.randn(size, generator=generator, dtype=torch.float64)
    optimum = torch.linalg.solve(hessian, slope)

    def function(z):
        return float(0.5 * z @ hessian @ z - slope @ z + 100), hessian @ z - slope

    return function, optimum


def zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.float64)


def test_lbfgs_finds_the_optimum_of_a_quadratic():
    function, optimum = quadratic()
    result = lbfgs(function, zeros(20), max_evaluations=200, tolerance=1e-15)
    assert result.converged
    torch.testing.assert_close(result.z, optimum, rtol=1e-5, atol=1e-5)


def test_the_limit_of_evaluations_is_kept_and_the_best_point_returned():
    function, _ = quadratic()
    result = lbfgs(function, zeros(20), max_evaluations=5, tolerance=0.0)
    assert len(result.trace) == 5
    assert not result.converged
    assert result.loss == min(loss for _, loss in result.trace)
    assert function(result.z)[0] == result.loss


def test_what_is_known_under_one_ridge_saves_an_evaluation_under_the_next():
    plain, _ = quadratic()

    def ridged(ridge):
        def function(z):
            loss, gradient = plain(z)
            return loss + ridge / 2 * float(z @ z), gradient + ridge * z

        return function

    strong = lbfgs(ridged(0.1), zeros(20), max_evaluations=6, tolerance=0.0, ridge=0.1)
    known = strong.with_ridge(0.01)
    loss, gradient = ridged(0.01)(strong.z)
    assert known is not None
    assert known[0] == pytest.approx(loss, rel=1e-13)
    torch.testing.assert_close(known[1], gradient, rtol=1e-12, atol=1e-12)

    told, asked = (
        lbfgs(
            ridged(0.01), strong.z, max_evaluations=6, tolerance=0.0, ridge=0.01, at_start=at_start
        )
        for at_start in (known, None)
    )
    assert [len(told.trace), len(asked.trace)] == [5, 6]
    torch.testing.assert_close(told.z, asked.z, rtol=1e-9, atol=1e-9)


def test_a_wall_of_nan_is_backed_away_from():
    def function(z):
        x = float(z[0])
        if x > 1.5:
            return math.nan, torch.full_like(z, math.nan)
        return (x - 1.4) ** 2 * 50, torch.tensor([100 * (x - 1.4)], dtype=torch.float64)

    result = lbfgs(function, zeros(1), max_evaluations=40, tolerance=1e-12)
    assert math.isfinite(result.loss)
    assert result.loss < 50 * 1.4**2 / 100


def test_a_start_that_is_not_finite_ends_at_once():
    result = lbfgs(
        lambda z: (math.nan, torch.full_like(z, math.nan)),
        zeros(3),
        max_evaluations=10,
        tolerance=1e-9,
    )
    assert result.loss == math.inf
    assert torch.equal(result.z, zeros(3))


def test_the_same_function_gives_the_same_answer_to_the_bit():
    function, _ = quadratic()
    first = lbfgs(function, zeros(20), max_evaluations=30, tolerance=1e-12)
    second = lbfgs(function, zeros(20), max_evaluations=30, tolerance=1e-12)
    assert torch.equal(first.z, second.z)


def test_rounding_errors_of_the_loss_are_not_blown_up():
    """Ranks add up in other orders: their losses and gradients differ in the eighth digit."""
    function, _ = quadratic()

    def flat(z, add=0.0):
        # As flat as losses are along the axes of a subspace: a gradient that is short of one.
        loss, gradient = function(z)
        noise = add * torch.cos(1e6 * z.sum() + torch.arange(20))
        return 0.005 * loss + float(noise[0]), 0.005 * gradient + noise

    ends = [
        lbfgs(lambda z, add=add: flat(z, add), zeros(20), max_evaluations=40, tolerance=1e-7).z
        for add in (0.0, 1e-8, -1e-8)
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("unit", [2.0**-12, 2.0**-30, 2.0**-50])
def test_the_unit_of_a_small_loss_changes_nothing(unit):
    """A power of two changes no digit of what is computed."""
    function, _ = quadratic(8)

    def plain(z):
        loss, gradient = function(z)
        return (loss - 99) / 16, gradient / 16

    def small(z):
        loss, gradient = plain(z)
        return unit * loss, unit * gradient

    expected = lbfgs(plain, zeros(8), max_evaluations=60, tolerance=1e-6)
    found = lbfgs(small, zeros(8), max_evaluations=60, tolerance=1e-6)
    assert found.converged
    assert plain(found.z)[0] == pytest.approx(expected.loss, rel=1e-6)
    assert len(found.trace) <= len(expected.trace) + 2


def test_no_coordinates_is_one_evaluation():
    result = lbfgs(lambda z: (3.0, z), zeros(0), max_evaluations=9, tolerance=1e-9)
    assert result.loss == 3.0
    assert result.converged


def test_schedules_end_where_they_should():
    assert schedule_factor("constant", 9, 10) == 1.0
    assert schedule_factor("linear", 5, 10) == 0.5
    assert abs(schedule_factor("cosine", 5, 10) - 0.5) < 1e-12
    assert [round(schedule_factor("step", s, 8), 6) for s in (0, 4, 6)] == [1.0, 0.1, 0.01]
