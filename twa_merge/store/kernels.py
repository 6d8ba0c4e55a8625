"""Project and combine on tiles of offsets, in every width.

Sums are taken over pieces of a tile in float32 and over tiles in float64, always in the same order.

There are two ways to do each: plain torch expressions under ``torch.compile``, which fuse the
unpacking with the product (DESIGN.md has the figures), and an eager one for small stores, odd
tiles and machines without a compiler.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..progress import Noted, Progress
from .quantize import GROUP, PLAIN, unpack
from .tiles import TILE, Tiles

# Numbers (of all offsets) in one eager step: their float32 copy stays in a core's cache.
_EAGER_CPU = 1 << 18
# Numbers combined in one call: enough to hide its overhead; the scales times β stay in cache.
_CALL_CPU = 1 << 24
_CALL_GPU = 1 << 28
# Numbers added up in float32 before anything else: sums of 512 keep seven digits.
_SUMMED = 512
# A compiled call of fewer tiles is not worth its overhead, and a single one would be a graph of
# its own.
_FEWEST_TILES = 4
# Numbers in a store from which evaluations pay for some ten seconds of compiling.
COMPILE_FROM = 1 << 27

_SIGN = -(1 << 31)


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
            self._project = torch.compile(project_tiles, fullgraph=True)
            self._combine = torch.compile(combine_tiles, fullgraph=True)
        # On a GPU the gradient comes out of a cache that all cores share, which by reckoning would
        # limit the narrow widths: read it once for four offsets (not yet measured on a GPU). On a
        # CPU it is in a core's own cache, and measured alike.
        self._together = 4 if device.type == "cuda" else 1

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
            weight = beta if here.scales is None else here.scales * beta[:, None]
            if self._fused(self._combine, here, weight, c, total, o, self.dtype) is None:
                self._combine_eagerly(here, c, beta, total, o)

    def _fused(
        self, function: Callable[..., Tensor] | None, tiles: Tiles, *args: object
    ) -> Tensor | None:
        """What the compiled function returns; None where the eager way has to be taken."""
        if function is None or tiles.width != TILE or len(tiles) < _FEWEST_TILES:
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
        together: how many offsets to take for one reading of the gradient, where that divides n.
    """
    n = data.shape[1]
    k = together if n % together == 0 else 1
    data = data.unflatten(1, (n // k, k))
    sums = []
    for i in range(k):
        if scales is None:
            products = data[:, :, i].float() * gradient[:, None]
            sums.append(products.unflatten(-1, (-1, _SUMMED)).sum(-1).sum(-1))
        else:
            scale = scales.unflatten(1, (n // k, k))[:, :, i]
            groups = data[:, :, i].unflatten(-1, (scale.shape[-1], -1))
            lanes = _times_gradient(groups, gradient.unflatten(-1, (-1, GROUP))[:, None], dtype)
            sums.append((lanes * scale[..., None]).sum((-1, -2)))
    return torch.stack(sums, 2).flatten(1) if k > 1 else sums[0]


def _times_gradient(groups: Tensor, g: Tensor, dtype: str) -> Tensor:
    """Unscaled products, added up lane by lane: (u, n, G, bytes), (u, 1, G, 128) → (.., lanes)."""
    if dtype == "int8":
        return groups.float() * g
    q = groups.int()
    if dtype == "int4":
        low, high = g[..., :64], g[..., 64:]
        return ((q & 15) - 8).float() * low + ((q >> 4) - 8).float() * high
    # The bit, moved to where float32 has its sign, turns the gradient's sign over.
    planes = g.unflatten(-1, (8, 16)).view(torch.int32)
    lanes = _flip(q << 31, planes[..., 0, :])
    for k in range(1, 8):
        lanes = lanes + _flip(q << (31 - k), planes[..., k, :])
    return -lanes


def combine_tiles(
    data: Tensor, weight: Tensor, centre: Tensor, total: Tensor, out: Tensor, dtype: str
) -> Tensor:
    """out = total·c + Σ_i weight_i q_i, written in place; returns ``total``.

    Args:
        weight: β (n,), or scales times β (u, n, G).
    """
    if dtype in PLAIN:
        out.copy_(centre * total + (data.float() * weight[:, None]).sum(1))
        return total
    groups = data.unflatten(-1, (weight.shape[-1], -1))
    scale = weight[..., None]
    if dtype == "int8":
        sums = (groups.float() * scale).sum(1)
    elif dtype == "int4":
        q = groups.int()
        zero = 8 * scale.sum(1)
        low, high = (half.float() * scale for half in (q & 15, q >> 4))
        sums = torch.cat((low.sum(1) - zero, high.sum(1) - zero), -1)
    else:
        q = groups.int()
        signs = scale.view(torch.int32)
        sums = torch.cat([-_flip(q << (31 - k), signs).sum(1) for k in range(8)], -1)
    shape = (-1, GROUP)
    out.unflatten(-1, shape).copy_(centre.unflatten(-1, shape) * total + sums)
    return total


def _flip(bits: Tensor, number: Tensor) -> Tensor:
    """float32 ``number``, seen as int32, with its sign turned over where the top bit is set."""
    return ((bits & _SIGN) ^ number).view(torch.float32)
