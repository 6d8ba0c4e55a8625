"""Tensor names without what wrappers around the model have put in them."""

from __future__ import annotations

from collections.abc import Iterable

# torch.compile, FSDP 1 and activation checkpointing may wrap any submodule, so these stand
# anywhere in a name, and no model has a part that is called so.
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# DistributedDataParallel, DataParallel and AveragedModel wrap the whole model only; a part in its
# middle may well be called "module".
_WHOLE = "module."
# What AveragedModel keeps beside the model that it wraps.
_BESIDE = frozenset({"n_averaged"})
_MAJORITY = 0.9
_EXTRA_STATE = "_extra_state"


def resolve_names(names: Iterable[str]) -> dict[str, str]:
    """Name as saved → name as in the model inside all wrappers, in the order given.

    ``_orig_mod.`` (and what FSDP and activation checkpointing add) is dropped wherever it stands;
    a leading ``module.`` is dropped, as often as it is there, when all names carry it, or nine in
    ten, or all but ``n_averaged``. Any order of nesting is resolved. Where two names would become
    one, they stay as they are.

    A model whose own parts are called so meets its checkpoint again if its names go through this
    function too.
    """
    raw = list(names)
    resolved = _unless_ambiguous(raw, [_drop_segments(name) for name in raw])
    while _is_wrapped(resolved):
        shorter = _unless_ambiguous(resolved, [name.removeprefix(_WHOLE) for name in resolved])
        if shorter == resolved:
            break
        resolved = shorter
    return dict(zip(raw, resolved, strict=True))


def is_extra_state(name: str) -> bool:
    """Whether this is what ``torch.nn.Module.get_extra_state`` returned, of any type."""
    return name.rpartition(".")[2] == _EXTRA_STATE


def extra_state_of(path: str) -> str:
    """The name that the extra state of the module at ``path`` is saved under."""
    return f"{path}.{_EXTRA_STATE}" if path else _EXTRA_STATE


def _drop_segments(name: str) -> str:
    *parents, leaf = name.split(".")
    return ".".join([*(part for part in parents if part not in _ANYWHERE), leaf])


def _is_wrapped(names: list[str]) -> bool:
    inside = [n for n in names if n not in _BESIDE]
    carrying = sum(n.startswith(_WHOLE) and n != _WHOLE for n in inside)
    return carrying > 0 and carrying >= _MAJORITY * len(inside)


def _unless_ambiguous(before: list[str], after: list[str]) -> list[str]:
    return after if len(set(after)) == len(set(before)) else before
