"""The module tree: its repeated layers, and which tensors belong to which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .layout import Blocks, Layout

_LISTS = (nn.ModuleList, nn.Sequential)


def repeated_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of the longest ``ModuleList`` or ``Sequential``: name → module, in order."""
    best: tuple[str, Sequence[tuple[str, nn.Module]]] = ("", [])
    for name, child in module.named_modules():
        if isinstance(child, _LISTS):
            layers = [(k, layer) for k, layer in child.named_children() if has_weights(layer)]
            if len(layers) > len(best[1]):
                best = (name, layers)
    prefix = best[0] + "." if best[0] else ""
    return {prefix + k: layer for k, layer in best[1]}


def gathered_layers(module: nn.Module) -> list[nn.Module]:
    """Layers that stand beside another of their class, in any list: of encoder and decoder.

    Where there are none, those of the longest list. Bare layers of a ``ModuleList`` may be heads
    that the data choose among, or be used by their weights without being called: they are left to
    the rest of the model unless they are most of it.
    """
    found: set[nn.Module] = set()
    longest: list[nn.Module] = []
    half = numbers(module) / 2
    for part in module.modules():
        if isinstance(part, _LISTS):
            bare = isinstance(part, nn.ModuleList) and numbers(part) <= half
            layers = [
                layer
                for layer in part.children()
                if has_weights(layer)
                and not isinstance(layer, nn.ModuleList)  # has no forward pass
                and not (bare and next(layer.children(), None) is None)
            ]
            classes = Counter(type(layer) for layer in layers if not isinstance(layer, _LISTS))
            found.update(layer for layer in layers if classes[type(layer)] > 1)
            longest = max(longest, layers, key=len)
    found = found or set(longest)
    return outermost(module, lambda part: part in found)


def outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Modules that are wanted and lie in none that is: Mamba names a block and its mixer.

    Each once, wherever else it is registered.
    """
    found: dict[nn.Module, None] = {}
    for child in module.children():
        found |= dict.fromkeys([child] if wanted(child) else outermost(child, wanted))
    return list(found)


def has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def numbers(module: nn.Module) -> int:
    """How many there are in its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def layer_groups(module: nn.Module, names: Mapping[str, str], layout: Layout) -> dict[str, str]:
    """Averaged tensor → the layer that it belongs to: before, each repeated layer, after.

    Tensors in front of the first repeated layer in the module tree form ``before``, those behind
    the last one ``after``, and those that the module lacks ``elsewhere``.
    """
    layers = list(repeated_layers(module))
    order = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    order += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    inside = {own: _layer_of(own, layers) for own in order}
    first = next((i for i, own in enumerate(order) if inside[own]), len(order))
    position = {own: i for i, own in enumerate(order)}
    groups = {}
    for name in layout.averaged:
        own = names.get(name)
        if own is None:
            groups[name] = "elsewhere"
        else:
            groups[name] = inside[own] or ("after" if position[own] > first else "before")
    return groups


def layers_of_blocks(blocks: Blocks, layer_of: Mapping[str, str]) -> Tensor | None:
    """The number of each block's layer, (B,) int64.

    None where there is one layer only, or each block is a layer.

    Args:
        layer_of: averaged tensor → the layer that it belongs to.
    """
    found = [layer_of[tensors[0]] for tensors in blocks.members()]
    number = {name: i for i, name in enumerate(dict.fromkeys(found))}
    if not 1 < len(number) < len(blocks):
        return None
    return torch.tensor([number[name] for name in found])


def _layer_of(name: str, layers: Sequence[str]) -> str | None:
    return next((layer for layer in layers if name.startswith(layer + ".")), None)
