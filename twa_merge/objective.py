"""Loss and gradient in coordinates, and losses per example, of the live model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import Batches
from .distributed import World
from .errors import TaskError, listing
from .layout import Blocks
from .model import LiveModel
from .store.base import Store, split_alphas
from .subspace import Chart
from .task import Task, metrics_of
from .user_code import user_code

# Numbers whose float64 copies are made at a time.
_PIECE = 1 << 22
# With a smaller Σ α the centre is too small a part of the weights to be told from them.
_LEAST_SUM = 0.1


def _require_per_example(what: str, values: Any, size: int) -> None:
    if isinstance(values, Tensor) and values.shape == (size,):
        return
    got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise TaskError(
        f"The task's {what} is not one number per example.",
        expected=f"a tensor of shape [{size}] for a batch of {size}",
        found=f"{what} gave {got}",
        remedy='return one number per example: no mean over the batch, reduction="none"',
    )


def _checked_metrics(metrics: Any, size: int) -> Mapping[str, Tensor]:
    if not isinstance(metrics, Mapping):
        raise TaskError(
            "The task's metrics have no names.",
            expected=f"a dictionary: name → tensor of shape [{size}] for a batch of {size}",
            found=type(metrics).__name__,
        )
    for name, values in metrics.items():
        if not isinstance(name, str) or not name:
            raise TaskError(
                "A metric of the task has no name.",
                expected="a dictionary whose keys are texts that are not empty",
                found=repr(name),
            )
        _require_per_example(f"metric {name}", values, size)
    return metrics


def _require_same_metrics(found: Sequence[Collection[str]]) -> None:
    """Checks the names of the columns of several batches, or ranks."""
    for names in found:
        if set(names) != set(found[0]):
            some, other = ({*names} - {*found[0]}, {*found[0]} - {*names})
            raise TaskError(
                "Not every batch has the same metrics.",
                expected="every metric from every batch: one number for each of its examples",
                found=f"{listing(sorted(some | other))} for some batches alone",
                remedy="give every example a value of every metric",
            )


def _require_gradient(losses: Tensor) -> None:
    if not losses.requires_grad:
        raise TaskError(
            "The task's loss does not depend on the model's parameters.",
            expected="a loss that gradients can be taken of",
            found="one computed under no_grad(), detached, or of a model whose parameters are all "
            "frozen",
            remedy="compute it with the model that loss() is given, without no_grad() or detach()",
        )


@dataclass
class Engine:
    """Sets the live model to any coefficients and runs the task on it.

    Attributes:
        blocks: of the store: coefficients come as (B, n), or as (1, n) for all blocks alike.
    """

    live: LiveModel
    store: Store
    blocks: Blocks
    task: Task
    world: World

    @torch.no_grad()
    def set_weights(self, alphas: Tensor) -> None:
        """w = Σ α_i w_i in every averaged tensor, from the store; w/‖w‖ of singular vectors."""
        targets = self.live.targets()
        self.store.combine(alphas, targets)
        for name, target in targets.items():
            if self.live.is_singular_vector(name):
                target.div_(target.norm().clamp(min=torch.finfo(target.dtype).tiny))

    def losses_of(self, batch: Any, expected: int) -> Tensor:
        """One loss per example, (batch,) float."""
        with user_code("compute its loss"):
            losses = self.live.run(lambda model: self.task.loss(model, batch))
        _require_per_example("loss", losses, expected)
        return losses

    def loss_and_products(
        self,
        alphas: Tensor,
        batches: Batches,
        chosen: Sequence[int],
        *,
        uncentred: bool = False,
    ) -> tuple[float, Tensor]:
        """Mean loss over ``chosen`` and s_i = ⟨Δ_i, ∇_w loss⟩ by block.

        The gradient of all batches accumulates in weight space first: the offsets are read once
        here and once in ``set_weights``, however many batches there are.

        Args:
            uncentred: s_i = ⟨w_i, ∇_w loss⟩ instead.

        Returns:
            The loss, and s (B, n) float64, the same on every rank.
        """
        self.set_weights(alphas)
        self.live.zero_gradients()
        total = torch.zeros((), dtype=torch.float64)
        with batch_statistics(self.live.module):
            rounds = -(-len(batches.parts(chosen)) // self.world.size)
            for number, (positions, batch, counts) in enumerate(batches.rounds(chosen), 1):
                self.live.before_pass(last=number == rounds)
                share = float(counts) / len(chosen)
                losses = self._add_gradients(batches, positions, batch, share)
                if counts:
                    total += losses.double().sum().cpu()
        gradients = self.live.gradients()
        products = self.store.project(gradients)
        if uncentred:
            products = products + self._along_centre(alphas, gradients, products)[:, None]
        packed = self.world.sum(torch.cat([total.reshape(1), products.reshape(-1)]))
        return float(packed[0]) / len(chosen), packed[1:].reshape(products.shape)

    def _add_gradients(
        self, batches: Batches, positions: Sequence[int], batch: Any, share: float
    ) -> Tensor:
        """Adds ``share`` of the gradients of a batch's losses, which it returns."""
        with batches.use(positions, batch) as own:
            losses = self.losses_of(own, len(positions))
            if losses.requires_grad or not self.live.thaw():
                _require_gradient(losses)
                with user_code("compute gradients"):
                    self.live.backward(losses.sum() * share)
                return losses.detach()
        # Of tensors alone that all checkpoints share, or of none: now it will show.
        return self._add_gradients(batches, positions, batch, share)

    @torch.no_grad()
    def _along_centre(
        self, alphas: Tensor, gradients: Mapping[str, Tensor], products: Tensor
    ) -> Tensor:
        """⟨c, ∇_w⟩ by block, (B,) float64, over this rank's rows only.

        From the live weights and ⟨w, ∇_w⟩ = Σα·⟨c, ∇_w⟩ + β·s, so that no store has to give its
        centre away.

        Args:
            alphas: that the weights are set to, (1, n) or (B, n).
            gradients: this rank's rows.
            products: s over this rank's rows, (B, n).
        """
        if float(alphas.sum(1).abs().min()) < _LEAST_SUM:
            alphas = torch.full_like(alphas, 1.0 / alphas.shape[1])
            self.set_weights(alphas)
        beta, total = split_alphas(alphas)
        weights = self.live.targets()
        found = torch.zeros(len(products), dtype=torch.float64, device=self.world.device)
        for name, gradient in gradients.items():
            found[self.blocks.index[name]] += _inner(weights[name], gradient)
        return (found.cpu() - (beta * products).sum(1)) / total

    @torch.no_grad()
    def example_losses(
        self,
        batches: Batches,
        chosen: Sequence[int],
        *,
        by_batch: bool = False,
        with_metrics: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of every chosen example with the weights as they are.

        Args:
            by_batch: normalise by batch statistics, as the fit does.
            with_metrics: compute the task's metrics too, which may take a second forward pass.

        Returns:
            Losses (len(chosen),) float64 and metrics of the same shape, the same on every rank.
        """
        place = {p: i for i, p in enumerate(chosen)}
        columns: dict[str, Tensor] = {}
        # A fold of few examples may hold out a single one, which has no statistics.
        alone = len(chosen) == 1
        with batch_statistics(self.live.module) if by_batch and not alone else nullcontext():
            for positions, batch, counts in batches.rounds(chosen):
                found = self._columns(batches, positions, batch, with_metrics)
                where = torch.tensor([place[p] for p in positions])
                if not columns:
                    columns = {k: torch.zeros(len(chosen), dtype=torch.float64) for k in found}
                _require_same_metrics([columns, found])
                for name, values in found.items():
                    if counts:
                        columns[name][where] = values.detach().double().reshape(-1).cpu()
        if with_metrics:
            _require_same_metrics(self.world.gather(list(columns)))
        names = sorted(columns)
        summed = self.world.sum(torch.stack([columns[k] for k in names]))
        result = dict(zip(names, summed, strict=True))
        return result.pop(""), result

    def losses_of_parts(
        self, batches: Batches, parts: Sequence[Sequence[int]], *, by_batch: bool = False
    ) -> Tensor:
        """Losses of the chosen examples, (M,) float64; no batch holds examples of two parts."""
        found = [self.example_losses(batches, part, by_batch=by_batch)[0] for part in parts]
        return torch.cat(found)

    def _columns(
        self, batches: Batches, positions: Sequence[int], batch: Any, with_metrics: bool
    ) -> dict[str, Tensor]:
        """The batch's losses under the empty name, and its metrics under theirs."""
        size = len(positions)
        together = getattr(self.task, "loss_and_metrics", None)
        if with_metrics and together is not None:
            with batches.use(positions, batch) as own, user_code("compute its loss"):
                both = self.live.run(lambda model: together(model, own), "both")
            if not isinstance(both, (tuple, list)) or len(both) != 2:
                raise TaskError(
                    "The task's loss_and_metrics() does not give both.",
                    expected="(losses, {name: values}), each a tensor of shape (batch,)",
                    found=type(both).__name__,
                )
            losses, metrics = both
            _require_per_example("loss", losses, size)
            return {"": losses, **_checked_metrics(metrics, size)}
        with batches.use(positions, batch) as own:
            columns = {"": self.losses_of(own, size)}
        metrics_alone = metrics_of(self.task)
        if with_metrics and metrics_alone is not None:
            with batches.use(positions, batch) as own, user_code("compute its metrics"):
                metrics = self.live.run(lambda model: metrics_alone(model, own), "metrics")
            columns |= _checked_metrics(metrics, size)
        return columns


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """⟨one, other⟩ of float32 numbers in float64, by pieces: copies would be twice the model."""
    pieces = zip(one.reshape(-1).split(_PIECE), other.reshape(-1).split(_PIECE), strict=True)
    # Infinities that all checkpoints share are no part of the subspace.
    return torch.stack(
        [a.double().nan_to_num_(posinf=0.0, neginf=0.0) @ b.float().double() for a, b in pieces]
    ).sum()


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch and leaves its running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    with modes_kept(norms):
        for m in norms:
            m.momentum, m.training = 0.0, True
        yield


@contextmanager
def modes_kept(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Whether batch norm normalises by the batch, and its momentum, are what they were, after."""
    saved = [(m, m.momentum, m.training) for m in norms]
    try:
        yield
    finally:
        for m, momentum, training in saved:
            m.momentum, m.training = momentum, training


@dataclass
class Objective:
    """Mean loss over a sample plus ridge, as a function of the coordinates of a chart.

    f(z) = mean loss(w(z)) + ridge/2 · ‖z‖²; one unit of z is one standard deviation of the
    checkpoints along that axis, around the chart's base.
    """

    engine: Engine
    chart: Chart
    batches: Batches
    chosen: Sequence[int]
    ridge: float = 0.0

    def __call__(self, z: Tensor) -> tuple[float, Tensor]:
        """f and ∇f (size,) float64 at z (size,) float64."""
        loss, products = self.engine.loss_and_products(
            self.chart.alphas(z), self.batches, self.chosen, uncentred=self.chart.linear
        )
        if len(self.chart.subspaces) == 1:
            products = products.sum(0, keepdim=True)
        gradient = self.chart.gradient(products) + self.ridge * z
        return loss + self.ridge / 2 * float(z @ z), gradient
