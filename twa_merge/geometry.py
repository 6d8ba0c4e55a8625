"""How checkpoints lie to one another, from one pass over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .agreement import require_same_files
from .checkpoints.base import Checkpoint
from .distributed import start
from .ingest import ingest
from .layout import Layout
from .progress import Progress
from .subspace import make_subspace, orthogonality_error


def geometry(
    checkpoints: Sequence[Checkpoint], layout: Layout, progress: Progress
) -> dict[str, Any]:
    """Distances, cosines and spectrum, all from the Gram matrix of the offsets."""
    world = start("cpu")
    require_same_files(checkpoints, world)
    grams = ingest(checkpoints, layout, world, progress=progress)
    gram = grams.exact.sum(0)
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None] - 2 * gram).clamp(min=0).sqrt()
    norms = squares.clamp(min=0).sqrt()
    cosines = gram / (norms[:, None] * norms[None]).clamp(min=1e-300)
    subspace = make_subspace(gram)
    return {
        "distances": distances.tolist(),
        "cosines": cosines.tolist(),
        "distance_to_mean": norms.tolist(),
        "norms": grams.norms.tolist(),
        "spectrum": subspace.explained,
        "rank": subspace.rank,
        "orthogonality_error": orthogonality_error(subspace, grams.stored.sum(0)),
    }
