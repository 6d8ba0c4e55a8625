"""Gram matrix of the offsets → rank → coordinates. Pure mathematics over n-sized matrices.

Trainable Weight Averaging (arXiv 2205.13104, section 3) trains in an orthonormal basis of the
span of the checkpoints. Here that basis, P = Λ^(-1/2) Uᵀ Δ with ΔΔᵀ = U Λ Uᵀ, is never formed: the
gradient in coordinates and the coefficients follow from U and n dot products with the offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        self.gram[group].addmm_(offsets, offsets.T)


@dataclass(frozen=True)
class Subspace:
    """Span of the offsets, as an implicit orthonormal basis.

    Attributes:
        directions: U, eigenvectors of the Gram matrix, (n, r) float64.
        eigenvalues: Λ, descending, (r,) float64; λ_j / n is the variance of the checkpoints along
            axis j.
        total: trace of the Gram matrix.
    """

    directions: Tensor
    eigenvalues: Tensor
    total: float

    @property
    def n(self) -> int:
        return self.directions.shape[0]

    @property
    def rank(self) -> int:
        return self.directions.shape[1]

    @property
    def explained(self) -> list[float]:
        """Share of the checkpoints' variance along each axis, r numbers."""
        return (self.eigenvalues / max(self.total, 1e-300)).tolist()

    def steps(self, z: Tensor) -> Tensor:
        """Change of the coefficients, (n,), for coordinates z (r,): U z / √n. Sums to zero."""
        return self.directions @ z / self.n**0.5

    def coordinates(self, alpha: Tensor) -> Tensor:
        """Coordinates (r,) of coefficients (n,) with Σ α = 1: √n Uᵀ α, since Uᵀ1 = 0."""
        return self.directions.T @ alpha * self.n**0.5

    def gradient(self, products: Tensor) -> Tensor:
        """∇_z (r,) = Uᵀ s / √n from s_i = ⟨Δ_i, ∇_w⟩ (n,)."""
        return self.directions.T @ products / self.n**0.5

    def leading(self, rank: int) -> Subspace:
        """The ``rank`` directions of largest variance: PCA of the trajectory."""
        return Subspace(self.directions[:, :rank], self.eigenvalues[:rank], self.total)


def make_subspace(gram: Tensor, tolerance: float = RANK_TOLERANCE) -> Subspace:
    """Eigendecomposition of a Gram matrix (n, n) float64, cut at its numerical rank.

    Identical or linearly dependent checkpoints lower the rank and do no harm.
    """
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > tolerance * values[0].clamp(min=0.0)
    # Rounding leaves U a trace of the vector of ones, which would break Σ α = 1.
    directions = vectors[:, keep]
    directions = directions - directions.mean(0)
    largest = directions.abs().argmax(0) if directions.numel() else None
    if largest is not None:
        # An eigenvector's sign is arbitrary: fix it, so that machines and ranks agree.
        directions = directions * directions.gather(0, largest[None]).sign()
    return Subspace(directions, values[keep], float(gram.trace()))


def orthogonality_error(subspace: Subspace, gram: Tensor) -> float:
    """max |P Pᵀ − I| of the basis for offsets whose Gram matrix is ``gram`` (n, n).

    ``gram`` belongs to the offsets as they are stored, so that rounding in the store shows.
    """
    if subspace.rank == 0:
        return 0.0
    scaled = subspace.directions / subspace.eigenvalues.sqrt()
    error = scaled.T @ gram @ scaled - torch.eye(subspace.rank, dtype=torch.float64)
    return float(error.abs().max())


@dataclass(frozen=True)
class Chart:
    """Coordinates of all blocks at once, around given coefficients.

    α_b(z) = base_b + U_b z_b / √n. The base is a point of the chart (z = 0), so a second stage
    around an earlier solution can always return to it.

    Attributes:
        base: (B, n) float64.
        subspaces: one a block, B of them; ranks may differ, zero included.
    """

    base: Tensor
    subspaces: Sequence[Subspace]

    @property
    def size(self) -> int:
        return sum(s.rank for s in self.subspaces)

    def alphas(self, z: Tensor) -> Tensor:
        """Coefficients (B, n) at coordinates z (size,)."""
        parts = z.split([s.rank for s in self.subspaces])
        steps = torch.stack([s.steps(p) for s, p in zip(self.subspaces, parts, strict=True)])
        return self.base + steps

    def gradient(self, products: Tensor) -> Tensor:
        """∇_z (size,) from s (B, n)."""
        return torch.cat([s.gradient(p) for s, p in zip(self.subspaces, products, strict=True)])
