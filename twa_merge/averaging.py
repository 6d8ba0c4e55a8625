"""Fixed coefficients: a merge that needs no data and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from . import random_directions, report
from .candidates import parse_weights
from .checkpoints import open_checkpoints
from .clock import Clock
from .config import OutputConfig, Selection, as_dict
from .distributed import start
from .errors import ConfigError
from .layout import dtype_named, global_block, make_layout
from .model_card import model_card
from .progress import Progress, silent
from .writer import check_output, write_merge

Paths = Sequence[str | PathLike[str]]


def average(
    checkpoints: Paths,
    output: str | PathLike[str],
    *,
    weights: str = "uniform",
    selection: Selection | None = None,
    out: OutputConfig | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Averages checkpoints with fixed coefficients; needs no data and no model.

    Args:
        weights: ``uniform``, ``ema:DECAY``, ``linear``, ``1-sqrt``, numbers that add up to one, or
            ``@report.json`` for the coefficients of an earlier merge.

    Returns:
        The document that is also written as ``twa_merge.json``.

    Raises:
        TwaMergeError: of the kind that says what is wrong; nothing has been written then.
    """
    out = out or OutputConfig()
    clock, target = Clock(), Path(output)
    with clock.part("open"):
        found = open_checkpoints(checkpoints, selection or Selection())
        layout = make_layout(found)
        dtype = dtype_named(out.dtype)
        check_output(target, found, out.overwrite, dtype=dtype)
        world = start("cpu")
        directions = None
        if weights.startswith("@"):
            path = Path(weights[1:])
            earlier = _read_json(path)
            blocks, alphas = report.coefficients_from_report(earlier, path, len(found), layout)
            record = earlier["coefficients"].get("random")
            if record is not None and len(blocks) == 1:
                directions, values = random_directions.from_record(record, path, layout)
                alphas = torch.cat([alphas, values[None]], 1)
        else:
            blocks, alphas = global_block(layout), parse_weights(weights, len(found))[None]
    document = report.header("average") | {
        "weights": weights,
        "checkpoints": report.checkpoint_list(found),
        "coefficients": report.coefficients(alphas, len(found), blocks, directions),
        "options": {"dtype": out.dtype, "selection": as_dict(selection or Selection())},
        "world_size": world.size,
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
    document["peak_memory_bytes"] = report.peak_memory_bytes(world.device)
    return document


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "The report cannot be read.", checkpoint=path, found=str(error)
        ) from error
