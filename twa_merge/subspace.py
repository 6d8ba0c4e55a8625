"""Gram matrix of the offsets → rank → coordinates. Pure mathematics over n-sized matrices.

Trainable Weight Averaging (arXiv 2205.13104, section 3) trains in an orthonormal basis of the
span of the checkpoints. Here that basis, P = Λ^(-1/2) Uᵀ Δ with ΔΔᵀ = U Λ Uᵀ, is never formed: the
gradient in coordinates and the coefficients follow from U and n dot products with the offsets. The
paper's own span is ``linear``, of the checkpoints instead of their offsets: one axis more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# An eigenvalue's relative error is about eps(float64) · λ_max / λ; below this ratio the direction
# would be orthonormal to fewer than five digits.
RANK_TOLERANCE = 1e-9


class GramAccumulator:
    """Adds up G_b = Σ Δ Δᵀ over row slices, one n × n matrix for each of B groups of tensors."""

    def __init__(self, groups: int, n: int) -> None:
        self.gram = torch.zeros(groups, n, n, dtype=torch.float64)

    def add(self, group: int, offsets: Tensor) -> None:
        """Adds the offsets (n, m) float64 of m numbers of one tensor."""
        # The upper right quarter is the lower left one again.
        gram, half = self.gram[group], len(offsets) // 2
        gram[:half, :half].addmm_(offsets[:half], offsets[:half].T)
        gram[half:].addmm_(offsets[half:], offsets.T)
        gram[:half, half:] = gram[half:, :half].T


@dataclass(frozen=True)
class Subspace:
    """Span of the offsets, or one like it, as an implicit orthonormal basis.

    Attributes:
        directions: U, eigenvectors of the Gram matrix, (n, r) float64.
        eigenvalues: Λ, descending, (r,) float64; λ_j / n is the variance of the checkpoints along
            axis j.
        total: trace of the Gram matrix.
        span: ``affine``; ``linear`` has one axis more, at the end, see ``with_centre``; ``random``
            has axes in random directions only, see ``random_subspace``. In those axes λ_j / n is
            the square of one unit of z.
    """

    directions: Tensor
    eigenvalues: Tensor
    total: float
    span: str = "affine"

    @property
    def n(self) -> int:
        return self.directions.shape[0]

    @property
    def rank(self) -> int:
        return self.directions.shape[1]

    @property
    def centred(self) -> int:
        """How many axes, the first ones, lie in the span of the offsets."""
        return {"affine": self.rank, "linear": self.rank - 1, "random": 0}[self.span]

    @property
    def explained(self) -> list[float]:
        """Share of the checkpoints' variance along each axis, r numbers.

        Zero for the axes that do not come from the offsets: what these are is another question.
        """
        shares = self.eigenvalues / max(self.total, 1e-300)
        return shares[: self.centred].tolist() + [0.0] * (self.rank - self.centred)

    def steps(self, z: Tensor) -> Tensor:
        """Change of the coefficients, (n,), for coordinates z (r,): U z / √n.

        It sums to zero in the affine span.
        """
        return self.directions @ z / self.n**0.5

    def coordinates(self, alpha: Tensor) -> Tensor:
        """Coordinates (r,) of coefficients (n,), the uniform mean being the origin.

        In the affine span these are √n Uᵀ α, since UᵀU = I and Uᵀ1 = 0.
        """
        return torch.linalg.pinv(self.directions) @ (alpha - 1.0 / self.n) * self.n**0.5

    def gradient(self, products: Tensor) -> Tensor:
        """∇_z (r,) = Uᵀ s / √n from s_i = ⟨Δ_i, ∇_w⟩ (n,); in the linear span, ⟨w_i, ∇_w⟩."""
        return self.directions.T @ products / self.n**0.5

    def leading(self, rank: int) -> Subspace:
        """The ``rank`` directions of largest variance: PCA of the trajectory."""
        rank = min(rank, self.centred)
        return Subspace(self.directions[:, :rank], self.eigenvalues[:rank], self.total)


def make_subspace(
    gram: Tensor, tolerance: float = RANK_TOLERANCE, *, centre: float = 0.0
) -> Subspace:
    """Eigendecomposition of a Gram matrix (n, n) float64, cut at its numerical rank.

    Identical or linearly dependent checkpoints lower the rank and do no harm.

    Args:
        centre: ‖c‖²: offsets that are no more than what float64 rounds of it are none.
    """
    values, directions = _axes(gram, tolerance)
    offsets = values > len(gram) * (4.0 * torch.finfo(torch.float64).eps) ** 2 * centre
    values, directions = values[offsets], directions[:, offsets]
    # Rounding leaves U a trace of the vector of ones, which would break Σ α = 1.
    directions = directions - directions.mean(0)
    return Subspace(_signed(directions), values, float(gram.trace()))


def with_centre(affine: Subspace, centre: Tensor, cross: Tensor) -> Subspace:
    """The span of the checkpoints themselves, as in the paper: Σ α need not be one.

    It holds one axis more than the affine span, along what of the centre c is orthogonal to that:
    c − Σ_j ⟨p_j, c⟩ p_j with ⟨p_j, c⟩ = (Uᵀ⟨c, Δ⟩)_j / √λ_j. One unit of z is its whole length.
    Where nothing of the centre is left, the affine span holds the checkpoints already.

    Args:
        centre: ‖c‖², one float64 number.
        cross: ⟨c, Δ_i⟩, (n,) float64.
    """
    n, square = affine.n, float(centre)
    roots = affine.eigenvalues.sqrt()
    inner = affine.directions.T @ cross / roots
    rest = square - float(inner @ inner)
    if rest <= RANK_TOLERANCE * square:
        return affine
    axis = n**0.5 * (1.0 / n - affine.directions @ (inner / roots))
    return Subspace(
        torch.cat([affine.directions, axis[:, None]], 1),
        torch.cat([affine.eigenvalues, affine.eigenvalues.new_tensor([n * rest])]),
        affine.total,
        "linear",
    )


def random_subspace(n: int, gram: Tensor, length: float) -> Subspace:
    """The span of R random directions, whose coefficients stand behind those of n checkpoints.

    Args:
        gram: (R, R) float64, of the random directions.
        length: of one unit of z.
    """
    values, vectors = _axes(gram, RANK_TOLERANCE)
    size, rank = n + len(gram), len(values)
    inside = _signed(vectors) / values.sqrt() * (size**0.5 * length)
    return Subspace(
        torch.cat([inside.new_zeros(n, rank), inside]),
        inside.new_full((rank,), size * length**2),
        0.0,
        "random",
    )


def root_mean_square(gram: Tensor) -> float:
    """Distance of the checkpoints from their centre, root mean square, from their Gram matrix."""
    return (float(gram.trace()) / len(gram)) ** 0.5


def _axes(gram: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues (r,), descending, and eigenvectors (n, r), cut at the numerical rank."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > tolerance * values[0].clamp(min=0.0)
    return values[keep], vectors[:, keep]


def _signed(directions: Tensor) -> Tensor:
    """An eigenvector's sign is arbitrary: fixes it, so that machines and ranks agree."""
    if directions.numel() == 0:
        return directions
    largest = directions.abs().argmax(0)
    return directions * directions.gather(0, largest[None]).sign()


