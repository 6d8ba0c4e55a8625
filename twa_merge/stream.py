"""Aligned row slices of one tensor across all checkpoints: the unit of every pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints.base import Checkpoint
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
    checkpoints: Sequence[Checkpoint], slices: Sequence[RowSlice], *, ahead: int = 4
) -> Generator[tuple[RowSlice, list[Tensor]], None, None]:
    """Yields every slice with its rows from all checkpoints.

    The next slices are paged in by a second thread meanwhile.

    Args:
        ahead: slices to page in ahead of the one being worked on.

    Yields:
        The slice and n flat tensors of its m numbers in the saved dtype, to be read only.
    """

    def fetch(cut: RowSlice) -> list[Tensor]:
        rows = [c.rows(cut.name, cut.start, cut.stop).reshape(-1) for c in checkpoints]
        for row in rows:
            _page_in(row)
        return rows

    with ThreadPoolExecutor(1, "twa-merge-read") as pool:
        waiting: list[Future[list[Tensor]]] = []
        try:
            for k, cut in enumerate(slices):
                while len(waiting) <= ahead and k + len(waiting) < len(slices):
                    waiting.append(pool.submit(fetch, slices[k + len(waiting)]))
                yield cut, waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _page_in(row: Tensor) -> None:
    if row.is_contiguous() and row.numel():
        row.view(torch.uint8)[::4096].max()


def blame(checkpoints: Sequence[Checkpoint], cut: RowSlice) -> CheckpointError:
    """The error that says which checkpoint holds a NaN or an infinity in ``cut``.

    Called once a result computed from the slice has turned out not to be finite: looking at the
    result costs a pass over one tensor, looking at the inputs would cost n.
    """
    for checkpoint in checkpoints:
        rows = checkpoint.rows(cut.name, cut.start, cut.stop)
        wrong = ~torch.isfinite(rows.float() if rows.element_size() == 1 else rows)
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            if where:
                where[0] += cut.start
            value = rows[wrong][0].item() if rows.dim() else rows.item()
            return CheckpointError(
                "A checkpoint holds a number that is not finite.",
                checkpoint=checkpoint.path,
                tensor=cut.name,
                expected="finite numbers",
                found=f"{value} at index {where}, {int(wrong.sum())} in this slice",
                remedy="leave this checkpoint out: its training had diverged",
            )
    return CheckpointError(
        "The combination overflows.",
        tensor=cut.name,
        expected="a finite sum",
        found="numbers too large for their dtype",
        remedy="choose coefficients closer to zero or a wider --dtype",
    )
