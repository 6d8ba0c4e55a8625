"""Suite 3: twelve fine-tunings of one starting point, on scikit-learn's digits."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from runs import Suite, cached, numbered
from torch import Tensor, nn
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from digits_task import ConvNet, DigitsTask, digits
from digits_train import WRONG_LABELS, mislabelled, shifted

# Learning rates of the fine-tunings: careful, usual, rash.
RATES = {"conv": (0.01, 0.03, 0.08), "vit": (5e-4, 1e-3, 2e-3)}
PRETRAINING_EPOCHS = {"conv": 20, "vit": 80}
FINE_TUNING_EPOCHS = 10
BATCH_SIZE = 16


class VisionLayer(nn.Module):
    """One pre-norm transformer layer over patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, width) → the same."""
        batch, patches, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, patches, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, patches, width))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images (batch, 1, 8, 8) in patches of 2 × 2 → logits (batch, 10)."""

    def __init__(self, width: int = 48, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.ModuleList(VisionLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"conv": ConvNet, "vit": VisionTransformer}


class SoupTask(DigitsTask):
    """The digits with either model."""

    def __init__(self, seed: int, kind: str) -> None:
        super().__init__(seed)
        self.kind = kind

    def build_model(self) -> nn.Module:
        return MODELS[self.kind]()


def noisy(images: Tensor) -> Tensor:
    return (images + 0.2 * torch.randn(images.shape)).clamp(0, 1)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "shifted": shifted,
    "noisy": noisy,
    "both": lambda images: noisy(shifted(images)),
}


def soup(cache: Path, seed: int, *, kind: str = "conv") -> Suite:
    """Three learning rates times four augmentations, each with a seed of its own.

    The starting point was trained on the first half of the training images; the fine-tunings see
    all of them, one label in ten of them wrong. It is the reference ``start``.

    Args:
        kind: ``conv`` (with batch norm) or ``vit``.
    """

    def make(folder: Path) -> None:
        images, labels = default_collate(list(digits(seed)[0]))
        torch.manual_seed(seed)
        labels = mislabelled(labels, WRONG_LABELS)
        start, half = MODELS[kind](), len(images) // 2
        rates = RATES[kind]
        epochs = PRETRAINING_EPOCHS[kind]
        _train(start, images[:half], labels[:half], rates[1], "both", epochs)
        torch.save({"model": start.state_dict()}, folder / "start.pt")
        for k, (augmentation, rate) in enumerate(itertools.product(AUGMENTATIONS, rates)):
            torch.manual_seed(1000 * (seed + 1) + k)
            model = copy.deepcopy(start)
            _train(model, images, labels, rate, augmentation, FINE_TUNING_EPOCHS)
            torch.save({"model": model.state_dict()}, folder / f"tuned-{k}.pt")

    settings = {
        "kind": kind,
        "seed": seed,
        "rates": RATES[kind],
        "epochs": [PRETRAINING_EPOCHS[kind], FINE_TUNING_EPOCHS],
    }
    folder = cached(cache / f"soup-{kind}-{seed}", settings, make)
    return Suite(
        f"soup-{kind}",
        seed,
        numbered(folder, "tuned-*.pt"),
        SoupTask(seed, kind),
        {"start": folder / "start.pt"},
    )


def _train(
    model: nn.Module, images: Tensor, labels: Tensor, rate: float, augmentation: str, epochs: int
) -> None:
    optimizer: torch.optim.Optimizer
    if isinstance(model, ConvNet):
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            views = AUGMENTATIONS[augmentation](images[batch])
            F.cross_entropy(model(views), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
