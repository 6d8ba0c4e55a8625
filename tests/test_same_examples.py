"""When examples that two processes read count as the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from launches import run
from small_task import train

from twa_merge.errors import TaskError
from twa_merge.same_examples import require_same_examples


class Beside:
    """Process 0 of two: the other one has gathered ``theirs``."""

    size, device = 2, torch.device("cpu")

    def __init__(self, theirs: Any = None) -> None:
        self.theirs, self.mine = theirs, None

    def gather(self, value: Any) -> list[Any]:
        self.mine = value
        return [value, value if self.theirs is None else self.theirs]


def compare(mine: Sequence[Any], theirs: Sequence[Any]) -> None:
    other = Beside()
    require_same_examples({"the fit split": theirs}, 0, other)
    require_same_examples({"the fit split": mine}, 0, Beside(other.mine))


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (IMAGES, IMAGES * (1 + 1e-6)),
        (IMAGES.numpy(), IMAGES),
        ([{"text": "a", "ids": torch.arange(9)}], [{"text": "a", "ids": torch.arange(9)}]),
        ([(1.0, None, [b"x"], np.str_("y"))], [(1.0 + 1e-9, None, [b"x"], np.str_("y"))]),
        ([object()], [object()]),
        ([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, torch.nan])]),
        ([torch.eye(3).to_sparse()], [torch.eye(3).to_sparse()]),
        ([IMAGES[0].bfloat16(), torch.zeros(0)], [IMAGES[0].bfloat16(), torch.zeros(0)]),
    ],
)
def test_the_same(mine, theirs):
    compare(mine, theirs)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (IMAGES, IMAGES.flip(0)),
        (IMAGES, IMAGES.flip(3)),
        (IMAGES, IMAGES + 0.1),
        (["a", "b", "c"], ["a", "c", "b"]),
        ([torch.arange(1000)], [torch.arange(1000).roll(1)]),
        ([{"x": 1.0, "y": 3}], [{"x": 1.0, "y": 4}]),
        ([(IMAGES[0], 1)], [(IMAGES[0], 2)]),
        ([np.array([True, False])], [np.array([False, True])]),
        ([[1, 2]], [[1, 2, 3]]),
        ([torch.zeros(2, 3)], [torch.zeros(3, 2)]),
        ([torch.tensor([1j, 2.0])], [torch.tensor([2.0, 1j])]),
    ],
)
def test_not_the_same(mine, theirs):
    with pytest.raises(TaskError, match="do not read the same examples") as caught:
        compare(mine, theirs)
    assert "of the fit split" in caught.value.details["expected"]
    assert "process 1" in caught.value.details["found"]


def test_what_is_drawn_from_the_generators_is_the_same():
    class Augmented:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            return i, torch.rand(3), np.random.rand()

    compare(Augmented(), Augmented())


TASK = """
import os, small_task
def task():
    made = small_task.task()
    if os.environ.get("RANK") == "1":
        made.x, made.y = made.x.flip(0), made.y.flip(0)
    return made
"""


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_process_with_the_examples_in_another_order_ends_the_run(tmp_path, command):
    train(tmp_path / "run", checkpoints=2)
    (tmp_path / "task.py").write_text(TASK)
    out = ["-o", tmp_path / "m"] if command == "train" else []
    done = run(
        2, command, tmp_path / "run", "--task", tmp_path / "task.py", "--device", "cpu", *out
    )
    assert done.returncode == 2 or "exitcode  : 2" in done.stderr, done.stderr
    assert done.stderr.count("do not read the same examples") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "task.py", "__pycache__"}
