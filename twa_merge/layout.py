"""Names, shapes and dtypes of all checkpoints → what is averaged, what is copied, what is tied."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoints.base import Checkpoint, TensorInfo
from .checkpoints.names import is_extra_state
from .dtypes import Dtype, named
from .errors import CheckpointError, ConfigError, listing

# Batch-norm statistics are re-estimated after a merge and have no gradient; their scale would
# drown the weights in the metric of the subspace.
_STATISTICS = ("running_mean", "running_var")
# Where spectral norm keeps its vectors, beside the weight that they belong to: the parametrization,
# and the hook that came before it.
_SINGULAR_VECTORS = (
    (re.compile(r"(.+\.)?parametrizations\.[^.]+(?=\.\d+\._[uv]$)"), ".original"),
    (re.compile(r"(.+\.)?[^.]+(?=_[uv]$)"), "_orig"),
)


@dataclass(frozen=True)
class Entry:
    """What happens to one saved tensor.

    Attributes:
        averaged: float tensors are averaged; all others are copied from the newest checkpoint, and
            so is what a module has saved as its extra state.
        statistic: a batch-norm running statistic: averaged, but no part of the subspace.
        singular: a singular vector of spectral norm, of unit length, which divides its weight by
            what it makes of it: no part of the subspace, and its mean is brought to unit length.
        tied_to: the earlier tensor that shares its storage; it follows that one in everything.
    """

    name: str
    info: TensorInfo
    averaged: bool
    statistic: bool = False
    singular: bool = False
    tied_to: str | None = None

    @property
    def in_subspace(self) -> bool:
        return self.averaged and not (self.statistic or self.singular or self.tied_to)


@dataclass(frozen=True)
class Layout:
    """The tensors that all checkpoints have in common, in the first checkpoint's file order.

    Attributes:
        extra_states: what modules have saved that is no tensor: name → a checkpoint that has it,
            and its type there.
    """

    entries: Mapping[str, Entry]
    extra_states: Mapping[str, tuple[Path, str]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    @property
    def averaged(self) -> list[str]:
        return [e.name for e in self.entries.values() if e.averaged]

    @property
    def copied(self) -> list[str]:
        return [e.name for e in self.entries.values() if not e.averaged]

    @property
    def in_subspace(self) -> list[str]:
        return [e.name for e in self.entries.values() if e.in_subspace]

    @property
    def trained_numbers(self) -> int:
        return sum(self[name].info.numel for name in self.in_subspace)


@dataclass(frozen=True)
class Blocks:
    """Groups of tensors that share one set of coefficients.

    Attributes:
        kind: ``global``, ``layers`` or ``tensors``.
        names: one name a block; B of them.
        index: averaged tensor → its block, 0..B-1.
    """

    kind: str
    names: tuple[str, ...]
    index: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.names)

    def members(self) -> list[list[str]]:
        """Tensors of each block, B lists."""
        groups: list[list[str]] = [[] for _ in self.names]
        for tensor, block in self.index.items():
            groups[block].append(tensor)
        return groups


def make_layout(checkpoints: Sequence[Checkpoint]) -> Layout:
    """Checks that all checkpoints hold the same tensors, from headers alone.

    Raises:
        CheckpointError: a tensor is missing, added, or of another shape or dtype.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _require_same(first, other)
    entries = {}
    for name, info in first.tensors.items():
        averaged = (info.dtype.is_float or info.dtype.is_complex) and not is_extra_state(name)
        # Tied in the first is not enough: untied weights may have drifted apart later.
        root = first.aliases.get(name)
        tied = root if all(c.aliases.get(name) == root for c in checkpoints) else None
        entries[name] = Entry(
            name=name,
            info=info,
            averaged=averaged,
            statistic=averaged and name.rpartition(".")[2] in _STATISTICS,
            singular=info.dtype.is_float and _is_singular_vector(name, first.tensors),
            tied_to=tied,
        )
    if not any(e.in_subspace for e in entries.values()):
        raise CheckpointError(
            "There is no float tensor to average.",
            checkpoint=first.path,
            found=listing(entries) or "no tensors",
        )
    extra_states: dict[str, tuple[Path, str]] = {}
    for checkpoint in checkpoints:
        for name, kind in checkpoint.extra_states.items():
            extra_states.setdefault(name, (checkpoint.path, kind))
    return Layout(entries, extra_states)


