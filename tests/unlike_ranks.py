"""Ranks that would go ways of their own, as rounding has them do on unlike processors."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from twa_merge.distributed import start

if __name__ == "__main__":
    world = start("cpu")
    asked: list[float] = []

    def evaluate(x: float) -> float:
        asked.append(x)
        return float(world.sum(torch.tensor([x], dtype=torch.float64)))

    def search(function: Callable[[float], float]) -> list[float]:
        return [function(1.0 + world.rank + k) for k in range(3 + world.rank)]

    found = world.gather((world.led(evaluate, search), asked))
    if world.is_zero:
        print(json.dumps(found))
