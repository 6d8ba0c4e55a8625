"""The implicit basis against explicit float64 linear algebra."""

from __future__ import annotations

import pytest
import torch

from twa_merge.subspace import (
    Chart,
    GramAccumulator,
    make_subspace,
    orthogonality_error,
    random_subspace,
    with_centre,
)


def centred(weights: torch.Tensor) -> torch.Tensor:
    return weights.double() - weights.double().mean(0)


def explicit_basis(subspace, offsets: torch.Tensor) -> torch.Tensor:
    """P = Λ^(-1/2) Uᵀ Δ, formed in full."""
    return (subspace.directions / subspace.eigenvalues.sqrt()).T @ offsets


def linear_span(weights: torch.Tensor):
    """The span of the weights themselves, from sums that a pass over them gives."""
    centre, offsets = weights.double().mean(0), centred(weights)
    subspace = make_subspace(offsets @ offsets.T)
    return with_centre(subspace, centre @ centre, offsets @ centre)


def test_64_nearly_parallel_checkpoints_give_an_orthonormal_basis():
    torch.manual_seed(0)
    base, drift = torch.randn(20_000), torch.randn(20_000)
    weights = torch.stack([base + 0.01 * t * drift + 1e-4 * torch.randn(20_000) for t in range(64)])
    offsets = centred(weights)
    subspace = make_subspace(offsets @ offsets.T)
    assert subspace.rank == 63
    basis = explicit_basis(subspace, offsets)
    assert (basis @ basis.T - torch.eye(63)).abs().max() < 1e-5
    # The same basis out of offsets that were rounded to float32, as a store keeps them.
    single = explicit_basis(subspace, offsets.float().double())
    assert (single @ single.T - torch.eye(63)).abs().max() < 1e-5


def test_the_reported_error_is_that_of_the_explicit_basis():
    torch.manual_seed(1)
    offsets = centred(torch.randn(6, 500))
    noisy = offsets + 0.05 * torch.randn_like(offsets)
    subspace = make_subspace(offsets @ offsets.T)
    basis = explicit_basis(subspace, noisy)
    expected = (basis @ basis.T - torch.eye(5)).abs().max()
    assert abs(orthogonality_error(subspace, noisy @ noisy.T) - expected) < 1e-12


def test_duplicates_and_dependent_checkpoints_lower_the_rank():
    torch.manual_seed(2)
    a, b = torch.randn(2, 300)
    offsets = centred(torch.stack([a, b, a, b, (a + b) / 2]))
    subspace = make_subspace(offsets @ offsets.T)
    assert subspace.rank == 1
    assert abs(sum(subspace.explained) - 1.0) < 1e-12


def test_identical_checkpoints_have_rank_zero():
    subspace = make_subspace(torch.zeros(4, 4, dtype=torch.float64))
    assert subspace.rank == 0
    chart = Chart(torch.full((1, 4), 0.25, dtype=torch.float64), [subspace])
    assert torch.equal(chart.alphas(torch.zeros(0, dtype=torch.float64)), chart.base)


def test_what_float64_rounds_of_the_centre_is_no_direction():
    weights = torch.full((3, 1000), 0.1, dtype=torch.float64)
    offsets = weights - weights.mean(0)
    gram, square = offsets @ offsets.T, float(weights[0] @ weights[0])
    assert make_subspace(gram).rank == 1, "there is something to be rounded"
    assert make_subspace(gram, centre=square).rank == 0
    real = 1e-9 * centred(torch.randn(3, 1000))
    assert make_subspace(real @ real.T, centre=square).rank == 2


