"""What can be seen of losses at once: the same in every evaluation, one for each example."""

from __future__ import annotations

import torch

from .candidates import single
from .numerals import figure
from .progress import Noted
from .run import Run

# Relative; the order of sums on a GPU changes less.
_SAME = 1e-3
# Of fewer examples the losses may be the same by chance: right answers of a sure model.
_SEVERAL = 4


def check_losses(run: Run) -> None:
    """Says where losses of one batch, taken twice from the last checkpoint, are not what they seem.

    A collective.
    """
    batches = run.fitter.batches
    chosen = range(min(batches.size, batches.batch_size))
    run.engine.set_weights(single(run.n, run.n - 1)[None])
    first, again = (run.engine.example_losses(batches, chosen)[0] for _ in range(2))
    if not bool((first.isfinite() & again.isfinite()).all()):
        return
    mean, other = float(first.mean()), float(again.mean())
    if not torch.allclose(first, again, rtol=_SAME, atol=_SAME * abs(mean)):
        run.progress(
            Noted(
                f"The loss of the same {len(first)} examples with the same weights was "
                f"{figure(mean, 4)} and then {figure(other, 4)}: the task draws from a random "
                "generator of its own, or keeps a state. Candidates cannot be compared like that; "
                "draw from the global generators of torch, numpy or random, which are seeded alike "
                "for every use of a batch."
            )
        )
    elif len(first) >= _SEVERAL and bool((first == first[0]).all()) and mean:
        run.progress(
            Noted(
                f"All {len(first)} examples of a batch have the same loss. If that is a mean over "
                "the batch, let the task give each example its own: intervals take them for "
                "independent, and are far too narrow otherwise."
            )
        )
