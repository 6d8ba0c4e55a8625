"""Random directions in weight space, generated whenever they are needed and never stored.

They are what the trained subspace is compared with: directions that have seen no training
("Measuring the intrinsic dimension of objective landscapes", arXiv 1804.08838). Their numbers are
independent random signs times one scale (Achlioptas, "Database-friendly random projections", 2003).

A sign is a bit of a hash of the seed, the direction, the tensor's name and the place in the tensor,
in integers throughout. So it is the same on every machine and device, whatever slice, rank or
thread asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints.base import Checkpoint, TensorInfo, WeightFile
from .distributed import World
from .dtypes import DTYPES, Array, Float64
from .errors import ConfigError
from .layout import Layout
from .progress import Advanced, Progress, Started
from .random_signs import WORD, key_of, table_of_signs, words_of

if TYPE_CHECKING:
    # A merge with fixed coefficients needs no model and no store.
    from .model import LiveModel

# Signs of all directions together that are made at a time.
_PIECE_CPU, _PIECE_GPU = 1 << 20, 1 << 26
# Up to here float32 counts by ones.
_EXACT = 1 << 24


@dataclass(frozen=True)
class RandomDirections:
    """R random directions r_j, as rules to generate them by.

    Attributes:
        scale: size of every number of a direction; a float32 number, so that files and the fit
            see the same.
        exceptions: tensor → the one whose numbers it takes, or None for zeros, where that is not
            what the layout says: tied tensors follow their root, batch-norm statistics and copied
            tensors stay as they are.
    """

    layout: Layout
    seed: int
    count: int
    scale: float
    exceptions: Mapping[str, str | None] = field(default_factory=dict)

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        """Tensor → the one whose numbers it takes; where it is missing, r_j is zero."""
        every = sources_of(self.layout) | dict(self.exceptions)
        return {name: source for name, source in every.items() if source is not None}

    @property
    def numel(self) -> int:
        """Numbers of a direction that are independent."""
        return sum(self.layout[name].info.numel for name in set(self.sources.values()))

    def signs(
        self, source: str, of: Sequence[int], start: int, stop: int, device: torch.device
    ) -> Tensor:
        """Signs of the directions ``of`` at flat numbers [start, stop): (len(of), m) float32."""
        first, last = start // WORD, -(-stop // WORD)
        keys = [key_of(self.seed, j, source) for j in of]
        words = words_of(torch.tensor(keys, device=device), first, last - first)
        shifts = torch.arange(0, WORD, 8, device=device)
        indices = ((words[..., None] >> shifts) & 0xFF).reshape(-1)
        signs = table_of_signs(device).index_select(0, indices).view(len(of), -1)
        return signs[:, start - first * WORD : stop - first * WORD]

    def pieces(
        self, source: str, start: int, stop: int, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """Flat numbers [start, stop) of a tensor, as many at a time as memory is meant for.

        Yields:
            Where the piece is, counted from ``start``, and the signs (R, m) float32.
        """
        most = _PIECE_CPU if device.type == "cpu" else _PIECE_GPU
        step = max(1, min(most // self.count, _EXACT) // WORD) * WORD
        for a in range(start // WORD * WORD, stop, step):
            low, high = max(a, start), min(a + step, stop)
            signs = self.signs(source, range(self.count), low, high, device)
            yield slice(low - start, high - start), signs

    def gram(self, world: World, progress: Progress) -> Tensor:
        """⟨r_j, r_k⟩, (R, R) float64, the same on every rank: sums of signs are exact."""
        names = sorted(set(self.sources.values()))
        spans = {name: span(self.layout[name].info, world.share) for name in names}
        progress(Started("Drawing random directions", sum(b - a for a, b in spans.values())))
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=world.device)
        for name, (start, stop) in spans.items():
            for _, signs in self.pieces(name, start, stop, world.device):
                total += signs @ signs.T
                progress(Advanced(signs.shape[1]))
        return self.scale**2 * world.sum(total.cpu())

    def among(
        self, checkpoints: Sequence[Checkpoint], alphas: Float64
    ) -> tuple[list[Checkpoint], Float64]:
        """The directions as checkpoints, for the writer: before the last one, whose sidecars and
        copied tensors it takes.

        Args:
            alphas: (1, n + R): coefficients of the checkpoints, then of the directions.

        Returns:
            n + R checkpoints and their coefficients (1, n + R), in one order.
        """
        n, last = len(checkpoints), checkpoints[-1]
        readers = [DirectionReader(self, j, last.tensors) for j in range(self.count)]
        made = [dataclasses.replace(last, reader=reader) for reader in readers]
        order = [*range(n - 1), *range(n, n + self.count), n - 1]
        return [*checkpoints[:-1], *made, last], alphas[:, order]

    def record(self, values: Sequence[float]) -> dict[str, Any]:
        """For the report: all that it takes to add ``values`` of the directions again."""
        found = {"seed": self.seed, "scale": self.scale, "values": list(values)}
        return found | ({"exceptions": dict(self.exceptions)} if self.exceptions else {})


def draw(layout: Layout, seed: int, count: int, length: float, live: LiveModel) -> RandomDirections:
    """``count`` directions of about the given length in the live model's parameters."""
    drawn = RandomDirections(layout, seed, count, 0.0, _exceptions(layout, live))
    scale = torch.tensor(length / math.sqrt(max(1, drawn.numel)), dtype=torch.float32)
    return dataclasses.replace(drawn, scale=float(scale))


