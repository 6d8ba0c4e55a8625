"""Where the labels of points stand on a picture, so that no label lies on another one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Place = tuple[float, float]
# Left, low, right and high end.
Box = tuple[float, float, float, float]

# All lengths are points of 1/72 inch. A letter is the broad average of a bold font of 9 points:
# the page's own font is not known here.
_LETTER, _LINE = 6.0, 11.0
# Markers of which no more than half can be seen beside one another.
_TOUCHING = 5.0
_MARKER = 6.0
_NEAR, _FARTHER, _FARTHEST = 7.0, 9.0, 100.0
# Right, left, and straight up or down, where an edge of the label begins.
_SIDES = ((1, 0.6), (-1, 0.6), (1, -0.6), (-1, -0.6), (0, 1.0), (0, -1.0))


@dataclass(frozen=True)
class Label:
    """A text beside a point.

    Attributes:
        point: its index among the points that were given.
        offset: from the point to the label's near end, at half of its height.
        side: 1: the text begins there; -1: it ends there; 0: it is centred there.
        far: not right beside the point, so that a line has to lead to it.
    """

    point: int
    text: str
    offset: Place
    side: int
    far: bool


def touching(points: Sequence[Place]) -> list[list[int]]:
    """Indices of the points, those together that look like one."""
    groups: list[list[int]] = []
    for i, point in enumerate(points):
        near = (g for g in groups if math.dist(points[g[0]], point) < _TOUCHING)
        group = next(near, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def place_labels(
    texts: Mapping[int, str], points: Sequence[Place], width: float, height: float
) -> list[Label]:
    """The nearest free place for each text in turn, or the least crowded one.

    Args:
        texts: index of a point → what stands beside it.
        points: all that labels keep clear of besides one another.
        width, height: of the picture, which begins at (0, 0).
    """
    taken = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in points]
    found = []
    for i, text in texts.items():
        options = []
        for distance, side, offset in _offsets(points[i][0] > width / 2):
            box = _box(points[i], offset, side, text)
            crowd = sum(_overlap(box, other) for other in taken)
            outside = box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height
            options.append((crowd + 2 * outside, distance, side, offset, box))
        _, distance, side, offset, box = min(options, key=lambda option: option[:2])
        taken.append(box)
        found.append(Label(i, text, offset, side, distance > 0))
    return found


def _offsets(leftwards: bool) -> Iterator[tuple[float, int, Place]]:
    """(distance, side, offset), the nearest first, towards the middle of the picture first."""
    distance = 0.0
    while distance <= _FARTHEST:
        for side, rise in _SIDES:
            across = -side if leftwards else side
            length = _NEAR + distance
            yield distance, across, (across * length, math.copysign(length, rise) * abs(rise))
        distance += _FARTHER


def _box(point: Place, offset: Place, side: int, text: str) -> Box:
    x, y = point[0] + offset[0], point[1] + offset[1]
    width = _LETTER * len(text)
    left = x - width * (1 - side) / 2
    return left, y - _LINE / 2, left + width, y + _LINE / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
