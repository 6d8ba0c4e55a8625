"""What the user supplies: a model, a small dataset, a loss per example."""

from __future__ import annotations

import copy
import inspect
import random
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, default_collate

from .errors import TaskError, listing
from .user_code import user_code


@runtime_checkable
class Task(Protocol):
    """What a merge is trained for.

    Besides the three methods below a task may have

    - ``collate(examples) -> batch``: ``torch.utils.data.default_collate`` otherwise;
    - ``metrics(model, batch) -> {name: Tensor (batch,)}``: reported next to the loss;
    - ``loss_and_metrics(model, batch)``: both at once, where one forward pass serves both;
    - ``groups() -> Sequence``, or an attribute ``groups`` of the dataset: one hashable label per
      example of ``dataset()``; examples of one group (several crops of one image, sequences of one
      text) stay on one side of the split and count as one in intervals;
    - ``split(guard_fraction, seed) -> (fit, guard)``: takes the splitting over altogether; both
      parts may have labels like those in an attribute ``groups``;
    - ``test_dataset()``: examples that are only ever reported on;
    - ``model_names(model, names) -> {checkpoint's name: model's name}``, for those of the
      checkpoints' tensors that the model calls otherwise;
    - ``no_split_modules``: class names of the layers that several processes gather one by one;
      every batch has to come to them in the same order. Empty: the model is gathered as a whole.
      Without it: what transformers names, or else the repeated layers of the module tree.
    """

    def build_model(self) -> nn.Module:
        """The architecture. Its weights are loaded by twa-merge."""
        ...

    def dataset(self) -> Dataset[Any]:
        """A map-style dataset: ``len(d)``, ``d[i]`` → one example, the same one every time."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """One loss per example: shape (batch,), float.

        What it draws from the generators of torch, numpy and Python is the same for a batch in
        every evaluation; the batch is its own to edit.
        """
        ...


@dataclass(frozen=True)
class Splits:
    """The task's data: coefficients are fitted on ``fit``, the winner is picked on ``guard``,
    ``test`` is only reported on.

    Attributes:
        fit_groups, guard_groups: label of each example; those of one group are alike. None: none
            are.
    """

    fit: Dataset[Any]
    guard: Dataset[Any]
    test: Dataset[Any] | None = None
    fit_groups: list[int] | None = None
    guard_groups: list[int] | None = None


def call_factory(
    factory: Callable[..., Any], name: str, data: str | None, option: str = "--data"
) -> Task:
    """The task object that a user's function returns.

    The function is called with ``data=``, the argument of ``option``, if it takes such a parameter.

    Raises:
        TaskError: it takes no data although some was given, wants what it cannot get, or returns
            something else than a task.
    """
    parameters = inspect.signature(factory).parameters
    wanted = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if wanted == ["data"] and data is None:
        raise TaskError(f"The task {name} needs data.", found="no --data", remedy="give --data")
    if wanted not in ([], ["data"]):
        raise TaskError(
            f"The task {name} wants more than it can be given.",
            expected="no parameter without a default but `data`",
            found=f"{getattr(factory, '__name__', name)}{inspect.signature(factory)}",
        )
    takes_data = "data" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )
    if data is not None and not takes_data:
        raise TaskError(
            f"The task {name} takes no data.",
            expected="a parameter called data",
            found=f"{getattr(factory, '__name__', name)}{inspect.signature(factory)}",
            remedy=f"leave {option} out, or give the function a parameter `data`",
        )
    task = factory(data=data) if takes_data and data is not None else factory()
    return check_task(task, name)


def check_task(task: Any, name: str) -> Task:
    """``task`` itself, if it has what a task needs.

    Raises:
        TaskError: a method is missing, or torch has been told to make tensors elsewhere.
    """
    if torch.get_default_device().type != "cpu":
        raise TaskError(
            f"The task {name} changes where torch makes tensors.",
            expected="the CPU: models and batches are moved to --device for it",
            found=f"torch.set_default_device, {torch.get_default_device()}",
            remedy="leave it out, and give device= to what the loss makes itself",
        )
    missing = [
        m for m in ("build_model", "dataset", "loss") if not callable(getattr(task, m, None))
    ]
    if missing:
        raise TaskError(
            f"The task {name} is incomplete.",
            expected="an object with the methods build_model, dataset and loss",
            found=f"{type(task).__name__} without {', '.join(missing)}",
        )
    return task


def split(task: Task, guard_fraction: float, seed: int, test: Task | None = None) -> Splits:
    """Fit and guard parts of the task's data, disjoint, by group where there are groups.

    Args:
        guard_fraction: share of the examples that goes to the guard split.
        test: a second task whose whole dataset is the test data.

    Raises:
        TaskError: there are too few examples for two parts, or data cannot be read by index.
    """
    with user_code("give its test data"):
        test_data = test.dataset() if test is not None else _call(task, "test_dataset")
    if test_data is not None:
        require_examples(test_data, "test data")
    one_group = False
    if callable(getattr(task, "split", None)):
        with user_code("split its data"):
            parts = task.split(guard_fraction, seed)  # type: ignore[attr-defined]
        if not isinstance(parts, (tuple, list)) or len(parts) != 2:
            raise TaskError(
                "The task's split() does not give two parts.",
                expected="(fit, guard): two datasets",
                found=f"{len(parts)} parts" if isinstance(parts, (tuple, list)) else type(parts),
            )
        fit, guard = parts
        for part in parts:
            _require_map_style(part, "split")
        sides = (_numbered(_own_groups(part), len(part)) for part in parts)
    else:
        data = dataset_of(task)
        labels = _labels_of(task, data)
        if labels is None:
            count = len(data)  # type: ignore[arg-type]
            indices = _split_singly(count, guard_fraction, seed)
            sides = (None for _ in indices)
        else:
            one_group = len(labels) > 1 and len(set(labels)) == 1
            indices = split_groups(labels, guard_fraction, seed)
            sides = ([labels[i] for i in side] for side in indices)
        fit, guard = (Subset(data, side) for side in indices)
    if len(fit) < 1 or len(guard) < 1:  # type: ignore[arg-type]
        raise TaskError(
            "There is too little data to be split.",
            expected="at least one example to fit and one to guard with",
            found=f"{len(fit)} and {len(guard)}"  # type: ignore[arg-type]
            + (", all of one group" if one_group else ""),
            remedy="give more data" + (", of two groups or more" if one_group else ""),
        )
    return Splits(fit, guard, test_data, *sides)


def split_groups(
    groups: Sequence[Any],
    guard_fraction: float,
    seed: int,
    sizes: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Indices of the fit and of the guard part, whole groups on one side.

    Groups are shuffled by ``seed``; each goes to the guard part if that brings the part closer to
    its share, so that one huge group does not swallow it. Both parts keep at least one group
    where there are two.

    Args:
        groups: label of each example, hashable.
        guard_fraction: share of the examples, weighted by ``sizes``, for the guard part.
        sizes: of the examples; all alike by default.
    """
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    weigh = (lambda group: sum(sizes[i] for i in group)) if sizes is not None else len
    shuffled = list(members.values())
    random.Random(seed).shuffle(shuffled)
    missing = guard_fraction * weigh(range(len(groups)))
    guard: list[list[int]] = []
    for group in shuffled:
        if len(guard) < len(shuffled) - 1 and weigh(group) <= 2 * missing:
            guard.append(group)
            missing -= weigh(group)
    if not guard and len(shuffled) > 1:
        guard = [min(shuffled, key=weigh)]
    chosen = sorted(i for group in guard for i in group)
    taken = set(chosen)
    return [i for i in range(len(groups)) if i not in taken], chosen


