"""Whether all processes of a run, or a later run, read the same examples.

Every process makes the dataset by itself. Where its order depends on hashes, on a folder's listing
or on a generator without a seed, what one process guards with another one fits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .agreement import heard_from_all
from .distributed import World
from .errors import TaskError
from .seeding import seeded
from .user_code import user_code

# Examples of each part that are looked at, evenly from its first to its last.
_LOOKED_AT = 16
# Nodes may round differently as they decode and resize.
_CLOSE = 1e-3

Sketch = list[str | float]


def require_same_examples(parts: Mapping[str, Dataset[Any]], seed: int, world: World) -> None:
    """Checks that all processes have the same examples in the same order, by some of them.

    Args:
        parts: what they are for → the examples.
        seed: what is drawn while an example is read follows from it.

    Raises:
        TaskError: on every process alike, where one of them has others; or the task's code fails.
    """
    if world.size == 1:
        return
    mine = [
        (part, i, sketch)
        for part, examples in parts.items()
        for i, sketch in _sketches(examples, seed, world.device)
    ]
    (one, first), *others = heard_from_all(mine, world)
    for another, theirs in others:
        for (part, i, expected), (_, _, found) in zip(first, theirs, strict=True):
            if not _alike(expected, found):
                raise TaskError(
                    "The processes of this run do not read the same examples.",
                    expected=f"number {i} of {part} as {one} reads it",
                    found=f"another one in {another}",
                    remedy="sort what comes from sets and folders, and seed what the dataset draws",
                )


def digest_of(examples: Dataset[Any], seed: int, device: torch.device) -> str:
    """A hash of some of the examples, the same where floats differ by their rounding."""
    digest = hashlib.blake2b(digest_size=16)
    for i, sketch in _sketches(examples, seed, device):
        rounded = [x if isinstance(x, str) else f"{x:.3g}" for x in sketch]
        digest.update(repr((i, rounded)).encode())
    return digest.hexdigest()


def _sketches(
    examples: Dataset[Any], seed: int, device: torch.device
) -> Iterator[tuple[int, Sketch]]:
    count = len(examples)  # type: ignore[arg-type]
    for i in sorted({k * (count - 1) // (_LOOKED_AT - 1) for k in range(_LOOKED_AT)}):
        with user_code("read its dataset"), seeded(seed + i, device):
            yield i, list(_sketch(examples[i]))


def _sketch(thing: Any) -> Iterator[str | float]:
    """Numbers and words that tell an example from another; of unknown objects their kind."""
    if isinstance(thing, (bool, int, str, bytes)) or thing is None:
        yield repr(thing)
    elif isinstance(thing, float):
        yield thing
    elif isinstance(thing, Tensor):
        yield from _of_numbers(thing)
    elif isinstance(thing, (np.ndarray, np.generic)) and thing.dtype.kind in "biufc":
        yield from _of_numbers(torch.from_numpy(np.array(thing)))
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield repr(key)
            yield from _sketch(value)
    elif isinstance(thing, Sequence):
        yield str(len(thing))
        for value in thing:
            yield from _sketch(value)
    else:
        yield type(thing).__qualname__


def _of_numbers(tensor: Tensor) -> Iterator[str | float]:
    """Shape and a hash; of floats, which nodes may round differently, two sums."""
    yield str(tuple(tensor.shape))
    if tensor.layout != torch.strided:
        return
    flat = tensor.detach().cpu().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    if not flat.is_floating_point():
        yield hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()
        return
    values = flat.double()
    # The second one knows the order.
    weights = torch.linspace(1.0, 2.0, len(values), dtype=torch.float64)
    yield float(values.square().sum())
    yield float(values.abs() @ weights)


def _alike(a: Sketch, b: Sketch) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: str | float, b: str | float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_CLOSE) or (math.isnan(a) and math.isnan(b))
    return a == b
