"""One pass over all checkpoints: centres each slice, adds to Gram matrices, fills the store."""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checkpoints.base import Checkpoint
from .distributed import World
from .layout import Blocks, Layout
from .progress import Advanced, Progress, Started, silent
from .store.base import Store
from .stream import RowSlice, blame, row_slices
from .subspace import GramAccumulator, add_up
from .tensors import as_tensor
from .threads import one_thread_each

# Numbers of all checkpoints worked on at a time by one thread.
_PIECE = 1 << 18
# Bytes of all checkpoints read at a time by one thread.
_BLOCK_BYTES = 2 << 20
_MAX_WORKERS = 8


@dataclass(frozen=True)
class Grams:
    """Gram matrices by tensor.

    Attributes:
        names: tensors in the subspace, T of them.
        exact: (T, n, n) float64, of the offsets in float64.
        stored: the same of offsets rounded to float32.
        centre: ‖c‖², (1,) float64.
        cross: ⟨c, Δ_i⟩, (n,) float64.
    """

    names: Sequence[str]
    exact: Tensor
    stored: Tensor
    centre: Tensor
    cross: Tensor

    @property
    def norms(self) -> Tensor:
        """‖w_i‖, (n,) float64; what is below 1e-8 of the largest is rounding."""
        squares = self.centre + 2.0 * self.cross + self.exact.sum(0).diagonal()
        return squares.clamp(min=0.0).sqrt()

    @property
    def constant(self) -> list[str]:
        """Tensors that are the same in all checkpoints, as those of a frozen backbone are."""
        return [name for name, gram in zip(self.names, self.exact, strict=True) if not gram.any()]

    def by_block(self, blocks: Blocks) -> Tensor:
        """(B, n, n): tensors of one block added up."""
        where = torch.tensor([blocks.index[name] for name in self.names])
        return add_up(self.exact, where, len(blocks))


def ingest(
    checkpoints: Sequence[Checkpoint],
    layout: Layout,
    world: World,
    *,
    store: Store | None = None,
    shared: Mapping[str, bool] | None = None,
    still: Collection[str] = (),
    progress: Progress = silent,
) -> Grams:
    """Streams this rank's rows of all averaged tensors once.

    Args:
        store: takes every slice; statistics too, which are in no Gram matrix.
        shared: tensors of which every rank holds all rows (buffers): they are stored whole and
            counted once.
        still: tensors that are stored alone, in no Gram matrix, such as buffers, which no gradient
            moves. One that counts steps would be longer than all weights.

    Raises:
        CheckpointError: a number is not finite.
    """
    n = len(checkpoints)
    names = [name for name in layout.in_subspace if name not in still]
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
    pass_ = _Pass(checkpoints, layout, store)
    exact, stored = GramAccumulator(len(names), n), GramAccumulator(len(names), n)
    squares = torch.zeros(1, dtype=torch.float64)
    cross = torch.zeros(n, dtype=torch.float64)
    total = sum(_numel(layout, cut) for cut in slices)
    progress(Started("Reading checkpoints", total * n, "numbers"))
    with closing(pass_.run(slices)) as passing:
        for cut, sums in passing:
            group = number.get(cut.name)
            if group is not None and (world.is_zero or not shared.get(cut.name)):
                exact.gram[group] += sums.exact
                squares += sums.squares
                cross += sums.cross
                stored.gram[group] += sums.stored
            progress(Advanced(_numel(layout, cut) * n))
    return Grams(
        names,
        world.sum(exact.gram),
        world.sum(stored.gram),
        world.sum(squares),
        world.sum(cross),
    )


@dataclass
class _Sums:
    """What one slice adds to ``Grams``: (n, n), (n, n), a number, (n,), float64."""

    exact: Tensor
    stored: Tensor
    squares: float
    cross: Tensor


