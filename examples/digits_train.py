"""Trains the network of digits_task.py as many runs do: a constant, rather high learning rate.

One training label in ten is wrong, as in data that was gathered without much care; what is held
out for the merge and for testing has been looked at.

    python examples/digits_train.py runs/digits

saves ``epoch-1.pt``, ``epoch-2.pt``, ... with the optimizer's state beside the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_task import ConvNet, digits
from torch import Tensor
from torch.utils.data import default_collate

EPOCHS = 20
LEARNING_RATE = 0.05
BATCH_SIZE = 16
WRONG_LABELS = 0.1


def train(
    folder: str | Path,
    seed: int = 0,
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
) -> list[Path]:
    """Saves one checkpoint an epoch into ``folder``; the same seed gives the same run.

    Returns:
        The files in order of training.
    """
    torch.manual_seed(seed)
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4)
    images, labels = default_collate(list(digits(seed)[0]))
    labels = mislabelled(labels, WRONG_LABELS)
    Path(folder).mkdir(parents=True, exist_ok=True)
    saved = []
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(model(shifted(images[batch])), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
        }
        saved.append(Path(folder) / f"epoch-{epoch}.pt")
        torch.save(state, saved[-1])
    return saved


def mislabelled(labels: Tensor, share: float) -> Tensor:
    """About ``share`` of the labels replaced by others: (examples,) → the same."""
    wrong = torch.rand(len(labels)) < share
    return torch.where(wrong, (labels + torch.randint(1, 10, labels.shape)) % 10, labels)


def shifted(images: Tensor) -> Tensor:
    """Every image moved by up to one pixel: (batch, 1, 8, 8) → the same."""
    down, right = torch.randint(0, 3, (2, len(images), 1, 1))
    rows = (torch.arange(8).view(1, 8, 1) + down).expand(-1, 8, 8)
    columns = (torch.arange(8).view(1, 1, 8) + right).expand(-1, 8, 8)
    padded = F.pad(images, (1, 1, 1, 1)).squeeze(1)
    which = torch.arange(len(images)).view(-1, 1, 1)
    return padded[which, rows, columns].unsqueeze(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = train(arguments.folder, arguments.seed)
    print(f"saved {len(files)} checkpoints in {arguments.folder}")
