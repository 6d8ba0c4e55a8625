"""Σ α_i w_i of one slice in float64, rounded once into bytes that are ready to be written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .dtypes import Array, Dtype, Float64, narrow, widen
from .stream import SLICE_NUMEL

# Numbers at a time. Smaller pieces would stay in a core's second-level cache, but threads then
# wait for one another between them: only one at a time can begin an operation.
_PIECE = 1 << 17
_WIDEST = 8


class Source(Protocol):
    """One term of a sum: a tensor of a checkpoint, or what replaces the sum."""

    @property
    def dtype(self) -> Dtype: ...

    def read(self, first: int, out: Array) -> None:
        """Numbers from ``first`` on, counted through the tensor, into ``out`` (m,)."""
        ...


# Each source with its α.
Terms = Sequence[tuple[Source, float]]


class _Without:
    """A source with zeros at some numbers, counted from ``start``."""

    def __init__(self, source: Source, zeros: np.ndarray, start: int) -> None:
        self._source, self._zeros, self._start = source, zeros, start

    @property
    def dtype(self) -> Dtype:
        return self._source.dtype

    def read(self, first: int, out: Array) -> None:
        self._source.read(first, out)
        out[self._zeros[first - self._start :][: len(out)]] = 0


class Accumulator:
    """One thread's buffers for Σ α w, so that nothing is allocated slice by slice.

    Products and sums are rounded one by one in float64, in the order of the terms, so they do not
    depend on threads.
    """

    def __init__(self) -> None:
        self._sum, self._product = np.empty(_PIECE), np.empty(_PIECE)
        self._single = np.empty(_PIECE, np.float32)
        self._rows = np.empty(_PIECE * _WIDEST, np.uint8)
        self._raw = bytearray(SLICE_NUMEL * _WIDEST)

    def fill(self, terms: Terms, first: int, count: int, dtype: Dtype) -> tuple[memoryview, bool]:
        """The bytes of Σ α w in a float or complex dtype, and whether all numbers are finite.

        An infinity that all terms share is itself, as in masks, and none of them.

        Args:
            first, count: numbers of the tensor, at most ``SLICE_NUMEL``.
        """
        data = memoryview(self._raw)[: count * dtype.itemsize]
        finite = True
        step = _PIECE // 2 if dtype.is_complex else _PIECE
        for start in range(0, count, step):
            stop = min(start + step, count)
            out = np.frombuffer(data[start * dtype.itemsize : stop * dtype.itemsize], dtype.array)
            finite &= self._fill_piece(terms, first + start, out, dtype) or (
                self._fill_around_infinities(terms, first + start, out, dtype)
            )
        return data, finite

    def copy(self, source: Source, first: int, count: int, dtype: Dtype) -> memoryview:
        """The bytes of numbers ``first`` to ``first + count - 1`` as they are."""
        assert source.dtype == dtype
        data = memoryview(self._raw)[: count * dtype.itemsize]
        source.read(first, np.frombuffer(data, dtype.array))
        return data

    def _fill_around_infinities(self, terms: Terms, first: int, out: Array, dtype: Dtype) -> bool:
        """As ``_fill_piece``, where the infinities that all terms share are taken over."""
        if dtype.is_complex or not terms:
            return False
        shared, infinities = self._shared_infinities(terms, first, len(out))
        if not len(infinities):
            return False
        kept = [(_Without(source, shared, first), alpha) for source, alpha in terms]
        finite = self._fill_piece(kept, first, out, dtype)
        rows = np.empty(len(infinities), dtype.array)
        single, product = self._single[: len(rows)], self._product[: len(rows)]
        narrow(infinities, dtype, rows, single, product)
        out[shared] = rows
        widen(rows, dtype, product, single)
        # Not every dtype has infinities.
        return finite and bool(np.isinf(product).all())

    def _shared_infinities(self, terms: Terms, first: int, size: int) -> tuple[np.ndarray, Float64]:
        """Which numbers are infinite and the same in all terms, (size,) bool, and these."""
        single, numbers, other = self._single[:size], self._sum[:size], self._product[:size]
        self._widened(terms[0][0], first, size, numbers, single)
        shared = np.isinf(numbers)
        for source, _ in terms[1:]:
            self._widened(source, first, size, other, single)
            shared &= numbers == other
        return shared, numbers[shared]

    @np.errstate(all="ignore")
    def _fill_piece(self, terms: Terms, first: int, out: Array, dtype: Dtype) -> bool:
        size = len(out)
        if dtype.is_complex:
            dtype = dtype.real()
            out = out.view(dtype.array)
        total, single = self._sum[: len(out)], self._single[: len(out)]
        if not terms:
            total.fill(0.0)
        common = _common_power_of_two(terms)
        for k, (source, alpha) in enumerate(terms):
            product = self._product[: len(out)] if k else total
            self._widened(source, first, size, product, single)
            if alpha != common:
                np.multiply(product, alpha / common, out=product)
            if k:
                np.add(total, product, out=total)
        if common != 1.0:
            np.multiply(total, common, out=total)
        # A NaN compares as false.
        surely_finite = total.max() <= dtype.largest and total.min() >= -dtype.largest
        if not surely_finite and np.isnan(total).any():
            return False
        narrow(total, dtype, out, single, self._product[: len(out)])
        if surely_finite:
            return True
        # What is a little too large may have been rounded to the largest number.
        widen(out, dtype, total, single)
        return bool(np.isfinite(total).all())

    def _widened(
        self, source: Source, first: int, size: int, out: Float64, single: np.ndarray
    ) -> None:
        dtype = source.dtype
        rows = self._rows[: size * dtype.itemsize].view(dtype.array)
        source.read(first, rows)
        if dtype.is_complex:
            dtype = dtype.real()
            rows = rows.view(dtype.array)
        widen(rows, dtype, out, single)


def _common_power_of_two(terms: Terms) -> float:
    """The α of all terms where that is a power of two, else 1: to multiply the sum by it, and not
    each term, changes no rounding."""
    alphas = {alpha for _, alpha in terms}
    alpha = alphas.pop() if len(alphas) == 1 else 1.0
    return alpha if abs(math.frexp(alpha)[0]) == 0.5 else 1.0