class _Pass:
    """Works on slices in several threads, one thread a slice.

    Each thread works on pieces that stay in its core's cache. Torch's own team of threads, which
    would share every one of these short operations, waits for its slowest member each time: with
    another program on a core that takes ten times as long.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        layout: Layout,
        store: Store | None,
    ) -> None:
        self._checkpoints, self._layout, self._store = checkpoints, layout, store

    def run(self, slices: Sequence[RowSlice]) -> Generator[tuple[RowSlice, _Sums], None, None]:
        """The slices with their sums, in the order given, however many threads there are."""
        workers = min(_MAX_WORKERS, torch.get_num_threads())
        buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(workers):
            buffers.put(_Buffer(self._checkpoints))

        def work(cut: RowSlice) -> _Sums:
            buffer = buffers.get()
            try:
                return self._take(cut, buffer)
            finally:
                buffers.put(buffer)

        pending: deque[tuple[RowSlice, Future[_Sums]]] = deque()
        with one_thread_each(), ThreadPoolExecutor(workers, "twa-merge-gram") as pool:
            try:
                for cut in slices:
                    pending.append((cut, pool.submit(work, cut)))
                    if len(pending) > 2 * workers:
                        cut, future = pending.popleft()
                        yield cut, future.result()
                while pending:
                    cut, future = pending.popleft()
                    yield cut, future.result()
            finally:
                for _, future in pending:
                    future.cancel()

    def _take(self, cut: RowSlice, buffer: _Buffer) -> _Sums:
        n, width = len(self._checkpoints), self._layout[cut.name].info.row_numel
        exact, stored = GramAccumulator(1, n), GramAccumulator(1, n)
        squares, cross = 0.0, torch.zeros(n, dtype=torch.float64)
        for block in _parts(cut, buffer.block_numel(cut.name), width):
            rows = buffer.read(block, width)
            for piece in _parts(block, _PIECE // n, width):
                a, b = ((row - block.start) * width for row in (piece.start, piece.stop))
                centre, offsets = buffer.centred(rows[:, a:b])
                square = float(centre @ centre)
                masked = None
                if not math.isfinite(square) and not bool(centre.isfinite().all()):
                    masked = _shared_infinities(rows[:, a:b])
                    if not bool((centre.isfinite() | masked).all()):
                        raise blame(self._checkpoints, piece)
                    offsets[:, masked] = 0.0
                # A model cannot hold it, see ``matching.require_cover``.
                if self._store is not None and not rows.is_complex():
                    self._store.put(piece, centre, offsets)
                if masked is not None:
                    centre[masked] = 0.0
                    square = float(centre @ centre)
                squares += square
                exact.add(0, offsets)
                cross += offsets @ centre
                stored.add(0, buffer.rounded(offsets))
        return _Sums(exact.gram[0], stored.gram[0], squares, cross)


def _shared_infinities(rows: Tensor) -> Tensor:
    """Which numbers of rows (n, m) are infinite and the same in all, as in masks: (m,) bool."""
    numbers = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows.double()
    return numbers[0].isinf() & (numbers == numbers[0]).all(0)


def _parts(cut: RowSlice, numel: int, width: int) -> Iterator[RowSlice]:
    """The rows of ``cut``, as many at a time as have ``numel`` numbers, but one at least."""
    step = max(1, numel // max(1, width))
    for start in range(cut.start, cut.stop, step):
        yield RowSlice(cut.name, start, min(start + step, cut.stop))


class _Buffer:
    """One thread's memory, so that nothing is allocated piece by piece."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._raw = np.empty(_BLOCK_BYTES, np.uint8)
        self._grow(max(1, _PIECE // len(checkpoints)))

    def _grow(self, m: int) -> None:
        n = len(self._checkpoints)
        self._offsets = torch.empty(n * m, dtype=torch.float64)
        self._centre = torch.empty(m, dtype=torch.float64)
        self._single = torch.empty(n * m, dtype=torch.float32)

    def block_numel(self, name: str) -> int:
        """Numbers of a tensor to read at a time from each checkpoint."""
        dtype = self._checkpoints[0].tensors[name].dtype
        return _BLOCK_BYTES // (len(self._checkpoints) * dtype.itemsize)

    def read(self, cut: RowSlice, width: int) -> Tensor:
        """All checkpoints' rows, flat: (n, m) in the saved dtype; overwritten by the next call."""
        n, m = len(self._checkpoints), (cut.stop - cut.start) * width
        dtype = self._checkpoints[0].tensors[cut.name].dtype
        if n * m * dtype.itemsize > len(self._raw):
            self._raw = np.empty(n * m * dtype.itemsize, np.uint8)
        rows = self._raw[: n * m * dtype.itemsize].view(dtype.array).reshape(n, m)
        for checkpoint, row in zip(self._checkpoints, rows, strict=True):
            checkpoint.read(cut.name, cut.start * width, row)
        return as_tensor(rows, dtype)

    def centred(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Centre (m,) and offsets (n, m) in float64; overwritten by the next call.

        A complex number counts as two.
        """
        if rows.is_complex():
            rows = torch.view_as_real(rows).flatten(1)
        n, m = rows.shape
        if m > self._centre.numel():
            self._grow(m)
        offsets = self._offsets[: n * m].view(n, m)
        offsets.copy_(rows)
        centre = torch.mean(offsets, 0, out=self._centre[:m])
        return centre, offsets.sub_(centre)

    def rounded(self, offsets: Tensor) -> Tensor:
        """The offsets rounded to float32, in place."""
        single = self._single[: offsets.numel()].view(offsets.shape)
        return offsets.copy_(single.copy_(offsets))


def _numel(layout: Layout, cut: RowSlice) -> int:
    return (cut.stop - cut.start) * layout[cut.name].info.row_numel
