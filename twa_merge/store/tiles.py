"""How offsets lie in memory, and how slices of the streaming pass get there.

A tile is T consecutive numbers of all n offsets. Offsets are kept tile by tile, so that

- a tile's piece of the gradient or of the result stays in cache for all n offsets, and each stored
  byte is read once, in order;
- any run of tiles is one contiguous copy from host to device.

Within a tile, plain numbers lie one offset after the other. Packed groups lie place by place, the
same group of all offsets side by side: a group is but a line or two of a cache, and reading
n short runs at once is slower than reading one long one.

A tensor's numbers on this rank are whole tiles and one narrower tile for what is left over. Where
offsets are packed, every row of a tensor is filled up to whole groups, so that a group never holds
numbers of two rows: what is stored of a row does not depend on which rank owns it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .quantize import CONTAINER, GROUP, GROUP_BYTES, PLAIN, pack


def tile_width(dtype: str) -> int:
    """Numbers of one offset in a tile.

    An odd number of lines of a cache for plain numbers: combining reads the same place of all
    offsets, and with a power of two all of these would want the same few lines of a core's first
    cache: 4096 measured slower.
    """
    return 9 * GROUP if dtype in PLAIN else 8 * GROUP


# Numbers quantised at a time: the few float32 copies that it takes stay in cache.
_AT_ONCE = 1 << 17

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Tiles:
    """u tiles of n offsets.

    Attributes:
        data: float (u, n, T), or packed (u, T / 128, n, ·).
        scales: (u, T / 128, n) float32 where the data is packed.
        width: T.
    """

    data: Tensor
    scales: Tensor | None
    width: int

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __getitem__(self, part: slice) -> Tiles:
        scales = None if self.scales is None else self.scales[part]
        return Tiles(self.data[part], scales, self.width)


@dataclass
class Part:
    """Numbers [start, stop) of a tensor's rows on this rank: offsets, and centre (u, T) float32."""

    start: int
    stop: int
    tiles: Tiles
    centre: Tensor


