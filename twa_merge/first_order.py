"""The paper's own training: SGD or AdamW in orthonormal coordinates, batch by batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .batches import Batches
from .config import FitConfig
from .optimize import FitResult, schedule_factor
from .subspace import Chart


def first_order(
    function: Callable[[Tensor, Sequence[int]], tuple[float, Tensor]],
    chart: Chart,
    batches: Batches,
    config: FitConfig,
    observe: Callable[[int, float, float], None],
    examples: int,
) -> FitResult:
    """Projected SGD or AdamW (Trainable Weight Averaging, arXiv 2205.13104, algorithm 1).

    The gradient of each batch is projected onto the orthonormal basis of the span, the step is
    taken there: y_j = z_j √(λ_j / n), so that a learning rate means what it means in weight space.
    With ``sharpness`` ρ each gradient is taken at y + ρ g/‖g‖ (sharpness-aware minimisation,
    arXiv 2010.01412).

    Args:
        function: (z, positions of a batch) → loss and ∇_z.
        examples: of the fit split to use.

    Returns:
        The last iterate, as in the paper; ``loss`` is the mean over the last epoch.
    """
    scale = torch.cat([(s.eigenvalues / s.n).sqrt() for s in chart.subspaces])
    y = torch.zeros(chart.size, dtype=torch.float64, requires_grad=True)
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [y], lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW([y], lr=config.lr, weight_decay=config.weight_decay)
    parts = batches.parts(range(examples))
    steps = config.epochs * len(parts)
    trace: list[tuple[int, float]] = []
    path: list[Tensor] = []
    best = mean = math.inf
    order = random.Random(batches.seed)
    for step in range(steps):
        if step % len(parts) == 0:
            order.shuffle(parts)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule_factor(config.schedule, step, steps)
        loss, gradient = _gradient(function, y.detach(), parts[step % len(parts)], scale, config)
        trace.append((step + 1, loss))
        observe(step + 1, loss, best if math.isfinite(best) else loss)
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            return FitResult(torch.zeros_like(y), math.inf, trace, False, path)
        y.grad = gradient
        optimizer.step()
        if step % len(parts) == len(parts) - 1:
            path.append(y.detach() / scale)
            # Least of the epochs: a single batch may be an easy one.
            mean = sum(loss for _, loss in trace[-len(parts) :]) / len(parts)
            best = min(best, mean)
    z = y.detach() / scale
    return FitResult(z, mean if bool(z.isfinite().all()) else math.inf, trace, True, path)


def _gradient(
    function: Callable[[Tensor, Sequence[int]], tuple[float, Tensor]],
    y: Tensor,
    part: Sequence[int],
    scale: Tensor,
    config: FitConfig,
) -> tuple[float, Tensor]:
    """Loss at y and gradient in y: ∇_y = ∇_z / scale."""
    loss, gradient = function(y / scale, part)
    gradient = gradient / scale
    norm = float(gradient.norm())
    if config.sharpness > 0.0 and norm > 0.0 and math.isfinite(norm):
        _, gradient = function((y + config.sharpness * gradient / norm) / scale, part)
        gradient = gradient / scale
    return loss, gradient
