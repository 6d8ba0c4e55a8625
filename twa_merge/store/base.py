"""What every store of offsets can do, wherever the offsets live."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..layout import Blocks, Layout
from ..stream import RowSlice


class Store(Protocol):
    """The offsets Δ_i = w_i − c of this rank's rows, and the two operations of an evaluation.

    A store holds the tensors that ``put`` was called for and nothing else.

    Attributes:
        blocks: tensor → which of the B sets of coefficients it follows.
        names: the tensors held.
        nbytes: memory of this rank that the store takes, centre included.
        place: ``device`` (also a CPU's own memory), ``host`` or ``disk``, and the dtype there.
    """

    blocks: Blocks

    @property
    def names(self) -> list[str]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def place(self) -> tuple[str, str]: ...

    def put(self, cut: RowSlice, centre: Tensor, offsets: Tensor) -> None:
        """Takes one slice in, during the streaming pass.

        Slices may be cut and come in any way, from several threads at once; their memory may be
        used again afterwards.

        Args:
            cut: rows inside this rank's share of the tensor, by their numbers in the whole tensor.
            centre: (m,) float64, the slice of the centre, flat.
            offsets: (n, m) float64.
        """
        ...

    def project(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """s_i = ⟨Δ_i, g⟩ by block, over this rank's rows only.

        Args:
            gradients: tensor → this rank's rows of ∇_w, on the store's device, rounded to float32
                where they are wider. A missing tensor, or None, counts as zero.

        Returns:
            (B, n) float64 on the CPU; the sum over the ranks is the caller's.
        """
        ...

    def combine(self, alphas: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Writes w = Σ_i α_i w_i into this rank's rows.

        Args:
            alphas: (B, n), or (1, n) for all blocks alike. Σ_i α_i = 1 in the affine span; any
                other sum scales the centre with it.
            targets: tensor → where to write: contiguous float32 on the store's device, of any
                shape with the right number of elements. May be some of ``names`` only.
        """
        ...


def split_alphas(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of the checkpoints → coefficients of the offsets and of the centre.

    Σ α_i w_i = (Σ α)·c + Σ_i (α_i − Σ α / n)·Δ_i: what is taken off adds up to nothing because
    Σ_i Δ_i = 0, and makes the uniform mean the centre itself, free of rounding in the offsets.

    Args:
        alphas: (B, n).

    Returns:
        β (B, n) and Σ α (B,), float64 on the CPU.
    """
    alphas = alphas.detach().to("cpu", torch.float64)
    total = alphas.sum(1)
    return alphas - (total / alphas.shape[1])[:, None], total


def held_name(layout: Layout, held: Container[str], name: str, numel: int) -> str | None:
    """The tensor that stands for ``name`` in a store; None where there is nothing to do.

    A tied tensor follows the one it is tied to. A rank that owns no rows of a tensor has never
    been given any, which is in order; any other tensor that is not held is a mistake of the
    caller, and must not pass for a gradient of zero.
    """
    root = layout[name].tied_to or name
    if root not in held and numel:
        raise KeyError(f"the store does not hold the tensor {name}")
    return root if numel else None


def row_of(rows: int, blocks: Blocks, name: str) -> int:
    """Which row of a (B, n) or (1, n) array the tensor follows."""
    return 0 if rows == 1 else blocks.index[name]
