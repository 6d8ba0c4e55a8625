"""The stages of the fit: the whole model, then blocks around its solution."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .candidates import BY_BLOCK, parse_families, window
from .config import parse_subspace
from .errors import listing
from .fitted import Fitted
from .numerals import figure
from .optimize import FitResult
from .progress import Noted
from .run import Run
from .subspace import (
    Chart,
    Subspace,
    add_up,
    make_subspace,
    random_subspace,
    root_mean_square,
    with_centre,
)


def train_stages(run: Run) -> list[Fitted]:
    """Stage one: the whole model. Stage two: every block, around the solution of stage one.

    Beside single tensors whole layers are tried, around the same solution: fewer coordinates need
    less data.
    """
    whole, wanted = run.world.broadcast(_whole(run)), parse_families(run.choices.guard.candidates)
    if not wanted & {"twa", BY_BLOCK}:
        return [_unfitted(run, whole)]
    by_block = BY_BLOCK in wanted
    if whole.rank == 0:
        run.progress(Noted("All checkpoints are identical: there is nothing to train."))
        by_block = False
    elif (parse_subspace(run.choices.fit.subspace)[1] or 0) > whole.rank:
        run.progress(Noted(f"There are only {whole.rank} directions: all of them are trained."))
    start_alphas = run.fitter.start(run.n, singles="greedy" in wanted)
    start_alphas = pad(start_alphas, (0, whole.n - run.n))
    fitted = [run.fitter.stage("twa", Chart(start_alphas, [whole]))]
    if len(run.blocks) > 1 and by_block:
        fitted.append(_by_block(run, run.blocks.kind, fitted[0]))
        if run.layers is not None:
            folds = fitted[1].path.folds if fitted[1].path else None
            fitted.append(_by_block(run, "layers", fitted[0], run.layers, folds))
    elif run.choices.fit.blocks in ("layers", "tensors") and by_block:
        run.progress(
            Noted(
                f"--blocks {run.choices.fit.blocks}: the model has no layers to tell apart, so one "
                "set of coefficients is trained for all of it."
            )
        )
    for stage in fitted:
        if not math.isfinite(stage.result.loss):
            run.progress(Noted(_given_up(run, stage)))
        elif run.choices.fit.optimizer != "lbfgs":
            _tell_of_a_rise(run, stage)
    return fitted


def _by_block(
    run: Run, kind: str, whole: Fitted, groups: Tensor | None = None, folds: int | None = None
) -> Fitted:
    """A stage around the solution of ``whole``.

    Args:
        groups: of blocks that share their coordinates, (B,) int64; None: every block has its own.
        folds: of the cross-validation of its ridge; None: until that is settled.
    """
    grams = run.grams.by_block(run.blocks)
    if groups is not None:
        grams = add_up(grams, groups, int(groups.max()) + 1)
    base = whole.alphas.expand(len(run.blocks), -1).clone()
    # Unlike processors find axes that differ in their last digits.
    subspaces = run.world.broadcast([_leading(run, gram) for gram in grams])
    chart = Chart(base, subspaces, groups)
    return run.fitter.stage(f"twa-{kind}", chart, whole, folds)


def _given_up(run: Run, stage: Fitted) -> str:
    trace = stage.result.trace
    if trace and math.isfinite(trace[0][1]):
        met = f"diverged after {len(trace)} evaluations"
        if run.choices.fit.optimizer != "lbfgs":
            met += " (a smaller --lr may help)"
        elif len(trace) == 1:
            met = "met gradients that are not finite at its start"
    else:
        met = "met a loss that is not finite at its start"
        # Not as the fit takes them: normalised by it, a whole batch has none.
        run.engine.set_weights(stage.chart.base)
        losses, _ = run.engine.example_losses(run.fitter.batches, range(run.fitter.limit))
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            numbers = listing(str(run.fitter.batches.number(i)) for i in bad)
            met += (
                f", that of {len(bad)} of {len(losses)} examples (number {numbers} of the dataset),"
            )
    return (
        f"The fit of {stage.name} {met} and was given up; the guard picks among the remaining "
        "candidates."
    )


def _tell_of_a_rise(run: Run, stage: Fitted) -> None:
    """Tells of a fit that ended above its start: no line search keeps these optimizers from it."""
    everything = range(run.fitter.limit)
    start, end = (run.fitter.score(a, everything) for a in (stage.chart.base, stage.alphas))
    if end > start:
        run.progress(
            Noted(
                f"The fit of {stage.name} ended at a loss of {figure(end, 4)}, above the "
                f"{figure(start, 4)} that it began with (a smaller --lr may help)."
            )
        )


def _unfitted(run: Run, whole: Subspace) -> Fitted:
    """What stands for the fit where no candidate comes from one: the mean, nothing evaluated."""
    mean = pad(window(run.n, run.n), (0, whole.n - run.n))[None]
    result = FitResult(torch.zeros(whole.rank, dtype=torch.float64), math.nan, [], False)
    return Fitted("twa", Chart(mean, [whole]), mean, 0.0, result)


def _whole(run: Run) -> Subspace:
    """What the first stage trains in."""
    gram, fit = run.grams.exact.sum(0), run.choices.fit
    if run.directions_gram is not None:
        return random_subspace(run.n, run.directions_gram, root_mean_square(gram))
    subspace = _leading(run, gram, float(run.grams.centre))
    if fit.span == "linear":
        subspace = with_centre(subspace, run.grams.centre, run.grams.cross)
    return subspace


def _leading(run: Run, gram: Tensor, centre: float = 0.0) -> Subspace:
    """The span of the offsets with this Gram matrix, or as many of its axes as are wanted."""
    subspace = make_subspace(gram, centre=centre)
    word, rank = parse_subspace(run.choices.fit.subspace)
    return subspace.leading(rank) if word == "pca" and rank else subspace
