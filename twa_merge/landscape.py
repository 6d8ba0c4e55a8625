"""The loss around the solution, in the plane of the two axes of largest variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fit import Fitter
from .fitted import Fitted
from .guard import Scored
from .progress import Advanced, Progress, Started

GRID = 9
_EXAMPLES = 64


def landscape(
    fitter: Fitter, whole: Fitted, shown: Sequence[Scored], progress: Progress
) -> dict[str, Any] | None:
    """Loss on a grid of the plane through the solution, parallel to the first two axes.

    Checkpoints, candidates and the path of the fit are projected onto it. A few examples are
    enough for contours: all points see the same ones.

    Returns:
        What ``html_report`` draws, or None where fewer than two axes come from the offsets.
    """
    subspace = whole.chart.subspaces[0]
    if subspace.centred < 2:
        return None
    plane = subspace.leading(2)

    def place(alpha: Tensor) -> Tensor:
        # In the whole subspace: the part along the centre's own axis is no part of the plane.
        return subspace.coordinates(alpha)[:2]

    corners = torch.eye(subspace.n, dtype=torch.float64)
    points = torch.stack([place(corner) for corner in corners])
    path = torch.stack([place(whole.chart.base[0])] + [
        place(whole.chart.alphas(z)[0]) for z in whole.result.path
    ])  # fmt: skip
    everything = torch.cat([points, path])
    low, high = everything.min(0).values, everything.max(0).values
    margin = 0.15 * (high - low)
    axes = [
        torch.linspace(float(a), float(b), GRID, dtype=torch.float64)
        for a, b in zip(low - margin, high + margin, strict=True)
    ]
    centre = whole.alphas[0]
    here = place(centre)
    sample = range(min(fitter.batches.size, _EXAMPLES))
    progress(Started("Drawing the landscape", GRID**2, "points"))
    rows = []
    for y in axes[1]:
        row = []
        for x in axes[0]:
            there: Tensor = torch.stack([x, y])
            row.append(fitter.score((centre + plane.steps(there - here))[None], sample))
            progress(Advanced())
        rows.append(row)
    return {
        "points": points.tolist(),
        "path": path.tolist(),
        "grid_x": axes[0].tolist(),
        "grid_y": axes[1].tolist(),
        "loss": rows,
        "examples": len(sample),
        "candidates": {
            s.name: place(s.candidate.alphas[0]).tolist()
            for s in shown
            if s.candidate.alphas.shape[0] == 1
        },
    }
