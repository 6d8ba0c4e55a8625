"""One pass over all checkpoints: centres each slice, adds to Gram matrices, fills the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints.base import Checkpoint
from .distributed import World
from .layout import Blocks, Layout
from .progress import Advanced, Progress, Started, silent
from .store.base import Store
from .stream import RowSlice, blame, row_slices, stream
from .subspace import GramAccumulator


@dataclass(frozen=True)
class Grams:
    """Gram matrices by tensor.

    Attributes:
        names: tensors in the subspace, T of them.
        exact: (T, n, n) float64, of the offsets in float64.
        stored: the same of offsets rounded to float32, where it was asked for.
        centre: ‖c‖², (1,) float64.
        cross: ⟨c, Δ_i⟩, (n,) float64.
    """

    names: Sequence[str]
    exact: Tensor
    stored: Tensor | None
    centre: Tensor
    cross: Tensor

    def by_block(self, blocks: Blocks) -> Tensor:
        """(B, n, n): tensors of one block added up."""
        result = torch.zeros(len(blocks), *self.exact.shape[1:], dtype=torch.float64)
        where = torch.tensor([blocks.index[name] for name in self.names])
        return result.index_add_(0, where, self.exact)


def ingest(
    checkpoints: Sequence[Checkpoint],
    layout: Layout,
    world: World,
    *,
    store: Store | None = None,
    shared: Mapping[str, bool] | None = None,
    check: bool = False,
    progress: Progress = silent,
) -> Grams:
    """Streams this rank's rows of all averaged tensors once.

    Args:
        store: takes every slice; statistics too, which are in no Gram matrix.
        shared: tensors of which every rank holds all rows (buffers): they are stored whole and
            counted once.
        check: add up the Gram matrix of the rounded offsets as well.

    Raises:
        CheckpointError: a number is not finite.
    """
    n = len(checkpoints)
    names = layout.in_subspace
    number = {name: i for i, name in enumerate(names)}
    shared = shared or {}
    wanted = [
        name
        for name in layout.averaged
        if layout[name].tied_to is None and (store is not None or name in number)
    ]
    slices: list[RowSlice] = []
    for name in wanted:
        share = None if shared.get(name) and store is not None else world.share
        slices += row_slices(layout, [name], share=share)
    exact = GramAccumulator(len(names), n)
    stored = GramAccumulator(len(names), n) if check else None
    squares = torch.zeros(1, dtype=torch.float64)
    cross = torch.zeros(n, dtype=torch.float64)
    total = sum(_numel(layout, cut) for cut in slices)
    progress(Started("Reading checkpoints", total * n, "numbers"))
    for cut, rows in stream(checkpoints, slices):
        centre, offsets = centred(rows)
        if not bool(centre.isfinite().all()):
            raise blame(checkpoints, cut)
        if store is not None:
            store.put(cut, centre, offsets)
        group = number.get(cut.name)
        if group is not None and (world.is_zero or not shared.get(cut.name)):
            exact.add(group, offsets)
            squares += centre @ centre
            cross += offsets @ centre
            if stored is not None:
                stored.add(group, offsets.float().double())
        progress(Advanced(offsets.numel()))
    return Grams(
        names,
        world.sum(exact.gram),
        world.sum(stored.gram) if stored is not None else None,
        world.sum(squares),
        world.sum(cross),
    )


def centred(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Centre (m,) and offsets (n, m) in float64 of n flat tensors of m numbers."""
    offsets = torch.empty(len(rows), rows[0].numel(), dtype=torch.float64)
    for i, row in enumerate(rows):
        offsets[i].copy_(row)
    centre = offsets.mean(0)
    return centre, offsets.sub_(centre)


def _numel(layout: Layout, cut: RowSlice) -> int:
    return (cut.stop - cut.start) * layout[cut.name].info.row_numel
