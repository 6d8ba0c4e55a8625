"""What a rank gathers of the other ranks' rows where that is left open: a layer, or the model."""

from __future__ import annotations

from ..config import EngineConfig, StoreConfig
from ..layout import Layout
from .plan import DEVICE_SHARE, Machine, Work, memory_plan


def gathering(
    layout: Layout, n: int, machine: Machine, store: StoreConfig, engine: EngineConfig
) -> str:
    """``layer`` or ``model``: what ``auto`` stands for on this machine.

    The whole model, gathered once an evaluation, is half of what the paper's scheme sends at its
    best; a layer at a time is sent again for every batch. The model is chosen where it takes half
    of a GPU's memory at most and leaves the offsets where they would be. Not on a CPU, where no
    rank may hold all of it, and not in bfloat16, where a layer at a time sends half as much already
    and batches that do without some parameters cannot be summed once.

    Args:
        n: checkpoints.
    """
    if engine.gather != "auto":
        return engine.gather
    several_gpus = machine.size > 1 and machine.device_type != "cpu"
    if not several_gpus or machine.device_memory is None or engine.precision != "fp32":
        return "layer"
    by_layer = memory_plan(layout, n, machine, store)
    whole = memory_plan(layout, n, machine, store, work=Work(whole_model=True))
    alike = (whole.kind, whole.dtype) == (by_layer.kind, by_layer.dtype)
    ample = whole.fits and 2 * whole.device_total <= DEVICE_SHARE * machine.device_memory
    return "model" if alike and ample else "layer"
