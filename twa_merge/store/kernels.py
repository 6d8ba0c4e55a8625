"""Project and combine on tiles of offsets, in every width.

Sums are taken over pieces of a tile in float32 and over tiles in float64, always in the same order.

There are two ways to do each: plain torch expressions under ``torch.compile``, which fuse the
unpacking with the product, and an eager one for small stores, odd tiles and machines without a
compiler. What the expressions look like is what compilers make the best of: sums over 16 lanes, in
two chains, so that one addition need not wait for the other; bits taken where they stand in their
byte, and their places made good by factors; offsets added up one by one rather than by ``sum``, so
that centre and result are touched in the same loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..progress import Noted, Progress
from .quantize import GROUP, PLAIN, PLANES, ZERO, unpack
from .tiles import Tiles, tile_width

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
_LANES = 16
# Numbers in a store from which evaluations pay for some ten seconds of compiling.
COMPILE_FROM = 1 << 27

# Products and sums may be fused, and intermediate results of many inputs need not be stored.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "fast",
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
        self._project: Callable[..., Tensor] | None = None
        self._combine: Callable[..., Tensor] | None = None
        self._traced: set[Callable[..., Tensor]] = set()
        if compiled:
            known = set(torch._inductor.list_options())  # type: ignore[no-untyped-call]
            options = {name: value for name, value in _OPTIONS.items() if name in known}
            self._project = torch.compile(project_tiles, fullgraph=True, options=options)
            self._combine = torch.compile(combine_tiles, fullgraph=True, options=options)
        # On a GPU the gradient comes out of a cache that all cores share, which by reckoning would
        # limit the narrow widths: read it once for four offsets (not yet measured on a GPU). On a
        # CPU one offset after the other is read fastest, but with single bits there is more to be
        # made of the gradient than to be read.
        self._together = 4 if device.type == "cuda" or dtype == "int1" else 1
        self._planes = planes(dtype, device)

    @property
    def compiled(self) -> bool:
        return self._project is not None

    def project(self, tiles: Tiles, gradient: Tensor) -> Tensor:
        """⟨Δ_i, g⟩ over the tiles: gradient (u, T) float32 → (n,) float64 on the device."""
        sums = self._fused(self._project, tiles, tiles.scales, gradient, self.dtype, self._together)
        if sums is None:
            sums = self._project_eagerly(tiles, gradient)
        return sums.sum(0, dtype=torch.float64)

    def combine(
        self, tiles: Tiles, centre: Tensor, beta: Tensor, total: Tensor, out: Tensor
    ) -> None:
        """out = total·c + Σ β_i Δ_i.

        Args:
            centre, out: (u, T) float32; ``beta``: (n,) float32; ``total``: (1,) float32.
        """
        numbers = tiles.data.shape[1] * tiles.width
        step = max(1, (_CALL_GPU if self.device.type == "cuda" else _CALL_CPU) // numbers)
        for a in range(0, len(tiles), step):
            part = slice(a, a + step)
            here, c, o = tiles[part], centre[part], out[part]
            weight, zero = weigh(here.scales, beta, self.dtype)
            shape = grouped(self.dtype, tiles.width)
            views = c.unflatten(-1, shape), total, o.unflatten(-1, shape)
            if self._fused(self._combine, here, weight, zero, self._planes, *views) is None:
                self._combine_eagerly(here, c, beta, total, o)

    def _fused(
        self, function: Callable[..., Tensor] | None, tiles: Tiles, *args: object
    ) -> Tensor | None:
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

    def _trace(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        for arg in args:
            # The number of tiles differs by tensor; one graph serves all of them.
            if isinstance(arg, Tensor) and arg.dim() > 1:
                torch._dynamo.mark_dynamic(arg, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(*args)
        self._traced.add(function)
        return result

    def _project_eagerly(self, tiles: Tiles, gradient: Tensor) -> Tensor:
        sums = torch.empty(tiles.data.shape[:2], device=self.device)
        for part, numbers in self._unpacked(tiles):
            if self.device.type == "cuda":
                # Not a matrix product: those may be rounded to TF32.
                sums[part] = (numbers * gradient[part, None]).sum(-1)
            else:
                for row, tile, g in zip(sums[part], numbers, gradient[part], strict=True):
                    torch.mv(tile, g, out=row)
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
            torch.addcmul(sums, centre[part], total, out=out[part])

    def _unpacked(self, tiles: Tiles) -> Iterator[tuple[slice, Tensor]]:
        """Runs of tiles that fit in a cache, and their numbers (k, n, T) in float32."""
        if self.dtype == "float32":
            yield slice(0, len(tiles)), tiles.data
            return
        most = _CALL_GPU if self.device.type == "cuda" else _EAGER_CPU
        n = tiles.data.shape[1]
        step = min(len(tiles), max(1, most // (n * tiles.width)))
        scratch = torch.empty(step, n, tiles.width, device=self.device)
        for a in range(0, len(tiles), step):
            here = tiles[a : a + step]
            numbers = scratch[: len(here)]
            if here.scales is None:
                numbers.copy_(here.data)
            else:
                packed = here.data.unflatten(-1, (here.scales.shape[-1], -1))
                unpack(packed, here.scales, self.dtype, numbers.unflatten(-1, (-1, GROUP)))
            yield slice(a, a + step), numbers


def project_tiles(
    data: Tensor, scales: Tensor | None, gradient: Tensor, dtype: str, together: int
) -> Tensor:
    """⟨Δ_i, g⟩ of every tile: (u, n, ·) and (u, T) → (u, n) float32.

    Args:
        together: how many offsets at most to take for one reading of the gradient.
    """
    n = data.shape[1]
    k = next(k for k in range(together, 0, -1) if n % k == 0)
    data = data.unflatten(1, (n // k, k))
    if scales is None:
        sums = [(data[:, :, i].float() * gradient[:, None]).sum(-1) for i in range(k)]
    else:
        groups = data.unflatten(-1, (scales.shape[-1], -1, _LANES))
        scales = scales.unflatten(1, (n // k, k))
        times = {"int8": _times_bytes, "int4": _times_nibbles, "int1": _times_bits}[dtype]
        g = gradient.unflatten(-1, (-1, GROUP // _LANES, _LANES))[:, None]
        lanes = times([groups[:, :, i] for i in range(k)], [g[..., j, :] for j in range(8)])
        sums = [(x * scales[:, :, i, :, None]).sum((-1, -2)) for i, x in enumerate(lanes)]
    return torch.stack(sums, 2).flatten(1) if k > 1 else sums[0]


# Unscaled products of groups with the gradient, added up lane by lane: k times (u, m, G, ·, 16)
# and 8 times (u, 1, G, 16) → k times (u, m, G, 16).


def _times_bytes(groups: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    return [_add([q[..., j, :].float() * g[j] for j in range(8)]) for q in groups]


def _times_nibbles(groups: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    zero = _add(g) * -ZERO["int4"]
    lanes = []
    for group in groups:
        q = [group[..., j, :].int() for j in range(4)]
        low = [(x & 15).float() * g[j] for j, x in enumerate(q)]
        high = [(x >> 4).float() * g[j] for j, x in enumerate(q, 4)]
        lanes.append(_add([zero, *(x for pair in zip(low, high, strict=True) for x in pair)]))
    return lanes


def _times_bits(groups: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    zero = _add(g) * -ZERO["int1"]
    parts = [factor * x for (_, factor), x in zip(PLANES["int1"], g, strict=True)]
    lanes = []
    for group in groups:
        q = group[..., 0, :].int()
        bits = [(q & mask).float() for mask, _ in PLANES["int1"]]
        lanes.append(_add([zero, *(x * part for x, part in zip(bits, parts, strict=True))]))
    return lanes


def combine_tiles(
    data: Tensor,
    weight: Tensor,
    zero: Tensor | None,
    masks_and_factors: tuple[Tensor, Tensor] | None,
    centre: Tensor,
    total: Tensor,
    out: Tensor,
) -> Tensor:
    """out = total·c + Σ_i weight_i q_i − zero, written in place; returns ``total``.

    Args:
        data: (u, n, ·).
        weight, zero: as ``weigh`` returns them; ``masks_and_factors``: as ``planes``.
        centre, out: (u, T), in the shape that ``grouped`` says.
    """
    n = data.shape[1]
    weight = weight.view(1, n, 1) if weight.dim() == 1 else weight[..., None]
    if weight.dim() == 4:
        data = data.unflatten(-1, (weight.shape[2], -1))
    masks, factors = masks_and_factors or (None, None)

    def products(some: slice | int) -> Tensor:
        numbers, factor = data[:, some], weight[:, some]
        if masks is None:
            return numbers.float() * factor
        return (numbers[..., None, :].int() & masks).float() * factor[..., None]

    if n <= _WRITTEN_OUT:
        sums = _add([products(i) for i in range(n)], chains=4)
    else:
        sums = products(slice(None)).sum(1)
    base = centre * total
    if zero is not None and factors is not None:
        base = base - zero[..., None, None]
        sums = sums * factors
    out.copy_(base + sums)
    return total


def weigh(scales: Tensor | None, beta: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """What numbers as they are stored count, and what has to be taken off for the stored zero.

    Args:
        scales: (u, n, G) or None; ``beta``: (n,).

    Returns:
        (n,) and None, or (u, n, G) and (u, G), None where zero is stored as zero.
    """
    if scales is None:
        return beta, None
    weight = scales * beta[:, None]
    return weight, ZERO[dtype] * weight.sum(1) if dtype in ZERO else None


def planes(dtype: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """``PLANES`` of a width as two tensors (planes, 1); None where a byte is one number."""
    if dtype not in PLANES:
        return None
    masks, factors = zip(*PLANES[dtype], strict=True)
    return (
        torch.tensor(masks, dtype=torch.int32, device=device)[:, None],
        torch.tensor(factors, device=device)[:, None],
    )


def grouped(dtype: str, width: int) -> tuple[int, ...]:
    """How a tile's numbers lie with respect to the bytes they are stored in."""
    if dtype in PLAIN:
        return (width,)
    k = len(PLANES.get(dtype, (0,)))
    return (width // GROUP, k, GROUP // k) if k > 1 else (width // GROUP, GROUP)


def _add(terms: list[Tensor], *, chains: int = 2) -> Tensor:
    """The sum, in several chains of additions that do not wait for each other."""
    sums = terms[:chains]
    for i, term in enumerate(terms[chains:]):
        sums[i % chains] = sums[i % chains] + term
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total