def test_coordinates_count_standard_deviations_of_the_checkpoints():
    torch.manual_seed(3)
    weights = torch.randn(7, 400)
    offsets = centred(weights)
    subspace = make_subspace(offsets @ offsets.T)
    coordinates = torch.stack(
        [subspace.coordinates(torch.eye(7, dtype=torch.float64)[i]) for i in range(7)]
    )
    torch.testing.assert_close(
        coordinates.square().mean(0), torch.ones(6, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_moving_along_an_axis_moves_the_weights_along_it():
    torch.manual_seed(4)
    weights = torch.randn(5, 300)
    offsets = centred(weights)
    subspace = make_subspace(offsets @ offsets.T)
    chart = Chart(torch.full((1, 5), 0.2, dtype=torch.float64), [subspace])
    z = torch.randn(4, dtype=torch.float64)
    alpha = chart.alphas(z)[0]
    assert abs(float(alpha.sum()) - 1.0) < 1e-12
    basis = explicit_basis(subspace, offsets)
    expected = weights.double().mean(0) + (z * (subspace.eigenvalues / 5).sqrt()) @ basis
    torch.testing.assert_close(alpha @ weights.double(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(subspace.coordinates(alpha), z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_the_accumulator_adds_up_slices(n):
    torch.manual_seed(5)
    offsets = torch.randn(n, 1000, dtype=torch.float64)
    grams = GramAccumulator(2, n)
    for part in offsets.split(130, dim=1):
        grams.add(1, part)
    torch.testing.assert_close(grams.gram[1], offsets @ offsets.T)
    assert not grams.gram[0].any()


def test_the_decomposition_does_not_depend_on_the_order_of_summation():
    torch.manual_seed(6)
    offsets = centred(torch.randn(6, 5000))
    gram = offsets @ offsets.T
    other = sum(part @ part.T for part in offsets.split(77, dim=1))
    torch.testing.assert_close(
        make_subspace(gram).directions, make_subspace(other).directions, rtol=1e-8, atol=1e-8
    )


def test_the_linear_span_of_64_nearly_parallel_checkpoints_is_orthonormal_and_whole():
    torch.manual_seed(7)
    base, drift = torch.randn(20_000), torch.randn(20_000)
    weights = torch.stack([base + 0.01 * t * drift + 1e-4 * torch.randn(20_000) for t in range(64)])
    subspace = linear_span(weights)
    assert (subspace.rank, subspace.centred, subspace.span) == (64, 63, "linear")
    basis = explicit_basis(subspace, weights.double())
    assert (basis @ basis.T - torch.eye(64)).abs().max() < 1e-5
    left = weights.double() - weights.double() @ basis.T @ basis
    assert left.norm(dim=1).max() < 1e-5 * weights.double().norm(dim=1).min()
    offsets, centre = centred(weights), weights.double().mean(0)
    error = orthogonality_error(subspace, offsets @ offsets.T, centre @ centre, offsets @ centre)
    assert error < 1e-5


def test_a_centre_inside_the_affine_span_adds_no_axis():
    torch.manual_seed(8)
    assert linear_span(torch.randn(5, 3)).span == "affine"
    # Five points of a plane that misses the origin: two axes, and the third one through it.
    assert linear_span(torch.randn(5, 2) @ torch.eye(2, 3) + torch.ones(3)).rank == 3


def test_coordinates_of_the_linear_span_are_places_in_weight_space():
    torch.manual_seed(9)
    weights = torch.randn(5, 300) + torch.randn(300)
    subspace = linear_span(weights)
    chart = Chart(torch.full((1, 5), 0.2, dtype=torch.float64), [subspace])
    assert chart.linear
    z = torch.randn(5, dtype=torch.float64)
    alpha = chart.alphas(z)[0]
    basis = explicit_basis(subspace, weights.double())
    expected = weights.double().mean(0) + (z * (subspace.eigenvalues / 5).sqrt()) @ basis
    torch.testing.assert_close(alpha @ weights.double(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(subspace.coordinates(alpha), z, rtol=1e-9, atol=1e-9)
    # One unit along the last axis is all that the centre has beside the offsets.
    assert abs(float(alpha.sum()) - 1 - float(z[-1])) < 1e-12
    assert subspace.explained[-1] == 0
    assert abs(sum(subspace.explained) - 1) < 1e-12
    assert subspace.leading(9).rank == 4


def test_the_reported_error_of_the_linear_span_is_that_of_the_explicit_basis():
    torch.manual_seed(10)
    weights = (torch.randn(6, 500) + torch.randn(500)).double()
    subspace = linear_span(weights)
    noisy = weights + 0.05 * torch.randn_like(weights)
    basis = explicit_basis(subspace, noisy)
    expected = (basis @ basis.T - torch.eye(6)).abs().max()
    offsets, centre = centred(noisy), noisy.mean(0)
    error = orthogonality_error(subspace, offsets @ offsets.T, centre @ centre, offsets @ centre)
    assert abs(error - expected) < 1e-12


def test_random_directions_are_made_orthonormal_and_one_unit_has_the_length_asked_for():
    torch.manual_seed(11)
    directions = torch.randn(4, 200).sign().double()
    directions = torch.cat([directions, directions[:1]])
    gram = directions @ directions.T
    subspace = random_subspace(3, gram, 2.5)
    assert (subspace.rank, subspace.n, subspace.centred) == (4, 8, 0)
    chart = Chart(torch.full((1, 8), 0.1, dtype=torch.float64), [subspace])
    steps = [chart.alphas(unit)[0] - 0.1 for unit in torch.eye(4, dtype=torch.float64)]
    assert all(not step[:3].any() for step in steps)
    moved = torch.stack([step[3:] @ directions for step in steps])
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(moved @ moved.T, 2.5**2 * eye, rtol=0, atol=1e-12)
    padded = torch.nn.functional.pad(gram, (3, 0, 3, 0))
    assert orthogonality_error(subspace, padded) < 1e-12
    assert subspace.explained == [0.0] * 4


def test_blocks_of_one_group_move_together():
    torch.manual_seed(5)
    grams = [make_subspace(o @ o.T) for o in (centred(torch.randn(4, 50)) for _ in range(2))]
    chart = Chart(torch.full((3, 4), 0.25).double(), grams, torch.tensor([0, 1, 0]))
    z, products = torch.randn(chart.size).double(), torch.randn(3, 4).double()
    steps = chart.alphas(z) - chart.base
    assert torch.equal(steps[0], steps[2])
    assert not torch.equal(steps[0], steps[1])
    # The gradient is the transpose of what the coordinates do.
    assert float(chart.gradient(products) @ z) == pytest.approx(float((products * steps).sum()))
