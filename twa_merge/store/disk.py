"""Offsets that stay in the checkpoint files: every evaluation reads them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoints.base import Checkpoint
from ..checkpoints.watchful import watched
from ..layout import Blocks, Layout
from ..stream import SLICE_NUMEL, RowSlice, row_slices, stream
from ..tensors import as_tensor
from .base import held_name, row_of

# Bytes of all checkpoints together that are read ahead of the arithmetic.
READ_AHEAD = 64 << 20
_SLICES_AHEAD = 4
# Numbers of all checkpoints together in one step: their float64 copy stays in a core's cache.
_STEP = 1 << 18


class DiskStore:
    """Projects and combines straight from the files, while a second thread reads ahead.

    It is exact, and takes no memory but for the slices in flight: even the centre is computed
    afresh from each slice. The arithmetic is the CPU's, whatever device gradients and targets are
    on: sending one gradient over is cheaper than n checkpoints.

    Args:
        share: tensor → this rank's rows [start, stop) of it.
        held: tensors that need not be put first: what is put stays in the files anyway.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        layout: Layout,
        blocks: Blocks,
        *,
        share: Callable[[str], tuple[int, int]],
        held: Iterable[str] = (),
    ) -> None:
        self.blocks = blocks
        self._checkpoints = watched(checkpoints)
        self._layout = layout
        self._share = share
        self._held = dict.fromkeys(held)

    @property
    def names(self) -> list[str]:
        return list(self._held)

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def place(self) -> tuple[str, str]:
        return "disk", "as saved"

    def put(self, cut: RowSlice, centre: Tensor, offsets: Tensor) -> None:
        self._held[cut.name] = None

    def project(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """As ``Store.project``.

        Raises:
            CheckpointError: a file has vanished or changed since the store was made.
        """
        n = len(self._checkpoints)
        sums = torch.zeros(len(self.blocks), n, dtype=torch.float64)
        given = {name: g for name, g in gradients.items() if g is not None}
        for name, gradient, start, rows in self._pass(given):
            flat = gradient.detach().reshape(-1)[start : start + rows[0].numel()]
            # Rounded as in memory, where float64 would be twice as much.
            flat = flat.float().to("cpu", torch.float64)
            step = max(1, _STEP // n)
            offsets = torch.empty(n, min(step, flat.numel()), dtype=torch.float64)
            for a in range(0, flat.numel(), step):
                g = flat[a : a + step]
                here = offsets[:, : g.numel()]
                for target, row in zip(here, rows, strict=True):
                    target.copy_(row[a : a + step])
                here.sub_(here.mean(0))
                products = torch.mv(here, g)
                if not bool(products.isfinite().all()) and bool(g.isfinite().all()):
                    # Infinities that all share have no offsets.
                    products = torch.mv(here.nan_to_num_(0.0, 0.0, 0.0), g)
                sums[self.blocks.index[name]] += products
        # Σ_i Δ_i = 0 exactly: what is left in the mean is the rounding of the centre, the same in
        # every offset.
        return sums.sub_(sums.mean(1, keepdim=True))

    def combine(self, alphas: Tensor, targets: Mapping[str, Tensor]) -> None:
        """As ``Store.combine``; Σ α_i w_i, of α rounded to float32, is accumulated in float64.

        Raises:
            CheckpointError: a file has vanished or changed since the store was made.
        """
        alphas = _rounded(alphas.detach().to("cpu", torch.float64))
        total, term = torch.empty(2, _STEP >> 3, dtype=torch.float64)
        for name, target, start, rows in self._pass(targets):
            assert target.dtype == torch.float32
            weights = alphas[row_of(len(alphas), self.blocks, name)].tolist()
            out = torch.empty(rows[0].numel(), dtype=torch.float32)
            for a in range(0, out.numel(), total.numel()):
                here = out[a : a + total.numel()]
                sum_, term_ = total[: here.numel()].zero_(), term[: here.numel()]
                for row, weight in zip(rows, weights, strict=True):
                    term_.copy_(row[a : a + here.numel()])
                    sum_.add_(term_, alpha=weight)
                if not bool(sum_.isfinite().all()):
                    # As in masks: infinities that all share, of which there is no weighted sum.
                    term_.copy_(rows[0][a : a + here.numel()])
                    sum_ = torch.where(term_.isinf(), term_, sum_)
                here.copy_(sum_)
            target.detach().view(-1)[start : start + out.numel()].copy_(out)

    def _pass(
        self, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, int, list[Tensor]]]:
        """Reads the rows of all checkpoints that belong to ``tensors``.

        Yields:
            Tensor held, the one given for it, where in it the slice begins, and n flat slices.
        """
        of: dict[str, list[Tensor]] = {}
        for asked, tensor in tensors.items():
            name = held_name(self._layout, self._held, asked, tensor.numel())
            if name is not None:
                of.setdefault(name, []).append(tensor)
        slices = [cut for name in of for cut in self._slices(name)]
        for cut, arrays in stream(self._checkpoints, slices, ahead=_SLICES_AHEAD):
            rows = [as_tensor(array, self._layout[cut.name].info.dtype) for array in arrays]
            first = cut.start - self._share(cut.name)[0]
            for tensor in of[cut.name]:
                yield cut.name, tensor, first * self._layout[cut.name].info.row_numel, rows

    def _slices(self, name: str) -> list[RowSlice]:
        in_flight = (_SLICES_AHEAD + 2) * len(self._checkpoints)
        most = READ_AHEAD // (in_flight * self._layout[name].info.dtype.itemsize)
        numel = max(4096, min(most, SLICE_NUMEL))
        return row_slices(self._layout, [name], share=lambda _: self._share(name), numel=numel)


def _rounded(alphas: Tensor) -> Tensor:
    """Coefficients (B, n) float64 of float32 numbers, moved alike so that they add up as before.

    Fits of several processes know them to 1e-16, which would show in the last bit of some weights,
    and in losses with kinks soon in more. Zero and one stay as they are.
    """
    single = alphas.float().double()
    missing = alphas.sum(1, keepdim=True).float().double() - single.sum(1, keepdim=True)
    return single + missing / alphas.shape[1]
