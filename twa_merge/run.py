"""One run of the trained merge: its choices, and everything that its stages share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .agreement import files_of, require_same_choices, require_same_files, sample_of
from .batches import Batches
from .batchnorm import leave_frozen
from .checkpoints.base import Checkpoint
from .choices import Choices
from .clock import Clock
from .config import (
    DataConfig,
    FitConfig,
    as_dict,
    parse_subspace,
)
from .distributed import World
from .diverged import far_apart_in_float32
from .errors import CheckpointError, listing
from .fit import Fitter
from .ingest import Grams, ingest
from .layers import layer_groups, layers_of_blocks
from .layout import Blocks, Layout, dtype_named, global_block, grouped_blocks, tensor_blocks
from .model import LiveModel, build
from .objective import Engine
from .progress import Noted, Progress
from .random_directions import RandomDirections, draw
from .random_store import RandomStore
from .resume import EvaluationLog
from .same_examples import digest_of, require_same_examples
from .scoring import Jury
from .store import Store, Work, exact_store, gathering, make_store, this_machine
from .subspace import root_mean_square
from .task import Splits, Task


@dataclass
class Run:
    """Everything that the stages of one merge share.

    Attributes:
        directions: random ones, where they are what is trained.
        directions_gram: their Gram matrix, (R, R) float64.
        layers: the layer of each block, (B,) int64, where ``--blocks auto`` leaves a choice
            between tensors and layers.
    """

    checkpoints: list[Checkpoint]
    layout: Layout
    task: Task
    splits: Splits
    world: World
    choices: Choices
    log: EvaluationLog
    clock: Clock
    progress: Progress
    blocks: Blocks
    grams: Grams
    engine: Engine
    fitter: Fitter
    jury: Jury
    directions: RandomDirections | None = None
    directions_gram: Tensor | None = None
    layers: Tensor | None = None

    @property
    def n(self) -> int:
        return len(self.checkpoints)


def set_up(
    checkpoints: list[Checkpoint],
    layout: Layout,
    task: Task,
    splits: Splits,
    world: World,
    choices: Choices,
    log: EvaluationLog,
    clock: Clock,
    progress: Progress,
) -> Run:
    """Builds the model and reads the checkpoints: Gram matrices and store in a single pass."""
    n = len(checkpoints)
    machine = this_machine(world)
    gather = gathering(layout, n, machine, choices.store, choices.engine)
    with clock.part("build"):
        live = build(
            task,
            layout,
            checkpoints[-1],
            world,
            precision=choices.engine.precision,
            activation_checkpointing=choices.engine.activation_checkpointing,
            gather=gather,
        )
    note_strangers(live, layout, progress)
    if unsaved := leave_frozen(live, checkpoints):
        progress(
            Noted(
                f"The checkpoints lack running statistics of batch norm in {listing(unsaved)}; "
                "they stay as build_model() leaves them."
            )
        )
    blocks = _blocks(live, layout, choices.fit)
    shared = {name: live.is_shared(name) for name in layout.averaged}
    store = make_store(
        checkpoints,
        layout,
        blocks,
        world,
        choices.store,
        shared=shared,
        work=Work(whole_model=gather == "model", layer_numel=live.layer_numel),
        machine=machine,
        progress=progress,
    )
    with clock.part("ingest"):
        grams = ingest(
            checkpoints, layout, world, store=store, shared=shared,
            still=_still(live, layout), progress=progress,
        )  # fmt: skip
    far_apart = far_apart_in_float32(checkpoints, grams.norms, progress)
    exact = exact_store(store, checkpoints, layout, world, shared=shared, far_apart=far_apart)
    directions, directions_gram = _directions(live, layout, grams, choices), None
    if world.size == 1 and choices.fit.span == "affine" and not directions:
        live.freeze(grams.constant)
    if directions:
        with clock.part("random directions"):
            directions_gram = directions.gram(world, progress)

    def engine_of(offsets: Store) -> Engine:
        spanned = RandomStore(offsets, directions, n, world) if directions else offsets
        return Engine(live, spanned, blocks, task, world)

    engine = engine_of(store)
    judging = engine if exact is store else engine_of(exact)
    fit, guard, test = _batches(task, splits, world, choices.data)
    dtype = dtype_named(choices.out.dtype)
    jury = Jury(judging, fit, guard, test, n, dtype, choices.guard.select, choices.guard.batch_norm)
    steps = [c.step for c in checkpoints]
    fitter = Fitter(engine, fit, choices.fit, log, progress, choices.data.sample, steps=steps)
    return Run(
        checkpoints, layout, task, splits, world, choices, log, clock, progress, blocks, grams,
        engine, fitter, jury, directions, directions_gram,
        _layers(live, layout, blocks, choices.fit),
    )  # fmt: skip


def _batches(
    task: Task, splits: Splits, world: World, config: DataConfig
) -> tuple[Batches, Batches, Batches | None]:
    """Those of the fit split, the guard split and the test data."""
    size, seed = config.batch_size, config.seed
    return (
        Batches(splits.fit, task, size, seed, world, splits.fit_groups),
        Batches(splits.guard, task, size, seed, world, splits.guard_groups, stream=1),
        Batches(splits.test, task, size, seed, world, stream=2)
        if splits.test is not None
        else None,
    )


def _still(live: LiveModel, layout: Layout) -> list[str]:
    """Averaged tensors that are no directions of their own for the fit.

    Buffers, which no gradient moves; tensors that are no part of the model; and those of which the
    model keeps but one where the file has two.
    """
    first = live.tied_groups()
    return [name for name in layout.averaged if live.is_buffer(name) or first.get(name) != name]


def several(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints, if there are two or more; CheckpointError otherwise."""
    if len(checkpoints) < 2:
        raise CheckpointError(
            "There is only one checkpoint, so there is nothing to average.",
            checkpoint=checkpoints[0].path,
            expected="two or more checkpoints",
            found="one",
            remedy="give the run folder, more checkpoints, or a wider selection",
        )
    return checkpoints


