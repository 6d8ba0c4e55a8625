"""Bytes that a run takes on the rank that takes most, from the tensors' shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..layout import Entry, Layout
from .disk import READ_AHEAD
from .tiles import footprint

# Bytes of a streaming pass into a store in memory: 5 MB a thread for a few threads.
BUFFERS = 16 << 20


def own_dtype(layout: Layout) -> str:
    """``bfloat16`` where most of the numbers are no finer than that, or else ``float32``."""
    infos = [layout[name].info for name in layout.in_subspace]
    wide = sum(i.numel for i in infos if i.dtype.itemsize >= 4 or i.dtype.name == "float16")
    return "float32" if 2 * wide > sum(info.numel for info in infos) else "bfloat16"


def model_bytes(
    layout: Layout,
    size: int,
    shared: Mapping[str, bool],
    layer_numel: tuple[int, int] | None,
    *,
    on_cpu: bool,
    whole_model: bool = False,
) -> dict[str, int]:
    """The model's bytes by kind, one of ``size`` processes: float32, but for sums on a CPU.

    Args:
        on_cpu: gradients of all batches are added up in float64.
        shared: tensors that every rank holds whole.
        layer_numel: numbers in the largest layer that is gathered by itself, and in what is not;
            None goes by the tensors' names.
        whole_model: every rank gathers all parameters, and keeps all gradients, for a whole
            evaluation.
    """
    entries = [e for e in layout.entries.values() if e.tied_to is None]
    parameters = sum(_local(e, size, shared) for e in entries if e.averaged)
    trained = sum(_local(e, size, shared) for e in entries if e.in_subspace)
    copied = sum(e.info.nbytes for e in entries if not e.averaged)
    layer, root = layer_numel or largest_layer(layout)
    # A layer's gathered parameters, the next one's ahead of time, and its whole gradient; the
    # root's parameters and gradient stay for the whole pass.
    gathered = 3 * layer + 2 * root
    if whole_model:
        gathered = 2 * sum(e.info.numel for e in entries if e.in_subspace) + layer
    # Beside the sums there is the gradient that a pass has come to, until it is added to its own.
    alone = max((e.info.numel for e in entries if e.in_subspace), default=0)
    passing = 4 * alone if on_cpu and size == 1 else 0
    return {
        "parameters": 4 * parameters + copied,
        "gradients": (8 if on_cpu else 4) * trained + passing,
        "gathered model" if whole_model else "gathered layer": 4 * gathered if size > 1 else 0,
    }


def store_bytes(
    layout: Layout, n: int, dtype: str, size: int, shared: Mapping[str, bool]
) -> dict[str, int]:
    """What a store in memory takes, scales and padding included."""
    sizes = [
        footprint(_rows(entry, size, shared), entry.info.row_numel, n, dtype)
        for entry in layout.entries.values()
        if entry.averaged and entry.tied_to is None
    ]
    return {"offsets": sum(o for o, _ in sizes), "centre": sum(c for _, c in sizes)}


def passing_bytes(layout: Layout, n: int, *, again: bool) -> int:
    """Slices of all checkpoints on their way through a pass, and what is computed from them.

    Reading once, for a store in memory, takes a few buffers, one piece of one checkpoint at a time.

    Args:
        again: the files are read for evaluations or candidates too, which takes slices of all
            checkpoints that are read ahead.
    """
    longest = max((entry.info.row_numel for entry in layout.entries.values()), default=0)
    least = 16 * n * longest  # no slice is shorter than a row
    return (READ_AHEAD if again else BUFFERS) + least


def gram_bytes(layout: Layout, n: int) -> int:
    """Gram matrices by tensor, of exact and of stored offsets, and the axes that come of them."""
    return 4 * 8 * n**2 * len(layout.in_subspace)


def _local(entry: Entry, size: int, shared: Mapping[str, bool]) -> int:
    """Numbers of a tensor on the rank that has most of them, which is the first."""
    return _rows(entry, size, shared) * entry.info.row_numel


def _rows(entry: Entry, size: int, shared: Mapping[str, bool]) -> int:
    return math.ceil(entry.info.rows / (1 if shared.get(entry.name) else size))


def largest_layer(layout: Layout) -> tuple[int, int]:
    """Numbers in the largest repeated layer and outside of all: layers have numbers in names."""
    layers: dict[str, int] = {}
    for name in layout.in_subspace:
        parts = name.split(".")
        end = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        layer = ".".join(parts[: end + 1])
        layers[layer] = layers.get(layer, 0) + layout[name].info.numel
    root = layers.pop("", 0)
    return max(layers.values(), default=0), root
