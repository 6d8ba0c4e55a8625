"""A task whose fits show the last bit of a gradient: rectifiers, few examples, many batches."""

from __future__ import annotations

from small_task import CLASSES, FEATURES, Small
from torch import nn


class Kinked(Small):
    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, CLASSES)
        )


def task(data: str | None = None) -> Kinked:
    return Kinked(data)
