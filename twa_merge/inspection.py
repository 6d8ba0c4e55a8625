"""What is in a folder of checkpoints, and how they lie to one another."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from . import report
from .checkpoints import open_checkpoints
from .checkpoints.base import Checkpoint
from .config import Selection
from .distributed import start
from .errors import CheckpointError
from .ingest import ingest
from .layout import Layout, make_layout
from .progress import Progress, silent
from .subspace import make_subspace, orthogonality_error

Paths = Sequence[str | PathLike[str]]


def inspect(
    checkpoints: Paths,
    *,
    selection: Selection | None = None,
    geometry: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What is in a folder of checkpoints, from headers; with ``geometry`` from one pass over all.

    Raises:
        CheckpointError: a checkpoint cannot be read, or a number is not finite.
    """
    found = open_checkpoints(checkpoints, selection or Selection())
    differences: list[str] = []
    try:
        layout = make_layout(found)
    except CheckpointError as error:
        if geometry:
            raise
        differences.append(str(error))
        layout = make_layout(found[:1])
    document = report.header("inspect") | {
        "checkpoints": [
            row | {"bytes": c.nbytes, "tensors": len(c.tensors)}
            for row, c in zip(report.checkpoint_list(found), found, strict=True)
        ],
        "tensors": _tensor_summary(layout),
        "parameters": sum(
            e.info.numel for e in layout.entries.values() if e.averaged and e.tied_to is None
        ),
        "differences": differences,
        "geometry": _geometry(found, layout, progress) if geometry else None,
    }
    return document


def _tensor_summary(layout: Layout) -> dict[str, Any]:
    by_dtype: dict[str, dict[str, int]] = {}
    for entry in layout.entries.values():
        row = by_dtype.setdefault(
            str(entry.info.dtype).removeprefix("torch."),
            {"tensors": 0, "parameters": 0, "bytes": 0},
        )
        row["tensors"] += 1
        row["parameters"] += entry.info.numel
        row["bytes"] += entry.info.nbytes
    entries = layout.entries.values()
    return {
        "averaged": len(layout.averaged),
        "copied": len(layout.copied),
        "tied": sum(e.tied_to is not None for e in entries),
        "statistics": sum(e.statistic for e in entries),
        "by_dtype": by_dtype,
    }


def _geometry(
    checkpoints: Sequence[Checkpoint], layout: Layout, progress: Progress
) -> dict[str, Any]:
    """Distances, cosines and spectrum, all from the Gram matrix of the offsets."""
    world = start("cpu")
    grams = ingest(checkpoints, layout, world, check=True, progress=progress)
    gram = grams.exact.sum(0)
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None] - 2 * gram).clamp(min=0).sqrt()
    norms = squares.clamp(min=0).sqrt()
    cosines = gram / (norms[:, None] * norms[None]).clamp(min=1e-300)
    subspace = make_subspace(gram)
    centre = float(grams.centre.sum())
    return {
        "distances": distances.tolist(),
        "cosines": cosines.tolist(),
        "distance_to_mean": norms.tolist(),
        "norms": (squares + centre + 2 * grams.cross).clamp(min=0).sqrt().tolist(),
        "spectrum": subspace.explained,
        "rank": subspace.rank,
        "orthogonality_error": orthogonality_error(
            subspace, (gram if grams.stored is None else grams.stored.sum(0))
        ),
    }
