"""A task file: convolutional network with batch norm on scikit-learn's handwritten digits.

    python examples/digits_train.py runs/digits
    twa-merge train runs/digits --task examples/digits_task.py -o merged/

merges the run's checkpoints. Of the 1,797 images a third trains the run, a third trains and guards
the merge, and a third is only ever tested on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset


def digits(seed: int = 0) -> tuple[Subset, Subset, Subset]:
    """1,797 images in three disjoint parts: for training, held out for the merge, and for testing.

    One example is an image (1, 8, 8) float from 0 to 1 and its digit.
    """
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    everything = TensorDataset(images, torch.as_tensor(data.target, dtype=torch.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return (
        Subset(everything, order[:600]),
        Subset(everything, order[600:1200]),
        Subset(everything, order[1200:]),
    )


def conv_norm(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class ConvNet(nn.Module):
    """Images (batch, 1, 8, 8) → logits (batch, 10)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(1, width),
            conv_norm(width, width),
            nn.MaxPool2d(2),
            conv_norm(width, 2 * width),
            conv_norm(2 * width, 2 * width),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(2 * width * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class DigitsTask:
    """What twa-merge asks for: the model, the held-out data, one loss per example."""

    def __init__(self, seed: int = 0) -> None:
        _, self._held_out, self._test = digits(seed)

    def build_model(self) -> nn.Module:
        return ConvNet()

    def dataset(self) -> Dataset:
        return self._held_out

    def test_dataset(self) -> Dataset:
        return self._test

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="none")

    def metrics(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        return {"accuracy": (model(images).argmax(1) == labels).float()}


def task() -> DigitsTask:
    """The name that twa-merge looks for."""
    return DigitsTask()
