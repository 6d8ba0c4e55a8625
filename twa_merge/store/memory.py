"""Offsets in the memory of the device or of the host."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..layout import Blocks, Layout
from ..progress import Noted, Progress, silent
from ..stream import RowSlice
from .base import held_name, row_of, split_alphas
from .kernels import Kernels, worth_compiling
from .quantize import PLAIN
from .tiles import Held, Part, Tiles, allocate

# cudaHostRegisterPortable: for every device that this process uses.
_PINNED_FOR_ALL = 1
# Bytes of offsets on their way from host to device at a time; two such pieces are in flight.
STAGED = 64 << 20


class MemoryStore:
    """Holds the offsets, packed, next to the centre in float32.

    Args:
        dtype: ``float32``, ``bfloat16``, ``int8``, ``int4`` or ``int1``.
        n: checkpoints.
        share: tensor → this rank's rows [start, stop) of it.
        device: that computes, and that gradients and targets are on.
        on_host: keep offsets and centre in pinned host memory and send them through in pieces;
            no difference where the device is the CPU.
        compiled: take the fast kernels; None decides by how many numbers are held.
    """

    def __init__(
        self,
        dtype: str,
        n: int,
        layout: Layout,
        blocks: Blocks,
        *,
        share: Callable[[str], tuple[int, int]],
        device: torch.device,
        on_host: bool = False,
        compiled: bool | None = None,
        progress: Progress = silent,
    ) -> None:
        self.blocks = blocks
        self._dtype = dtype
        self._n = n
        self._layout = layout
        self._share = share
        self._device = device
        self._home = torch.device("cpu") if on_host else device
        self._compiled = compiled
        self._progress = progress
        self._held: dict[str, Held] = {}
        self._allocating = threading.Lock()
        self._kernels: dict[str, Kernels] = {}
        self._pin = self._home != self._device
        self._pinned: list[int] = []
        weakref.finalize(self, _unpin, self._pinned).atexit = False

    @property
    def place(self) -> tuple[str, str]:
        return "host" if self._home != self._device else "device", self._dtype

    @property
    def packs(self) -> bool:
        """Whether offsets are rounded to 8 bits or less."""
        return self._dtype not in PLAIN

    @property
    def names(self) -> list[str]:
        return list(self._held)

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())

    def put(self, cut: RowSlice, centre: Tensor, offsets: Tensor) -> None:
        start, stop = self._share(cut.name)
        with self._allocating:
            if cut.name not in self._held:
                row_numel = self._layout[cut.name].info.row_numel
                self._held[cut.name] = allocate(
                    stop - start, row_numel, self._n, self._dtype, self._memory
                )
        self._held[cut.name].put(cut.start - start, centre, offsets)

    def project(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        self._ready()
        sums = torch.zeros(len(self.blocks), self._n, dtype=torch.float64, device=self._device)
        for asked, gradient in gradients.items():
            if gradient is None:
                continue
            name = held_name(self._layout, self._held, asked, gradient.numel())
            if name is None:
                continue
            held = self._complete(name, gradient.numel())
            kernels = self._kernels[held.dtype]
            rows = held.rows
            flat = rows.widened(gradient.detach().reshape(-1).float())
            found = sums[self.blocks.index[name]]
            for part, tiles, where in self._pieces(held):
                here = _filled_up(flat[where], part.tiles.width)
                found += kernels.project(tiles, here, rows.room)
        return sums.cpu()

    def combine(self, alphas: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._ready()
        beta, total = (x.to(self._device, torch.float32) for x in split_alphas(alphas))
        for asked, target in targets.items():
            name = held_name(self._layout, self._held, asked, target.numel())
            if name is None:
                continue
            held = self._complete(name, target.numel())
            assert target.dtype == torch.float32
            kernels, rows = self._kernels[held.dtype], held.rows
            flat = target.detach().view(-1)
            if rows.room != rows.numel:
                flat = torch.empty(rows.total, dtype=torch.float32, device=self._device)
            row = row_of(len(beta), self.blocks, name)
            for part, tiles, where in self._pieces(held):
                first = (where.start - part.start) // tiles.width
                centre = part.centre[first : first + len(tiles)]
                centre = centre.to(self._device, non_blocking=True)
                here = flat[where]
                whole = here.numel() == centre.numel()
                out = here.view_as(centre) if whole else torch.empty_like(centre)
                kernels.combine(tiles, centre, beta[row], total[row : row + 1], out)
                if not whole:
                    here.copy_(out.view(-1)[: here.numel()])
            if rows.room != rows.numel:
                target.detach().view(-1, rows.numel).copy_(rows.narrowed(flat))

    def _ready(self) -> None:
        """Makes the kernels for every width that is held, once all is."""
        if not self._kernels:
            compiled = self._compiled
            if compiled is None:
                # Of all ranks: sums are not to depend on how many there are.
                whole = [e.info.numel for e in self._layout.entries.values() if e.averaged]
                compiled = worth_compiling(self._n * sum(whole), self._device)
            for dtype in {held.dtype for held in self._held.values()}:
                # Rows too short to be packed are few: not worth the compiler's time.
                fast = compiled and dtype == self._dtype
                self._kernels[dtype] = Kernels(
                    dtype, self._device, compiled=fast, progress=self._progress
                )

    def _complete(self, name: str, numel: int) -> Held:
        held = self._held[name]
        assert held.missing == 0, f"{name} has not been put completely"
        assert held.rows.given == numel, f"{name}: {numel} numbers given, {held.rows.given} held"
        return held

    def _pieces(self, held: Held) -> Iterator[tuple[Part, Tiles, slice]]:
        """The tensor's tiles on the device, as many at a time as may be there.

        Yields:
            The part they belong to, the tiles, and which of the tensor's numbers they hold.
        """
        for part in held.parts:
            if self._home == self._device:
                yield part, part.tiles, slice(part.start, part.stop)
                continue
            step = max(1, STAGED * len(part.tiles) // part.tiles.nbytes)
            for first, tiles in _staged(part.tiles, step, self._device):
                a = part.start + first * tiles.width
                yield part, tiles, slice(a, min(part.stop, a + len(tiles) * tiles.width))

    def _memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = torch.empty(shape, dtype=dtype, device=self._home)
        if self._pin and memory.nbytes:
            # Not pin_memory(): it rounds every allocation up to a power of two.
            # Slices are put by threads of their own, whose device is the first until told.
            with torch.cuda.device(self._device):
                failed = torch.cuda.cudart().cudaHostRegister(
                    memory.data_ptr(), memory.nbytes, _PINNED_FOR_ALL
                )
            self._pin = not int(failed)
            if self._pin:
                self._pinned.append(memory.data_ptr())
            else:
                self._progress(
                    Noted("Host memory cannot be pinned here: evaluations wait for every copy.")
                )
        return memory


def _filled_up(numbers: Tensor, width: int) -> Tensor:
    """Flat numbers → (u, width), zeros at the end where they do not come out even."""
    tiles = -(-numbers.numel() // width)
    if tiles * width == numbers.numel():
        return numbers.view(tiles, width)
    padded = numbers.new_zeros(tiles * width)
    padded[: numbers.numel()] = numbers
    return padded.view(tiles, width)


def _staged(tiles: Tiles, step: int, device: torch.device) -> Iterator[tuple[int, Tiles]]:
    """Tiles copied from pinned memory ``step`` at a time, the next while this one is worked on.

    Two places on the device take turns; a place is filled again once the work enqueued on what it
    held is done.
    """
    compute, copy = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    step = min(step, len(tiles))
    firsts = range(0, len(tiles), step)
    places = [_like(tiles[:step], device) for _ in firsts[:2]]
    filled = [torch.cuda.Event() for _ in places]
    used = [torch.cuda.Event() for _ in places]
    # The places may be memory that enqueued work still reads.
    copy.wait_stream(compute)

    def fill(turn: int) -> Tiles:
        source = tiles[firsts[turn] : firsts[turn] + step]
        place = places[turn % 2][: len(source)]
        with torch.cuda.stream(copy):
            copy.wait_event(used[turn % 2])
            place.data.copy_(source.data, non_blocking=True)
            if place.scales is not None and source.scales is not None:
                place.scales.copy_(source.scales, non_blocking=True)
            filled[turn % 2].record(copy)
        return place

    following = fill(0)
    for turn, first in enumerate(firsts):
        now = following
        if turn + 1 < len(firsts):
            following = fill(turn + 1)
        compute.wait_event(filled[turn % 2])
        yield first, now
        used[turn % 2].record(compute)


def _like(tiles: Tiles, device: torch.device) -> Tiles:
    scales = None if tiles.scales is None else torch.empty_like(tiles.scales, device=device)
    return Tiles(torch.empty_like(tiles.data, device=device), scales, tiles.width)


def _unpin(pointers: list[int]) -> None:
    for pointer in pointers:
        torch.cuda.cudart().cudaHostUnregister(pointer)
