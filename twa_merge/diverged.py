"""Checkpoints of a training that had diverged, told by the size of their weights.

Next to weights that are thousands of times as large the others are the same to rounding: neither
their span nor any mean with them in it is of use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .checkpoints.base import Checkpoint
from .errors import listing
from .layout import Layout
from .progress import Noted, Progress
from .tensors import as_tensor

# Ratio of norms from which float32 keeps no more than four digits of the smaller.
_FAR_LARGER = 1e3
# Tensors that are looked at, and numbers from the start of each: a training diverges as a whole.
_TENSORS, _NUMBERS = 64, 4096


def without_diverged(
    checkpoints: list[Checkpoint], layout: Layout, progress: Progress
) -> list[Checkpoint]:
    """All checkpoints but those whose weights are far larger than those of most, or NaN; says so.

    Nothing is left out where fewer than two would be left.
    """
    norms = [_norm(checkpoint, layout) for checkpoint in checkpoints]
    finite = sorted(norm for norm in norms if math.isfinite(norm))
    # Where all are infinite, so are their masks.
    usual = finite[(len(finite) - 1) // 2] if finite else math.inf
    broken = [math.isnan(norm) or norm == math.inf > usual for norm in norms]
    large = [math.inf > norm > _FAR_LARGER * usual > 0.0 for norm in norms]
    kept = [c for c, *odd in zip(checkpoints, broken, large, strict=True) if not any(odd)]
    if len(kept) < 2 or len(kept) == len(checkpoints):
        return checkpoints
    for odd, what in (
        (broken, "The weights are not finite"),
        (large, f"The weights are more than {_FAR_LARGER:.0f} times as large as most others'"),
    ):
        left_out = [c for c, is_odd in zip(checkpoints, odd, strict=True) if is_odd]
        if left_out:
            paths = listing(str(c.path) for c in left_out)
            progress(Noted(f"Left out: {paths}. {what}, so that the training had diverged."))
        for checkpoint in left_out:
            checkpoint.close()
    return kept


def far_apart_in_float32(
    checkpoints: Sequence[Checkpoint], norms: Tensor, progress: Progress
) -> bool:
    """Whether offsets in float32 are too coarse for the smallest checkpoint; says so."""
    large, small = int(norms.argmax()), int(norms.argmin())
    if float(norms[large]) <= _FAR_LARGER * float(norms[small]):
        return False
    progress(
        Noted(
            f"The weights of {checkpoints[large].path} are far larger than those of "
            f"{checkpoints[small].path}: its training may have diverged. Next to it the others are "
            "rounded while coefficients are trained, so that leaving it out may give a better "
            "merge; candidates are compared by the files themselves."
        )
    )
    return True


def _norm(checkpoint: Checkpoint, layout: Layout) -> float:
    """Of parts of the weights, the same parts of every checkpoint."""
    names = layout.averaged
    total = 0.0
    for name in names[:: math.ceil(len(names) / _TENSORS)]:
        info = checkpoint.tensors[name]
        numbers = np.empty(min(info.numel, _NUMBERS), info.dtype.array)
        checkpoint.read(name, 0, numbers)
        total += float(as_tensor(numbers, info.dtype).abs().double().square().sum())
    return math.sqrt(total)
