"""How offsets lie in memory, and how slices of the streaming pass get there.

A tile is T consecutive numbers of all n offsets, (n, T), one offset after the other. Offsets are
kept tile by tile, so that

- a tile's piece of the gradient or of the result stays in cache for all n offsets, and each stored
  byte is read once, in order;
- any run of tiles is one contiguous copy from host to device.

A tensor's numbers on this rank are whole tiles and one narrower tile for what is left over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .quantize import CONTAINER, GROUP, GROUP_BYTES, PLAIN, pack

# Numbers of one offset in a tile: all n rows of a few dozen offsets fit in a core's second-level
# cache, and there are few enough partial sums. Widths from 512 to 16,384 measured alike.
TILE = 4096

# Numbers quantised at a time: the few float32 copies that it takes stay in cache.
_AT_ONCE = 1 << 17

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Tiles:
    """u tiles of n offsets.

    Attributes:
        data: float (u, n, T), or packed (u, n, bytes).
        scales: (u, n, T / 128) float32 where the data is packed.
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


@dataclass
class Held:
    """One tensor's offsets and centre on this rank, filled by slices in any order.

    Several threads may put slices at once: they write to different places, all but their accounts.
    """

    dtype: str
    n: int
    numel: int
    parts: list[Part]
    missing: int
    # Group → its (n, 128) numbers and how many of them have come. Slices need not end where groups
    # do; only the groups at their ends wait here.
    pending: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        return sum(part.tiles.nbytes + part.centre.nbytes for part in self.parts)

    def put(self, at: int, centre: Tensor, offsets: Tensor) -> None:
        """Takes numbers [at, at + m) in: centre (m,), offsets (n, m), any float dtype."""
        m = offsets.shape[1]
        assert offsets.shape[0] == self.n
        assert 0 <= at <= at + m <= self.numel
        for part in self.parts:
            a, b = max(at, part.start), min(at + m, part.stop)
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
        """Packs whole groups at once, those at the ends of the slice when they are complete."""
        stop = at + offsets.shape[1]
        a = min(-(-at // GROUP) * GROUP, stop)
        b = stop if stop == self.numel else max(a, stop // GROUP * GROUP)
        step = max(1, _AT_ONCE // self.n // GROUP) * GROUP
        for c in range(a, b, step):
            self._pack(c, offsets[:, c - at : min(c + step, b) - at].float())
        for c, d in ((at, a), (b, stop)):
            if c < d:
                with self.lock:
                    self._collect(c, offsets[:, c - at : d - at].float())

    def _collect(self, at: int, offsets: Tensor) -> None:
        group, m = at // GROUP, offsets.shape[1]
        numbers, have = self.pending.pop(group, (offsets.new_zeros(self.n, GROUP), 0))
        numbers[:, at - group * GROUP :][:, :m] = offsets
        expected = min(GROUP, self.numel - group * GROUP)
        if have + m < expected:
            self.pending[group] = numbers, have + m
        else:
            self._pack(group * GROUP, numbers[:, :expected])

    def _pack(self, at: int, offsets: Tensor) -> None:
        """Packs numbers from a multiple of 128 on, to the end of a group or of the tensor."""
        left = offsets.shape[1] % GROUP
        whole = offsets.shape[1] - left
        if whole:
            groups = offsets[:, :whole].unflatten(1, (-1, GROUP))
            self._write(at // GROUP, *pack(groups, self.dtype))
        if left:
            last = offsets.new_zeros(self.n, 1, GROUP)
            last[:, 0, :left] = offsets[:, whole:]
            self._write((at + whole) // GROUP, *pack(last, self.dtype, left))

    def _write(self, at: int, values: Tensor, scales: Tensor | None = None) -> None:
        """Puts numbers (n, k), or groups (n, k, bytes) with scales (n, k), where they belong.

        Args:
            at: of the first among the tensor's numbers, or groups.
        """
        unit = 1 if scales is None else GROUP
        for part in self.parts:
            wide = part.tiles.width // unit
            start = part.start // unit
            a = max(at, start)
            b = min(at + values.shape[1], start + len(part.tiles) * wide)
            while a < b:
                tile, column = divmod(a - start, wide)
                whole = (b - a) // wide if column == 0 else 0
                run = whole * wide if whole else min(wide - column, b - a)
                tiles = slice(tile, tile + max(1, whole))
                columns = slice(column, column + run // max(1, whole))
                source = slice(a - at, a - at + run)
                _place(part.tiles.data, wide, tiles, columns, values[:, source])
                if scales is not None and part.tiles.scales is not None:
                    _place(part.tiles.scales, wide, tiles, columns, scales[:, source])
                a += run


def _place(store: Tensor, wide: int, tiles: slice, columns: slice, values: Tensor) -> None:
    """Values (n, run, ·) into some columns of some tiles of ``store`` (u, n, wide · bytes)."""
    target = store.unflatten(-1, (wide, -1))[tiles, :, columns]
    k, n, run, size = target.shape
    target.copy_(values.reshape(n, k, run, size).transpose(0, 1))


def allocate(numel: int, n: int, dtype: str, memory: Allocate) -> Held:
    """Room for n offsets of ``numel`` numbers and their centre."""
    parts = []
    for start, stop, width in _parts(numel, dtype):
        u = -(-(stop - start) // width)
        scales = None
        if dtype in PLAIN:
            data = memory((u, n, width), PLAIN[dtype])
        else:
            packed = width // GROUP * GROUP_BYTES[dtype]
            data = memory((u, n, packed), CONTAINER[dtype])
            scales = memory((u, n, width // GROUP), torch.float32)
        centre = memory((u, width), torch.float32).zero_()
        parts.append(Part(start, stop, Tiles(data, scales, width), centre))
    return Held(dtype, n, numel, parts, missing=numel)


def footprint(numel: int, n: int, dtype: str) -> tuple[int, int]:
    """Bytes of the offsets and of the centre that ``allocate`` asks for."""
    numbers = sum(
        -(-(stop - start) // width) * width for start, stop, width in _parts(numel, dtype)
    )
    if dtype in PLAIN:
        return numbers * n * PLAIN[dtype].itemsize, 4 * numbers
    return numbers // GROUP * n * (GROUP_BYTES[dtype] + 4), 4 * numbers


def _parts(numel: int, dtype: str) -> list[tuple[int, int, int]]:
    """Start, stop and width of the tiles: whole ones, then one for the rest."""
    whole = numel // TILE * TILE
    parts = [(0, whole, TILE)] if whole else []
    if left := numel - whole:
        parts.append((whole, numel, left if dtype in PLAIN else -(-left // GROUP) * GROUP))
    return parts
