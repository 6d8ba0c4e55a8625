"""The parts of the JSON document that only a fit has: candidates, stages, improvements."""

from __future__ import annotations

from typing import Any

import torch

from . import report
from .fit import Fitted
from .guard import Improvement, Scored, bootstrap_interval
from .layout import Blocks
from .report import coefficient_values, finite


def candidate_row(item: Scored, n: int, blocks: Blocks, seed: int) -> dict[str, Any]:
    """One candidate of the document; losses that are not finite become None.

    Its coefficients are those of the n checkpoints; random directions are in ``coefficients``.
    """
    low, high = bootstrap_interval(item.guard, seed)
    row: dict[str, Any] = {
        "name": item.name,
        "coefficients": coefficient_values(item.candidate.alphas[:, :n].numpy(), blocks),
        "fit_loss": finite(item.fit_loss),
        "guard_loss": finite(float(item.guard.mean())),
        "guard_ci95": [finite(low), finite(high)],
        "selection_loss": finite(float(item.evidence("loss").mean())),
        "selection_examples": len(item.guard) + (0 if item.unseen is None else len(item.unseen)),
        "test_loss": finite(item.test_loss),
        "cost": round(item.candidate.cost, 2),
    }
    if item.candidate.blend_of:
        row["blend_of"] = dict(item.candidate.blend_of)
    if item.metrics:
        row["guard_metrics"] = {k: finite(float(v.mean())) for k, v in item.metrics.items()}
    if item.test_metrics:
        row["test_metrics"] = {k: finite(v) for k, v in item.test_metrics.items()}
    if item.batch_norm is not None:
        row["batch_norm"] = item.batch_norm
    return row


def improvement_row(found: Improvement) -> dict[str, Any]:
    return {
        "over": found.over,
        "mean": finite(found.mean),
        "ci95": [finite(found.low), finite(found.high)],
        "certain": found.certain,
        "examples": found.examples,
    }


def stage_row(fitted: Fitted) -> dict[str, Any]:
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


def peak_memory_bytes(device: torch.device) -> int:
    """The largest memory this process has taken: on the GPU, or resident on the CPU, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return report.peak_memory_bytes()
