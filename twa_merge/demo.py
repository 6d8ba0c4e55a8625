"""A real training run in about a minute, and the task to merge it with: ``twa-merge demo``."""

from __future__ import annotations

import json
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

STEPS = 1000
CHECKPOINTS = 20
LEARNING_RATE = 3e-3
BATCH_SIZE = 16
WARMUP = 50
SCHEDULES = ("constant", "decay")


class Training:
    """One run of a ``ByteTransformer``, advanced step by step.

    A step's batch depends on the seed and the step's number alone, so that a (deep) copy can go
    another way from the same point.

    Attributes:
        step: steps made so far.
    """

    def __init__(
        self,
        text: Text,
        *,
        seed: int = 0,
        learning_rate: float = LEARNING_RATE,
        batch_size: int = BATCH_SIZE,
        config: ByteConfig | None = None,
    ) -> None:
        self.step = 0
        self.seed, self.learning_rate, self.batch_size = seed, learning_rate, batch_size
        self.model = ByteTransformer(config or ByteConfig())
        self.model.reset(seed)
        self._bytes = torch.frombuffer(bytearray(b"\n".join(text.train)), dtype=torch.uint8)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def advance(self, factor: float = 1.0) -> None:
        """One step at ``factor`` times the learning rate, less during the warm-up."""
        self.step += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * factor * min(1.0, self.step / WARMUP)
        sequence_loss(self.model, self._batch()).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, run: Path) -> Path:
        """Writes ``run/checkpoint-STEP`` in float32 and returns it."""
        folder = run / f"checkpoint-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        # Shards this small only so that a small model has several, as a large one would.
        save_torch_model(self.model, folder, max_shard_size="700KB")
        document = {"architectures": ["ByteTransformer"], "model_type": "byte_transformer"}
        text = json.dumps({**document, **asdict(self.model.config)}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        return folder

    def _batch(self) -> Tensor:
        """Stretches drawn uniformly from the training text: (batch, context + 1) uint8."""
        # The generator looks at the lower 32 bits only.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**32)
        length = self.model.config.context + 1
        last = len(self._bytes) - length
        starts = torch.randint(last + 1, (self.batch_size, 1), generator=generator)
        return self._bytes[starts + torch.arange(length)]


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
    config: ByteConfig | None = None,
    progress: Progress = silent,
) -> list[Path]:
    """Trains a ``ByteTransformer`` on the training part of ``text`` and saves checkpoints.

    The number of steps is fixed, so that the same call gives the same run. Two runs that differ
    in ``schedule`` only are one run up to the last fifth of their steps. Checkpoints come from the
    second half, as if the run had deleted its oldest ones as it went.

    Args:
        folder: gets ``checkpoint-STEP`` folders of float32 safetensors shards.
        checkpoints: how many, evenly spread over the second half, the last after the last step.
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
    second_half = steps - steps // 2
    if not 1 <= checkpoints <= second_half:
        raise ConfigError(
            "A run cannot save so many checkpoints.",
            expected=f"1 to {second_half}, half the number of steps",
            found=checkpoints,
        )
    training = Training(
        text or standard_library_text(),
        seed=seed,
        learning_rate=learning_rate,
        batch_size=batch_size,
        config=config,
    )
    saved_at = {steps - second_half * k // checkpoints for k in range(checkpoints)}
    saved = []
    progress(Started("Training a small run", steps, "steps"))
    for step in range(1, steps + 1):
        training.advance(decay_factor(step, steps) if schedule == "decay" else 1.0)
        if step in saved_at:
            saved.append(training.save(Path(folder)))
        progress(Advanced())
    return saved


def decay_factor(step: int, steps: int) -> float:
    """Share of the learning rate for step 1..steps: 1, then to zero over the last fifth."""
    decayed = max(1, steps // 5)
    return min(1.0, (steps - step + 1) / (decayed + 1))


def task(
    text: Text | None = None, *, sequences: int | None = 256, test_sequences: int | None = 256
) -> ByteTask:
    """The task of the demo's run: ``--task twa_merge.demo:task`` on the command line.

    Args:
        text: that the run was trained on; ``standard_library_text()`` without it.
        sequences: held-out sequences of 128 bytes for fit and guard together; None for all.
        test_sequences: the same of the test part.

    Raises:
        TaskError: this Python came without its source.
    """
    text = text or standard_library_text()
    return ByteTask(text.held_out, text.test, sequences=sequences, test_sequences=test_sequences)
