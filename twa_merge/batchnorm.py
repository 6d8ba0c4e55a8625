"""Running statistics of batch norm for weights that no training run has had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import Batches
from .checkpoints.base import Checkpoint
from .model import LiveModel
from .objective import Engine, modes_kept
from .tensors import tensor_rows

_STATISTICS = ("running_mean", "running_var")


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the module keeps running statistics that may change."""
    return bool(_norms(module))


def leave_frozen(live: LiveModel, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Leaves batch norm that was frozen in training in evaluation mode, in the fit as well.

    It is told by running statistics that are the same in all checkpoints; or that none of them
    holds, so that others could not be written.

    Returns:
        The layers whose statistics no checkpoint holds.
    """
    saved = {own: name for name, own in live.names.items()}
    paths: dict[_BatchNorm, list[str]] = {}
    for path, m in live.module.named_modules(remove_duplicate=False):
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            paths.setdefault(m, []).append(path)
    unsaved = []
    for m, under in paths.items():
        owns = [f"{path}.{kind}".lstrip(".") for path in under for kind in _STATISTICS]
        names = [saved[own] for own in owns if own in saved]
        if all(_is_constant(checkpoints, name) for name in names):
            # What is kept is used all the same.
            m.track_running_stats = False
        if not names:
            unsaved.append(under[0])
    return unsaved


@torch.no_grad()
def reestimate(engine: Engine, batches: Batches, chosen: Sequence[int]) -> None:
    """Replaces the running statistics by their mean over batches of the fit split.

    All calls of a layer count alike, as in ``torch.optim.swa_utils.update_bn``. Layers that are
    never called keep what they have; those other than batch norm stay in evaluation mode.
    """
    norms, calls = _norms(engine.live.module), Counter[nn.Module]()

    def before_call(m: nn.Module, _: object) -> None:
        if m.training:
            if not calls[m]:
                m.reset_running_stats()  # type: ignore[operator]
            calls[m] += 1
            # A cumulative mean.
            m.momentum = 1.0 / calls[m]  # type: ignore[assignment]

    hooks = [m.register_forward_pre_hook(before_call) for m in norms]
    try:
        with modes_kept(norms):
            for positions, batch, counts in batches.rounds(chosen):
                for m in norms:
                    m.training = counts
                with batches.use(positions, batch) as own:
                    engine.losses_of(own, len(positions))
    finally:
        for hook in hooks:
            hook.remove()
    _average_over_ranks(engine, norms, calls)


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


def _is_constant(checkpoints: Sequence[Checkpoint], name: str) -> bool:
    first = tensor_rows(checkpoints[0], name)
    return all(torch.equal(first, tensor_rows(c, name)) for c in checkpoints[1:])


def _average_over_ranks(
    engine: Engine, norms: Sequence[_BatchNorm], calls: Mapping[nn.Module, int]
) -> None:
    if engine.world.size == 1:
        return
    for m in norms:
        for tensor in (m.running_mean, m.running_var):
            assert tensor is not None
            weighted = torch.cat([tensor.double(), tensor.new_ones(1).double()]) * calls[m]
            summed = engine.world.sum(weighted)
            if summed[-1] > 0:
                tensor.copy_(summed[:-1] / summed[-1])
