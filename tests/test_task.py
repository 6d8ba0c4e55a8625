"""What a user supplies: found by name, checked, split; and what goes wrong on the way."""

from __future__ import annotations

import itertools
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LinearTask, save_run
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import IterableDataset

from twa_merge import merge
from twa_merge.batches import Batches
from twa_merge.distributed import World
from twa_merge.errors import CheckpointError, TaskError
from twa_merge.task import call_factory, check_task, split, split_groups, to_device
from twa_merge.tasks import load_task

BODY = """
import torch
from torch import Tensor, nn

class Mine:
    def __init__(self, data="none"):
        self.data = data
    def build_model(self):
        return nn.Linear(1, 1)
    def dataset(self):
        return list(range(8))
    def loss(self, model, batch):
        return batch
"""


class Mine:
    def __init__(self, data: Any = (), groups: Any = None) -> None:
        self.data = data
        self._groups = groups

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def dataset(self) -> Any:
        return self.data

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return batch

    def groups(self) -> Any:
        return self._groups


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def load(spec: str | Path, data: str | None = None, **options: Any) -> Any:
    return load_task(str(spec), data=data, checkpoint=None, options=options)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Splitting


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_both_parts_have_their_share(fraction: float, count: int) -> None:
    fit, guard = split_groups(list(range(count)), fraction, seed=0)
    assert sorted(fit + guard) == list(range(count))
    assert len(guard) == min(max(1, round(fraction * count + 1e-9)), count - 1)


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_examples_without_groups_are_split_like_groups_of_one(fraction: float, count: int) -> None:
    parts = split(Mine(range(count)), fraction, 3)
    fit, guard = split_groups(range(count), fraction, 3)
    assert ([*parts.fit], [*parts.guard]) == (fit, guard)
    assert parts.fit_groups is None
    assert parts.guard_groups is None


def test_splitting_takes_little_memory() -> None:
    tracemalloc.start()
    split(Mine(range(100_000)), 0.25, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 100_000, "bytes an example"


def test_groups_stay_on_one_side() -> None:
    groups = [i // 7 % 13 for i in range(500)]
    fit, guard = split_groups(groups, 0.3, seed=1)
    assert sorted(fit + guard) == list(range(500))
    assert not {groups[i] for i in fit} & {groups[i] for i in guard}
    assert len(guard) == pytest.approx(150, abs=25)


def test_split_follows_the_seed() -> None:
    groups = list("abcdefghijklmnop")
    assert split_groups(groups, 0.25, 5) == split_groups(groups, 0.25, 5)
    assert split_groups(groups, 0.25, 5) != split_groups(groups, 0.25, 6)


@pytest.mark.parametrize("seed", range(8))
def test_a_huge_group_does_not_swallow_the_split(seed: int) -> None:
    groups = ["huge"] * 90 + list(range(30))
    assert len(split_groups(groups, 0.1, seed)[1]) == pytest.approx(12, abs=1)
    fit, guard = split_groups(["a"] * 90 + ["b"] * 10, 0.25, seed)
    assert (len(fit), len(guard)) == (90, 10)


def test_shares_are_measured_in_sizes() -> None:
    sizes = [1 + 9 * (i % 2) for i in range(200)]
    fit, guard = split_groups(list(range(200)), 0.2, 0, sizes)
    assert sum(sizes[i] for i in guard) == pytest.approx(0.2 * sum(sizes), abs=10)
    assert not set(fit) & set(guard)


def test_one_group_cannot_be_split() -> None:
    assert split_groups(["a"] * 5, 0.5, 0) == ([0, 1, 2, 3, 4], [])
    with pytest.raises(TaskError, match="too little data"):
        split(Mine([1, 2, 3], groups="aaa"), 0.25, 0)


def test_a_tasks_groups_count() -> None:
    data, groups = list(range(40)), [i // 4 for i in range(40)]
    as_tensors = [torch.tensor(g) for g in groups]
    for given in (groups, tuple(groups), torch.tensor(groups), as_tensors):
        parts = split(Mine(data, given), 0.25, 0)
        assert not {groups[i] for i in parts.fit} & {groups[i] for i in parts.guard}
        assert len(parts.fit) + len(parts.guard) == 40
    ungrouped = split(Mine(data), 0.25, 0)
    assert len(ungrouped.guard) == 10


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Mine(list(range(4)), groups=[1, 2]), "2 of type int"),
        (Mine(list(range(2)), groups=[[1], [2]]), "hashable"),
        (Mine(iter([1, 2, 3])), "map-style"),
        (Mine(Endless()), "map-style"),
        (Mine([1]), "too little data"),
    ],
)
def test_data_that_cannot_be_split(task: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        split(task, 0.25, 0)


@pytest.mark.parametrize(("data", "said"), [(Endless(), "map-style"), ([], "is empty")])
def test_test_data_that_cannot_be_evaluated(data: Any, said: str) -> None:
    task = Mine([1, 2])
    with pytest.raises(TaskError, match=said):
        split(task, 0.5, 0, test=Mine(data))
    task.test_dataset = lambda: data  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=said):
        split(task, 0.5, 0)


