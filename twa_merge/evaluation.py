"""Loss and metrics of finished models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from . import report
from .agreement import require_same_choices, require_same_files
from .batches import Batches
from .checkpoints import open_checkpoints
from .config import DataConfig, EngineConfig, Selection, StoreConfig, as_dict
from .distributed import start
from .guard import bootstrap_interval
from .ingest import ingest
from .layout import global_block, make_layout
from .model import build
from .objective import Engine
from .progress import Advanced, Progress, Started, silent
from .run import note_strangers
from .same_examples import require_same_examples
from .store import make_store
from .task import Task, check_task, dataset_of, require_examples
from .tasks import load_task

Paths = Sequence[str | PathLike[str]]


def evaluate(
    models: Paths,
    task: Task | str,
    *,
    data: str | None = None,
    task_options: Mapping[str, object] | None = None,
    selection: Selection | None = None,
    data_config: DataConfig | None = None,
    engine: EngineConfig | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Loss and metrics of any number of models on all of the data.

    Returns:
        A document with one row a model: mean loss, its 95 % interval and the metrics' means.

    Raises:
        TwaMergeError: of the kind that says what is wrong.
    """
    engine, data_config = engine or EngineConfig(), data_config or DataConfig()
    found = [c for path in models for c in open_checkpoints([path], selection or Selection())]
    world = start(engine.device)
    require_same_files(found, world)
    rows = []
    progress(Started("Evaluating", len(found), "models"))
    examples = 0
    for checkpoint in found:
        layout = make_layout([checkpoint])
        if isinstance(task, str):
            named: Task = load_task(
                task, data=data, checkpoint=checkpoint.path, options=dict(task_options or {})
            )
        else:
            named = check_task(task, type(task).__name__)
        dataset = dataset_of(named)
        require_examples(dataset, "dataset")
        require_same_choices(
            {
                "number of examples": len(dataset),  # type: ignore[arg-type]
                "data options": as_dict(data_config),
                "precision": engine.precision,
            },
            world,
        )
        require_same_examples({"the data": dataset}, data_config.seed, world)
        live = build(named, layout, checkpoint, world, precision=engine.precision)
        note_strangers(live, layout, progress)
        blocks = global_block(layout)
        shared = {name: live.is_shared(name) for name in layout.averaged}
        store = make_store([checkpoint], layout, blocks, world, StoreConfig("disk"), shared=shared)
        ingest([checkpoint], layout, world, store=store, shared=shared)
        batches = Batches(dataset, named, data_config.batch_size, data_config.seed, world)
        examples = batches.size
        runner = Engine(live, store, blocks, named, world)
        runner.set_weights(torch.ones(1, 1, dtype=torch.float64))
        losses, metrics = runner.example_losses(batches, range(batches.size), with_metrics=True)
        low, high = bootstrap_interval(losses, data_config.seed)
        rows.append(
            {
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "loss": report.finite(float(losses.mean())),
                "ci95": [report.finite(low), report.finite(high)],
                "metrics": {k: report.finite(float(v.mean())) for k, v in metrics.items()},
            }
        )
        progress(Advanced())
    return report.header("eval") | {"examples": examples, "models": rows}
