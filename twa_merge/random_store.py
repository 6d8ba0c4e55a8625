"""A store with random directions behind the checkpoints' offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .distributed import World
from .layout import Blocks
from .random_directions import RandomDirections, span
from .store.base import Store
from .stream import RowSlice


class RandomStore:
    """A store whose coefficients go on behind the n checkpoints': R random directions.

    ``combine`` takes (B, n) and (1, n) as the store within does, and (1, n + R); ``project`` gives
    (1, n + R). The whole model is one block.
    """

    def __init__(self, store: Store, directions: RandomDirections, n: int, world: World) -> None:
        assert len(store.blocks) == 1
        self.blocks: Blocks = store.blocks
        self._store, self._directions = store, directions
        self._n, self._world = n, world
        # Pieces begin where this rank's rows do, which is not to show on a CPU.
        self._wide = torch.float64 if world.device.type == "cpu" else torch.float32

    @property
    def names(self) -> list[str]:
        return self._store.names

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    @property
    def place(self) -> tuple[str, str]:
        return self._store.place

    def put(self, cut: RowSlice, centre: Tensor, offsets: Tensor) -> None:
        self._store.put(cut, centre, offsets)

    def project(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        along = torch.zeros(self._directions.count, dtype=torch.float64, device=self._world.device)
        given = {name: g for name, g in gradients.items() if g is not None}
        for flat, pieces in self._pieces(given):
            for where, signs in pieces:
                numbers = flat[where].float().to(self._wide)
                along += signs.to(self._wide) @ numbers
        random = self._directions.scale * along.cpu()
        return torch.cat([self._store.project(gradients), random[None]], 1)

    def combine(self, alphas: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._store.combine(alphas[:, : self._n], targets)
        gamma = alphas[0, self._n :].to(self._world.device) * self._directions.scale
        if not gamma.any():
            return
        gamma = gamma.float().to(self._wide)
        for flat, pieces in self._pieces(targets):
            for where, signs in pieces:
                flat[where] += gamma @ signs.to(self._wide)

    def _pieces(
        self, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Iterator[tuple[slice, Tensor]]]]:
        """Tensors, this rank's rows, that the directions touch: their numbers, flat, and pieces."""
        for name, tensor in tensors.items():
            source = self._directions.sources.get(name)
            if source is None or not tensor.numel():
                continue
            info = self._directions.layout[name].info
            # Every rank holds a scalar, for the sake of FSDP2.
            start, stop = span(info, self._world.share) if info.shape else (0, 1)
            assert tensor.numel() == stop - start
            flat = tensor.detach().reshape(-1)
            yield flat, self._directions.pieces(source, start, stop, tensor.device)
