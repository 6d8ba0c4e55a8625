"""Σ α_i w_i, slice by slice, on its way from the checkpoints' files into a new one."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import threads
from .accumulator import Accumulator, Terms
from .checkpoints.base import Checkpoint, Reader, TensorInfo
from .dtypes import Array, Dtype, Float64, named, widen
from .errors import OutputError, TwaMergeError
from .layout import Blocks, Layout
from .progress import Advanced, Progress
from .safetensors_writer import SafetensorsFile, SavedTensor
from .stream import SLICE_NUMEL, RowSlice, blame, row_slices

_MAX_WORKERS = 8


@dataclass(frozen=True)
class _Saved:
    """A tensor of a checkpoint, as a term."""

    reader: Reader
    name: str
    dtype: Dtype

    def read(self, first: int, out: Array) -> None:
        self.reader.read(self.name, first, out)


def _saved(checkpoint: Checkpoint, name: str) -> _Saved:
    return _Saved(checkpoint.reader, name, checkpoint.tensors[name].dtype)


@dataclass(frozen=True)
class _Given:
    """Numbers in memory, as a term."""

    numbers: Array
    dtype: Dtype

    def read(self, first: int, out: Array) -> None:
        np.copyto(out, self.numbers[first : first + len(out)])


class Combination:
    """What each saved tensor becomes.

    Args:
        alphas: coefficients (B, n) float64, or (1, n) for all blocks.
        overrides: float64, or complex128, numbers that replace the combination; of tensors that
            are not averaged, numbers of any dtype.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        layout: Layout,
        blocks: Blocks,
        alphas: Float64,
        overrides: Mapping[str, Array],
    ) -> None:
        assert alphas.dtype == np.float64
        assert np.isfinite(alphas).all()
        assert alphas.shape in ((1, len(checkpoints)), (len(blocks), len(checkpoints)))
        assert overrides.keys() <= layout.entries.keys()
        self.checkpoints, self.layout, self.overrides = checkpoints, layout, overrides
        self._index = blocks.index
        self._taking_part = [
            [(i, a) for i, a in enumerate(row) if a != 0.0] for row in alphas.tolist()
        ]

    def terms(self, name: str) -> Terms:
        """What a tensor is the sum of; a checkpoint with α = 0 takes no part."""
        entry = self.layout[name]
        if name in self.overrides:
            return [(self._override(name), 1.0)]
        if not entry.averaged:
            return [(_saved(self.checkpoints[-1], name), 1.0)]
        terms = [(_saved(self.checkpoints[i], name), a) for i, a in self._of(name)]
        if not entry.singular or [a for _, a in terms] == [1.0]:
            return terms
        length = self._length(name, terms)
        return [(source, a / length) for source, a in terms]

    def _length(self, name: str, terms: Terms) -> float:
        """‖Σ α w‖ of a vector, which is small: a row or a column of a matrix."""
        info = self.layout[name].info
        total, numbers = np.zeros(info.numel), np.empty(info.numel)
        rows, single = np.empty(info.numel, info.dtype.array), np.empty(info.numel, np.float32)
        for source, alpha in terms:
            source.read(0, rows)
            widen(rows, info.dtype, numbers, single)
            total += alpha * numbers
        return max(float(np.linalg.norm(total)), float(np.finfo(np.float32).tiny))

    def _of(self, name: str) -> list[tuple[int, float]]:
        if len(self._taking_part) == 1:
            return self._taking_part[0]
        return self._taking_part[self._index[self.layout[name].tied_to or name]]

    def _override(self, name: str) -> _Given:
        entry, numbers = self.layout[name], self.overrides[name].reshape(-1)
        if not entry.averaged:
            dtype = entry.info.dtype
            return _Given(numbers.astype(dtype.array), dtype)
        return _Given(numbers, named(str(numbers.dtype)))

    def batches(self, names: Iterable[str]) -> Iterator[list[RowSlice]]:
        """Slices, small ones together: handing them to another thread one by one would cost more
        than to compute them."""
        batch: list[RowSlice] = []
        total = 0
        for cut in row_slices(self.layout, names):
            numel = (cut.stop - cut.start) * self.layout[cut.name].info.row_numel
            if batch and total + numel > SLICE_NUMEL:
                yield batch
                batch, total = [], 0
            batch.append(cut)
            total += numel
        if batch:
            yield batch

    def culprit(self, cut: RowSlice) -> TwaMergeError:
        """The error that says whose numbers in ``cut`` are not finite."""
        if cut.name in self.overrides:
            return OutputError(
                "A statistic that was estimated anew is not finite.",
                tensor=cut.name,
                remedy="use --batch-norm newest or average",
            )
        return blame([self.checkpoints[i] for i, _ in self._of(cut.name)], cut)


def write_file(
    path: Path,
    tensors: Sequence[SavedTensor],
    metadata: Mapping[str, str],
    combination: Combination,
    progress: Progress,
) -> None:
    """Writes one safetensors file. Each thread reads, computes and writes one slice at a time.

    Memory: about 4 MB a thread, however many checkpoints there are.

    Raises:
        CheckpointError: a NaN or an infinity.
        OSError: the disk is full, or the file cannot be written.
    """
    workers = min(_MAX_WORKERS, threads.available())
    infos = {tensor.name: tensor.info for tensor in tensors}
    accumulators: queue.SimpleQueue[Accumulator] = queue.SimpleQueue()
    for _ in range(workers):
        accumulators.put(Accumulator())

    def work(batch: Sequence[RowSlice]) -> int:
        accumulator = accumulators.get()
        try:
            return sum(
                _write_slice(file, combination, accumulator, infos[cut.name], cut) for cut in batch
            )
        finally:
            accumulators.put(accumulator)

    total = 0
    with (
        SafetensorsFile(path, tensors, metadata) as file,
        ThreadPoolExecutor(workers, "twa-merge-write") as pool,
    ):
        pending: deque[Future[int]] = deque()
        try:
            for batch in combination.batches(infos):
                pending.append(pool.submit(work, batch))
                while pending and (len(pending) > 2 * workers or pending[0].done()):
                    total += _done(pending, file, progress)
            while pending:
                total += _done(pending, file, progress)
        finally:
            for future in pending:
                future.cancel()
    assert total == sum(tensor.info.nbytes for tensor in tensors)


def _done(pending: deque[Future[int]], file: SafetensorsFile, progress: Progress) -> int:
    nbytes = pending.popleft().result()
    file.written(nbytes)
    progress(Advanced(nbytes))
    return nbytes


def _write_slice(
    file: SafetensorsFile,
    combination: Combination,
    accumulator: Accumulator,
    info: TensorInfo,
    cut: RowSlice,
) -> int:
    """Computes and writes one slice; the number of its bytes."""
    terms = combination.terms(cut.name)
    begin, end = cut.start * info.row_numel, cut.stop * info.row_numel
    # A single row may be longer than a slice should be.
    for first in range(begin, end, SLICE_NUMEL):
        count = min(SLICE_NUMEL, end - first)
        if combination.layout[cut.name].averaged:
            data, finite = accumulator.fill(terms, first, count, info.dtype)
            if not finite:
                raise combination.culprit(cut)
        else:
            data = accumulator.copy(terms[0][0], first, count, info.dtype)
        file.write(cut.name, first * info.dtype.itemsize, data)
    return (end - begin) * info.dtype.itemsize