def test_parts_that_a_task_split_off_are_checked() -> None:
    task = Mine()
    task.split = lambda guard_fraction, seed: ([1], Endless())  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match="map-style"):
        split(task, 0.5, 0)


def test_a_task_may_split_by_itself_and_bring_test_data() -> None:
    class Own(Mine):
        def split(self, guard_fraction: float, seed: int) -> tuple[list[int], list[int]]:
            return [1, seed], [guard_fraction]

        def test_dataset(self) -> list[int]:
            return [9]

    parts = split(Own(), 0.5, 7)
    assert (parts.fit, parts.guard, parts.test) == ([1, 7], [0.5], [9])
    assert split(Own(), 0.5, 7, test=Mine([3, 4])).test == [3, 4]
    assert split(Mine([1, 2]), 0.5, 7).test is None


def test_batches_move_in_one_piece() -> None:
    class Encoding(dict):
        def to(self, device: torch.device) -> str:
            return f"moved to {device}"

    meta = torch.device("meta")
    x = torch.ones(2)
    lock = threading.Lock()
    stayed = to_device([x, lock], torch.device("cpu"))
    stayed[0].zero_()
    assert x.sum() == 2.0
    assert stayed[1] is lock, "what cannot be copied is shared"
    moved = to_device({"a": [x, (x, "text")], "b": Encoding()}, meta)
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert moved["a"][1][1] == "text"
    assert moved["b"] == "moved to meta"
    packed = to_device(pack_sequence([x, x[:1]]), meta)
    assert isinstance(packed, PackedSequence)
    assert not packed.batch_sizes.is_meta, "torch wants these on the CPU"


# Factories


def test_factory_gets_data_if_it_takes_any() -> None:
    assert call_factory(lambda data=None: Mine(data), "t", "d").data == "d"
    assert call_factory(lambda data="own": Mine(data), "t", None).data == "own"
    assert call_factory(lambda **kwargs: Mine(kwargs), "t", "d").data == {"data": "d"}
    assert call_factory(lambda: Mine("x"), "t", None).data == "x"


