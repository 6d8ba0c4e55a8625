"""A task whose fits show the last bit of a gradient: rectifiers, few examples, many batches."""

from __future__ import annotations

import torch
from small_task import CLASSES, FEATURES, Small
from torch import Tensor, nn


class Net(nn.Sequential):
    """With a scalar, which every process holds whole."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, CLASSES)
        )
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature


class Kinked(Small):
    def build_model(self) -> nn.Module:
        return Net()


def task(data: str | None = None) -> Kinked:
    return Kinked(data)
