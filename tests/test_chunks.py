"""Boxes that make up a tensor: every run of its numbers is found in them."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from twa_merge.checkpoints.chunks import Box, Tiling, are_apart, pieces

GRIDS = [
    ((7,), [[0, 3, 5]]),
    ((5, 3), [[0, 2], [0]]),
    ((5, 3), [[0], [0]]),
    ((4, 7), [[0], [0, 4]]),
    ((4, 6), [[0, 1, 3], [0, 2, 5]]),
    ((3, 5, 4), [[0], [0, 3], [0]]),
    ((2, 3, 4, 5), [[0, 1], [0], [0, 1, 3], [0]]),
    ((2, 3, 4), [[0], [0], [0, 3]]),
    ((3, 1, 2), [[0, 2], [0], [0, 1]]),
]


def grid(shape: tuple[int, ...], begins: list[list[int]]) -> list[Box[str]]:
    sides = [
        [(a, b - a) for a, b in itertools.pairwise([*each, size])]
        for each, size in zip(begins, shape, strict=True)
    ]
    boxes = [
        Box(tuple(a for a, _ in cell), tuple(n for _, n in cell), str(k))
        for k, cell in enumerate(itertools.product(*sides))
    ]
    random.Random(0).shuffle(boxes)
    return boxes


def gathered(shape: tuple[int, ...], boxes: list[Box[str]], first: int, count: int) -> list[int]:
    """The run, where each number is its own index in the whole tensor."""
    whole = np.arange(math.prod(shape)).reshape(shape)
    held = {
        box.item: whole[
            tuple(slice(a, a + n) for a, n in zip(box.corner, box.sizes, strict=True))
        ].reshape(-1)
        for box in boxes
    }
    out = np.full(count, -1)
    for part in Tiling(shape, boxes).parts(first, count):
        piece = out[part.base : part.base + math.prod(part.sizes)].reshape(part.sizes)
        target = piece[part.where]
        assert (target == -1).all()
        target[...] = held[part.box.item][part.first : part.first + target.size].reshape(
            target.shape
        )
    return out.tolist()


@pytest.mark.parametrize(("shape", "begins"), GRIDS)
def test_every_run_of_every_tiling(shape: tuple[int, ...], begins: list[list[int]]) -> None:
    boxes = grid(shape, begins)
    assert are_apart(boxes)
    numel = math.prod(shape)
    for first in range(numel + 1):
        for count in range(numel - first + 1):
            assert gathered(shape, boxes, first, count) == list(range(first, first + count))


def test_boxes_that_are_no_grid() -> None:
    boxes = [
        Box((0, 0), (4, 2), "a"),
        Box((0, 2), (1, 3), "b"),
        Box((1, 2), (3, 1), "c"),
        Box((1, 3), (3, 2), "d"),
    ]
    assert are_apart(boxes)
    for first in range(20):
        assert gathered((4, 5), boxes, first, 20 - first) == list(range(first, 20))


def test_a_tensor_cut_into_rows_is_read_in_one_piece() -> None:
    tiling = Tiling((6, 3, 2), grid((6, 3, 2), [[0, 2, 4], [0], [0]]))
    parts = list(tiling.parts(13, 22))
    assert [len(part.sizes) for part in parts] == [1, 1]
    assert [(part.box.corner[0], part.first) for part in parts] == [(2, 1), (4, 0)]


def test_a_scalar_and_nothing() -> None:
    assert gathered((), [Box((), (), "a")], 0, 1) == [0]
    assert not list(Tiling((0, 3), []).parts(0, 0))
    assert not list(pieces((3, 4), 5, 0))


def test_pieces_go_on_from_one_to_the_next() -> None:
    assert list(pieces((3, 4), 2, 8)) == [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 2))]
    assert list(pieces((3, 4), 0, 12)) == [((0, 0), (3, 4))]


def test_boxes_that_overlap() -> None:
    for other in (Box((1, 1), (2, 2), "b"), Box((0, 0), (2, 2), "b"), Box((0, 1), (1, 1), "b")):
        assert not are_apart([Box((0, 0), (2, 2), "a"), other])
    cells = grid((4, 6), [[0, 1, 3], [0, 2, 5]])
    assert not are_apart([*cells, Box((3, 5), (1, 1), "again")])
