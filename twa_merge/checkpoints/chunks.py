"""Tensors that were cut into boxes, in any dimensions: where each of their numbers lies."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Shape = tuple[int, ...]


# With slots: a checkpoint of many processes has tens of thousands of parts.
@dataclass(frozen=True, slots=True)
class Box(Generic[T]):
    """The part of a tensor that begins at ``corner`` and has the shape ``sizes``.

    Attributes:
        item: whatever holds its numbers.
    """

    corner: Shape
    sizes: Shape
    item: T

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """What one box has of a run of numbers.

    Attributes:
        first: where in the box it begins, counted row by row; it goes on from there without a gap.
        base: where in the run the piece begins that the part belongs to.
        sizes: shape of that piece.
        where: the part's place in the piece.
    """

    box: Box[T]
    first: int
    base: int
    sizes: Shape
    where: tuple[slice, ...]


class Tiling(Generic[T]):
    """The boxes that make up a tensor, none of them empty.

    Dimensions in which no box ends are counted as one with those before them: a tensor that was cut
    into rows has a single dimension here.
    """

    def __init__(self, shape: Shape, boxes: Sequence[Box[T]]) -> None:
        cut = [k for k, n in enumerate(shape) if any(box.sizes[k] != n for box in boxes)]
        last = cut[-1] if cut else 0
        inner = math.prod(shape[last + 1 :])
        self.shape = (*shape[:last], math.prod(shape[last:]))
        folded = [
            Box(
                (*box.corner[:last], inner * sum(box.corner[last : last + 1])),
                (*box.sizes[:last], math.prod(box.sizes[last:])),
                box,
            )
            for box in boxes
        ]
        self._boxes: list[Box[Box[T]]] = sorted(folded, key=lambda box: box.corner)
        self._begins = [box.corner[0] for box in self._boxes]
        self._longest = max((box.sizes[0] for box in self._boxes), default=0)

    def parts(self, first: int, count: int) -> Iterator[Part[T]]:
        """Where numbers ``first`` to ``first + count - 1`` lie, counted row by row."""
        base = 0
        for corner, sizes in pieces(self.shape, first, count):
            end = tuple(a + n for a, n in zip(corner, sizes, strict=True))
            for box in self._near(corner[0], end[0]):
                low = tuple(map(max, corner, box.corner))
                high = tuple(
                    min(z, b + n) for z, b, n in zip(end, box.corner, box.sizes, strict=True)
                )
                if all(a < z for a, z in zip(low, high, strict=True)):
                    where = tuple(
                        slice(a - c, z - c) for a, z, c in zip(low, high, corner, strict=True)
                    )
                    yield Part(box.item, _place(low, box), base, sizes, where)
            base += math.prod(sizes)

    def _near(self, begin: int, end: int) -> list[Box[Box[T]]]:
        """At least those that have some of [begin, end) in dimension 0."""
        start = bisect_right(self._begins, begin - self._longest)
        return self._boxes[start : bisect_left(self._begins, end)]


def pieces(shape: Shape, first: int, count: int) -> Iterator[tuple[Shape, Shape]]:
    """Numbers ``first`` to ``first + count - 1``, counted row by row, as boxes in that order.

    In each there is one dimension that it has a part of: it has one index of those before, and all
    of those behind. So what it has in common with another box lies in that one without a gap.

    Yields:
        Where the box begins, and its shape.
    """
    if len(shape) == 1:
        if count:
            yield (first,), (count,)
        return
    inner = math.prod(shape[1:])
    end = first + count
    while first < end:
        row, rest = divmod(first, inner)
        if rest or end - first < inner:
            used = min(inner - rest, end - first)
            for corner, sizes in pieces(shape[1:], rest, used):
                yield (row, *corner), (1, *sizes)
        else:
            rows = (end - first) // inner
            used = rows * inner
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
        first += used


def are_apart(boxes: Sequence[Box[T]]) -> bool:
    """Whether no number lies in two boxes, as far as straight cuts through all of them can tell.

    Whatever processes in a grid save can be told apart so.
    """
    if len(boxes) < 2:
        return True
    for axis in range(len(boxes[0].sizes)):
        groups = _cut(boxes, axis)
        if len(groups) > 1:
            return all(map(are_apart, groups))
    return False


def _cut(boxes: Sequence[Box[T]], axis: int) -> list[list[Box[T]]]:
    """Groups of boxes that have no index of a dimension in common with each other."""
    groups: list[list[Box[T]]] = []
    reached = 0
    for box in sorted(boxes, key=lambda box: box.corner[axis]):
        if not groups or box.corner[axis] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, box.corner[axis] + box.sizes[axis])
    return groups


def _place(index: Shape, box: Box[T]) -> int:
    """Which number of the box, counted row by row, stands at an index of the tensor."""
    place = 0
    for at, begin, size in zip(index, box.corner, box.sizes, strict=True):
        place = place * size + at - begin
    return place
