"""Σ α_i w_i, slice by slice, on its way from the checkpoints' files into a new one."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from .accumulator import Accumulator, Terms
from .checkpoints.base import Checkpoint, TensorInfo
from .errors import OutputError, TwaMergeError
from .layout import Blocks, Layout
from .progress import Advanced, Progress
from .safetensors_writer import SafetensorsFile, SavedTensor
from .stream import SLICE_NUMEL, RowSlice, blame, row_slices, stream

_MAX_WORKERS = 8

Work = tuple[RowSlice, Terms, list[Tensor]]


class Combination:
    """What each saved tensor becomes.

    Args:
        alphas: coefficients (B, n) float64, or (1, n) for all blocks.
        overrides: tensors that replace the combination.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        layout: Layout,
        blocks: Blocks,
        alphas: Tensor,
        overrides: Mapping[str, Tensor],
    ) -> None:
        assert alphas.dtype == torch.float64
        assert alphas.isfinite().all()
        assert alphas.shape in ((1, len(checkpoints)), (len(blocks), len(checkpoints)))
        assert overrides.keys() <= layout.entries.keys()
        self.checkpoints, self.layout, self.overrides = checkpoints, layout, overrides
        self._index = blocks.index
        self._terms: list[Terms] = [
            tuple((i, a) for i, a in enumerate(row) if a != 0.0) for row in alphas.tolist()
        ]

    def terms(self, name: str) -> Terms:
        """(checkpoint, α) for each one that takes part in a tensor."""
        entry = self.layout[name]
        if name in self.overrides:
            return ()
        if not entry.averaged:
            return ((len(self.checkpoints) - 1, 1.0),)
        if len(self._terms) == 1:
            return self._terms[0]
        return self._terms[self._index[entry.tied_to or name]]

    def slices(self, names: Iterable[str]) -> Generator[Work, None, None]:
        """Yields every slice of the tensors with its terms and their m numbers each."""
        for chosen, run in groupby(names, lambda name: tuple(i for i, _ in self.terms(name))):
            cuts = row_slices(self.layout, run)
            if chosen:
                for cut, rows in stream([self.checkpoints[i] for i in chosen], cuts):
                    yield cut, self.terms(cut.name), rows
                continue
            for cut in cuts:
                override = self.overrides.get(cut.name)
                given = [] if override is None else [_rows(override, cut)]
                yield cut, tuple((0, 1.0) for _ in given), given

    def batches(self, names: Iterable[str]) -> Generator[list[Work], None, None]:
        """Slices, small ones together: handing them to another thread one by one would cost more
        than to compute them."""
        batch: list[Work] = []
        total = 0
        with closing(self.slices(names)) as slices:
            for work in slices:
                numel = (work[0].stop - work[0].start) * self.layout[work[0].name].info.row_numel
                if batch and total + numel > SLICE_NUMEL:
                    yield batch
                    batch, total = [], 0
                batch.append(work)
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
        return blame([self.checkpoints[i] for i, _ in self.terms(cut.name)], cut)


def write_file(
    path: Path,
    tensors: Sequence[SavedTensor],
    metadata: Mapping[str, str],
    combination: Combination,
    progress: Progress,
) -> None:
    """Writes one safetensors file. Memory: a few slices, however many checkpoints there are.

    Raises:
        CheckpointError: a NaN or an infinity.
        OSError: the disk is full, or the file cannot be written.
    """
    workers = min(_MAX_WORKERS, torch.get_num_threads())
    infos = {tensor.name: tensor.info for tensor in tensors}
    accumulators: queue.SimpleQueue[Accumulator] = queue.SimpleQueue()
    for _ in range(workers):
        accumulators.put(Accumulator())

    def work(batch: Sequence[Work]) -> int:
        accumulator = accumulators.get()
        try:
            return sum(
                _write_slice(file, combination, accumulator, infos[w[0].name], w) for w in batch
            )
        finally:
            accumulators.put(accumulator)

    total = 0
    with (
        SafetensorsFile(path, tensors, metadata) as file,
        ThreadPoolExecutor(workers, "twa-merge-write") as pool,
        closing(combination.batches(infos)) as batches,
    ):
        pending: deque[Future[int]] = deque()
        try:
            for batch in batches:
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
    work: Work,
) -> int:
    """Computes and writes one slice; the number of its bytes."""
    cut, terms, rows = work
    begin, size = cut.start * info.row_numel, (cut.stop - cut.start) * info.row_numel
    averaged = combination.layout[cut.name].averaged
    # A single row may be longer than a slice should be.
    for start in range(0, size, SLICE_NUMEL):
        part = [row[start : start + SLICE_NUMEL] for row in rows]
        count = min(SLICE_NUMEL, size - start)
        data, finite = accumulator.fill(part, terms, count, info.dtype, averaged)
        if not finite:
            raise combination.culprit(cut)
        file.write(cut.name, (begin + start) * info.dtype.itemsize, data)
    return size * info.dtype.itemsize


def _rows(override: Tensor, cut: RowSlice) -> Tensor:
    rows = override.detach().cpu()
    return (rows[cut.start : cut.stop] if rows.dim() else rows).reshape(-1)
