"""Which tensor of the checkpoints is which of the module's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from .checkpoints import extra_state_of, resolve_names
from .errors import TaskError, listing
from .layout import Layout
from .task import Task
from .tasks.pretrained import renamings
from .user_code import user_code


def renamed_by(task: Task, module: nn.Module, layout: Layout) -> Mapping[str, str]:
    """Checkpoint tensor → name in the module, as the task says, or transformers for its models."""
    rename = getattr(task, "model_names", None)
    if rename is None:
        return renamings(module, list(layout.entries)) if _of_transformers(module) else {}
    with user_code("name its model's tensors"):
        names = rename(module, list(layout.entries))
    if not isinstance(names, Mapping):
        raise TaskError(
            "The task's model_names() gives no names.",
            expected="a dictionary from names in the checkpoints to names in the model",
            found=type(names).__name__,
        )
    return names


def _of_transformers(module: nn.Module) -> bool:
    """Whether transformers may save the module under other names than it has."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(module, modeling.PreTrainedModel):
        return False
    # Older ones have no such names.
    return importlib.util.find_spec("transformers.conversion_mapping") is not None


def match_names(
    module: nn.Module, layout: Layout, renamed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Checkpoint tensor → name in the module, of parameters, buffers and extra states.

    Names match as they are, as the task has ``renamed`` them, or all after one outer prefix is
    added or removed (``model.``, ``transformer.``): a base model's checkpoint and the same model
    under a head.
    """
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    names += extra_states(module)
    saved = [*layout.entries, *layout.extra_states]
    # The readers strip the prefixes of wrappers, which may be the name of a real child here.
    own = {resolved: raw for raw, resolved in resolve_names(names).items()}
    prefixes = sorted({name.partition(".")[0] + "." for name in own})

    def ways() -> Iterator[dict[str, str]]:
        yield {name: name for name in saved}
        yield {name: renamed.get(name, name) for name in saved} if renamed else {}
        for prefix in prefixes:
            yield {name: prefix + name for name in saved}
        for prefix in sorted({name.partition(".")[0] + "." for name in saved}):
            yield {name: name.removeprefix(prefix) for name in saved}

    matches = [{n: own[m] for n, m in renaming.items() if m in own} for renaming in ways()]
    as_said = max(matches[:2], key=len)
    # Not those that bring two networks of a checkpoint to one place.
    guesses = [m for m in matches[2:] if len(set(m.values())) == len(m)]
    best = max([as_said, *guesses], key=len)
    if len(best) == len(as_said) or not _missing(module, as_said):
        return as_said
    _require_one(module, layout, best, [m for m in guesses if len(m) == len(best)])
    return best


def extra_states(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that take back an extra state: the name that it is saved under → the module."""
    return {
        extra_state_of(path): part
        for path, part in module.named_modules(remove_duplicate=False)
        if type(part).set_extra_state is not nn.Module.set_extra_state
    }


def _missing(module: nn.Module, names: Mapping[str, str]) -> list[str]:
    """Parameters that no tensor of the checkpoints stands for."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    covered = {id(parameters[own]) for own in names.values() if own in parameters}
    return [name for name, p in parameters.items() if id(p) not in covered]


def frozen_and_unsaved(module: nn.Module, names: Mapping[str, str]) -> list[str]:
    """Parameters that the checkpoints lack, if all of them are frozen, unlike others.

    Runs that train a part of a model (adapters, a head) may save no more than that.

    Args:
        names: checkpoint tensor → name in the module.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    missing = _missing(module, names)
    return missing if trained and trained.isdisjoint(missing) else []


def _require_one(
    module: nn.Module, layout: Layout, best: Mapping[str, str], guesses: Sequence[Mapping[str, str]]
) -> None:
    """Raises TaskError where the checkpoints hold the whole module more than once."""
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }

    def pairs(names: Mapping[str, str]) -> set[tuple[str, int]]:
        # Tied in the files, or registered twice in the module: the same under another name.
        return {
            (layout[n].tied_to or n, id(tensors[own])) for n, own in names.items() if own in tensors
        }

    others = [names for names in guesses if pairs(names) != pairs(best)]
    if others and set(_missing(module, best)) == set(frozen_and_unsaved(module, best)):
        either, other = (next(iter(found)) for found in (best, others[0]))
        raise TaskError(
            "The checkpoints hold the task's model more than once.",
            tensor=f"{either} or {other}",
            expected="one network that the tensors' names fit",
            found=f"{1 + len(others)} of them",
            remedy="say which with the task's model_names(model, names): a dictionary from names "
            "in the checkpoints to names in the model",
        )


def require_cover(
    module: nn.Module, names: Mapping[str, str], layout: Layout, as_built: Collection[str] = ()
) -> None:
    """Checks that the checkpoints can be loaded into the module, and trained in it.

    Args:
        names: checkpoint tensor → name in the module.
        as_built: parameters that need not be loaded.

    Raises:
        TaskError: a tensor is complex or of another shape, or a parameter is lazy or missing.
    """
    for name in names:
        if layout[name].info.dtype.is_complex:
            raise TaskError(
                "Coefficients cannot be trained for a model with complex tensors.",
                tensor=name,
                expected="real tensors, pairs of them perhaps (torch.view_as_real)",
                found=layout[name].info.dtype,
                remedy="if it never changes, build the model with persistent=False for it; or "
                "choose coefficients yourself, with twa-merge average",
            )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    if lazy:
        raise TaskError(
            "The model has parameters whose shapes are not known before it is used.",
            tensor=listing(lazy),
            expected="a model that can be loaded as build_model() returns it",
            found="lazy modules",
            remedy="give their sizes (nn.Linear instead of nn.LazyLinear), or pass an example "
            "through the model in build_model()",
        )
    missing = [name for name in _missing(module, names) if name not in as_built]
    if missing:
        raise TaskError(
            "The model has parameters that the checkpoints lack.",
            tensor=listing(missing),
            expected=f"every parameter in the checkpoints, e.g. {next(iter(layout.entries))}",
            found=f"{len(missing)} of {len(parameters)} parameters missing",
            remedy="give the architecture that was trained; if what is missing was never trained, "
            "let build_model() load it and freeze it (requires_grad_(False)); where transformers "
            "fuses tensors as it loads them (mixtures of experts), save the checkpoints once more "
            "with save_pretrained(..., save_original_format=False)",
        )
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for name, own in names.items():
        shape = tuple(parameters.get(own, buffers.get(own)).shape)  # type: ignore[union-attr]
        if shape != layout[name].info.shape:
            raise TaskError(
                "The model's tensor has another shape than the checkpoints'.",
                tensor=name,
                expected=list(layout[name].info.shape),
                found=list(shape),
                remedy="let build_model() return the architecture that was trained",
            )