def _split_singly(
    count: int, guard_fraction: float, seed: int
) -> tuple[Sequence[int], Sequence[int]]:
    """``split_groups`` of examples that are all by themselves, in eight bytes for each."""
    shuffled = array("q", range(count))
    random.Random(seed).shuffle(shuffled)
    guards = max(1, min(int(guard_fraction * count + 0.5), count - 1)) if count > 1 else 0
    is_guard = bytearray(count)
    for i in shuffled[:guards]:
        is_guard[i] = 1
    fit, guard = (array("q", (i for i in range(count) if is_guard[i] == side)) for side in (0, 1))
    return fit, guard


def groups_of(task: Task, data: Dataset[Any]) -> list[int]:
    """The number of the group of each example; examples of one group stay together.

    Raises:
        TaskError: the task's own code fails, or its labels do not fit its dataset.
    """
    labels = _labels_of(task, data)
    return [*range(len(data))] if labels is None else labels  # type: ignore[arg-type]


def _labels_of(task: Task, data: Dataset[Any]) -> list[int] | None:
    """The number of the group of each example; None where every one is a group of its own."""
    with user_code("group its examples"):
        groups = _call(task, "groups")
    count = len(data)  # type: ignore[arg-type]
    return _numbered(groups if groups is not None else _own_groups(data), count)


