"""Calls of layers that FSDP2 gathers: what they may write to, and whose weights they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .errors import TaskError
from .user_code import GATHER_AS_A_WHOLE

# Ways to make numbers of a tensor. Of a DTensor they silently are those of this rank's rows.
_TO_NUMBERS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")

# A dict or list, a tensor that is in there while a layer is called, and what stood there before.
_Lent = tuple[dict[Any, Any] | list[Any], Any, Any]


def keep_writes(layer: nn.Module) -> None:
    """Has a layer write to the dicts and lists that it is given, after hooks have copied them.

    Hooks that put other tensors in place of a layer's inputs, as FSDP2's do, make copies of what
    holds them. All such hooks have to be there already, and come first.
    """
    # Of calls that have begun: a layer may call itself.
    calls: list[tuple[Any, list[_Lent]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(((args, kwargs), []))

    def lend(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, lent = calls[-1]
        return _lend(given, (args, kwargs), lent)

    def take_back(*_: object) -> None:
        # No call where an earlier hook has ended it.
        lent = calls.pop()[1] if calls else []
        while lent:
            holder, tensor, before = lent.pop()
            for key, value in _items(holder):
                if value is tensor:
                    holder[key] = before

    layer.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
    layer.register_forward_pre_hook(lend, with_kwargs=True)
    layer.register_forward_hook(take_back, prepend=True, always_call=True)


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


class OwnWeights:
    """Sees to it that a pass computes with the weights that FSDP2 gathers, and leaves them there.

    It gathers into the tensors that it has made, whatever stands in their place: weights that a
    layer is called with go unheard, and those that replace them stay as they are in later passes.

    Args:
        layers: of ``module``, that are gathered by themselves.
    """

    def __init__(self, module: nn.Module, layers: Collection[nn.Module]) -> None:
        self._names = {part: name for name, part in module.named_modules()}
        self._root = _without(module, layers)
        self._layers = [_without(layer, layers) for layer in layers]
        self._known: set[tuple[nn.Module, str, Tensor]] = set()
        self._passing = False
        for layer, parts in zip(layers, self._layers, strict=True):
            self._watch(layer, parts)

    @contextmanager
    def used(self) -> Iterator[None]:
        """A pass. Backward passes, which may compute layers once more, are not looked at.

        Raises:
            TaskError: it has called a layer with other weights, replaced weights, or made numbers
                of weights that are not gathered.
        """
        if not self._known:
            self._known.update(*map(_weights, self._layers))
        self._passing = True
        places = _places(self._root)
        try:
            with _no_numbers():
                yield
            self._require_left(places, self._root)
        finally:
            self._passing = False

    def _watch(self, layer: nn.Module, parts: Sequence[nn.Module]) -> None:
        places: dict[tuple[nn.Module, str], tuple[int, int]] = {}

        def before(*_: object) -> None:
            if self._passing and not self._known.issuperset(_weights(parts)):
                raise TaskError(
                    "A layer is called with other weights than its own.",
                    expected="the model's own weights, which are gathered for it",
                    found=f"others for {self._names[layer]} (torch.func.functional_call?)",
                    remedy=GATHER_AS_A_WHOLE,
                )

        def gathered(*_: object) -> None:
            places.clear()
            places.update(_places(parts) if self._passing else {})

        def done(*_: object) -> None:
            if self._passing:
                self._require_left(places, parts)

        def given_up(*_: object) -> None:
            if self._passing:
                # Or kept, where the whole model is gathered once.
                self._known.update(_weights(parts))

        # Around FSDP2's own hooks, which gather and give up.
        layer.register_forward_pre_hook(before, prepend=True)
        layer.register_forward_pre_hook(gathered)
        layer.register_forward_hook(done, prepend=True)
        layer.register_forward_hook(given_up)

    def _require_left(
        self,
        places: dict[tuple[nn.Module, str], tuple[int, int]],
        parts: Sequence[nn.Module],
    ) -> None:
        for (part, name), place in _places(parts).items():
            if places.get((part, name), place) != place:
                raise TaskError(
                    "The forward pass replaces weights of the model.",
                    tensor=f"{self._names[part]}.{name}".lstrip("."),
                    expected="weights that stay where they are: no `.data = ...`",
                    remedy="compute what takes their place as a tensor of its own, by "
                    "torch.nn.utils.parametrize perhaps; or use one process and --precision fp32",
                )


@contextmanager
def _no_numbers() -> Iterator[None]:
    from torch.distributed.tensor import DTensor

    def refuse(*_: object) -> Any:
        raise TaskError(
            "The model or its loss makes a number of weights that are not gathered.",
            expected="weights of layers that are used inside these layers alone",
            remedy=GATHER_AS_A_WHOLE,
        )

    own = {name: vars(DTensor)[name] for name in _TO_NUMBERS if name in vars(DTensor)}
    for name in _TO_NUMBERS:
        setattr(DTensor, name, refuse)
    try:
        yield
    finally:
        for name in _TO_NUMBERS:
            delattr(DTensor, name)
        for name, method in own.items():
            setattr(DTensor, name, method)


def _without(module: nn.Module, layers: Collection[nn.Module]) -> list[nn.Module]:
    """The module and what is in it, but for ``layers`` in there."""
    found = [module]
    for child in module.children():
        found += _without(child, layers) if child not in layers else []
    return found


def _weights(parts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for part in parts:
        for name, own in part._parameters.items():
            if own is not None:
                yield part, name, own


def _places(parts: Iterable[nn.Module]) -> dict[tuple[nn.Module, str], tuple[int, int]]:
    """Which tensor holds each weight, and where it lies."""
    return {(part, name): (id(own), own.data_ptr()) for part, name, own in _weights(parts)}
