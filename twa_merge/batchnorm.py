"""Running statistics of batch norm for weights that no training run has had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import Batches
from .objective import Engine, modes_kept


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the module keeps running statistics."""
    return bool(_norms(module))


@torch.no_grad()
def reestimate(engine: Engine, batches: Batches, chosen: Sequence[int]) -> None:
    """Replaces the running statistics by their mean over batches of the fit split.

    Batches count alike, as in ``torch.optim.swa_utils.update_bn``; layers other than batch norm
    stay in evaluation mode.
    """
    norms = _norms(engine.live.module)
    rounds = 0
    with modes_kept(norms):
        for m in norms:
            m.reset_running_stats()
            m.training = True
        for positions, batch, counts in batches.rounds(chosen):
            rounds += counts
            for m in norms:
                # A cumulative mean; a batch that does not count moves nothing.
                m.momentum = 1.0 / rounds if counts else 0.0
            with batches.use(positions, batch) as own:
                engine.losses_of(own, len(positions))
    _average_over_ranks(engine, norms, rounds)


def take_newest(engine: Engine, n: int) -> None:
    """Replaces the running statistics by the newest checkpoint's."""
    targets = {k: t for k, t in engine.live.targets().items() if engine.live.is_statistic(k)}
    newest = torch.zeros(1, n, dtype=torch.float64)
    newest[0, -1] = 1.0
    engine.store.combine(newest, targets)


def statistics(engine: Engine) -> dict[str, Tensor]:
    """Checkpoint name → running statistic as it is now, on the CPU.

    A layer that the module holds twice was saved under two names, and has the same under both.
    """
    live = engine.live
    now = {k: t.detach().cpu().clone() for k, t in live.targets().items() if live.is_statistic(k)}
    return {name: now[first] for name, first in live.tied_groups().items() if first in now}


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [
        m
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None
    ]


def _average_over_ranks(engine: Engine, norms: Sequence[_BatchNorm], rounds: int) -> None:
    if engine.world.size == 1:
        return
    for m in norms:
        for tensor in (m.running_mean, m.running_var):
            assert tensor is not None
            weighted = torch.cat(
                [
                    tensor.double() * rounds,
                    torch.tensor([rounds], dtype=torch.float64, device=tensor.device),
                ]
            )
            summed = engine.world.sum(weighted)
            tensor.copy_(summed[:-1] / summed[-1])
