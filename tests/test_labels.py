"""Labels of points: none lies on another one, none is left out."""

from __future__ import annotations

import itertools
import random

from twa_merge.labels import Label, place_labels, touching

LETTER, LINE = 6.0, 11.0


def box(label: Label, points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    x = points[label.point][0] + label.offset[0]
    y = points[label.point][1] + label.offset[1]
    width = LETTER * len(label.text)
    left = x - {1: 0.0, 0: width / 2, -1: width}[label.side]
    return left, y - LINE / 2, left + width, y + LINE / 2


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    across = one[0] < other[2] and other[0] < one[2]
    return across and one[1] < other[3] and other[1] < one[3]


def test_only_what_looks_like_one_point_is_one_group() -> None:
    assert touching([(0, 0), (30, 1), (2, 1), (60, 0), (61, 0)]) == [[0, 2], [1], [3, 4]]


def test_labels_of_a_crowd_lie_on_nothing() -> None:
    draw = random.Random(0)
    points = [(200 + draw.gauss(0, 25), 150 + draw.gauss(0, 25)) for _ in range(9)]
    texts = {i: f"window:{i + 2}" for i in range(9)}
    found = place_labels(texts, points, 450.0, 300.0)
    assert [label.text for label in found] == list(texts.values())
    boxes = [box(label, points) for label in found]
    assert not any(itertools.starmap(overlap, itertools.combinations(boxes, 2)))
    stars = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    assert not any(overlap(one, star) for one in boxes for star in stars)
    assert all(left >= 0 and right <= 450 for left, _, right, _ in boxes)


def test_a_label_alone_is_beside_its_point_and_inside_the_picture() -> None:
    points = [(5.0, 150.0), (445.0, 150.0)]
    left, right = place_labels({0: "checkpoint-40", 1: "twa"}, points, 450.0, 300.0)
    assert (left.side, right.side) == (1, -1)
    assert not left.far
    assert not right.far


def test_there_is_a_place_where_there_is_no_room() -> None:
    (label,) = place_labels({0: "x" * 400}, [(5.0, 5.0)], 10.0, 10.0)
    assert label.text