@dataclass(frozen=True)
class Rows:
    """How the rows of a tensor lie: ``count`` rows of ``numel`` numbers, with ``room`` for each."""

    count: int
    numel: int
    room: int

    @property
    def given(self) -> int:
        """Numbers of the tensor."""
        return self.count * self.numel

    @property
    def total(self) -> int:
        """Numbers that there is room for."""
        return self.count * self.room

    def widened(self, numbers: Tensor) -> Tensor:
        """(…, rows · numel) → (…, rows · room), zeros at the end of each row."""
        if self.room == self.numel:
            return numbers
        rows = numbers.unflatten(-1, (-1, self.numel))
        return F.pad(rows, (0, self.room - self.numel)).flatten(-2)

    def narrowed(self, numbers: Tensor) -> Tensor:
        """(rows · room,) → (rows, numel), a view."""
        return numbers.view(-1, self.room)[:, : self.numel]

    def real(self) -> Tensor:
        """How many numbers of each group of a row are the tensor's: (room / 128,) float32."""
        groups = torch.full((self.room // GROUP,), GROUP, dtype=torch.float32)
        groups[-1] -= self.room - self.numel
        return groups


@dataclass
class Held:
    """One tensor's offsets and centre on this rank, filled by slices in any order.

    Several threads may put slices at once: they write to different places, all but their accounts.
    """

    dtype: str
    n: int
    rows: Rows
    parts: list[Part]
    missing: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        return sum(part.tiles.nbytes + part.centre.nbytes for part in self.parts)

    def put(self, row: int, centre: Tensor, offsets: Tensor) -> None:
        """Takes whole rows in, from ``row`` on: centre (m,), offsets (n, m), any float dtype."""
        m = offsets.shape[1]
        assert offsets.shape[0] == self.n
        assert 0 <= row * self.rows.numel <= row * self.rows.numel + m <= self.rows.given
        at, centre = row * self.rows.room, self.rows.widened(centre)
        for part in self.parts:
            a, b = max(at, part.start), min(at + centre.numel(), part.stop)
            if a < b:
                flat = part.centre.view(-1)
                flat[a - part.start : b - part.start].copy_(centre[a - at : b - at])
        if self.dtype in PLAIN:
            self._write(at, offsets)
        else:
            self._quantise(at, offsets)
        with self.lock:
            self.missing -= m

    def _quantise(self, at: int, offsets: Tensor) -> None:
        """Packs rows, a few at a time."""
        step = max(1, _AT_ONCE // self.n // self.rows.room)
        real = self.rows.real()
        for some in offsets.split(step * self.rows.numel, 1):
            wide = self.rows.widened(some.float())
            groups = wide.unflatten(1, (-1, len(real), GROUP))
            packed, scales = pack(groups, self.dtype, real)
            self._write_groups(at // GROUP, packed.flatten(1, 2), scales.flatten(1))
            at += wide.shape[1]

    def _write_groups(self, at: int, packed: Tensor, scales: Tensor) -> None:
        """Puts groups (n, k, ·) with scales (n, k), from the tensor's group ``at`` on."""
        for part in self.parts:
            start, stop = part.start // GROUP, part.stop // GROUP
            a, b = max(at, start), min(at + scales.shape[1], stop)
            if a < b and part.tiles.scales is not None:
                to, of = slice(a - start, b - start), slice(a - at, b - at)
                part.tiles.data.flatten(0, 1)[to].copy_(packed[:, of].transpose(0, 1))
                part.tiles.scales.flatten(0, 1)[to].copy_(scales[:, of].T)

    def _write(self, at: int, values: Tensor) -> None:
        """Puts numbers (n, k), from the tensor's number ``at`` on."""
        for part in self.parts:
            wide = part.tiles.width
            a, b = max(at, part.start), min(at + values.shape[1], part.stop)
            while a < b:
                tile, column = divmod(a - part.start, wide)
                whole = (b - a) // wide if column == 0 else 0
                run = whole * wide if whole else min(wide - column, b - a)
                target = part.tiles.data[tile : tile + max(1, whole)]
                target = target[..., column : column + run // max(1, whole)]
                source = values[:, a - at : a - at + run]
                target.copy_(source.unflatten(1, (len(target), -1)).transpose(0, 1))
                a += run


def kept_as(dtype: str, count: int, numel: int) -> tuple[str, Rows]:
    """How ``count`` rows of ``numel`` numbers are kept in a store of ``dtype``.

    Rows that would take more room in whole groups than in bfloat16 stay in that: those of biases
    and norms are single numbers.
    """
    if dtype in PLAIN:
        return dtype, Rows(count, numel, numel)
    groups = -(-numel // GROUP)
    if groups * (GROUP_BYTES[dtype] + 4) >= 2 * numel:
        return "bfloat16", Rows(count, numel, numel)
    return dtype, Rows(count, numel, groups * GROUP)


def allocate(count: int, numel: int, n: int, dtype: str, memory: Allocate) -> Held:
    """Room for n offsets of ``count`` rows of ``numel`` numbers, and their centre."""
    dtype, rows = kept_as(dtype, count, numel)
    parts = []
    for start, stop, width in _parts(rows.total, tile_width(dtype)):
        u = -(-(stop - start) // width)
        scales = None
        if dtype in PLAIN:
            data = memory((u, n, width), PLAIN[dtype])
        else:
            groups, container = width // GROUP, CONTAINER[dtype]
            data = memory((u, groups, n, GROUP_BYTES[dtype] // container.itemsize), container)
            scales = memory((u, groups, n), torch.float32)
        centre = memory((u, width), torch.float32).zero_()
        parts.append(Part(start, stop, Tiles(data, scales, width), centre))
    return Held(dtype, n, rows, parts, missing=rows.given)


def footprint(count: int, numel: int, n: int, dtype: str) -> tuple[int, int]:
    """Bytes of the offsets and of the centre that ``allocate`` asks for."""
    dtype, rows = kept_as(dtype, count, numel)
    if dtype in PLAIN:
        return rows.total * n * PLAIN[dtype].itemsize, 4 * rows.total
    return rows.total // GROUP * n * (GROUP_BYTES[dtype] + 4), 4 * rows.total


def _parts(numel: int, tile: int) -> list[tuple[int, int, int]]:
    """Start, stop and width of the tiles: whole ones, then one for the rest."""
    whole = numel // tile * tile
    parts = [(0, whole, tile)] if whole else []
    return parts + ([(whole, numel, numel - whole)] if numel > whole else [])
