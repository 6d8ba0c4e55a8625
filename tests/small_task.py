"""A task file for tests of the command line: two layers and batch norm, on made-up data."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from runs import Pairs, save_run
from torch import Tensor, nn

FEATURES, CLASSES = 6, 3


class Small:
    def __init__(self, data: str | None = None) -> None:
        generator = torch.Generator().manual_seed(int(data or 0))
        self.x = torch.randn(90, FEATURES, generator=generator)
        self.y = (self.x[:, :CLASSES] + 0.5 * self.x[:, CLASSES:]).argmax(1)

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, CLASSES)
        )

    def dataset(self) -> Pairs:
        return Pairs(self.x, self.y)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        # Lets a test catch the run in the middle.
        time.sleep(float(os.environ.get("SMALL_TASK_SLEEP", "0")))
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        return {"accuracy": (model(x).argmax(1) == y).float()}


def task(data: str | None = None) -> Small:
    return Small(data)


def train(
    folder: Path,
    checkpoints: int = 6,
    seed: int = 0,
    of: Callable[[str], Small] = Small,
    lr: float = 0.5,
) -> None:
    """A real run: SGD at a rate that is too high, a checkpoint every ten steps."""
    torch.manual_seed(seed)
    data = of("7")
    model = data.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    states = []
    for step in range(10 * checkpoints):
        chosen = torch.randint(len(data.x), (8,))
        optimizer.zero_grad()
        data.loss(model, (data.x[chosen], data.y[chosen])).mean().backward()
        optimizer.step()
        if step % 10 == 9:
            states.append({k: v.clone() for k, v in model.state_dict().items()})
    save_run(folder, states)
