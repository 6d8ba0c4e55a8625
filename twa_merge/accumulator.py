"""Σ α_i w_i of one slice in float64, rounded once into bytes that are ready to be written."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

from .safetensors_writer import DTYPE_NAMES
from .stream import SLICE_NUMEL

# Torch runs loops of fewer than 32768 numbers in the calling thread. Several threads with a piece
# each then get along; its own team of threads stands still whenever another thread has a core.
_PIECE = 32768 - 64

# (checkpoint, its α) for each one that takes part.
Terms = tuple[tuple[int, float], ...]


class Accumulator:
    """One thread's buffers for Σ α w, so that nothing is allocated slice by slice.

    Products and sums are rounded one by one in float64, in the order of the terms, so they depend
    neither on threads nor on whether the processor can fuse the two.
    """

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
            rows = [torch.view_as_real(row).reshape(-1) for row in rows]
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
