"""Calls of layers: what they write reaches their callers, whatever hooks have put in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

# A dict or list, a tensor that is in there while a layer is called, and what stood there before.
_Lent = tuple[dict[Any, Any] | list[Any], Any, Any]


def keep_writes(layer: nn.Module) -> None:
    """Has a layer write to the dicts and lists that it is given, after hooks have copied them.

    Hooks that put other tensors in place of a layer's inputs, as FSDP2's do, make copies of what
    holds them. All such hooks have to be there already, and come first.
    """
    given: list[Any] = []
    lent: list[_Lent] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A call that failed may have left its own.
        given[:], lent[:] = [(args, kwargs)], []

    def lend(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _lend(given.pop(), (args, kwargs), lent)

    def take_back(*_: object) -> None:
        while lent:
            holder, tensor, before = lent.pop()
            for key, value in _items(holder):
                if value is tensor:
                    holder[key] = before

    layer.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
    layer.register_forward_pre_hook(lend, with_kwargs=True)
    layer.register_forward_hook(take_back, prepend=True)


def _lend(old: Any, new: Any, lent: list[_Lent]) -> Any:
    """``old``, with what its copy ``new`` holds in it; ``new`` where that cannot be."""
    if new is old:
        return old
    if dataclasses.is_dataclass(old) and not isinstance(old, dict) and hasattr(old, "__dict__"):
        attributes = vars(old)
        return old if _lend(attributes, getattr(new, "__dict__", None), lent) is attributes else new
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        parts = [_lend(a, b, lent) for a, b in zip(old, new, strict=True)]
        if all(part is b for part, b in zip(parts, new, strict=True)):
            return new
        return type(new)(*parts) if hasattr(new, "_fields") else type(new)(parts)
    if not any(isinstance(old, kind) and isinstance(new, kind) for kind in (dict, list)):
        return new
    if [key for key, _ in _items(old)] != [key for key, _ in _items(new)]:
        return new
    for key, before in _items(old):
        value = _lend(before, new[key], lent)
        if value is not before:
            lent.append((old, value, before))
            old[key] = value
    return old


def _items(holder: dict[Any, Any] | list[Any]) -> Iterable[tuple[Any, Any]]:
    return [*(holder.items() if isinstance(holder, dict) else enumerate(holder))]