def from_record(
    record: Mapping[str, Any], path: Path, layout: Layout
) -> tuple[RandomDirections, Float64]:
    """The directions of an earlier report and their coefficients, (R,) float64.

    Raises:
        ConfigError: it is not what ``RandomDirections.record`` writes, or is of other tensors.
    """
    try:
        values = np.array([float(v) for v in record["values"]])
        scale = float(record["scale"])
        exceptions = {str(k): v for k, v in record.get("exceptions", {}).items()}
        named = {*exceptions, *(v for v in exceptions.values() if v is not None)}
        numbers = values.size and bool(np.isfinite(values).all()) and math.isfinite(scale)
        if not (numbers and named <= layout.entries.keys()):
            raise ValueError
        found = RandomDirections(layout, int(record["seed"]), len(values), scale, exceptions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "The report's random directions cannot be made again.",
            checkpoint=path,
            expected="seed, scale and values as they were written, and the same tensors",
            remedy="use the report as it is, with the checkpoints that it was made from",
        ) from error
    return found, values


def sources_of(layout: Layout) -> dict[str, str]:
    """Tensor → the one whose random numbers it takes, by what the files alone tell."""
    roots = {e.name: e.tied_to or e.name for e in layout.entries.values() if e.averaged}
    return {
        name: root
        for name, root in roots.items()
        if layout[root].in_subspace and layout[root].info.dtype.is_float
    }


def _exceptions(layout: Layout, live: LiveModel) -> dict[str, str | None]:
    """What the module knows besides: which tensors share a parameter, and which are none.

    A tensor without a gradient would be disturbed where no fit can mend it.
    """
    known, groups = sources_of(layout), live.tied_groups()
    families: dict[str, list[str]] = {}
    for name, root in known.items():
        families.setdefault(root, []).append(name)
    found: dict[str, str | None] = {}
    for root, members in families.items():
        inside = [m for m in members if m in live.names and not live.is_buffer(m)]
        source = known.get(groups[inside[0]]) if inside else None
        if source != root:
            found |= dict.fromkeys(members, source)
    return found


class DirectionReader:
    """One direction as a checkpoint of float32 numbers, generated as they are read.

    Args:
        tensors: of the checkpoints that it stands among.
    """

    aliases: Mapping[str, str] = {}
    files: tuple[WeightFile, ...] = ()

    def __init__(
        self, directions: RandomDirections, number: int, tensors: Mapping[str, TensorInfo]
    ) -> None:
        single = DTYPES["float32"]
        self.tensors: Mapping[str, TensorInfo] = {
            name: dataclasses.replace(info, dtype=single) if info.dtype.is_float else info
            for name, info in tensors.items()
        }
        self._directions, self._number = directions, number

    def read(self, name: str, first: int, out: Array) -> None:
        source = self._directions.sources.get(name)
        if source is None:
            out.fill(0)
            return
        stop = first + len(out)
        signs = self._directions.signs(source, [self._number], first, stop, torch.device("cpu"))
        np.multiply(signs[0].numpy(), np.float32(self._directions.scale), out=out)

    def close(self) -> None:
        pass


def span(info: TensorInfo, share: Callable[[int], tuple[int, int]]) -> tuple[int, int]:
    """Flat numbers [start, stop) of this rank's rows."""
    start, stop = share(info.rows)
    return start * info.row_numel, stop * info.row_numel
