"""What every store of offsets can do, wherever it keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..stream import RowSlice


class Store(Protocol):
    """Offsets of this rank's rows.

    Attributes:
        nbytes: memory taken by centre and offsets.
    """

    nbytes: int

    def put(self, cut: RowSlice, centre: Tensor, offsets: Tensor) -> None:
        """Takes one slice during the streaming pass: centre (m,) and offsets (n, m), float64."""
        ...

    def project(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """s_i = ⟨Δ_i, g⟩ by block, (B, n) float64 on the CPU, over this rank's rows.

        Tensors that ``gradients`` lacks count as zero.
        """
        ...

    def combine(self, alphas: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Writes w = c + Σ (α_i − 1/n) Δ_i into the targets, in place.

        Args:
            alphas: (B, n), or (1, n) for all blocks alike, float64.
            targets: name → this rank's rows, float32, contiguous.
        """
        ...
