"""Finds the model's own weights in what a training script has saved around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, listing
from .foreign import spread_tensors
from .names import is_extra_state

WEIGHTS_ALONE = "save the weights alone, with torch.save(model.state_dict(), path), and merge those"
# Where the classes of tensors come from that are spread over processes.
SPREAD = ("torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed._shard")
# Names that training scripts give to the model's own weights, the most telling first.
_CONTAINERS = (
    "model",
    "state_dict",
    "module",
    "model_state_dict",
    "model_state",
    "model_dict",
    "net",
    "network",
    "weights",
    "params",
)
# Tensors under these keys are no weights at all.
_NOT_WEIGHTS = re.compile(
    r"(^|[^a-z])(optim[a-z]*|opt|(lr)?sched[a-z]*|scaler|rng|random|callbacks?|loops?|args?"
    r"|config|hparams?|hyper[a-z]*)([^a-z]|$)",
    re.I,
)
# Averages of the weights that a script keeps beside them.
_BESIDE = re.compile(r"(^|[^a-z])(ema|averaged?|swa|shadow)([^a-z]|$)", re.I)
# What optimizers keep for each parameter.
_MOMENTS = frozenset({"exp_avg", "exp_avg_sq_row", "momentum_buffer", "square_avg", "exp_inf"})
# What a script notes down of a run.
_RECORDS = re.compile(
    r"(^|[^a-z])(histor(y|ies)|logs?|losses|metrics?|meters?|results?|curves?|scores?|records?"
    r"|accurac(y|ies)|errors?|times?|meta(data)?|info)([^a-z]|$)",
    re.I,
)
STEP_KEYS = ("global_step", "global_steps", "iter_num", "iteration", "step", "iter", "num_updates")
_DEPTH = 3


@dataclass(frozen=True)
class StateDict:
    """A mapping from names to tensors inside of what a pickle holds.

    Attributes:
        keys: lead to it.
        extra_states: what modules have saved in it that is neither a tensor nor empty: name → type.
        left_out: where other weights were found beside it.
    """

    keys: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    extra_states: Mapping[str, str]
    left_out: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return ".".join(self.keys) or "the file itself"

    @property
    def entry(self) -> str | None:
        """Where it was found, if not under one of the usual names."""
        return ".".join(self.keys) if self.keys and _rank(self) else None


def state_dict_of(document: Any, path: Path, remedy: str = WEIGHTS_ALONE) -> StateDict:
    """The model's weights in what a pickle holds, whether their numbers are there or elsewhere.

    The mapping from names to tensors with the most tensors, up to three levels deep. Known
    containers come first (``model``, ``state_dict``, ``module``, ``model_state_dict`` …): where
    two of them have as many tensors, the earlier in that list, so ``model`` is preferred to
    ``state_dict``. Averages that a script keeps beside the model (``ema``) are taken only where
    there is nothing else, the states of optimizers never. Entries that are no tensors are left
    out, but for the names of what modules have saved as their extra state.

    Args:
        remedy: how the weights can be saved alone.

    Raises:
        CheckpointError: there is no such mapping, or several that could be meant.
    """
    if not isinstance(document, Mapping):
        raise CheckpointError(
            "A file holds no mapping from names to tensors.",
            checkpoint=path,
            expected="a state dict, alone or in a dict",
            found=type(document).__name__,
            remedy=remedy,
        )
    found = sorted(named_tensors(document), key=_preference)
    if not found:
        raise CheckpointError(
            "A file holds no named tensors.",
            checkpoint=path,
            expected="a state dict, alone or in a dict",
            found=f"a dict of {listing(str(key) for key in document)}",
            remedy=remedy,
        )
    chosen = found[0]
    rivals = [s for s in found[1:] if _rank(s) == _rank(chosen) == 1 and _is_network(s)]
    if rivals:
        raise CheckpointError(
            "A file holds several sets of weights, and it is not clear which one is the model.",
            checkpoint=path,
            expected="one state dict",
            found=listing(s.place for s in [chosen, *rivals]),
            remedy=remedy,
        )
    return replace(chosen, left_out=tuple(s.place for s in found[1:] if _is_network(s)))


def named_tensors(document: Mapping[Any, Any]) -> list[StateDict]:
    """Every mapping with named tensors, but for the states of optimizers and their like."""
    found = []
    seen: set[int] = set()  # a hostile mapping can contain itself
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), document)]
    while level:
        deeper = []
        for keys, mapping in level:
            if id(mapping) in seen:
                continue
            seen.add(id(mapping))
            named = {k: v for k, v in mapping.items() if isinstance(k, str)}
            tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
            if tensors and not _is_of_an_optimizer(keys, tensors):
                found.append(StateDict(keys, tensors, _extra_states(named)))
            if len(keys) < _DEPTH:
                deeper += [
                    ((*keys, str(k)), v)
                    for k, v in mapping.items()
                    if isinstance(v, Mapping) and not _NOT_WEIGHTS.search(str(k))
                ]
        level = deeper
    return found


def _extra_states(named: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: type(value).__name__
        for name, value in named.items()
        if is_extra_state(name)
        and not (value is None or isinstance(value, Tensor))
        and not (isinstance(value, Sized) and not len(value))
    }


def _is_of_an_optimizer(keys: tuple[str, ...], tensors: Mapping[str, Tensor]) -> bool:
    """Whether this is the state of one parameter, which optimizers count."""
    counted = keys[-2:-1] == ("state",) and keys[-1].isdecimal()
    return counted or not _MOMENTS.isdisjoint(tensors)


def _is_network(state: StateDict) -> bool:
    """Whether there are weights in it, rather than records of the run, counts or random states.

    Beside networks, in the file itself, single numbers and series of them are records.
    """
    if any(_RECORDS.search(key) for key in state.keys):
        return False
    return any(
        (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
        and tensor.numel() > 1
        and not _RECORDS.search(name)
        and (bool(state.keys) or tensor.dim() > 1 or "." in name)
        for name, tensor in state.tensors.items()
    )


def _preference(found: StateDict) -> tuple[int, bool, int, int]:
    last = found.keys[-1] if found.keys else None
    place = _CONTAINERS.index(last) if last in _CONTAINERS else len(_CONTAINERS)
    return _rank(found), not _is_network(found), -len(found.tensors), place


def _rank(found: StateDict) -> int:
    """0 for the model's own weights by name, 2 for averages beside them, 1 otherwise."""
    if any(_BESIDE.search(key) for key in found.keys):
        return 2
    return 0 if found.keys and found.keys[-1] in _CONTAINERS else 1


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no subclass, which may have no numbers of its own."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def require_dense(path: Path, name: str, tensor: Tensor) -> None:
    """Raises CheckpointError where a tensor is not a dense one on the CPU."""
    kind = type(tensor)
    if kind.__module__.startswith(SPREAD):
        raise spread_tensors(path, kind.__name__, name)
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not is_plain(tensor) or not dense:
        raise CheckpointError(
            "A tensor is not a plain dense one.",
            checkpoint=path,
            tensor=name,
            expected="a dense torch.Tensor",
            found=f"{kind.__name__}, {tensor.layout}, {tensor.dtype} on {tensor.device}",
            remedy="save it dense, or leave it out of the state dict",
        )


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Later name → earlier name of the very same numbers in the file."""
    first: dict[object, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue  # all empty storages begin at address zero
        same = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        root = first.setdefault(same, name)
        if root != name:
            aliases[name] = root
    return aliases


def count_of(document: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    """The first of these that a script has saved beside the weights as a count, if any."""
    for key in keys:
        value = document.get(key)
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if type(value) is int and value >= 0:
            return value
    return None
