"""A run that trains, and saves, two small factors beside each frozen layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from runs import Pairs, save_run
from torch import Tensor, nn

WIDTH, EXAMPLES = 8, 60


class Adapted(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.base.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
            self.base.bias.zero_()
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + self.up(self.down(x))).tanh()


class Adapters:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(EXAMPLES, WIDTH, generator=generator)
        self.y = torch.randn(EXAMPLES, WIDTH, generator=generator).tanh()

    def build_model(self) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        return nn.Sequential(Adapted(generator), Adapted(generator), nn.LayerNorm(WIDTH))

    def dataset(self) -> Pairs:
        return Pairs(self.x, self.y)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x).float() - y).square().mean(1)


def train(folder: Path) -> None:
    task = Adapters()
    torch.manual_seed(0)
    model = task.build_model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, states = torch.optim.SGD(trained.values(), lr=0.3), []
    for rows in torch.randint(EXAMPLES, (20, 16)):
        optimizer.zero_grad()
        task.loss(model, (task.x[rows], task.y[rows])).mean().backward()
        optimizer.step()
        states.append({name: p.detach().clone() for name, p in trained.items()})
    save_run(folder, states[4::5])


task = Adapters
