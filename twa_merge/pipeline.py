"""The story, in order: checkpoints in, coefficients trained, a winner picked, one model out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from . import report
from .agreement import require_shared_place
from .candidates import SINGLES
from .checkpoints import Checkpoint, open_checkpoints
from .checkpoints.watchful import watched
from .choices import (
    Choices,
    require_compatible,
    require_directions,
    require_start,
    task_and_splits,
)
from .clock import Clock
from .comparable import require_comparable
from .config import (
    DataConfig,
    EngineConfig,
    FitConfig,
    GuardConfig,
    OutputConfig,
    Paths,
    Selection,
    StoreConfig,
    as_paths,
)
from .distributed import start
from .diverged import without_diverged
from .dtypes import Array
from .errors import NoImprovement, TaskError, TwaMergeError
from .fit_report import fit_document
from .fitted import Fitted
from .guard import Scored, improvement, pick
from .html_report import html_report
from .landscape import landscape
from .layout import dtype_named, make_layout
from .loss_check import check_losses
from .model_card import model_card
from .numerals import decimals, figure
from .output_folder import record, state_folder
from .progress import Noted, Progress, silent
from .resume import EvaluationLog
from .run import Run, fingerprint, require_agreement, set_up, several
from .small_batches import settle_threads
from .stages import train_stages
from .svg import can_draw
from .task import Task
from .tensors import tensor_rows
from .verdict import Verdict, judge
from .wording import spoken, too_few
from .writer import check_output, write_merge


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
    checkpoints = as_paths(checkpoints, "checkpoints")
    clock, target = Clock(), Path(output)
    with clock.part("open"):
        require_compatible(choices.fit, choices.guard.candidates)
        every = several(open_checkpoints(checkpoints, choices.selection, progress))
        layout = make_layout(every)
        found = without_diverged(every, layout, progress)
        if len(found) < len(every):
            checkpoints, layout = [c.path for c in found], make_layout(found)
        # The fit may take hours, and what is written is computed from the files as they are then.
        sources = watched(found, in_place=True)
        require_directions(choices.fit, len(found), layout)
        require_start(choices.fit, found)
        world = start(choices.engine.device)
        names = check_output(
            target, found, choices.out.overwrite, dtype=dtype_named(choices.out.dtype)
        )
        chosen_task, splits = task_and_splits(
            task, data, test_data, found[-1], dict(task_options or {}), choices
        )
        require_agreement(found, splits, choices, world)
        require_shared_place(target, world)
    log = EvaluationLog(
        state_folder(target),
        fingerprint(found, task, data, splits, choices, world.device) if world.is_zero else {},
        world,
        choices.out.fresh,
        progress,
    )
    if log.resumed:
        progress(Noted(f"Continuing: {log.resumed} evaluations are known from {log.folder}."))
    run = set_up(found, layout, chosen_task, splits, world, choices, log, clock, progress)
    settle_threads(run)
    check_losses(run)
    require_comparable(run)
    with clock.part("fit"):
        fitted = train_stages(run)
    with clock.part("guard"):
        verdict = _judge(run, fitted)
    document = fit_document(run, fitted, verdict) | report.sources(checkpoints, found)
    document |= record(names)
    if choices.guard.require_improvement and not verdict.over_single.certain:
        log.remove()
        refusal = _no_improvement(run, verdict)
        refusal.document = document | {"written": False, "timings": clock.rounded()}
        raise refusal
    with clock.part("report"):
        documents = _documents(run, document, fitted, verdict)
    with clock.part("write"):
        _write(run, verdict, sources, target, documents)
    log.remove()
    document["timings"] = clock.rounded()
    return document


def _write(
    run: Run,
    verdict: Verdict,
    sources: Sequence[Checkpoint],
    target: Path,
    documents: Mapping[str, str],
) -> None:
    alphas = verdict.winner.candidate.alphas.numpy()
    if run.directions and alphas.shape[1] > run.n:
        sources, alphas = run.directions.among(sources, alphas)
    write_merge(
        sources,
        run.layout,
        run.blocks,
        alphas,
        target,
        dtype=run.jury.dtype,
        overrides=_statistics(run, verdict.winner),
        documents=documents,
        overwrite=run.choices.out.overwrite,
        world=run.world,
        progress=run.progress,
    )


def _judge(run: Run, fitted: Sequence[Fitted]) -> Verdict:
    try:
        return judge(run, fitted)
    except TwaMergeError:
        # Nothing was learned that another try could continue from.
        if not any(math.isfinite(stage.result.loss) for stage in fitted):
            run.log.remove()
        raise


def _no_improvement(run: Run, verdict: Verdict) -> NoImprovement:
    """Says how close the best merge came, where a single checkpoint won."""
    winner, found, select = verdict.winner, verdict.over_single, run.choices.guard.select
    message = (
        f"What was picked, {winner.name}, is not certainly better than the best single checkpoint"
    )
    compared = winner.name
    merges = [s for s in verdict.shown if s.name not in SINGLES]
    if winner.name in SINGLES and merges:
        closest = pick(merges, select)
        best = next(s for s in verdict.shown if s.name == "best_single")
        closest, single = run.jury.on_more([closest, best])
        found = improvement(closest, single, select, run.choices.data.seed)
        message = f"What was picked is no merge but {spoken(winner.name)}"
        compared = f"the best merge, {closest.name}"
    places = decimals([0.0, found.mean, found.low, found.high])
    mean, low, high = (figure(v, places) for v in (found.mean, found.low, found.high))
    measure = "" if select == "loss" else f" in {select.removeprefix('metric:')}"
    few = "" if found.enough else too_few(found.examples, found.groups)
    return NoImprovement(
        f"{message}; nothing was written.",
        expected="an improvement on the guard split whose 95 % interval lies above zero",
        found=f"{compared}: {mean} [{low}, {high}]{measure}{few}",
        remedy="give more data or other checkpoints, or leave --require-improvement out",
    )


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
    # On another node it may be missing, and all processes evaluate what is drawn.
    if not run.world.broadcast(can_draw()):
        run.progress(Noted('No report.html: it needs pip install "twa-merge[report]".'))
        return files
    plane = _plane(run, fitted, verdict)
    if run.world.is_zero:
        try:
            files["report.html"] = html_report(document, plane)
        except Exception as error:
            # An installation that cannot draw must not cost the merge.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            run.progress(Noted(f"No report.html: it could not be drawn: {reason}"))
    return files


def _plane(run: Run, fitted: Sequence[Fitted], verdict: Verdict) -> dict[str, Any] | None:
    """What the report draws of the loss around the solution, where the task bears looking at it.

    The corners of the picture are further out than anything that has been evaluated before.
    """
    if run.log.landscape_failed:
        run.progress(
            Noted("The report has no landscape: the task failed there. --fresh tries again.")
        )
        return None
    try:
        plane = landscape(run.fitter, fitted[0], verdict.shown, run.progress)
        if plane is None:
            why = "fewer than two of the directions that were trained lie between checkpoints"
            run.progress(Noted(f"The report has no landscape: {why}."))
        return plane
    except TaskError as error:
        # Of several processes one alone may have met it: the others wait for it.
        if run.world.size > 1:
            run.log.fail_landscape()
            where = error.details.get("what to do")
            error.details["what to do"] = (
                "the same command again goes on without the report's landscape, where this was"
                + (f" ({where})" if where else "")
            )
            raise
        why = ", ".join(line.strip() for line in str(error).splitlines())
        run.progress(Noted(f"The report has no landscape: {why}"))
        return None
