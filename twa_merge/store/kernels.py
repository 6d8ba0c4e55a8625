"""Project and combine on tiles of offsets, in every width.

Sums are always taken in the same order. On a CPU they hardly depend on where the rows of the ranks
begin either: they are in float64, in the fast way over all but pieces of a row. On a GPU they are
in float32 within a tile.

There is a fast way, compiled at the first use (in C on a CPU, by ``torch.compile`` on a GPU), and
an eager one for small stores, odd tiles and machines without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..progress import Noted, Progress
from .fused import Fused
from .native import Native
from .quantize import GROUP, unpack
from .tiles import Tiles

_T = TypeVar("_T")

# Numbers (of all offsets) in one eager step: their copy stays in a core's cache.
_EAGER_CPU = 1 << 18
_EAGER_GPU = 1 << 28
# Numbers in a store from which its evaluations pay for compiling: a second, or some twenty.
_COMPILE_FROM_CPU = 1 << 23
_COMPILE_FROM_GPU = 1 << 28


def worth_compiling(numbers: int, device: torch.device) -> bool:
    """Whether a store of so many numbers, of all offsets, is."""
    return numbers >= (_COMPILE_FROM_CPU if device.type == "cpu" else _COMPILE_FROM_GPU)


class Kernels:
    """Project and combine for one store.

    Args:
        dtype: of the store.
        device: that computes.
        compiled: take the fast way; falls back to the eager one, with one note, where it fails.
    """

    def __init__(
        self, dtype: str, device: torch.device, *, compiled: bool, progress: Progress
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._progress = progress
        self._wide = torch.float64 if device.type == "cpu" else torch.float32
        self._compiled = compiled
        self._fast: Native | Fused | None = None

    def project(self, tiles: Tiles, gradient: Tensor, row: int) -> Tensor:
        """⟨Δ_i, g⟩ over the tiles: gradient (u, T) float32 → (n,) float64 on the device.

        Args:
            row: numbers that there is room for in a row of the tensor.
        """
        found = self._try(lambda fast: fast.project(tiles, gradient, row), tiles)
        sums = self._project_eagerly(tiles, gradient) if found is None else found
        return sums.sum(0, dtype=torch.float64)

    def combine(
        self, tiles: Tiles, centre: Tensor, beta: Tensor, total: Tensor, out: Tensor
    ) -> None:
        """out = total·c + Σ β_i Δ_i.

        Args:
            centre, out: (u, T) float32; ``beta``: (n,) float32; ``total``: (1,) float32.
        """

        def combined(fast: Native | Fused) -> bool:
            fast.combine(tiles, centre, beta, total, out)
            return True

        if not self._try(combined, tiles):
            self._combine_eagerly(tiles, centre, beta, total, out)

    def _try(self, call: Callable[[Native | Fused], _T], tiles: Tiles) -> _T | None:
        """What the fast way returns; None where the eager way has to be taken."""
        if not self._compiled:
            return None
        try:
            if self._fast is None:
                on_cpu = self.device.type == "cpu"
                self._fast = Native(self.dtype) if on_cpu else Fused(self.dtype, self.device)
            return call(self._fast) if self._fast.takes(tiles) else None
        except Exception as error:
            # Whatever stops a compiler, the eager way gives the same numbers; what stops both
            # (no memory left, say) is raised from there.
            self._compiled, self._fast = False, None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._progress(
                Noted(f"No compiler works here, so the slower eager kernels are used: {reason}")
            )
            return None

    def _project_eagerly(self, tiles: Tiles, gradient: Tensor) -> Tensor:
        shape = len(tiles), tiles.data.shape[-2]
        sums = torch.empty(shape, dtype=self._wide, device=self.device)
        for part, numbers in self._unpacked(tiles):
            g = gradient[part].view(len(numbers), -1).to(self._wide)
            if self.device.type == "cuda":
                # Not a matrix product: those may be rounded to TF32.
                products = (numbers * g[:, None]).sum(-1)
            elif tiles.scales is None:
                products = torch.stack([torch.mv(*pair) for pair in zip(numbers, g, strict=True)])
            else:
                products = torch.linalg.vecdot(numbers, g[:, None])
            sums[part] = products.unflatten(0, (part.stop - part.start, -1)).sum(1)
        return sums

    def _combine_eagerly(
        self, tiles: Tiles, centre: Tensor, beta: Tensor, total: Tensor, out: Tensor
    ) -> None:
        for part, numbers in self._unpacked(tiles):
            if self.device.type == "cuda":
                sums = (numbers * beta[:, None]).sum(1)
            else:
                rows = beta.to(self._wide).expand(numbers.shape[0], 1, -1)
                sums = torch.bmm(rows, numbers)[:, 0]
            out[part] = sums.view_as(centre[part]).addcmul_(centre[part].to(self._wide), total)

    def _unpacked(self, tiles: Tiles) -> Iterator[tuple[slice, Tensor]]:
        """Runs of tiles that fit in a cache, and their numbers in the dtype of the sums.

        Yields:
            Which tiles, and (k, n, T), or where they are packed (k · T / 128, n, 128).
        """
        most = _EAGER_GPU if self.device.type == "cuda" else _EAGER_CPU
        n = tiles.data.shape[-2]
        step = min(len(tiles), max(1, most // (n * tiles.width)))
        if tiles.data.dtype == self._wide:
            for a in range(0, len(tiles), step):
                yield slice(a, min(a + step, len(tiles))), tiles.data[a : a + step]
            return
        size = step * n * tiles.width
        scratch = torch.empty(size, dtype=self._wide, device=self.device)
        for a in range(0, len(tiles), step):
            here = tiles[a : a + step]
            numbers = scratch[: len(here) * n * tiles.width]
            if here.scales is None:
                numbers = numbers.view_as(here.data).copy_(here.data)
            else:
                data, scales = here.data.flatten(0, 1), here.scales.flatten(0, 1)
                numbers = unpack(data, scales, self.dtype, numbers.view(-1, n, GROUP))
            yield slice(a, a + len(here)), numbers
