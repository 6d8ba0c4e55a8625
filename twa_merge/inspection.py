"""What is in a folder of checkpoints, from headers; its geometry and memory plan when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import report
from .checkpoints import open_checkpoints
from .checkpoints.base import Checkpoint
from .config import EngineConfig, Paths, Selection, StoreConfig, as_paths
from .errors import CheckpointError, ConfigError
from .layout import Layout, make_layout
from .progress import Progress, silent
from .svg import can_draw


def inspect(
    checkpoints: Paths,
    *,
    selection: Selection | None = None,
    geometry: bool = False,
    plan: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What is in a folder of checkpoints, from headers; with ``geometry`` from one pass over all.

    Args:
        plan: ``gpus`` altogether (0 or None for this run's processes on CPUs), ``nodes`` that they
            are on (one unless given), ``gpu_memory`` of one in bytes, and ``gather``, ``store`` and
            ``store_dtype`` as ``EngineConfig`` and ``StoreConfig`` have them: adds what training
            would take on them.

    Raises:
        CheckpointError: a checkpoint cannot be read, or a number is not finite.
        ConfigError: the plan contradicts itself.
    """
    if plan is not None:
        _require_possible(plan)
    checkpoints = as_paths(checkpoints, "checkpoints")
    found = open_checkpoints(checkpoints, selection or Selection(), progress)
    differences: list[str] = []
    try:
        layout = make_layout(found)
    except CheckpointError as error:
        if geometry:
            raise
        differences.append(str(error))
        layout = make_layout(found[:1])
    document = report.header("inspect") | {
        "checkpoints": [
            row | {"bytes": c.nbytes, "tensors": len(c.tensors), "entry": c.entry}
            for row, c in zip(report.checkpoint_list(found), found, strict=True)
        ],
        "tensors": _tensor_summary(layout),
        "parameters": sum(
            e.info.numel for e in layout.entries.values() if e.averaged and e.tied_to is None
        ),
        "differences": differences,
        "geometry": _geometry(found, layout, progress) if geometry else None,
        "plan": _plan(layout, len(found), plan) if plan is not None else None,
    }
    return document


def _plan(layout: Layout, n: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The memory plan of ``train`` for these checkpoints, on other machines than this one too."""
    from .distributed import start
    from .landscape import GRID
    from .store import Machine, Work, gathering, memory_plan, this_machine

    gpus = wanted.get("gpus") or 0
    if gpus:
        machine = Machine(
            size=gpus,
            per_node=math.ceil(gpus / (wanted.get("nodes") or 1)),
            device_type="cuda",
            device_memory=wanted.get("gpu_memory"),
        )
    else:
        machine = this_machine(start("cpu"))
    pictures = GRID**2 if can_draw() else 0
    engine = EngineConfig(gather=wanted.get("gather", "auto"))
    store = StoreConfig(wanted.get("store", "auto"), wanted.get("store_dtype", "auto"))
    gather = gathering(layout, n, machine, store, engine)
    work = Work(whole_model=gather == "model", pictures=pictures)
    found = memory_plan(layout, n, machine, store, work=work)
    advice = list(found.advice)
    if found.kind == "disk":
        advice.append(
            f"The files are read some {found.passes} times; with a fixed --ridge and --candidates "
            "quick it would be a quarter of that."
        )
    return {
        "processes": machine.size,
        "nodes": math.ceil(machine.size / machine.per_node),
        "store": found.kind,
        "store dtype": found.dtype,
        "device bytes per process": {**found.device, "total": found.device_total},
        "host bytes per process": {**found.host, "total": found.host_total},
        "passes over the files": found.passes,
        "minutes": round(found.minutes, 3),
        "fits": found.fits,
        "advice": advice,
    }


def _require_possible(wanted: Mapping[str, Any]) -> None:
    gpus, nodes = wanted.get("gpus") or 0, wanted.get("nodes") or 1
    memory = wanted.get("gpu_memory")
    if not gpus and (memory is not None or nodes > 1):
        raise ConfigError(
            "--gpu-memory and --nodes are of a plan for GPUs.",
            expected="--gpus of at least 1",
            found=f"--gpus {gpus}",
            remedy="give --gpus, or leave them out for a plan of this machine's CPU",
        )
    if gpus and nodes > gpus:
        raise ConfigError(
            "There are more nodes than GPUs.",
            expected="--gpus of all nodes together",
            found=f"--gpus {gpus} --nodes {nodes}",
            remedy=f"give at least --gpus {nodes}, or fewer nodes",
        )


def _tensor_summary(layout: Layout) -> dict[str, Any]:
    by_dtype: dict[str, dict[str, int]] = {}
    for entry in layout.entries.values():
        row = by_dtype.setdefault(
            entry.info.dtype.name,
            {"tensors": 0, "parameters": 0, "bytes": 0},
        )
        row["tensors"] += 1
        row["parameters"] += entry.info.numel
        row["bytes"] += entry.info.nbytes
    entries = layout.entries.values()
    return {
        "averaged": len(layout.averaged),
        "copied": len(layout.copied),
        "tied": sum(e.tied_to is not None for e in entries),
        "statistics": sum(e.statistic for e in entries),
        "by_dtype": by_dtype,
    }


def _geometry(
    checkpoints: Sequence[Checkpoint], layout: Layout, progress: Progress
) -> dict[str, Any]:
    # Waits for torch, which headers have no need of.
    from .geometry import geometry

    return geometry(checkpoints, layout, progress)
