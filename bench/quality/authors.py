"""The authors' algorithm, for comparison: Trainable Weight Averaging (arXiv 2205.13104).

Written afresh from the paper's algorithm 1 and section 3, in the form that its experiments have:

1. the checkpoints' raw weights, not centred, are orthonormalised by classical Gram-Schmidt in
   float32: P (n, D);
2. from the mean or the last checkpoint, SGD with momentum on mini-batches whose gradients are
   projected onto the subspace: g ← Pᵀ(P g);
3. a step, linear or cosine schedule; batch-norm statistics are re-estimated at the end.

The learning rate is the best of several by the loss on the guard split, which is what a careful
user of that code would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from twa_merge.checkpoints import Checkpoint
from twa_merge.task import Task, collate_of
from twa_merge.tensors import tensor_rows


@dataclass(frozen=True)
class Settings:
    """Of the paper's training; every learning rate is tried from every start."""

    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    starts: tuple[str, ...] = ("mean", "last")
    epochs: int = 5
    batch_size: int = 16
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    seed: int = 0


@dataclass
class Outcome:
    """What the best learning rate led to.

    Attributes:
        state: parameters and buffers by name, ready for ``load_state_dict`` and ``save_file``.
        orthogonality_error: max |P Pᵀ − I| of the float32 basis.
        guard_loss: of ``state``, the one that it was chosen by.
        trials: (start, learning rate) → guard loss.
        passes: forward and backward passes over the fit split, of all trials.
    """

    state: dict[str, Tensor]
    start: str
    learning_rate: float
    orthogonality_error: float
    guard_loss: float
    trials: dict[tuple[str, float], float] = field(default_factory=dict)
    passes: int = 0


class FlatModel:
    """The task's model with all parameters in one vector, which the module's are views of."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.module: nn.Module = task.build_model()
        self.parameters = dict(self.module.named_parameters())
        self.vector = torch.cat([p.detach().float().flatten() for p in self.parameters.values()])
        parts = self.vector.split([p.numel() for p in self.parameters.values()])
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.data = part.view(parameter.shape)

    def weights(self, checkpoints: Sequence[Checkpoint]) -> Tensor:
        """The checkpoints' raw weights: (n, D) float32."""
        return torch.stack(
            [
                torch.cat([tensor_rows(c, k).float().flatten() for k in self.parameters])
                for c in checkpoints
            ]
        )

    def gradient(self, batch: Any) -> Tensor:
        """Of the mean loss, in training mode as the authors have it: (D,)."""
        self.module.train()
        self.module.zero_grad()
        self.task.loss(self.module, batch).mean().backward()
        return torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in self.parameters.values()
            ]
        )

    @torch.no_grad()
    def loss(self, data: Dataset[Any], batch_size: int) -> float:
        """Mean loss per example in evaluation mode."""
        self.module.eval()
        losses = [self.task.loss(self.module, b) for b in self.batches(data, batch_size)]
        return float(torch.cat(losses).double().mean())

    @torch.no_grad()
    def update_statistics(self, data: Dataset[Any], batch_size: int) -> None:
        """Batch-norm statistics of the current weights, as ``swa_utils.update_bn`` makes them."""
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        if not norms:
            return
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
        self.module.train()
        for batch in self.batches(data, batch_size):
            self.task.loss(self.module, batch)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum

    def batches(
        self, data: Dataset[Any], size: int, generator: torch.Generator | None = None
    ) -> Iterator[Any]:
        """Collated batches of all examples, shuffled where there is a generator."""
        n = len(data)  # type: ignore[arg-type]
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for part in order.split(size):
            yield collate_of(self.task)([data[i] for i in part.tolist()])

    def state(self) -> dict[str, Tensor]:
        """A copy of parameters and buffers as they are."""
        return {k: v.detach().clone() for k, v in self.module.state_dict().items()}


def authors_twa(
    checkpoints: Sequence[Checkpoint],
    task: Task,
    fit: Dataset[Any],
    guard: Dataset[Any],
    settings: Settings = Settings(),
) -> Outcome:
    """The paper's training on ``fit``, its learning rate and start chosen on ``guard``.

    A trial whose loss is not finite is out.
    """
    model = FlatModel(task)
    weights = model.weights(checkpoints)
    starts = {"mean": weights.mean(0), "last": weights[-1].clone()}
    basis = gram_schmidt(weights)
    best: Outcome | None = None
    trials: dict[tuple[str, float], float] = {}
    for start in settings.starts:
        for rate in settings.learning_rates:
            model.vector.copy_(starts[start])
            projected_sgd(model, basis, fit, rate, settings)
            model.update_statistics(fit, settings.batch_size)
            loss = model.loss(guard, settings.batch_size)
            trials[start, rate] = loss
            if math.isfinite(loss) and (best is None or loss < best.guard_loss):
                best = Outcome(model.state(), start, rate, orthogonality_error(basis), loss)
    if best is None:
        raise FloatingPointError(f"every learning rate diverged: {settings.learning_rates}")
    best.trials, best.passes = trials, len(trials) * settings.epochs
    return best


def gram_schmidt(weights: Tensor) -> Tensor:
    """Classical Gram-Schmidt, one row after the other, in the weights' own dtype: (n, D)."""
    basis = weights.clone()
    for i in range(len(basis)):
        if i:
            basis[i] -= basis[:i].T @ (basis[:i] @ basis[i])
        basis[i] /= basis[i].norm()
    return basis


def orthogonality_error(basis: Tensor) -> float:
    """max |P Pᵀ − I|, in float64."""
    wide = basis.double()
    return float((wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max())


def projected_sgd(
    model: FlatModel, basis: Tensor, data: Dataset[Any], rate: float, settings: Settings
) -> None:
    """Moves ``model.vector`` by SGD with momentum within the subspace."""
    generator = torch.Generator().manual_seed(settings.seed)
    velocity = torch.zeros_like(model.vector)
    steps = settings.epochs * math.ceil(len(data) / settings.batch_size)  # type: ignore[arg-type]
    step = 0
    for _ in range(settings.epochs):
        for batch in model.batches(data, settings.batch_size, generator):
            gradient = model.gradient(batch)
            projected = basis.T @ (basis @ gradient)
            velocity.mul_(settings.momentum).add_(projected)
            velocity.add_(model.vector, alpha=settings.weight_decay)
            factor = schedule_factor(settings.schedule, step / steps)
            model.vector.sub_(velocity, alpha=rate * factor)
            step += 1


def schedule_factor(schedule: str, done: float) -> float:
    """Share of the learning rate after ``done`` (0 to 1) of the training."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1.0 - done
    if schedule == "step":
        return 1.0 if done < 0.5 else 0.1
    return 1.0
