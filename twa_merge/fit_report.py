"""The JSON document of a trained merge: coefficients, candidates, stages, improvements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import report
from .config import as_dict
from .fitted import Fitted
from .guard import Improvement, Scored
from .report import coefficient_values, finite
from .run import Run
from .sampling import bootstrap_interval
from .subspace import Subspace, orthogonality_error
from .verdict import Verdict


def fit_document(run: Run, fitted: Sequence[Fitted], verdict: Verdict) -> dict[str, Any]:
    """The document of a trained merge, but for its sources and timings. A collective."""
    whole, seed = fitted[0], run.choices.data.seed
    winner = verdict.winner.candidate
    subspace = whole.chart.subspaces[0]
    coefficients = report.coefficients(winner.alphas.numpy(), run.n, run.blocks, run.directions)
    if winner.alphas.shape[0] > 1:
        coefficients = {"global": whole.alphas[0].tolist()} | coefficients
    document = report.header("twa") | {
        "seed": seed,
        "coefficients": coefficients,
        "subspace": {
            "rank": subspace.rank,
            "orthogonality_error": _orthogonality_error(run, subspace),
            "explained": subspace.explained,
        },
        "optimizer": {
            "name": run.choices.fit.optimizer,
            "evaluations": round(sum(f.evaluations for f in fitted), 2),
            "trace": [[k, finite(loss)] for k, loss in whole.result.trace],
            "converged": whole.result.converged,
            "stages": [_stage_row(f) for f in fitted if f.examples],
        },
        "data": {
            "fit_examples": len(run.splits.fit),  # type: ignore[arg-type]
            "guard_examples": len(run.splits.guard),  # type: ignore[arg-type]
            "fit_examples_used": max(f.examples for f in fitted),
            "guard_examples_used": len(run.jury.guard_sample),
            "test_examples": 0 if run.splits.test is None else len(run.splits.test),  # type: ignore[arg-type]
        },
        "candidates": [_candidate_row(s, run) for s in verdict.shown],
        "other_candidates": [
            {"name": s.name, "guard_loss": finite(float(s.guard.mean()))} for s in verdict.others
        ],
        "chosen": winner.name,
        "passed_over": verdict.passed_over.name if verdict.passed_over else None,
        "improvement": _improvement_row(verdict.over_single),
        "improvement_over_uniform": _improvement_row(verdict.over_uniform)
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
        "peak_memory_bytes": int(run.world.max(_peak_memory_bytes(run.world.device))),
        "world_size": run.world.size,
        "device": str(run.world.device),
    }
    if winner.alphas.shape[0] > 1:
        document["blocks"] = report.members(run.blocks)
    return document


def _orthogonality_error(run: Run, subspace: Subspace) -> float:
    grams = run.grams
    if run.directions_gram is not None:
        return orthogonality_error(subspace, pad(run.directions_gram, (run.n, 0, run.n, 0)))
    return orthogonality_error(subspace, grams.stored.sum(0), grams.centre, grams.cross)


def _candidate_row(item: Scored, run: Run) -> dict[str, Any]:
    """One candidate of the document; losses that are not finite become None.

    Its coefficients are those of the n checkpoints; random directions are in ``coefficients``.
    """
    seed, select = run.choices.data.seed, run.choices.guard.select
    row: dict[str, Any] = {
        "name": item.name,
        "coefficients": coefficient_values(item.candidate.alphas[:, : run.n].numpy(), run.blocks),
        "fit_loss": finite(item.fit_loss),
        "guard_loss": finite(float(item.guard.mean())),
        "guard_ci95": _interval(item.guard, item, seed),
        "selection_loss": finite(float(item.evidence("loss").mean())),
        "selection_examples": len(item.guard) + (0 if item.unseen is None else len(item.unseen)),
        "test_loss": finite(item.test_loss),
        "cost": round(item.candidate.cost, 2),
    }
    if item.candidate.blend_of:
        row["blend_of"] = dict(item.candidate.blend_of)
    if item.metrics:
        row["guard_metrics"] = {k: finite(float(v.mean())) for k, v in item.metrics.items()}
    if select != "loss":
        values = item.metrics[select.removeprefix("metric:")]
        row["guard_metric_ci95"] = _interval(values, item, seed)
    if item.test_metrics:
        row["test_metrics"] = {k: finite(v) for k, v in item.test_metrics.items()}
    if item.batch_norm is not None:
        row["batch_norm"] = item.batch_norm
    return row


def _interval(values: Tensor, item: Scored, seed: int) -> list[float | None]:
    """95 % interval of the mean of values of the guard split, (N,)."""
    return [finite(end) for end in bootstrap_interval(values, seed, item.groups)]


def _improvement_row(found: Improvement) -> dict[str, Any]:
    return {
        "over": found.over,
        "mean": finite(found.mean),
        "ci95": [finite(found.low), finite(found.high)],
        "certain": found.certain,
        "enough": found.enough,
        "examples": found.examples,
        "groups": found.groups,
    }


def _stage_row(fitted: Fitted) -> dict[str, Any]:
    """How one stage of the fit went."""
    return {
        "name": fitted.name,
        "coordinates": fitted.chart.size,
        "fit_examples": fitted.examples,
        "ridge": fitted.ridge,
        "ridge_scores": [[finite(ridge), finite(score)] for ridge, score in fitted.scores.items()],
        "evaluations": round(fitted.evaluations, 2),
        "converged": fitted.result.converged,
        "trace": [[k, finite(loss)] for k, loss in fitted.result.trace],
    }


def _peak_memory_bytes(device: torch.device) -> int:
    """The largest memory this process has taken: on the GPU, or resident on the CPU, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return report.peak_memory_bytes()