def fingerprint(
    checkpoints: Sequence[Checkpoint],
    task: Task | str,
    data: str | None,
    splits: Splits,
    choices: Choices,
    device: torch.device,
) -> dict[str, Any]:
    """What the evaluations depend on; the number of processes is not part of it."""
    return {
        "checkpoints": [[p.name, *sample_of(p)] for p in files_of(checkpoints)],
        "task": task if isinstance(task, str) else type(task).__name__,
        "data": data,
        "examples": [
            len(splits.fit),  # type: ignore[arg-type]
            len(splits.guard),  # type: ignore[arg-type]
            digest_of(splits.fit, choices.data.seed, device),
        ],
        "data options": as_dict(choices.data),
        "fit options": as_dict(choices.fit),
        "precision": choices.engine.precision,
        "store": as_dict(choices.store),
    }


def require_agreement(
    checkpoints: Sequence[Checkpoint], splits: Splits, choices: Choices, world: World
) -> None:
    """Checks that all processes are about to do the same.

    Raises:
        CheckpointError, ConfigError: they read other files, or were asked for something else.
        TaskError: their datasets hold other examples.
    """
    parts = {"the fit split": splits.fit, "the guard split": splits.guard}
    if splits.test is not None:
        parts["the test data"] = splits.test
    counts = [len(part) for part in parts.values()]  # type: ignore[arg-type]
    asked: dict[str, Any] = {"number of examples": counts}
    for part, labels in (("fit", splits.fit_groups), ("guard", splits.guard_groups)):
        asked[f"number of groups in the {part} split"] = labels and len(set(labels))
    for kind in ("data", "fit", "guard", "store", "engine"):
        options = as_dict(getattr(choices, kind))
        asked |= {f"{kind} option {name}": value for name, value in options.items()}
    # A node may have its own devices.
    del asked["engine option device"]
    require_same_files(checkpoints, world)
    require_same_choices(asked | {"output dtype": choices.out.dtype}, world)
    require_same_examples(parts, choices.data.seed, world)


def note_strangers(live: LiveModel, layout: Layout, progress: Progress) -> None:
    """Tells of what the checkpoints hold and the model lacks, and the other way round."""
    strangers = [n for n in layout.averaged if n not in live.names and n not in live.unlike]
    if strangers:
        progress(
            Noted(
                f"{len(strangers)} tensors are no part of the task's model, for instance "
                f"{strangers[0]}; they are averaged with the coefficients of the whole model."
            )
        )
    if layout.extra_states:
        progress(
            Noted(
                "The checkpoints hold extra states of modules that are no tensors and no part of "
                f"the task's model; they are left out: {listing(layout.extra_states)}."
            )
        )
    if live.as_built:
        progress(
            Noted(
                "The checkpoints lack parameters that the task's model has frozen; they stay as "
                f"build_model() leaves them: {listing(live.as_built)}."
            )
        )
    if live.states_as_built:
        progress(
            Noted(
                "The checkpoints lack extra states that the task's model takes; they stay as "
                f"build_model() leaves them: {listing(live.states_as_built)}."
            )
        )


def _directions(
    live: LiveModel, layout: Layout, grams: Grams, choices: Choices
) -> RandomDirections | None:
    """Random directions as long as the checkpoints are far from their centre, root mean square."""
    word, count = parse_subspace(choices.fit.subspace)
    if word != "random" or count is None:
        return None
    return draw(layout, choices.data.seed, count, root_mean_square(grams.exact.sum(0)), live)


def _blocks(live: LiveModel, layout: Layout, fit: FitConfig) -> Blocks:
    """The finest blocks that the fit will use."""
    if parse_subspace(fit.subspace)[0] == "random":
        return global_block(layout)
    if fit.blocks == "layers":
        return grouped_blocks("layers", layer_groups(live.module, live.names, layout))
    if fit.blocks == "tensors" or (fit.blocks == "auto" and fit.optimizer == "lbfgs"):
        return tensor_blocks(layout, live.tied_groups())
    return global_block(layout)


def _layers(live: LiveModel, layout: Layout, blocks: Blocks, fit: FitConfig) -> Tensor | None:
    """The layer of each block, (B,) int64, where there is a choice between tensors and layers."""
    if fit.blocks != "auto" or blocks.kind != "tensors":
        return None
    return layers_of_blocks(blocks, layer_groups(live.module, live.names, layout))
