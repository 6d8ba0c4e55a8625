"""The story, in order: checkpoints in, coefficients trained, a winner picked, one model out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import fit_report, report
from .candidates import SINGLES, parse_families, window
from .checkpoints import open_checkpoints
from .clock import Clock
from .config import (
    DataConfig,
    EngineConfig,
    FitConfig,
    GuardConfig,
    OutputConfig,
    Selection,
    StoreConfig,
    as_dict,
    parse_subspace,
)
from .distributed import start
from .document import decimals, figure
from .dtypes import Array
from .errors import NoImprovement, TwaMergeError
from .fit import Fitted
from .guard import Scored, improvement, pick
from .html_report import html_report
from .landscape import landscape
from .layout import dtype_named, make_layout
from .model_card import model_card
from .optimize import FitResult
from .progress import Noted, Progress, silent
from .resume import EvaluationLog
from .run import (
    Choices,
    Run,
    fingerprint,
    require_compatible,
    require_directions,
    set_up,
    several,
    task_and_splits,
)
from .subspace import (
    Chart,
    Subspace,
    add_up,
    make_subspace,
    orthogonality_error,
    random_subspace,
    root_mean_square,
    with_centre,
)
from .svg import can_draw
from .task import Task
from .tensors import tensor_rows
from .verdict import Verdict, judge, require_metric
from .writer import check_output, write_merge

Paths = Sequence[str | PathLike[str]]


def merge(
    checkpoints: Paths,
    task: Task | str,
    output: str | PathLike[str],
    *,
    data: str | None = None,
    test_data: str | None = None,
    task_options: Mapping[str, object] | None = None,
    selection: Selection | None = None,
    data_config: DataConfig | None = None,
    fit: FitConfig | None = None,
    guard: GuardConfig | None = None,
    store: StoreConfig | None = None,
    engine: EngineConfig | None = None,
    out: OutputConfig | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Trains averaging coefficients and writes the best model that the checkpoints hold.

    Args:
        checkpoints: a run folder, several checkpoint folders, or files.
        task: a task object, ``causal-lm``, ``path/task.py[:function]`` or ``module:function``.
        output: the folder to write; it appears complete or not at all.
        data, test_data: for tasks that are named; the second is only ever reported on.
        task_options: keyword arguments of the named task.

    Returns:
        The document that is also written as ``twa_merge.json``.

    Raises:
        TwaMergeError: of the kind that says what is wrong; nothing has been written then.
        NoImprovement: with ``require_improvement``, when nothing certainly beats the best single
            checkpoint.
    """
    choices = Choices(
        selection or Selection(),
        data_config or DataConfig(),
        fit or FitConfig(),
        guard or GuardConfig(),
        store or StoreConfig(),
        engine or EngineConfig(),
        out or OutputConfig(),
    )
    clock, target = Clock(), Path(output)
    with clock.part("open"):
        parse_families(choices.guard.candidates)
        require_compatible(choices.fit)
        found = open_checkpoints(checkpoints, choices.selection)
        layout = make_layout(several(found))
        require_directions(choices.fit, len(found), layout)
        world = start(choices.engine.device)
        check_output(target, found, choices.out.overwrite, dtype=dtype_named(choices.out.dtype))
        chosen_task, splits = task_and_splits(
            task, data, test_data, found[-1], dict(task_options or {}), choices
        )
    log = EvaluationLog(
        target.with_name(target.name + ".partial"),
        fingerprint(found, task, data, splits, choices),
        world,
        choices.out.fresh,
        progress,
    )
    if log.resumed:
        progress(Noted(f"Continuing: {log.resumed} evaluations are known from {log.folder}."))
    run = set_up(found, layout, chosen_task, splits, world, choices, log, clock, progress)
    require_metric(run)
    with clock.part("fit"):
        fitted = _fit(run)
    with clock.part("guard"):
        verdict = _judge(run, fitted)
    document = _document(run, fitted, verdict)
    if choices.guard.require_improvement and not verdict.over_single.certain:
        log.remove()
        raise _no_improvement(run, verdict)
    with clock.part("report"):
        documents = _documents(run, document, fitted, verdict)
    sources, alphas = list(found), verdict.winner.candidate.alphas.numpy()
    if run.directions and alphas.shape[1] > run.n:
        sources, alphas = run.directions.among(found, alphas)
    with clock.part("write"):
        write_merge(
            sources,
            layout,
            run.blocks,
            alphas,
            target,
            dtype=run.jury.dtype,
            overrides=_statistics(run, verdict.winner),
            documents=documents,
            overwrite=choices.out.overwrite,
            world=world,
            progress=progress,
        )
    log.remove()
    document["timings"] = clock.rounded()
    return document