@pytest.mark.parametrize(
    ("factory", "data", "said"),
    [
        (lambda: Mine(), "d", "takes no data"),
        (lambda data: Mine(), None, "needs data"),
        (lambda data, width: Mine(), "d", "wants more"),
        (lambda: object(), None, "object without build_model, dataset, loss"),
        (lambda: None, None, "NoneType without"),
    ],
)
def test_factories_that_do_not_fit(factory: Any, data: str | None, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        call_factory(factory, "t", data)


def test_the_option_that_brought_the_data_is_named(tmp_path: Path) -> None:
    save_run(tmp_path / "run", LinearTask().states(2))
    file = tmp_path / "alone.py"
    file.write_text("from runs import LinearTask\n\n\ndef task():\n    return LinearTask()\n")
    for given, name in (("test_data", "--test-data"), ("data", "--data")):
        with pytest.raises(TaskError, match="takes no data") as caught:
            merge([tmp_path / "run"], str(file), tmp_path / "out", **{given: "x.txt"})
        assert caught.value.details["what to do"].startswith(f"leave {name} out")


def test_check_task_wants_methods() -> None:
    task = Mine()
    assert check_task(task, "t") is task
    task.loss = 3  # type: ignore[method-assign, assignment]
    with pytest.raises(TaskError, match="Mine without loss"):
        check_task(task, "t")


def test_a_task_may_not_change_where_torch_makes_tensors() -> None:
    torch.set_default_device("meta")
    try:
        with pytest.raises(TaskError, match="changes where torch makes tensors") as caught:
            check_task(Mine(), "t")
    finally:
        torch.set_default_device(None)
    assert "meta" in caught.value.details["found"]


# Tasks by name


def test_file_and_function(tmp_path: Path) -> None:
    path = write(
        tmp_path, "my-task.py", BODY + "task = Mine\ndef other(data):\n    return Mine(data + '!')"
    )
    assert load(path).data == "none"
    assert load(path, "d").data == "d"
    assert load(f"{path}:other", "d").data == "d!"
    assert load(f"{path}:").data == "none"


def test_a_file_imports_its_neighbours(tmp_path: Path) -> None:
    for folder, value in (("one", 1), ("two", 2)):
        write(tmp_path, f"{folder}/parts.py", f"VALUE = {value}")
        write(tmp_path, f"{folder}/helper_{folder}.py", f"VALUE = {value}")
        text = f"from . import parts\nimport helper_{folder} as helper\n"
        end = "\ndef task():\n    from .parts import VALUE\n    return Mine((VALUE, helper.VALUE))"
        write(tmp_path, f"{folder}/task.py", text + BODY + end)
    assert load(tmp_path / "one" / "task.py").data == (1, 1)
    assert load(tmp_path / "two" / "task.py").data == (2, 2)


def test_classes_of_a_file_can_be_pickled(tmp_path: Path) -> None:
    import pickle

    task = load(write(tmp_path, "t.py", BODY + "task = Mine"), "d")
    assert pickle.loads(pickle.dumps(task)).data == "d"


def test_a_relative_path_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "pack_of_mine/tasks.py", BODY + "def make():\n    return Mine('m')")
    monkeypatch.chdir(tmp_path)
    assert load("pack_of_mine/tasks.py:make").data == "m"
    assert load("pack_of_mine.tasks:make").data == "m"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nimport no_such_thing\n", ["No module named 'no_such_thing'", "line 2"]),
        ("def task(:\n", ["SyntaxError", "line 1"]),
        ("def task():\n    x = 1\n    return x / 0\n", ["ZeroDivisionError", "line 3, in task"]),
        ("def task():\n    import json\n    json.loads('{')\n", ["JSONDecodeError", "line 3"]),
        ("import sys\nsys.exit(4)\n", ["SystemExit: 4", "line 2"]),
        ("def task():\n    return 3\n", ["int without build_model"]),
        ("def other(): ...\nclass Thing: ...\n", ["no function 'task'", "other, Thing"]),
        ("task = 3\n", ["no function 'task'", "no functions"]),
    ],
)
def test_a_file_that_fails(tmp_path: Path, text: str, said: list[str]) -> None:
    path = write(tmp_path, "broken.py", text)
    with pytest.raises(TaskError) as caught:
        load(path)
    assert [part for part in [*said, str(path)] if part not in str(caught.value)] == []


