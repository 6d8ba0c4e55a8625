"""Project and combine on tiles of offsets, in every width.

Sums are taken over pieces of a tile in float32 and over tiles in float64, always in the same order.

There are two ways to do each: plain torch expressions under ``torch.compile``, which fuse the
unpacking with the product, and an eager one for small stores, odd tiles and machines without a
compiler. What the expressions look like is what compilers make the best of: sums over 16 lanes;
bits taken where they stand in their word, and their places made good by factors; offsets taken one
by one rather than by a dimension, so that gradient, centre and result are touched in the same loop
and groups that lie side by side are read in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..progress import Noted, Progress
from .quantize import GROUP, LANES, PLAIN, PLANES, planes, unpack
from .tiles import Tiles, tile_width

_T = TypeVar("_T")

# Numbers (of all offsets) in one eager step: their float32 copy stays in a core's cache.
_EAGER_CPU = 1 << 18
# Numbers combined in one call: enough to hide its overhead; the scales times β stay in cache.
_CALL_CPU = 1 << 25
_CALL_GPU = 1 << 28
# A compiled call of fewer tiles is not worth its overhead, and a single one would be a graph of
# its own.
_FEWEST_TILES = 4
# Offsets of one combination written out one by one: more make compilers slow.
_WRITTEN_OUT = 64
# Numbers in a store from which evaluations pay for some twenty seconds of compiling.
COMPILE_FROM = 1 << 28

# Products and sums may be fused, and intermediate results of many inputs need not be stored.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "cpp.enable_tiling_heuristics": False,
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 1000,
}


class Kernels:
    """Project and combine for one store.

    Args:
        dtype: of the store.
        device: that computes.
        compiled: use ``torch.compile``; falls back to eager, with one note, where it fails.
    """

    def __init__(
        self, dtype: str, device: torch.device, *, compiled: bool, progress: Progress
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._progress = progress
        self._project: Callable[..., list[list[Tensor]]] | None = None
        self._combine: Callable[..., Tensor] | None = None
        self._traced: set[Callable[..., Any]] = set()
        if compiled:
            known = set(torch._inductor.list_options())  # type: ignore[no-untyped-call]
            options = {name: value for name, value in _OPTIONS.items() if name in known}
            self._project = torch.compile(project_tiles, fullgraph=True, options=options)
            self._combine = torch.compile(combine_tiles, fullgraph=True, options=options)
        # How many offsets to take for one reading of the gradient. A CPU reads best what lies in
        # order: plain numbers of one offset, packed groups of all, or of as many as compilers take
        # in a reasonable time. On a GPU the gradient comes out of a cache that all cores share,
        # which by reckoning would limit narrow widths otherwise (not yet measured on one).
        self._together = 4 if device.type == "cuda" else 1 if dtype in PLAIN else 16
        self._planes = planes(dtype, device)

    @property
    def compiled(self) -> bool:
        return self._project is not None

    def project(self, tiles: Tiles, gradient: Tensor) -> Tensor:
        """⟨Δ_i, g⟩ over the tiles: gradient (u, T) float32 → (n,) float64 on the device."""
        sums = self._fused(self._project, tiles, tiles.scales, gradient, self.dtype, self._together)
        found = self._project_eagerly(tiles, gradient) if sums is None else in_order(sums)
        return found.sum(0, dtype=torch.float64)

    def combine(
        self, tiles: Tiles, centre: Tensor, beta: Tensor, total: Tensor, out: Tensor
    ) -> None:
        """out = total·c + Σ β_i Δ_i.

        Args:
            centre, out: (u, T) float32; ``beta``: (n,) float32; ``total``: (1,) float32.
        """
        numbers = tiles.data.shape[-2] * tiles.width
        step = max(1, (_CALL_GPU if self.device.type == "cuda" else _CALL_CPU) // numbers)
        shape = grouped(self.dtype, tiles.width)
        for a in range(0, len(tiles), step):
            part = slice(a, a + step)
            here, c, o = tiles[part], centre[part], out[part]
            weight = beta if here.scales is None else here.scales * beta
            views = c.unflatten(-1, shape), total, o.unflatten(-1, shape)
            if self._fused(self._combine, here, weight, self._planes, *views) is None:
                self._combine_eagerly(here, c, beta, total, o)

    def _fused(self, function: Callable[..., _T] | None, tiles: Tiles, *args: object) -> _T | None:
        """What the compiled function returns; None where the eager way has to be taken."""
        if function is None or tiles.width != tile_width(self.dtype) or len(tiles) < _FEWEST_TILES:
            return None
        try:
            if function in self._traced:
                return function(tiles.data, *args)
            return self._trace(function, tiles.data, *args)
        except Exception as error:
            # Whatever stops a compiler, the eager way gives the same numbers; what stops both
            # (no memory left, say) is raised from there.
            self._project = self._combine = None
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self._progress(
                Noted(
                    "torch.compile does not work here, so the slower eager kernels are used: "
                    f"{type(error).__name__}: {reason}"
                )
            )
            return None

    def _trace(self, function: Callable[..., _T], *args: object) -> _T:
        for arg in args:
            # The number of tiles differs by tensor; one graph serves all of them.
            if isinstance(arg, Tensor) and arg.dim() > 1:
                torch._dynamo.mark_dynamic(arg, 0)
        # Another width before this one in the same process must not make any other size dynamic:
        # that takes compilers minutes.
        static = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
        with warnings.catch_warnings(), static:
            warnings.simplefilter("ignore")
            result = function(*args)
        self._traced.add(function)
        return result

    def _project_eagerly(self, tiles: Tiles, gradient: Tensor) -> Tensor:
        sums = torch.empty(len(tiles), tiles.data.shape[-2], device=self.device)
        for part, numbers in self._unpacked(tiles):
            g = gradient[part].view(len(numbers), -1)
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
                rows = beta.expand(numbers.shape[0], 1, -1)
                sums = torch.bmm(rows, numbers)[:, 0]
            torch.addcmul(sums.view_as(centre[part]), centre[part], total, out=out[part])

    def _unpacked(self, tiles: Tiles) -> Iterator[tuple[slice, Tensor]]:
        """Runs of tiles that fit in a cache, and their numbers in float32.

        Yields:
            Which tiles, and (k, n, T), or where they are packed (k · T / 128, n, 128).
        """
        if self.dtype == "float32":
            yield slice(0, len(tiles)), tiles.data
            return
        most = _CALL_GPU if self.device.type == "cuda" else _EAGER_CPU
        n = tiles.data.shape[-2]
        step = min(len(tiles), max(1, most // (n * tiles.width)))
        scratch = torch.empty(step * n * tiles.width, device=self.device)
        for a in range(0, len(tiles), step):
            here = tiles[a : a + step]
            numbers = scratch[: len(here) * n * tiles.width]
            if here.scales is None:
                numbers = numbers.view_as(here.data).copy_(here.data)
            else:
                data, scales = here.data.flatten(0, 1), here.scales.flatten(0, 1)
                numbers = unpack(data, scales, self.dtype, numbers.view(-1, n, GROUP))
            yield slice(a, a + len(here)), numbers


def project_tiles(
    data: Tensor, scales: Tensor | None, gradient: Tensor, dtype: str, together: int
) -> list[list[Tensor]]:
    """⟨Δ_i, g⟩ of every tile: ``Tiles.data`` and (u, T) → (u, n) float32, as ``in_order`` takes it.

    Args:
        together: how many offsets at most to take for one reading of the gradient.
    """
    n = data.shape[-2]
    k = n // -(-n // together)
    blocks = []
    # All but n % k offsets k at a time, then these.
    for a, b in ((0, n // k * k), (n // k * k, n)):
        if a == b:
            continue
        size = min(k, b - a)
        some = data[..., a:b, :].unflatten(-2, (-1, size))
        if scales is None:
            sums = [(some[:, :, i].float() * gradient[:, None]).sum(-1) for i in range(size)]
        else:
            scale = scales[..., a:b, None].unflatten(-2, (-1, size))
            lanes = _times(some, gradient.unflatten(-1, (-1, 1, 8, LANES)), dtype)
            sums = [(x * scale[:, :, :, i]).sum((1, 3)) for i, x in enumerate(lanes)]
        blocks.append(sums)
    return blocks


def in_order(blocks: list[list[Tensor]]) -> Tensor:
    """Sums of every k-th offset, (u, ·) each → (u, n). Apart: compilers take long over it."""
    return torch.cat([torch.stack(sums, 2).flatten(1) for sums in blocks], 1)


def _times(data: Tensor, gradient: Tensor, dtype: str) -> list[Tensor]:
    """Unscaled products of groups with the gradient, added up lane by lane.

    Args:
        data: (u, G, m, k, ·); ``gradient``: (u, G, 1, 8, 16).

    Returns:
        k times (u, G, m, 16).
    """
    g = list(gradient.unbind(-2))
    if dtype not in PLANES:
        bytes_ = [data[:, :, :, i].unflatten(-1, (8, LANES)) for i in range(data.shape[3])]
        return [_add([q[..., j, :].float() * g[j] for j in range(8)]) for q in bytes_]
    of = list(zip(PLANES[dtype], g, strict=True))
    offset = _add([x * -zero for (_, _, zero), x in of if zero])
    parts = [(mask, x * factor) for (mask, factor, _), x in of]
    words = [data[:, :, :, i].int() for i in range(data.shape[3])]
    return [_add([offset, *((q & mask).float() * x for mask, x in parts)]) for q in words]


def combine_tiles(
    data: Tensor,
    weight: Tensor,
    places: tuple[Tensor, Tensor, Tensor] | None,
    centre: Tensor,
    total: Tensor,
    out: Tensor,
) -> Tensor:
    """out = total·c + Σ_i weight_i Δ_i, written in place; returns ``total``.

    Args:
        data: ``Tiles.data``.
        weight: of the offsets (n,), or of all groups, times their scales, (u, G, n).
        places: as ``planes`` returns them.
        centre, out: (u, T), in the shape that ``grouped`` says.
    """
    n = data.shape[-2]
    # Offsets to the front, and numbers in the shape of the result.
    numbers = data.movedim(-2, 0)
    weights = weight.view(n, 1, 1) if weight.dim() == 1 else weight.movedim(-1, 0)[..., None]
    if places is not None:
        numbers, weights = numbers.unsqueeze(-2), weights[..., None]

    def products(some: slice | int) -> Tensor:
        q = numbers[some] if places is None else numbers[some].int() & places[0]
        return q.float() * weights[some]

    if n <= _WRITTEN_OUT:
        sums = _add([products(i) for i in range(n)], chains=4)
    else:
        sums = products(slice(None)).sum(0)
    base = centre * total
    if places is not None:
        _, factors, zeros = places
        base = base - weight.sum(-1)[..., None, None] * zeros
        sums = sums * factors
    out.copy_(base + sums)
    return total


def grouped(dtype: str, width: int) -> tuple[int, ...]:
    """How a tile's numbers lie with respect to the words they are stored in."""
    if dtype in PLAIN:
        return (width,)
    return (width // GROUP, 8, LANES) if dtype in PLANES else (width // GROUP, GROUP)


def _add(terms: list[Tensor], *, chains: int = 2) -> Tensor:
    """The sum, in several chains of additions that do not wait for each other."""
    sums = terms[:chains]
    for i, term in enumerate(terms[chains:]):
        sums[i % chains] = sums[i % chains] + term
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total
