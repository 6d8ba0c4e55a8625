"""Small real runs on disk, and tasks to go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset


def states_of(
    n: int,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.1,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """n state dicts: a common base plus noise."""
    shapes = shapes or {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 7), "scalar": ()}
    generator = torch.Generator().manual_seed(seed)
    base = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    return [
        {
            k: (b + scale * torch.randn(b.shape, generator=generator)).to(dtype)
            for k, b in base.items()
        }
        for _ in range(n)
    ]


def save_run(
    folder: Path, states: Sequence[Mapping[str, Tensor]], *, steps: Sequence[int] | None = None
) -> list[Path]:
    """One ``checkpoint-STEP/model.safetensors`` a state."""
    paths = []
    for i, state in enumerate(states):
        path = folder / f"checkpoint-{steps[i] if steps else 100 * (i + 1)}"
        path.mkdir(parents=True)
        save_file(dict(state), path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths


class Pairs(Dataset):
    """Inputs and targets."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


class LinearTask:
    """Least squares: the loss is a quadratic of the weights, so optima are known exactly."""

    def __init__(
        self, inputs: int = 6, outputs: int = 4, examples: int = 60, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.outputs = inputs, outputs
        self.x = torch.randn(examples, inputs, generator=generator)
        self.truth = torch.randn(outputs, inputs, generator=generator)
        noise = 0.1 * torch.randn(examples, outputs, generator=generator)
        self.y = self.x @ self.truth.T + noise

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.inputs, self.outputs))

    def dataset(self) -> Pairs:
        return Pairs(self.x, self.y)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x) - y).square().sum(1)

    def states(self, n: int, spread: float = 0.5, seed: int = 1) -> list[dict[str, Tensor]]:
        """Checkpoints scattered around the truth."""
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                "0.weight": self.truth
                + spread * torch.randn(self.truth.shape, generator=generator),
                "0.bias": spread * torch.randn(self.outputs, generator=generator),
            }
            for _ in range(n)
        ]
