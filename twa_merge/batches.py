"""A dataset in fixed batches, in a seeded order, dealt over the ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .distributed import World
from .seeding import seeded
from .task import Task, collate_of, to_device
from .user_code import user_code

# Collated batches are kept between evaluations up to this size; beyond it they are made again.
_CACHE_BYTES = 1 << 30
# Between the seeds of datasets and losses: the noise of one must not repeat another's.
_APART = 0x9E3779B9


class Batches:
    """Examples of a dataset in fixed batches, dealt over the ranks.

    The order is drawn once from ``seed``, so that any leading part is a fair sample and batch
    statistics do not follow the order of a sorted dataset. Batch k belongs to rank k mod size;
    all ranks make the same number of rounds, because the passes of a sharded model are
    collective, and a rank that has run out repeats a batch with weight zero.

    Args:
        groups: label of each example; those of one group are alike. None: none are.
        stream: of random numbers that the dataset and the loss draw. What is fitted in the noise of
            one split must not look good by the same noise in another.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        task: Task,
        batch_size: int,
        seed: int,
        world: World,
        groups: Sequence[int] | None = None,
        stream: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = len(dataset)  # type: ignore[arg-type]
        self.order = torch.randperm(self.size, generator=generator).tolist()
        self.batch_size = batch_size
        labels = range(self.size) if groups is None else groups
        self._groups = torch.tensor([labels[place] for place in self.order], dtype=torch.int64)
        self._dataset = dataset
        self._collate = collate_of(task)
        self.seed = seed
        self._drawing = seed + 2 * stream * _APART
        self._world = world
        self._cache: dict[tuple[int, ...], Any] = {}
        self._cached_bytes = 0

    def number(self, position: int) -> int:
        """The place of an example in the dataset that the split is a part of."""
        place = self.order[position]
        return int(getattr(self._dataset, "indices", range(self.size))[place])

    def groups(self, chosen: Sequence[int]) -> Tensor:
        """Label of the group of each chosen example, (M,) int64."""
        return self._groups[list(chosen)]

    def parts(self, chosen: Sequence[int]) -> list[list[int]]:
        """``chosen`` batch by batch, over all ranks.

        An example that would be left alone joins the batch before it: batch norm cannot normalise
        by the statistics of a single one.
        """
        size = self.batch_size
        starts = list(range(0, len(chosen), size))
        if size > 1 and len(starts) > 1 and len(chosen) - starts[-1] == 1:
            starts.pop()
        ends = [*starts[1:], len(chosen)]
        return [list(chosen[a:b]) for a, b in zip(starts, ends, strict=True)]

    def rounds(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], Any, bool]]:
        """This rank's batches of the ``chosen`` examples (positions in the seeded order).

        Yields:
            The batch's positions, the collated batch as it is kept, and whether it counts.
        """
        world, batches = self._world, self.parts(chosen)
        for first in range(0, len(batches), world.size):
            k = first + world.rank
            counts = k < len(batches)
            positions = batches[k if counts else 0]
            yield positions, self._batch(positions), counts

    @contextmanager
    def use(self, positions: Sequence[int], batch: Any) -> Iterator[Any]:
        """The kept ``batch`` on the device, in a copy: losses may edit or empty what they get.

        A loss that draws at random (noise, masks) draws the same for a batch in every use, so that
        candidates differ by their weights alone and the fit has a function to minimise.
        """
        own = to_device(batch, self._world.device)
        with seeded(self._drawing + positions[0] + _APART, self._world.device):
            yield own

    def _batch(self, positions: list[int]) -> Any:
        key = tuple(positions)
        batch = self._cache.get(key)
        if batch is None:
            batch = self._make(positions)
            size = nbytes(batch)
            if self._cached_bytes + size <= _CACHE_BYTES:
                self._cache[key] = batch
                self._cached_bytes += size
        return batch

    def _make(self, positions: list[int]) -> Any:
        # A dataset that augments at random must show the same examples in every evaluation.
        again = seeded(self._drawing + positions[0], self._world.device)
        with user_code("read its dataset"), again:
            return self._collate([self._dataset[self.order[p]] for p in positions])


def nbytes(batch: Any) -> int:
    """Of tensors, arrays, and what holds them in the open."""
    if isinstance(batch, Mapping):
        return sum(nbytes(v) for v in batch.values())
    if isinstance(batch, (list, tuple)):
        return sum(nbytes(v) for v in batch)
    if isinstance(found := getattr(batch, "nbytes", None), int):
        return found
    held = getattr(batch, "__dict__", {})
    return sys.getsizeof(batch) + sum(nbytes(v) for v in held.values())
