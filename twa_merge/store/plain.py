"""Temporary: float32 offsets in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layout import Blocks, Layout
from ..stream import RowSlice


class PlainStore:
    def __init__(self, layout: Layout, blocks: Blocks, n: int, device: torch.device) -> None:
        self.nbytes = 0
        self._layout, self._blocks, self._n, self._device = layout, blocks, n, device
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._whole: dict[str, tuple[Tensor, Tensor]] = {}

    def put(self, cut: RowSlice, centre: Tensor, offsets: Tensor) -> None:
        self._parts.setdefault(cut.name, []).append(
            (centre.float().to(self._device), offsets.float().to(self._device))
        )

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._whole:
            parts = self._parts.pop(name)
            self._whole[name] = (
                torch.cat([c for c, _ in parts]),
                torch.cat([d for _, d in parts], 1),
            )
        return self._whole[name]

    def project(self, gradients: Mapping[str, Tensor]) -> Tensor:
        result = torch.zeros(len(self._blocks), self._n, dtype=torch.float64)
        for name, gradient in gradients.items():
            if gradient.numel():
                result[self._blocks.index[name]] += (
                    (self._of(name)[1] @ gradient.reshape(-1)).double().cpu()
                )
        return result

    def combine(self, alphas: Tensor, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            if not target.numel():
                continue
            row = alphas[self._blocks.index[name] if len(alphas) > 1 else 0]
            centre, offsets = self._of(name)
            beta = (row - row.sum() / self._n).float().to(self._device)
            flat = target.view(-1)
            torch.mul(centre, float(row.sum()), out=flat)
            for i in range(self._n):
                flat.add_(offsets[i], alpha=float(beta[i]))
