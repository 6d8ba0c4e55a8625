"""The JSON document of a run: what was merged, how, with what result."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import __version__
from .checkpoints.base import Checkpoint
from .errors import ConfigError
from .guard import Improvement, Scored, bootstrap_interval
from .layout import Blocks, Layout, blocks_from_members, global_block

if TYPE_CHECKING:
    # A merge with fixed coefficients needs no model, and is not to wait for what models need.
    from .fit import Fitted
    from .random_directions import RandomDirections

FORMAT = 1


def checkpoint_list(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    return [{"path": str(c.path), "step": c.step, "format": c.format} for c in checkpoints]


def coefficient_values(alphas: Tensor, blocks: Blocks) -> Any:
    """(1, n) → a list; (B, n) → block name → list."""
    if alphas.shape[0] == 1:
        return alphas[0].tolist()
    return {name: row.tolist() for name, row in zip(blocks.names, alphas, strict=True)}


def coefficients(
    alphas: Tensor, n: int, blocks: Blocks, directions: RandomDirections | None
) -> dict[str, Any]:
    """The document's coefficients: of n checkpoints, by block where blocks differ.

    Args:
        alphas: (1, n) or (B, n), or (1, n + R) with random directions behind the checkpoints.
    """
    if alphas.shape[0] > 1:
        return {"blocks": coefficient_values(alphas, blocks)}
    found: dict[str, Any] = {"global": alphas[0, :n].tolist()}
    if directions and alphas.shape[1] > n:
        found["random"] = directions.record(alphas[0, n:].tolist())
    return found


def candidate_row(item: Scored, n: int, blocks: Blocks, seed: int) -> dict[str, Any]:
    """One candidate of the document; losses that are not finite become None.

    Its coefficients are those of the n checkpoints; random directions are in ``coefficients``.
    """
    low, high = bootstrap_interval(item.guard, seed)
    row: dict[str, Any] = {
        "name": item.name,
        "coefficients": coefficient_values(item.candidate.alphas[:, :n], blocks),
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


def members(blocks: Blocks) -> dict[str, Any]:
    """Which tensors each block holds, so that a merge can be made again without the model."""
    return {
        "kind": blocks.kind,
        "members": dict(zip(blocks.names, blocks.members(), strict=True)),
    }


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def peak_memory_bytes(device: torch.device) -> int:
    """The largest memory this process has taken: on the GPU, or resident on the CPU, bytes.

    Resident memory counts mapped pages of the checkpoint files, which the system takes back when
    it needs them.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def header(method: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": __version__, "method": method}


def coefficients_from_report(
    document: Mapping[str, Any], path: Path, n: int, layout: Layout
) -> tuple[Blocks, Tensor]:
    """Blocks and coefficients (B, n) of an earlier report's winner.

    Raises:
        ConfigError: it is no report of this tool, or one of another number of checkpoints.
    """
    try:
        found = document["coefficients"]
        values = found.get("blocks") or {"global": found["global"]}
        rows = torch.tensor([list(row) for row in values.values()], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "The file is no report of twa-merge.",
            checkpoint=path,
            expected="a twa_merge.json with coefficients",
        ) from error
    if rows.ndim != 2 or rows.shape[1] != n:
        raise ConfigError(
            "The report is of another number of checkpoints.",
            checkpoint=path,
            expected=f"{rows.shape[-1]} checkpoints",
            found=f"{n} checkpoints",
            remedy="choose the same ones, for instance with --last or --from-step",
        )
    if "blocks" in found:
        described = document.get("blocks", {})
        return (
            blocks_from_members(
                described.get("kind", "tensors"), described.get("members", {}), layout
            ),
            rows,
        )
    return global_block(layout), rows
