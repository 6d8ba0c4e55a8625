"""Σ α_i w_i, slice by slice, on its way from the checkpoints' files into a new one."""

from __future__ import annotations

import functools
import math
import queue
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints.base import Checkpoint
from .errors import OutputError, TwaMergeError
from .layout import Blocks, Layout
from .progress import Advanced, Progress
from .safetensors_writer import DTYPE_NAMES, SafetensorsFile, SavedTensor
from .stream import SLICE_NUMEL, RowSlice, blame, row_slices, stream

# Torch runs loops of fewer than 32768 numbers in the calling thread. Several threads with a piece
# each then get along; its own team of threads stands still whenever another thread has a core.
_PIECE = 32768 - 64
_MAX_WORKERS = 8

Terms = tuple[tuple[int, float], ...]


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

    def slices(
        self, names: Sequence[str]
    ) -> Generator[tuple[RowSlice, Terms, list[Tensor]], None, None]:
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

    Sums are products and additions rounded one by one in float64, in the checkpoints' order, so
    they depend neither on threads nor on whether the processor can fuse the two.

    Raises:
        CheckpointError: a NaN or an infinity.
        OSError: the disk is full, or the file cannot be written.
    """
    workers = min(_MAX_WORKERS, torch.get_num_threads())
    saved = {tensor.name: tensor for tensor in tensors}
    benches: queue.SimpleQueue[_Bench] = queue.SimpleQueue()
    for _ in range(workers):
        benches.put(_Bench())

    def work(cut: RowSlice, terms: Terms, rows: list[Tensor]) -> int:
        info = saved[cut.name].info
        begin, size = cut.start * info.row_numel, (cut.stop - cut.start) * info.row_numel
        averaged = combination.layout[cut.name].averaged
        bench = benches.get()
        try:
            for start in range(0, size, SLICE_NUMEL):
                part = [row[start : start + SLICE_NUMEL] for row in rows]
                count = min(SLICE_NUMEL, size - start)
                data, finite = bench.fill(part, terms, count, info.dtype, averaged)
                if not finite:
                    raise combination.culprit(cut)
                file.write(cut.name, (begin + start) * info.dtype.itemsize, data)
        finally:
            benches.put(bench)
        return size * info.dtype.itemsize

    total = 0
    with (
        SafetensorsFile(path, tensors, metadata) as file,
        ThreadPoolExecutor(workers, "twa-merge-write") as pool,
        closing(combination.slices(list(saved))) as slices,
    ):
        pending: deque[Future[int]] = deque()
        try:
            for cut, terms, rows in slices:
                pending.append(pool.submit(work, cut, terms, rows))
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


class _Bench:
    """One worker's buffers, so that nothing is allocated slice by slice."""

    def __init__(self) -> None:
        self._sum, self._term = (torch.empty(_PIECE, dtype=torch.float64) for _ in range(2))
        self._single = torch.empty(_PIECE)
        # A bytearray is a tensor's memory and what the operating system writes, both at once.
        self._raw = bytearray(SLICE_NUMEL * max(dtype.itemsize for dtype in DTYPE_NAMES))
        self._out = torch.frombuffer(self._raw, dtype=torch.uint8)

    def fill(
        self, rows: list[Tensor], terms: Terms, count: int, dtype: torch.dtype, averaged: bool
    ) -> tuple[memoryview, bool]:
        """The bytes of Σ α w in ``dtype``, and whether all of its numbers are finite.

        Args:
            rows: flat tensors of ``count`` numbers, one for each term.
            averaged: False copies the only row instead.
        """
        data = memoryview(self._raw)[: count * dtype.itemsize]
        if dtype.is_complex:
            rows = [torch.view_as_real(row).view(-1) for row in rows]
            count, dtype = 2 * count, dtype.to_real()
        out = self._out[: len(data)].view(dtype)
        step = _even_step(count)
        finite = True
        for start in range(0, count, step):
            target = out[start : start + step]
            part = [row[start : start + step] for row in rows]
            if averaged:
                total = self._combine(part, terms, target.numel())
                target.copy_(total)
                finite = finite and self._is_finite(total, target)
            else:
                target.copy_(part[0])
        return data, finite

    def _combine(self, rows: list[Tensor], terms: Terms, count: int) -> Tensor:
        total, term = self._sum[:count], self._term[:count]
        if not rows:
            return total.zero_()
        for k, (row, (_, alpha)) in enumerate(zip(rows, terms, strict=True)):
            product = term if k else total
            if row.dtype == torch.float16:
                # Exact either way, and twice as fast in two steps.
                row = self._single[:count].copy_(row)
            product.copy_(row)
            if k and _is_exact(alpha, row.dtype):
                total.add_(product, alpha=alpha)
                continue
            if alpha != 1.0:
                product.mul_(alpha)
            if k:
                total.add_(product)
        return total

    def _is_finite(self, total: Tensor, saved: Tensor) -> bool:
        """Whether ``saved``, which is ``total`` rounded, holds finite numbers only."""
        # No number is larger than the norm of all, which is quick to have from the cache.
        squares = torch.mul(total, total, out=self._term[: total.numel()])
        if math.sqrt(squares.sum().item()) <= torch.finfo(saved.dtype).max:
            return True
        # Not every narrow dtype knows isfinite.
        return bool(torch.isfinite(saved.double()).all())


def _even_step(count: int) -> int:
    """Size of pieces that are about equal, and whole cache lines."""
    pieces = max(1, -(-count // _PIECE))
    return max(1, -(-count // (64 * pieces))) * 64


@functools.lru_cache(maxsize=4096)
def _is_exact(alpha: float, dtype: torch.dtype) -> bool:
    """Whether α times a number of ``dtype`` needs no rounding in float64.

    Then multiplying and adding in one step, which processors may or may not fuse, is the same.
    """
    digits = 1 - math.log2(torch.finfo(dtype).eps)
    return dtype != torch.float64 and Fraction(alpha).numerator.bit_length() + digits <= 53


def _rows(override: Tensor, cut: RowSlice) -> Tensor:
    rows = override.detach().cpu()
    return (rows[cut.start : cut.stop] if rows.dim() else rows).reshape(-1)