def test_errors_that_are_meant_for_the_user_pass(tmp_path: Path) -> None:
    text = "from twa_merge.errors import CheckpointError\nraise CheckpointError('as it is')\n"
    with pytest.raises(CheckpointError, match=r"^as it is$"):
        load(write(tmp_path, "t.py", text))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("causal_lm", "did you mean causal-lm?"),
        ("resnet", "causal-lm, path/task.py"),
        ("my.module", "did you mean my.module:task?"),
        ("nowhere/task.py", "There is no task file"),
        ("nowhere_at_all.tasks:make", "There is no module nowhere_at_all.tasks"),
        ("json.nothing:make", "There is no module json.nothing"),
        ("json:make", "no function 'make'"),
        ("", "There is no task called ''"),
        (":task", "There is no task called ':task'"),
    ],
)
def test_names_that_are_no_task(spec: str, said: str) -> None:
    with pytest.raises(TaskError) as caught:
        load(spec)
    assert said in str(caught.value)


def test_a_module_that_cannot_import_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "importing_module.py", "\nimport nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=r"'nothing_of_that_name'[\s\S]*line 2"):
        load("importing_module:task")


def test_options_that_a_task_does_not_take(tmp_path: Path) -> None:
    path = write(tmp_path, "t.py", BODY + "task = Mine")
    assert load(path, max_length=None, trust_remote_code=False)
    with pytest.raises(TaskError, match="does not take --max-length, --model"):
        load(path, model="x", max_length=3)
    with pytest.raises(TaskError, match="does not take --max-length"):
        load(path, max_length=0)
    with pytest.raises(TaskError, match=r"does not take --depth[\s\S]*--max-length"):
        load("causal-lm", "data.txt", depth=3)
    with pytest.raises(TaskError, match="causal-lm needs data"):
        load("causal-lm")


@pytest.mark.parametrize(
    ("method", "gives", "said"),
    [
        ("groups", lambda *_: 5, "groups do not fit"),
        ("split", lambda *_: [[1], [2], [3]], "two parts"),
        ("split", lambda *_: None, "two parts"),
        ("groups", lambda *_: [7] * 20, "all of one group"),
        ("dataset", lambda *_: Unmeasured(), "how long"),
    ],
)
def test_what_a_task_gives_is_looked_at(method: str, gives: Callable[..., Any], said: str) -> None:
    kind = type("Given", (LinearTask,), {method: gives})
    with pytest.raises(TaskError, match=said):
        split(kind(examples=20), 0.25, 0)


class Unmeasured:
    def __len__(self) -> int:
        raise RuntimeError("not counted yet")

    def __getitem__(self, i: int) -> int:
        return i


@pytest.mark.parametrize("once", [iter, lambda columns: (c for c in columns), itertools.chain])
def test_a_batch_that_is_read_once_becomes_a_list(once: Callable[..., Any]) -> None:
    class Generated(LinearTask):
        def collate(self, examples: list[Any]) -> Any:
            return once([torch.stack(column) for column in zip(*examples, strict=True)])

    world = World()
    batches = Batches(Generated().dataset(), Generated(), 8, 0, world)
    for positions, batch, _ in batches.rounds(range(8)):
        for _ in range(2):
            with batches.use(positions, batch) as own:
                assert isinstance(own, list)
                assert own[0].shape == (8, 6)


class Columns(Iterator[Tensor]):
    """A batch that hands out its columns one by one, again and again, and knows more than them."""

    def __init__(self, examples: list[Any]) -> None:
        self.columns, self.size = [*map(torch.stack, zip(*examples, strict=True))], len(examples)

    def __next__(self) -> Tensor:
        self.columns.append(self.columns.pop(0))
        return self.columns[-1]


def test_a_batch_of_a_class_of_its_own_stays_what_it_is(tmp_path: Path) -> None:
    class Own(LinearTask):
        def collate(self, examples: list[Any]) -> Any:
            return Columns(examples)

    batches = Batches(Own().dataset(), Own(), 8, 0, World())
    for positions, batch, _ in batches.rounds(range(8)):
        for _ in range(2):
            with batches.use(positions, batch) as own:
                assert own.size == 8
                assert (next(own).shape, next(own).shape) == ((8, 6), (8, 4))