def _fit(run: Run) -> list[Fitted]:
    """Stage one: the whole model. Stage two: every block, around the solution of stage one.

    Beside single tensors whole layers are tried, around the same solution: fewer coordinates need
    less data.
    """
    whole, wanted = _whole(run), parse_families(run.choices.guard.candidates)
    if not wanted & {"twa", "twa-layers"}:
        return [_unfitted(run, whole)]
    if whole.rank == 0:
        run.progress(Noted("All checkpoints are identical: there is nothing to train."))
    elif (parse_subspace(run.choices.fit.subspace)[1] or 0) > whole.rank:
        run.progress(Noted(f"There are only {whole.rank} directions: all of them are trained."))
    start_alphas = pad(run.fitter.start(run.n), (0, whole.n - run.n))
    fitted = [run.fitter.stage("twa", Chart(start_alphas, [whole]))]
    if len(run.blocks) > 1 and "twa-layers" in wanted:
        fitted.append(_by_block(run, run.blocks.kind, fitted[0]))
        if run.layers is not None:
            folds = fitted[1].path.folds if fitted[1].path else None
            fitted.append(_by_block(run, "layers", fitted[0], run.layers, folds))
    for stage in fitted:
        if not math.isfinite(stage.result.loss):
            run.progress(Noted(_given_up(stage)))
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
    chart = Chart(base, [_leading(run, gram) for gram in grams], groups)
    return run.fitter.stage(f"twa-{kind}", chart, whole, folds)


def _given_up(stage: Fitted) -> str:
    trace = stage.result.trace
    if trace and math.isfinite(trace[0][1]):
        met = f"diverged after {len(trace)} evaluations (a smaller --lr may help)"
    else:
        met = "met a loss that is not finite at its start"
    return (
        f"The fit of {stage.name} {met} and was given up; the guard picks among the remaining "
        "candidates."
    )


def _unfitted(run: Run, whole: Subspace) -> Fitted:
    """What stands for the fit where no candidate comes from one: the mean, nothing evaluated."""
    mean = pad(window(run.n, run.n), (0, whole.n - run.n))[None]
    result = FitResult(torch.zeros(whole.rank, dtype=torch.float64), math.nan, [], False)
    return Fitted("twa", Chart(mean, [whole]), mean, 0.0, result)


def _judge(run: Run, fitted: Sequence[Fitted]) -> Verdict:
    try:
        return judge(run, fitted)
    except TwaMergeError:
        # Nothing was learned that another try could continue from.
        if not any(math.isfinite(stage.result.loss) for stage in fitted):
            run.log.remove()
        raise


def _whole(run: Run) -> Subspace:
    """What the first stage trains in."""
    gram, fit = run.grams.exact.sum(0), run.choices.fit
    if run.directions_gram is not None:
        return random_subspace(run.n, run.directions_gram, root_mean_square(gram))
    subspace = _leading(run, gram)
    if fit.span == "linear":
        subspace = with_centre(subspace, run.grams.centre, run.grams.cross)
    return subspace


def _leading(run: Run, gram: Tensor) -> Subspace:
    """The span of the offsets with this Gram matrix, or as many of its axes as are wanted."""
    subspace = make_subspace(gram)
    word, rank = parse_subspace(run.choices.fit.subspace)
    return subspace.leading(rank) if word == "pca" and rank else subspace


def _orthogonality_error(run: Run, subspace: Subspace) -> float:
    grams = run.grams
    if run.directions_gram is not None:
        return orthogonality_error(subspace, pad(run.directions_gram, (run.n, 0, run.n, 0)))
    gram = (grams.exact if grams.stored is None else grams.stored).sum(0)
    return orthogonality_error(subspace, gram, grams.centre, grams.cross)


