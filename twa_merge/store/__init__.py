"""Where the offsets live, and how wide they are."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence

from ..checkpoints.base import Checkpoint
from ..config import StoreConfig
from ..distributed import World
from ..layout import Blocks, Layout
from ..progress import Noted, Progress, silent
from .base import Store
from .disk import DiskStore
from .gathering import gathering
from .limits import device_memory, host_memory
from .memory import MemoryStore
from .plan import NO_DTYPE_ON_DISK, Machine, Plan, Rates, Work, memory_plan

__all__ = [
    "Machine",
    "Plan",
    "Rates",
    "Store",
    "Work",
    "exact_store",
    "gathering",
    "make_store",
    "memory_plan",
    "this_machine",
]


def make_store(
    checkpoints: Sequence[Checkpoint],
    layout: Layout,
    blocks: Blocks,
    world: World,
    config: StoreConfig,
    *,
    shared: Mapping[str, bool] | None = None,
    work: Work | None = None,
    machine: Machine | None = None,
    compiled: bool | None = None,
    progress: Progress | None = None,
) -> Store:
    """An empty store for this rank's rows, to be filled by the streaming pass.

    With ``auto`` in ``config`` all ranks call this together, and decide alike.

    Args:
        shared: tensors of which every rank holds all rows.
        work: what the memory plan has to reckon with.
        machine: as it was before anything that the plan knows of was there; None: as it is.
        compiled: take the fast kernels; None decides by how many numbers are held.
        progress: is told where the offsets go if they do not go where they would best.
    """
    whole, progress = shared or {}, progress or silent
    kind, dtype = config.kind, config.dtype
    if kind != "disk" and "auto" in (kind, dtype):
        n, machine = len(checkpoints), machine or this_machine(world)
        plan = memory_plan(layout, n, machine, config, work=work, shared=whole)
        kind, dtype = plan.kind, plan.dtype
        if plan.advice:
            place = "on disk" if kind == "disk" else f"in {kind} memory as {dtype}"
            progress(Noted(" ".join([f"The offsets stay {place}.", *plan.advice])))

    share = _share(layout, world, whole)
    if kind == "disk":
        if config.kind == "disk" and config.dtype != "auto":
            progress(Noted(NO_DTYPE_ON_DISK))
        return DiskStore(checkpoints, layout, blocks, share=share)
    return MemoryStore(
        dtype,
        len(checkpoints),
        layout,
        blocks,
        share=share,
        device=world.device,
        on_host=kind == "host" and world.device.type != "cpu",
        compiled=compiled,
        progress=progress,
    )


def exact_store(
    store: Store,
    checkpoints: Sequence[Checkpoint],
    layout: Layout,
    world: World,
    *,
    shared: Mapping[str, bool] | None = None,
    far_apart: bool = False,
) -> Store:
    """A filled store itself, or, where it packs the offsets, their files.

    What is fitted to rounded offsets is a good fit; what is compared by them may win by rounding.

    Args:
        far_apart: next to one of the checkpoints the others are lost even in float32.
    """
    if not (isinstance(store, MemoryStore) and (store.packs or far_apart)):
        return store
    share = _share(layout, world, shared or {})
    return DiskStore(checkpoints, layout, store.blocks, share=share, held=store.names)


def _share(
    layout: Layout, world: World, whole: Mapping[str, bool]
) -> Callable[[str], tuple[int, int]]:
    """Tensor → this rank's rows [start, stop) of it, all of them where it is ``whole``."""

    def share(name: str) -> tuple[int, int]:
        rows = layout[name].info.rows
        return (0, rows) if whole.get(name) else world.share(rows)

    return share


def this_machine(world: World) -> Machine:
    """Processes and memory of this run, the least of all ranks. Collective."""
    hosts = world.gather(socket.gethostname())
    per_node = max(hosts.count(host) for host in hosts)
    memory = world.gather((device_memory(world.device), host_memory(per_node)))
    on_device = [device for device, _ in memory if device is not None]
    on_host = [host for _, host in memory if host is not None]
    return Machine(
        size=world.size,
        per_node=per_node,
        device_type=world.device.type,
        device_memory=min(on_device, default=None),
        host_memory=min(on_host, default=None),
    )
