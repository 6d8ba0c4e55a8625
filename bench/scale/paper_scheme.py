"""The distributed training of the paper (arXiv 2205.13104), written afresh: basis by checkpoint.

Every rank holds the whole model and n/k of the n basis vectors, each of full length. A step sums
the gradient over the ranks (D numbers), projects it onto the rank's own vectors, and sums what
comes back (D numbers again). To build the basis every rank orthonormalises all n vectors and then
keeps its own, as the scheme has it: Gram-Schmidt needs every earlier vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twa_merge.checkpoints.base import Checkpoint
from twa_merge.task import Task
from twa_merge.tensors import tensor_rows


class PaperScheme:
    """One rank of ``size``.

    Attributes:
        module: the whole model.
        basis: (n / size, D) float32, this rank's vectors; None before ``build_basis``.
    """

    def __init__(self, task: Task, rank: int, size: int) -> None:
        self.task, self.rank, self.size = task, rank, size
        self.module = task.build_model()
        self.basis: Tensor | None = None

    def build_basis(self, checkpoints: Sequence[Checkpoint]) -> None:
        """In one array: a list of vectors that is stacked in the end takes twice as much."""
        names = [name for name, _ in self.module.named_parameters()]
        n, total = len(checkpoints), sum(p.numel() for p in self.module.parameters())
        vectors = torch.empty(n, total)
        for vector, checkpoint in zip(vectors, checkpoints, strict=True):
            parts = [tensor_rows(checkpoint, k).flatten() for k in names]
            torch.cat(parts, out=vector)
        for i, vector in enumerate(vectors):
            vector -= vectors[:i].T @ (vectors[:i] @ vector)
            vector /= vector.norm()
        each = n // self.size
        last = n if self.rank == self.size - 1 else each * (self.rank + 1)
        self.basis = vectors[each * self.rank : last].clone()

    def step(self, batches: Iterable[Any], examples: int, rate: float = 0.1) -> None:
        """One step of projected gradient descent on this rank's share of the batches."""
        assert self.basis is not None
        for batch in batches:
            (self.task.loss(self.module, batch).sum() / examples).backward()
        gradient = torch.cat([p.grad.flatten() for p in self.module.parameters()])
        self.module.zero_grad()
        dist.all_reduce(gradient)
        projected = self.basis.T @ (self.basis @ gradient)
        dist.all_reduce(projected)
        parts = projected.split([p.numel() for p in self.module.parameters()])
        with torch.no_grad():
            for parameter, part in zip(self.module.parameters(), parts, strict=True):
                parameter -= rate * part.view_as(parameter)
