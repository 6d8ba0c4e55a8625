"""Fixed coefficients: a merge that needs no data and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import report
from .agreement import require_same_choices, require_same_files, require_shared_place
from .checkpoints import Checkpoint, open_checkpoints
from .clock import Clock
from .config import OutputConfig, Paths, Selection, as_dict, as_paths
from .dtypes import Float64
from .errors import ConfigError
from .fixed_weights import parse_weights
from .layout import (
    Blocks,
    Layout,
    dtype_named,
    global_block,
    make_layout,
    require_tensors_alone,
)
from .model_card import model_card
from .output_folder import record
from .progress import Noted, Progress, silent
from .ranks import Alone, Ranks, world_size
from .writer import check_output, write_merge

if TYPE_CHECKING:
    # Fixed coefficients are not to wait for torch.
    from .random_directions import RandomDirections


def average(
    checkpoints: Paths,
    output: str | PathLike[str],
    *,
    weights: str | Sequence[float] = "uniform",
    selection: Selection | None = None,
    out: OutputConfig | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Averages checkpoints with fixed coefficients; needs no data and no model.

    Args:
        weights: ``uniform``, ``ema:DECAY``, ``linear``, ``1-sqrt``, numbers that add up to one (in
            a sequence, or as text with commas), or ``@report.json`` for the coefficients of an
            earlier merge.

    Returns:
        The document that is also written as ``twa_merge.json``.

    Raises:
        TwaMergeError: of the kind that says what is wrong; nothing has been written then.
    """
    out = out or OutputConfig()
    checkpoints, weights = as_paths(checkpoints, "checkpoints"), _as_text(weights)
    clock, target = Clock(), Path(output)
    with clock.part("open"):
        found = open_checkpoints(checkpoints, selection or Selection(), progress)
        layout = make_layout(found)
        require_tensors_alone(layout, layout.extra_states)
        dtype = dtype_named(out.dtype)
        names = check_output(target, found, out.overwrite, dtype=dtype)
        world = _join()
        require_same_files(found, world)
        require_shared_place(target, world)
        blocks, alphas, directions = _coefficients(weights, found, layout, progress)
    require_same_choices({"coefficients": alphas.tolist(), "dtype": out.dtype}, world)
    document = report.header("average") | {
        "weights": report.weights_source(weights),
        **report.sources(checkpoints, found),
        "coefficients": report.coefficients(alphas, len(found), blocks, directions),
        "options": {"dtype": out.dtype, "selection": as_dict(selection or Selection())},
        "world_size": world.size,
        **record(names),
    }
    if len(blocks) > 1:
        document["blocks"] = report.members(blocks)
    sources = list(found)
    if directions:
        sources, alphas = directions.among(found, alphas)
    with clock.part("write"):
        write_merge(
            sources,
            layout,
            blocks,
            alphas,
            target,
            dtype=dtype,
            documents={
                "twa_merge.json": json.dumps(document, indent=1, allow_nan=False) + "\n",
                "README.md": model_card(document),
            },
            overwrite=out.overwrite,
            world=world,
            progress=progress,
        )
    document["timings"] = clock.rounded()
    document["peak_memory_bytes"] = report.peak_memory_bytes()
    return document


def _as_text(weights: str | Sequence[float]) -> str:
    """Numbers in the form in which the command line takes them, to the last digit."""
    if isinstance(weights, str):
        return weights
    try:
        return ",".join(repr(float(number)) for number in weights)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "The weights are neither text nor numbers.",
            expected="a word such as uniform, or one number a checkpoint",
            found=repr(weights),
        ) from error


def _coefficients(
    weights: str, found: Sequence[Checkpoint], layout: Layout, progress: Progress
) -> tuple[Blocks, Float64, RandomDirections | None]:
    """Blocks, their coefficients (B, n + R) float64, and the R random directions, if any.

    Raises:
        ConfigError: the word, or the report that it names, has no coefficients for n checkpoints.
    """
    n = len(found)
    if not weights.startswith("@"):
        return global_block(layout), parse_weights(weights, n)[None], None
    path = Path(weights[1:])
    earlier = _read_json(path)
    blocks, alphas = report.coefficients_from_report(earlier, path, n, layout)
    steps = report.steps_of(earlier)
    if steps and steps != [checkpoint.step for checkpoint in found]:
        progress(Noted(f"The coefficients of {path} are those of checkpoints of other steps."))
    if report.statistics_of(earlier) in ("reestimate", "newest"):
        progress(
            Noted(
                f"Running statistics of batch norm are averaged here. Those of the merge of {path} "
                "were not, so that this one is another model: without data they cannot be made "
                "again."
            )
        )
    record = earlier["coefficients"].get("random")
    if record is None or len(blocks) > 1:
        return blocks, alphas, None
    # Generated by torch, which nothing else here needs.
    from . import random_directions

    directions, values = random_directions.from_record(record, path, layout)
    return blocks, np.concatenate([alphas, values[None]], 1), directions


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            "The report cannot be read.",
            checkpoint=path,
            expected="a twa_merge.json, as merges write it",
            found=str(error),
            remedy="check the path after the @, and that the file is complete",
        ) from error


def _join() -> Ranks:
    """Joins the process group on CPUs, if there is one: only that needs torch."""
    if world_size() == 1:
        return Alone()
    from .distributed import start

    return start("cpu")
