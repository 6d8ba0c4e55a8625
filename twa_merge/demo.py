"""A real training run in about a minute, and the task to merge it with: ``twa-merge demo``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import save_torch_model
from torch import Tensor

from .errors import ConfigError
from .progress import Advanced, Progress, Started, silent
from .tasks.byte_lm import (
    ByteConfig,
    ByteTask,
    ByteTransformer,
    Text,
    sequence_loss,
    standard_library_text,
)

STEPS = 1200
CHECKPOINTS = 24
LEARNING_RATE = 3e-3
BATCH_SIZE = 16
WARMUP = 50
SCHEDULES = ("constant", "decay")


def train_run(
    folder: str | Path,
    *,
    steps: int = STEPS,
    checkpoints: int = CHECKPOINTS,
    seed: int = 0,
    schedule: str = "constant",
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
    text: Text | None = None,
    config: ByteConfig = ByteConfig(),
    progress: Progress = silent,
) -> list[Path]:
    """Trains a ``ByteTransformer`` on the training part of ``text`` and saves checkpoints.

    The number of steps is fixed, so that the same call gives the same run. Two runs that differ
    in ``schedule`` only are one run up to the last fifth of their steps.

    Args:
        folder: gets ``checkpoint-STEP`` folders of float32 safetensors shards.
        checkpoints: how many, evenly spread, the last one after the last step.
        schedule: ``constant`` learning rate, or ``decay``: linearly to zero over the last fifth.
        text: ``standard_library_text()`` without it.

    Returns:
        The checkpoint folders in order of training.

    Raises:
        ConfigError: an unknown schedule, or more checkpoints than steps.
        TaskError: this Python came without its source.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(
            "The schedule is not known.", expected=" or ".join(SCHEDULES), found=schedule
        )
    if not 1 <= checkpoints <= steps:
        raise ConfigError(
            "A run cannot save so many checkpoints.",
            expected=f"1 to {steps}, the number of steps",
            found=checkpoints,
        )
    model = ByteTransformer(config)
    model.reset(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    saved_at = {steps * (k + 1) // checkpoints for k in range(checkpoints)}
    saved = []
    progress(Started("training", steps, "steps"))
    batches = _batches((text or standard_library_text()).train, config, batch_size, seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _factor(step, steps, schedule)
        sequence_loss(model, next(batches)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in saved_at:
            saved.append(_save(model, Path(folder) / f"checkpoint-{step}"))
        progress(Advanced())
    return saved


def demo_text(seed: int = 0) -> Text:
    """What the demo's run is trained, merged and tested on."""
    return standard_library_text(seed)


def task(
    text: Text | None = None, *, sequences: int | None = 512, test_sequences: int | None = 512
) -> ByteTask:
    """The task of the demo's run: ``--task twa_merge.demo:task`` on the command line.

    Args:
        sequences: held-out sequences of 128 bytes for fit and guard together; None for all.
        test_sequences: the same of the test part.
    """
    text = text or standard_library_text()
    return ByteTask(text.held_out, text.test, sequences=sequences, test_sequences=test_sequences)


def _factor(step: int, steps: int, schedule: str) -> float:
    """Share of the learning rate that step 1..steps is made with."""
    if schedule == "decay" and step > steps - steps // 5:
        return (steps - step + 1) / (steps // 5 + 1)
    return min(1.0, step / WARMUP)


def _batches(
    documents: tuple[bytes, ...], config: ByteConfig, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Stretches drawn uniformly from the joined documents: (batch, context + 1) uint8."""
    text = torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)
    stretch = torch.arange(config.context + 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - config.context, (batch_size, 1), generator=generator)
        yield text[starts + stretch]


def _save(model: ByteTransformer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # Shards this small only so that a small model has several, as a large one would.
    save_torch_model(model, folder, max_shard_size="700KB")
    document = {"architectures": ["ByteTransformer"], "model_type": "byte_transformer"}
    text = json.dumps({**document, **asdict(model.config)}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return folder
