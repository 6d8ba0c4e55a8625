"""A deep stack of equal layers and next to no activations: weights are all that takes memory.

twa-merge train RUN --task bench/scale/layers_task.py --data WIDTHxLAYERS
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Stack(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Layers:
    def __init__(self, width: int, layers: int, examples: int = 64) -> None:
        self.width, self.layers, self.examples = width, layers, examples

    def build_model(self) -> nn.Module:
        return Stack(self.width, self.layers)

    def dataset(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        return TensorDataset(
            *torch.randn(2, self.examples, self.width, generator=generator).unbind()
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y, reduction="none").mean(1)


def task(data: str = "64x4") -> Layers:
    width, layers = map(int, data.split("x"))
    return Layers(width, layers)


def make_run(
    folder: Path,
    width: int,
    layers: int,
    checkpoints: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A run folder of ``checkpoints`` that scatter around one start; made once, then kept."""
    document = [width, layers, checkpoints, str(dtype)]
    folder = folder / f"layers-{width}x{layers}-{checkpoints}-{str(dtype).rpartition('.')[2]}"
    made = folder / "made.json"
    if made.is_file() and json.loads(made.read_text()) == document:
        return folder
    generator = torch.Generator().manual_seed(0)
    start = {
        f"layers.{i}.{name}": torch.randn(shape, generator=generator) * width**-0.5
        for i in range(layers)
        for name, shape in (("weight", (width, width)), ("bias", (width,)))
    }
    for k in range(checkpoints):
        state = {
            name: (value + 0.1 * width**-0.5 * torch.randn(value.shape, generator=generator)).to(
                dtype
            )
            for name, value in start.items()
        }
        path = folder / f"checkpoint-{100 * (k + 1)}"
        path.mkdir(parents=True, exist_ok=True)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    made.write_text(json.dumps(document))
    return folder
