"""The JSON document of a run: what was merged, how, with what result."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__
from .checkpoints.base import Checkpoint
from .document import checkpoint_labels, folder_name
from .dtypes import Float64
from .errors import ConfigError, listing
from .layout import Blocks, Layout, blocks_from_members, global_block

if TYPE_CHECKING:
    # A merge with fixed coefficients is not to wait for torch.
    from .random_directions import RandomDirections

FORMAT = 1


def checkpoint_list(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    return [{"path": str(c.path), "step": c.step, "format": c.format} for c in checkpoints]


def steps_of(document: Mapping[str, Any]) -> list[int | None]:
    """The training steps of the checkpoints that a report is of; none where it does not say."""
    listed = document.get("checkpoints")
    rows = listed if isinstance(listed, list) else []
    return [row.get("step") for row in rows if isinstance(row, dict)]


def statistics_of(document: Mapping[str, Any]) -> str | None:
    """What a report says of where its winner's running statistics of batch norm came from."""
    listed = document.get("candidates")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    found = (row.get("batch_norm") for row in rows if row.get("name") == document.get("chosen"))
    return next(found, None)


def sources(given: Sequence[str | PathLike[str]], found: Sequence[Checkpoint]) -> dict[str, Any]:
    """What was merged, as the document of a merge says it.

    The document is published with the merge, so paths are cut to what tells the checkpoints apart
    and the folder that they lie in: no more of the machine is anybody's business.

    Args:
        given: the paths that the user gave.

    Returns:
        ``run``, the name of the folder where one run folder was given, and ``checkpoints``.
    """
    paths = [Path(p) for p in ([given] if isinstance(given, (str, PathLike)) else given)]
    is_run = len(paths) == 1 and all(c.path.parent == paths[0] for c in found)
    rows = checkpoint_list(found)
    labels = checkpoint_labels(rows, least=2)
    return {
        "run": paths[0].absolute().name if is_run else None,
        "checkpoints": [row | {"path": k} for row, k in zip(rows, labels, strict=True)],
    }


def weights_source(weights: str) -> str:
    """What ``--weights`` said, of a file no more than its name."""
    return f"@{folder_name(weights[1:])}" if weights.startswith("@") else weights


def coefficient_values(alphas: Float64, blocks: Blocks) -> Any:
    """(1, n) → a list; (B, n) → block name → list."""
    if alphas.shape[0] == 1:
        return alphas[0].tolist()
    return {name: row.tolist() for name, row in zip(blocks.names, alphas, strict=True)}


def coefficients(
    alphas: Float64, n: int, blocks: Blocks, directions: RandomDirections | None
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


def members(blocks: Blocks) -> dict[str, Any]:
    """Which tensors each block holds, so that a merge can be made again without the model."""
    return {
        "kind": blocks.kind,
        "members": dict(zip(blocks.names, blocks.members(), strict=True)),
    }


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def peak_memory_bytes() -> int:
    """The largest resident memory of this process, in bytes.

    It counts mapped pages of files, which the system takes back when it needs them.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def header(method: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": __version__, "method": method}


def coefficients_from_report(
    document: Mapping[str, Any], path: Path, n: int, layout: Layout
) -> tuple[Blocks, Float64]:
    """Blocks and coefficients (B, n) of an earlier report's winner.

    Raises:
        ConfigError: it is no report of this tool, one of another format or of another number of
            checkpoints, or one with a coefficient that is not finite.
    """
    try:
        version = document.get("format", FORMAT)
        found = document["coefficients"]
        values = found.get("blocks") or {"global": found["global"]}
        rows = np.array([list(row) for row in values.values()], dtype=np.float64)
        described = document.get("blocks") or {}
        members = {k: [str(name) for name in v] for k, v in described.get("members", {}).items()}
        kind = str(described.get("kind", "tensors"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "The file is no report of twa-merge.",
            checkpoint=path,
            expected="a twa_merge.json with coefficients",
            remedy="name the twa_merge.json of an earlier merge",
        ) from error
    _require_rows(version, rows, n, path)
    if "blocks" not in found:
        return global_block(layout), rows
    blocks = blocks_from_members(kind, members, layout)
    if set(blocks.names) != set(values):
        raise ConfigError(
            "The report's coefficients are of other blocks than it describes.",
            checkpoint=path,
            expected=listing(blocks.names),
            found=listing(values),
            remedy="use the file as it was written, or make the merge again",
        )
    return blocks, rows[[list(values).index(name) for name in blocks.names]]


def _require_rows(version: Any, rows: Float64, n: int, path: Path) -> None:
    """Checks that a report of this version has finite coefficients (B, n)."""
    if version != FORMAT:
        raise ConfigError(
            "The report's format is not known.",
            checkpoint=path,
            expected=f"format {FORMAT}",
            found=f"format {version!r}",
            remedy="use the version of twa-merge that wrote it, or give the coefficients",
        )
    if rows.ndim != 2 or rows.shape[1] != n:
        raise ConfigError(
            "The report is of another number of checkpoints.",
            checkpoint=path,
            expected=f"{rows.shape[-1]} checkpoints",
            found=f"{n} checkpoints",
            remedy="choose the same ones, for instance with --last or --from-step",
        )
    if not np.isfinite(rows).all():
        raise ConfigError(
            "The report's coefficients are not finite.",
            checkpoint=path,
            expected="finite numbers",
            found=listing(str(x) for x in rows[~np.isfinite(rows)]),
            remedy="use the file as it was written, or make the merge again",
        )