def orthogonality_error(
    subspace: Subspace,
    gram: Tensor,
    centre: Tensor | float = 0.0,
    cross: Tensor | None = None,
) -> float:
    """max |P Pᵀ − I| of the basis for offsets whose Gram matrix is ``gram`` (n, n).

    ``gram`` belongs to the offsets rounded to float32, as the widest store has them. With
    ``centre`` and ``cross``, as in ``with_centre``, the basis is of the checkpoints, whose Gram
    matrix is G + ⟨c, Δ⟩1ᵀ + 1⟨c, Δ⟩ᵀ + ‖c‖²11ᵀ.
    """
    if subspace.rank == 0:
        return 0.0
    scaled = subspace.directions / subspace.eigenvalues.sqrt()
    found = scaled.T @ gram @ scaled
    if cross is not None:
        # Term by term: next to ‖c‖² the offsets would be lost.
        ones, along = scaled.sum(0), scaled.T @ cross
        found += along.outer(ones) + ones.outer(along) + float(centre) * ones.outer(ones)
    error = found - torch.eye(subspace.rank, dtype=torch.float64)
    return float(error.abs().max())


def add_up(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums (count, …) of the rows of ``values`` (B, …) that belong to each group, (B,) int64."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, groups, values)


@dataclass(frozen=True)
class Chart:
    """Coordinates of all blocks at once, around given coefficients.

    α_b(z) = base_b + U_g z_g / √n for every block b of group g. The base is a point of the chart
    (z = 0), so a second stage around an earlier solution can always return to it.

    Attributes:
        base: (B, n) float64.
        subspaces: one a group of blocks, G of them; ranks may differ, zero included.
        groups: the group of each block, (B,) int64; None: every block is a group of its own.
    """

    base: Tensor
    subspaces: Sequence[Subspace]
    groups: Tensor | None = None

    @property
    def size(self) -> int:
        return sum(s.rank for s in self.subspaces)

    @property
    def linear(self) -> bool:
        """Whether the gradient needs ⟨w_i, ∇_w⟩ in place of ⟨Δ_i, ∇_w⟩."""
        return any(s.span == "linear" for s in self.subspaces)

    def around(self, base: Tensor) -> Chart:
        """The same coordinates around another base, (1, n) or (B, n)."""
        return replace(self, base=base.expand_as(self.base).clone())

    def alphas(self, z: Tensor) -> Tensor:
        """Coefficients (B, n) at coordinates z (size,)."""
        parts = z.split([s.rank for s in self.subspaces])
        steps = torch.stack([s.steps(p) for s, p in zip(self.subspaces, parts, strict=True)])
        return self.base + (steps if self.groups is None else steps[self.groups])

    def gradient(self, products: Tensor) -> Tensor:
        """∇_z (size,) from s (B, n)."""
        if self.groups is not None:
            products = add_up(products, self.groups, len(self.subspaces))
        return torch.cat([s.gradient(p) for s, p in zip(self.subspaces, products, strict=True)])
