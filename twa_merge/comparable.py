"""Whether candidates can be compared: by losses and metrics that are finite numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .batches import Batches
from .candidates import Candidate, single, window
from .errors import ConfigError, TaskError, listing
from .guard import Scored
from .progress import Started
from .run import Run


def require_comparable(run: Run) -> None:
    """Looks at what candidates are compared by and reported on, before anything is trained.

    All losses of the guard split by the last checkpoint, and by the mean and the other ones where
    some are not finite; metrics, and losses of test data, by one batch. A collective.

    Raises:
        ConfigError: the task does not have the metric that --select names.
        TaskError: some example has no finite loss, or metric, by any of these candidates.
    """
    run.progress(Started("Looking at the guard split"))
    jury, select = run.jury, run.choices.guard.select
    _require_losses(run)
    if select != "loss":
        _require_metric(run, select.removeprefix("metric:"))
    if jury.test is not None:
        run.engine.example_losses(jury.test, _one_batch(jury.test), with_metrics=True)


def _require_losses(run: Run) -> None:
    jury = run.jury
    broken = torch.ones(len(jury.guard_sample), dtype=torch.bool)
    singles = [single(run.n, i) for i in reversed(range(run.n))]
    for alphas in (singles[0], window(run.n, run.n), *singles[1:]):
        looked_at = Candidate("", alphas[None], 0)
        for mode in jury.modes(looked_at):
            jury.apply(looked_at.alphas, mode)
            broken &= ~jury.engine.example_losses(jury.guard, jury.guard_sample)[0].isfinite()
            if not broken.any():
                return
    raise _without_loss(jury.guard, broken, "every single checkpoint and their mean")


def _require_metric(run: Run, name: str) -> None:
    guard, broken = run.jury.guard, []
    for alphas in (single(run.n, run.n - 1), window(run.n, run.n)):
        run.engine.set_weights(alphas[None])
        _, metrics = run.engine.example_losses(guard, _one_batch(guard), with_metrics=True)
        _require_named(name, metrics)
        broken.append(~metrics[name].isfinite())
    both = broken[0] & broken[1]
    if both.any():
        raise _without_number(name, guard, both, "last and uniform")


def _one_batch(batches: Batches) -> range:
    return range(min(batches.batch_size, batches.size))


def _require_named(name: str, metrics: Mapping[str, Tensor]) -> None:
    if name not in metrics:
        raise ConfigError(
            "--select names a metric that the task does not have.",
            expected=", ".join(metrics) or "a task with metrics()",
            found=name,
        )


def require_finite(guard: Batches, winner: Scored, select: str) -> None:
    """Looks at the winner's losses, or values of the metric that it was picked by.

    Raises:
        TaskError: even of the winner some are not finite.
    """
    losses, costs = (~cost.isfinite() for cost in (winner.guard, winner.cost_of(select)))
    if losses.any():
        raise _without_loss(guard, losses, winner.name)
    if costs.any():
        raise _without_number(select.removeprefix("metric:"), guard, costs, winner.name)


def _without_loss(guard: Batches, broken: Tensor, whose: str) -> TaskError:
    return TaskError(
        "The loss is not finite for any candidate, the checkpoints themselves included.",
        expected="finite losses on the guard split",
        found=f"{_counted(guard, broken, 'losses')} of {whose} are not",
        remedy="look at the task's loss and data, or try --precision fp32",
    )


def _without_number(metric: str, guard: Batches, broken: Tensor, whose: str) -> TaskError:
    return TaskError(
        f"The metric {metric} is not finite for any candidate.",
        expected="a finite value for every example of the guard split",
        found=f"{_counted(guard, broken, 'values')} of {whose} are not",
        remedy="let the task's metrics give a number for every example, or leave out of its data "
        "those that have none",
    )


def _counted(guard: Batches, broken: Tensor, what: str) -> str:
    """How many of the losses or values, (N,) bool, and which examples' they are."""
    numbers = listing(str(guard.number(i)) for i in broken.nonzero().flatten().tolist())
    return f"{int(broken.sum())} of {len(broken)} {what} (number {numbers} of the dataset)"
