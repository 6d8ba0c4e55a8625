"""Aligned row slices of one tensor across all checkpoints: the unit of every pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .checkpoints.base import Checkpoint
from .dtypes import Array, Dtype, Float64, widen
from .errors import CheckpointError
from .layout import Layout

# Numbers of one checkpoint in flight: 2 MB of float64 stay in a core's second-level cache.
SLICE_NUMEL = 1 << 18

Share = Callable[[int], tuple[int, int]]


@dataclass(frozen=True)
class RowSlice:
    """Rows [start, stop) of dimension 0 of one tensor."""

    name: str
    start: int
    stop: int


def row_slices(
    layout: Layout,
    names: Iterable[str],
    *,
    share: Share | None = None,
    numel: int = SLICE_NUMEL,
) -> list[RowSlice]:
    """Cuts tensors into slices of at most ``numel`` numbers, or one row where a row is longer.

    Args:
        share: rows of a dimension 0 → the part [start, stop) to cover; all rows without it.
    """
    slices = []
    for name in names:
        info = layout[name].info
        start, stop = share(info.rows) if share else (0, info.rows)
        step = max(1, numel // max(1, info.row_numel))
        slices += [RowSlice(name, a, min(a + step, stop)) for a in range(start, stop, step)]
    return slices


def stream(
    checkpoints: Sequence[Checkpoint], slices: Sequence[RowSlice], *, ahead: int
) -> Generator[tuple[RowSlice, list[Array]], None, None]:
    """Yields every slice with its rows from all checkpoints.

    The next slices are read by a second thread meanwhile.

    Args:
        ahead: slices to read ahead of the one being worked on.

    Yields:
        The slice and n new flat arrays of its m numbers in the saved dtype.
    """

    def fetch(cut: RowSlice) -> list[Array]:
        return [c.rows(cut.name, cut.start, cut.stop).reshape(-1) for c in checkpoints]

    with ThreadPoolExecutor(1, "twa-merge-read") as pool:
        waiting: list[Future[list[Array]]] = []
        try:
            for k, cut in enumerate(slices):
                while len(waiting) <= ahead and k + len(waiting) < len(slices):
                    waiting.append(pool.submit(fetch, slices[k + len(waiting)]))
                yield cut, waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def blame(checkpoints: Sequence[Checkpoint], cut: RowSlice) -> CheckpointError:
    """The error that says which checkpoint holds a NaN or an infinity in ``cut``.

    Called once a result computed from the slice has turned out not to be finite: looking at the
    result costs a pass over one tensor, looking at the inputs would cost n.
    """
    for checkpoint in checkpoints:
        numbers = _numbers(
            checkpoint.rows(cut.name, cut.start, cut.stop), checkpoint.tensors[cut.name].dtype
        )
        wrong = ~np.isfinite(numbers)
        if wrong.any():
            where = [int(i[0]) for i in np.nonzero(np.atleast_1d(wrong))] if wrong.ndim else []
            if where:
                where[0] += cut.start
            return CheckpointError(
                "A checkpoint holds a number that is not finite.",
                checkpoint=checkpoint.path,
                tensor=cut.name,
                expected="finite numbers",
                found=f"{numbers[wrong][0]} at index {where}, {wrong.sum()} in this slice",
                remedy="leave this checkpoint out: its training had diverged",
            )
    return CheckpointError(
        "The combination overflows.",
        tensor=cut.name,
        expected="a finite sum",
        found="numbers too large for their dtype",
        remedy="choose coefficients closer to zero or a wider --dtype",
    )


def _numbers(rows: Array, dtype: Dtype) -> Array:
    """Rows of a float or complex dtype as numbers that numpy knows."""
    if dtype.is_complex:
        return rows
    out: Float64 = np.empty(rows.size)
    widen(rows.reshape(-1), dtype, out, np.empty(rows.size, np.float32))
    return out.reshape(rows.shape)