def require_tensors_alone(layout: Layout, names: Iterable[str]) -> None:
    """Raises CheckpointError where one of these names is of an extra state that is no tensor."""
    for name in names:
        if name in layout.extra_states:
            path, kind = layout.extra_states[name]
            raise CheckpointError(
                "A module has saved an extra state that is no tensor: it is not read, and "
                "safetensors cannot hold it.",
                checkpoint=path,
                tensor=name,
                expected="tensors",
                found=f"a {kind}",
                remedy="keep it in a buffer (register_buffer), or let get_extra_state() return a "
                "tensor, and save the checkpoints once more; or, if whoever builds the model sets "
                "it, delete this name from their state dicts",
            )


def _is_singular_vector(name: str, names: Container[str]) -> bool:
    return any(
        (found := pattern.match(name)) is not None and found[0] + weight in names
        for pattern, weight in _SINGULAR_VECTORS
    )


def _require_same(first: Checkpoint, other: Checkpoint) -> None:
    missing = [name for name in first.tensors if name not in other.tensors]
    added = [name for name in other.tensors if name not in first.tensors]
    if missing or added:
        raise CheckpointError(
            f"A tensor is {'missing' if missing else 'in this checkpoint only'}.",
            checkpoint=other.path,
            tensor=listing(missing or added),
            expected=f"the same {len(first.tensors)} tensors as {first.path}",
            found=f"{len(missing)} missing, {len(added)} more",
            remedy="merge checkpoints of one model only, or leave this one out",
        )
    for name, info in first.tensors.items():
        found = other.tensors[name]
        if found.shape != info.shape:
            raise CheckpointError(
                "A tensor has another shape.",
                checkpoint=other.path,
                tensor=name,
                expected=f"{list(info.shape)} as in {first.path}",
                found=list(found.shape),
                remedy="merge checkpoints of one model only, or leave this one out",
            )
        if found.dtype != info.dtype:
            raise CheckpointError(
                "A tensor has another dtype.",
                checkpoint=other.path,
                tensor=name,
                expected=f"{info.dtype} as in {first.path}",
                found=found.dtype,
                remedy="save all checkpoints in one dtype, or leave this one out",
            )


def dtype_named(name: str | None) -> Dtype | None:
    """The dtype that --dtype names; None for None."""
    return named(name) if name else None


def global_block(layout: Layout) -> Blocks:
    """One block: the whole model."""
    return Blocks("global", ("global",), dict.fromkeys(layout.averaged, 0))


def tensor_blocks(layout: Layout, same: Mapping[str, str] | None = None) -> Blocks:
    """One block a tensor; tied tensors, and those that ``same`` maps to one key, share theirs."""
    same = same or {}
    return grouped_blocks(
        "tensors",
        {
            name: same.get(root, root)
            for name in layout.averaged
            for root in (layout[name].tied_to or name,)
        },
    )


def grouped_blocks(kind: str, group_of: Mapping[str, str]) -> Blocks:
    """Blocks from tensor → name of its group, in order of first appearance."""
    names = tuple(dict.fromkeys(group_of.values()))
    number = {name: i for i, name in enumerate(names)}
    return Blocks(kind, names, {tensor: number[g] for tensor, g in group_of.items()})


def blocks_from_members(kind: str, members: Mapping[str, Iterable[str]], layout: Layout) -> Blocks:
    """Blocks as an earlier report lists them.

    Raises:
        ConfigError: the report speaks of other tensors than these checkpoints have.
    """
    index = {tensor: i for i, tensors in enumerate(members.values()) for tensor in tensors}
    wrong = set(index) ^ set(layout.averaged)
    if wrong:
        raise ConfigError(
            "The report's blocks do not fit these checkpoints.",
            tensor=listing(sorted(wrong)),
            remedy="use the checkpoints that the report was made from",
        )
    return Blocks(kind, tuple(members), index)