def _no_improvement(run: Run, verdict: Verdict) -> NoImprovement:
    """Says how close the best merge came, where a single checkpoint won."""
    closest, found, select = verdict.winner, verdict.over_single, run.choices.guard.select
    merges = [s for s in verdict.shown if s.name not in SINGLES]
    if closest not in merges and merges:
        closest = pick(merges, select)
        single = next(s for s in verdict.shown if s.name == "best_single")
        found = improvement(closest, single, select, run.choices.data.seed)
    places = decimals([0.0, found.mean, found.low, found.high])
    mean, low, high = (figure(v, places) for v in (found.mean, found.low, found.high))
    return NoImprovement(
        "What was picked is not certainly better than the best single checkpoint; nothing was "
        "written.",
        expected="an improvement on the guard split whose 95 % interval lies above zero",
        found=f"{closest.name}: {mean} [{low}, {high}]",
        remedy="give more data or other checkpoints, or leave --require-improvement out",
    )


def _document(run: Run, fitted: Sequence[Fitted], verdict: Verdict) -> dict[str, Any]:
    whole, seed = fitted[0], run.choices.data.seed
    winner = verdict.winner.candidate
    subspace = whole.chart.subspaces[0]
    coefficients = report.coefficients(winner.alphas.numpy(), run.n, run.blocks, run.directions)
    if winner.alphas.shape[0] > 1:
        coefficients = {"global": whole.alphas[0].tolist()} | coefficients
    document = report.header("twa") | {
        "seed": seed,
        "checkpoints": report.checkpoint_list(run.checkpoints),
        "coefficients": coefficients,
        "subspace": {
            "rank": subspace.rank,
            "orthogonality_error": _orthogonality_error(run, subspace),
            "explained": subspace.explained,
        },
        "optimizer": {
            "name": run.choices.fit.optimizer,
            "evaluations": round(sum(f.evaluations for f in fitted), 2),
            "trace": [[k, report.finite(loss)] for k, loss in whole.result.trace],
            "converged": whole.result.converged,
            "stages": [fit_report.stage_row(f) for f in fitted if f.examples],
        },
        "data": {
            "fit_examples": len(run.splits.fit),  # type: ignore[arg-type]
            "guard_examples": len(run.splits.guard),  # type: ignore[arg-type]
            "fit_examples_used": max(f.examples for f in fitted),
            "guard_examples_used": len(run.jury.guard_sample),
            "test_examples": 0 if run.splits.test is None else len(run.splits.test),  # type: ignore[arg-type]
        },
        "candidates": [fit_report.candidate_row(s, run.n, run.blocks, seed) for s in verdict.shown],
        "other_candidates": [
            {"name": s.name, "guard_loss": report.finite(float(s.guard.mean()))}
            for s in verdict.others
        ],
        "chosen": winner.name,
        "improvement": fit_report.improvement_row(verdict.over_single),
        "improvement_over_uniform": fit_report.improvement_row(verdict.over_uniform)
        if verdict.over_uniform
        else None,
        "options": {
            "fit": as_dict(run.choices.fit),
            "data": as_dict(run.choices.data),
            "guard": as_dict(run.choices.guard),
            "store": as_dict(run.choices.store),
            "engine": as_dict(run.choices.engine),
            "dtype": run.choices.out.dtype,
            "selection": as_dict(run.choices.selection),
        },
        "store": dict(zip(("kind", "dtype"), run.engine.store.place, strict=True)),
        "timings": run.clock.rounded(),
        "peak_memory_bytes": int(run.world.max(fit_report.peak_memory_bytes(run.world.device))),
        "world_size": run.world.size,
        "device": str(run.world.device),
    }
    if winner.alphas.shape[0] > 1:
        document["blocks"] = report.members(run.blocks)
    return document


def _statistics(run: Run, winner: Scored) -> dict[str, Array]:
    """Running statistics to be written instead of averaged ones: name → tensor."""
    if winner.batch_norm == "newest":
        # The store may have rounded them.
        names = [e.name for e in run.layout.entries.values() if e.statistic]
        found = {name: tensor_rows(run.checkpoints[-1], name) for name in names}
    else:
        found = run.jury.overrides(winner)
    return {name: tensor.double().numpy() for name, tensor in found.items()}


def _documents(
    run: Run, document: dict[str, Any], fitted: Sequence[Fitted], verdict: Verdict
) -> dict[str, str]:
    """The files beside the weights: report, model card, and the plots where matplotlib is."""
    files = {
        "twa_merge.json": json.dumps(document, indent=1, allow_nan=False) + "\n",
        "README.md": model_card(document),
    }
    if not can_draw():
        run.progress(Noted('No report.html: it needs pip install "twa-merge[report]".'))
        return files
    plane = landscape(run.fitter, fitted[0], verdict.shown, run.progress)
    if run.world.is_zero:
        files["report.html"] = html_report(document, plane)
    return files
