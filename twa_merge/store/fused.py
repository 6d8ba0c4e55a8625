"""Project and combine on a GPU: expressions for ``torch.compile``, which fuses unpacking and sums.

Not yet measured on one. Bits are taken where they stand in their word, and their places made good
by factors; offsets are taken one by one rather than by a dimension, so that gradient, centre and
result are read once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from .quantize import GROUP, LANES, PLAIN, PLANES, planes
from .tiles import Tiles, tile_width

_T = TypeVar("_T")

# Numbers combined in one call: enough to hide its overhead.
_CALL = 1 << 28
# Fewer tiles are not worth a call's overhead, and a single one would be a graph of its own.
_FEWEST_TILES = 4
# Offsets of one combination written out one by one: more make compilers slow.
_WRITTEN_OUT = 64
# Offsets to take for one reading of the gradient, which comes out of a cache that all cores share
# and by reckoning would limit narrow widths otherwise.
_TOGETHER = 4

# Intermediate results of many inputs need not be stored.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 1000,
}


class Fused:
    """Project and combine in one width; compiled at the first use, which raises what goes wrong."""

    def __init__(self, dtype: str, device: torch.device) -> None:
        self._dtype = dtype
        known = set(torch._inductor.list_options())  # type: ignore[no-untyped-call]
        options = {name: value for name, value in _OPTIONS.items() if name in known}
        self._project = torch.compile(project_tiles, fullgraph=True, options=options)
        self._combine = torch.compile(combine_tiles, fullgraph=True, options=options)
        self._planes = planes(dtype, device)
        self._traced: set[Callable[..., Any]] = set()

    def takes(self, tiles: Tiles) -> bool:
        return tiles.width == tile_width(self._dtype) and len(tiles) >= _FEWEST_TILES

    def project(self, tiles: Tiles, gradient: Tensor, row: int) -> Tensor:
        """⟨Δ_i, g⟩ of every tile: gradient (u, T) float32 → (u, n) float32."""
        args = (tiles.data, tiles.scales, gradient, self._dtype, _TOGETHER)
        return in_order(self._call(self._project, *args))

    def combine(
        self, tiles: Tiles, centre: Tensor, beta: Tensor, total: Tensor, out: Tensor
    ) -> None:
        """out = total·c + Σ β_i Δ_i: (u, T), (n,), (1,), (u, T), all float32."""
        step = max(_FEWEST_TILES, _CALL // (len(beta) * tiles.width))
        shape = grouped(self._dtype, tiles.width)
        # The last call takes what would be too little for one of its own.
        cuts = [*range(0, max(1, len(tiles) - _FEWEST_TILES + 1), step), len(tiles)]
        for a, b in pairwise(cuts):
            here, c, o = tiles[a:b], centre[a:b], out[a:b]
            weight = beta if here.scales is None else here.scales * beta
            views = c.unflatten(-1, shape), total, o.unflatten(-1, shape)
            self._call(self._combine, here.data, weight, self._planes, *views)

    def _call(self, function: Callable[..., _T], *args: object) -> _T:
        if function in self._traced:
            return function(*args)
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
