"""A task file: a model with tensors that few models have, on made-up data."""

from __future__ import annotations

from pathlib import Path

import torch
from runs import Pairs, save_run
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

FEATURES, CLASSES = 6, 3


class Odd(nn.Module):
    """Parameters without numbers and of integers; buffers that are wide, narrow, count and mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        # Its constructor computes a buffer, which fails on the meta device.
        self.turned = orthogonal(nn.Linear(8, 8))
        self.last = nn.Linear(8, CLASSES)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.scale = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
        self.register_buffer("wide", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("narrow", torch.zeros(8, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) * self.scale + self.wide + self.narrow + self.empty.sum()
        mixed = (self.mask.exp() @ hidden.float().T).T / 8
        return self.last(self.turned(mixed.tanh()))


class OddTask:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(80, FEATURES, generator=generator)
        self.y = self.x[:, :CLASSES].argmax(1)

    def build_model(self) -> nn.Module:
        return Odd()

    def dataset(self) -> Pairs:
        return Pairs(self.x[:60], self.y[:60])

    def test_dataset(self) -> Pairs:
        return Pairs(self.x[60:], self.y[60:])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="none")


def task() -> OddTask:
    return OddTask()


def train(folder: Path, checkpoints: int = 5) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    data, model, states = OddTask(), Odd(), []
    with torch.no_grad():
        model.scale.copy_(torch.arange(1, 9))
        model.wide.copy_(torch.randn(8).double())
        model.narrow.copy_(torch.randn(8))
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for step in range(10 * checkpoints):
        chosen = torch.randint(60, (8,))
        optimizer.zero_grad()
        data.loss(model, (data.x[chosen], data.y[chosen])).mean().backward()
        optimizer.step()
        model.count += 2048.0
        if step % 10 == 9:
            states.append({k: v.clone().contiguous() for k, v in model.state_dict().items()})
    save_run(folder, states)
    return states