def _own_groups(data: Any) -> Any:
    found = getattr(data, "groups", None)
    return None if callable(found) else found


def _numbered(groups: Any, count: int) -> list[int] | None:
    """Labels of any kind as numbers; None where there are none."""
    if groups is None:
        return None
    # Tensors are hashed by identity: every example would be a group of its own.
    several = isinstance(groups, Iterable)
    labels = [g.tolist() if isinstance(g, Tensor) else g for g in (groups if several else [groups])]
    if len(labels) != count or not all(isinstance(label, Hashable) for label in labels):
        raise TaskError(
            "The task's groups do not fit its dataset.",
            expected=f"{count} hashable labels, one an example",
            found=f"{len(labels)} of type {listing({type(label).__name__ for label in labels})}",
        )
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def dataset_of(task: Task) -> Dataset[Any]:
    """All of the task's examples.

    Raises:
        TaskError: the task's own code fails, or the dataset cannot be read by index.
    """
    with user_code("give its dataset"):
        data = task.dataset()
    _require_map_style(data, "dataset")
    return data


def require_examples(data: Any, what: str) -> None:
    """Checks that there is something to evaluate on.

    Raises:
        TaskError: ``data`` cannot be read by index, or is empty.
    """
    _require_map_style(data, what)
    if len(data) < 1:
        raise TaskError(
            f"The task's {what} is empty.",
            expected="at least one example",
            found=f"a {type(data).__name__} of length 0",
        )


def _require_map_style(data: Any, what: str) -> None:
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not sized or isinstance(data, IterableDataset):
        raise TaskError(
            f"The task's {what} cannot be read by index.",
            expected="a map-style dataset: len(d) and d[i]",
            found=type(data).__name__,
            remedy="return a list or a torch.utils.data.Dataset with __len__",
        )
    with user_code(f"say how long its {what} is"):
        len(data)


def collate_of(task: Task) -> Callable[[list[Any]], Any]:
    collate = getattr(task, "collate", None) or default_collate

    def collated(examples: list[Any]) -> Any:
        batch = collate(examples)
        # What is read once would be empty in the next evaluation.
        # A batch of a class of its own may be an iterator, too, and has more to it.
        own = type(batch).__module__ not in ("builtins", "itertools")
        return list(batch) if isinstance(batch, Iterator) and not own else batch

    return collated


def metrics_of(task: Task) -> Callable[[nn.Module, Any], Mapping[str, Tensor]] | None:
    return getattr(task, "metrics", None)


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of the batch on ``device``; tuples, lists and mappings are walked."""
    if isinstance(batch, Tensor):
        return batch.to(device, copy=True)
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        return batch
    # Packed sequences, transformers' encodings, graphs: what moves itself knows how, but may move
    # itself in place.
    if callable(getattr(batch, "to", None)):
        return _copied(batch).to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(v, device) for v in batch)
    return _copied(batch)


def _copied(thing: Any) -> Any:
    try:
        return copy.deepcopy(thing)
    except Exception:
        # A lock, an open file, a tensor with a history: a loss is unlikely to edit those.
        return thing


def _call(task: Task, method: str) -> Any:
    found = getattr(task, method, None)
    return found() if callable(found) else None
