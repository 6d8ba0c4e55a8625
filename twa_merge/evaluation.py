"""Loss and metrics of finished models."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from . import report
from .agreement import require_same_choices, require_same_files
from .batches import Batches
from .checkpoints import Checkpoint, is_run, open_checkpoints, sidecars
from .checkpoints.base import reading
from .config import DataConfig, EngineConfig, Paths, Selection, StoreConfig, as_dict, as_paths
from .distributed import World, start
from .ingest import ingest
from .layout import global_block, make_layout
from .model import build
from .objective import Engine
from .progress import Advanced, Progress, Started, silent
from .run import note_strangers
from .same_examples import require_same_examples
from .sampling import bootstrap_interval
from .store import make_store
from .task import Task, check_task, dataset_of, groups_of, require_examples
from .tasks import BUILT_IN, load_task


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

    Args:
        selection: of the checkpoints of every run folder among ``models``.
        engine: of which device and precision are used.

    Returns:
        A document with one row a model: mean loss, its 95 % interval and the metrics' means.

    Raises:
        TwaMergeError: of the kind that says what is wrong.
    """
    engine, data_config = engine or EngineConfig(), data_config or DataConfig()
    found, everything = [], Selection()
    selection = selection or everything
    for path in as_paths(models, "models"):
        # A model that is named is meant whatever its step; that of a merge nobody knows.
        selects = selection != everything and is_run(path)
        found += open_checkpoints([path], selection if selects else everything, progress)
    world = start(engine.device)
    require_same_files(found, world)
    rows = []
    progress(Started("Evaluating", len(found), "models"))
    examples = 0
    loaded: dict[Hashable, tuple[Task, Dataset[Any], list[int]]] = {}
    for checkpoint in found:
        reads = _what_it_reads(task, checkpoint)
        if reads not in loaded:
            loaded = {reads: _load(task, data, checkpoint, task_options or {})}
        named, dataset, groups = loaded[reads]
        examples = len(dataset)  # type: ignore[arg-type]
        rows.append(_row(checkpoint, named, dataset, groups, data_config, engine, world, progress))
        checkpoint.close()
        # Hooks and modules refer to one another, and the next model may need the memory.
        gc.collect()
        progress(Advanced())
    return report.header("eval") | {"examples": examples, "models": rows}


def _what_it_reads(task: Task | str, checkpoint: Checkpoint) -> Hashable:
    """What tells the task of one checkpoint from that of another: for most tasks nothing.

    A built-in one takes configuration and tokenizer from the checkpoint's folder, or from the
    folder above it.
    """
    if not isinstance(task, str) or task not in BUILT_IN:
        return None
    beside = []
    for name, file in sidecars(checkpoint).items():
        with reading(file):
            if file.is_file():
                beside.append((name, hashlib.blake2b(file.read_bytes()).hexdigest()))
    return checkpoint.path.absolute().parent, tuple(beside)


def _load(
    task: Task | str, data: str | None, checkpoint: Checkpoint, options: Mapping[str, object]
) -> tuple[Task, Dataset[Any], list[int]]:
    """The task, its examples, and the group of each of them."""
    if isinstance(task, str):
        task = load_task(task, data=data, checkpoint=checkpoint.path, options=options)
    else:
        task = check_task(task, type(task).__name__)
    dataset = dataset_of(task)
    require_examples(dataset, "dataset")
    return task, dataset, groups_of(task, dataset)


def _row(
    checkpoint: Checkpoint,
    task: Task,
    dataset: Dataset[Any],
    groups: Sequence[int],
    data_config: DataConfig,
    engine: EngineConfig,
    world: World,
    progress: Progress,
) -> dict[str, Any]:
    """One model's losses and metrics; it is built, evaluated and let go of."""
    # For every model, as processes that do not see the same files may load other tasks.
    require_same_choices(
        {
            "number of examples": len(dataset),  # type: ignore[arg-type]
            "data options": as_dict(data_config),
            "precision": engine.precision,
        },
        world,
    )
    require_same_examples({"the data": dataset}, data_config.seed, world)
    layout = make_layout([checkpoint])
    live = build(task, layout, checkpoint, world, precision=engine.precision)
    note_strangers(live, layout, progress)
    blocks = global_block(layout)
    shared = {name: live.is_shared(name) for name in layout.averaged}
    store = make_store([checkpoint], layout, blocks, world, StoreConfig("disk"), shared=shared)
    ingest([checkpoint], layout, world, store=store, shared=shared)
    size, seed = data_config.batch_size, data_config.seed
    batches = Batches(dataset, task, size, seed, world, groups, stream=3)
    runner = Engine(live, store, blocks, task, world)
    runner.set_weights(torch.ones(1, 1, dtype=torch.float64))
    everything = range(batches.size)
    losses, metrics = runner.example_losses(batches, everything, with_metrics=True)
    low, high = bootstrap_interval(losses, seed, batches.groups(everything))
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "loss": report.finite(float(losses.mean())),
        "ci95": [report.finite(low), report.finite(high)],
        "metrics": {k: report.finite(float(v.mean())) for k, v in metrics.items()},
    }
