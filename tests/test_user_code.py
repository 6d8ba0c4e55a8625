"""What a user's task raises, and where it is said to come from."""

from __future__ import annotations

import sys

import pytest
import torch
from runs import LinearTask, save_run

from twa_merge import evaluate, merge
from twa_merge.config import DataConfig, FitConfig, GuardConfig
from twa_merge.errors import TaskError
from twa_merge.task import split

METHODS = ["build_model", "dataset", "groups", "test_dataset", "split", "collate", "loss",
           "metrics", "__getitem__"]  # fmt: skip


def gives_up(*_: object) -> object:
    sys.exit(4)


def raises(*_: object) -> object:
    raise KeyError("labels")


class Examples(list):
    """A dataset that fails as it is read."""

    act = staticmethod(raises)

    def __getitem__(self, _: object) -> object:
        return self.act()


def broken(method: str, act) -> LinearTask:
    task = LinearTask()
    if method == "__getitem__":
        examples = Examples(range(60))
        examples.act = act  # type: ignore[method-assign]
        task.dataset = lambda: examples  # type: ignore[method-assign, assignment, return-value]
    else:
        setattr(task, method, act)
    return task


def test_gradients_inside_a_model_need_to_be_asked_for(tmp_path) -> None:
    save_run(tmp_path / "run", LinearTask().states(3))
    task = LinearTask()

    def forces(model, batch):
        x = batch[0].requires_grad_(True)
        return torch.autograd.grad(model(x).sum(), x)[0].square().sum(1)

    task.loss = forces  # type: ignore[method-assign]
    with pytest.raises(TaskError, match="failed to compute its loss") as caught:
        merge([tmp_path / "run"], task, tmp_path / "m")
    assert "with torch.enable_grad():" in caught.value.details["what to do"]
    assert f"{__file__}, line" in caught.value.details["what to do"]

    def asks(model, batch):
        with torch.enable_grad():
            x = batch[0].requires_grad_(True)
            found = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        return found.square().sum(1)

    task.loss = asks  # type: ignore[method-assign]
    assert merge([tmp_path / "run"], task, tmp_path / "m")["chosen"]


@pytest.mark.parametrize("act", [gives_up, raises])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_a_task_raises_is_told_with_its_line(tmp_path, method, act) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    save_run(run, LinearTask().states(3))
    guard = GuardConfig(select="metric:any" if method == "metrics" else "loss")
    with pytest.raises(TaskError) as caught:
        merge([run], broken(method, act), out, guard=guard)
    said = str(caught.value)
    assert ("SystemExit: 4" if act is gives_up else "KeyError: 'labels'") in said
    assert f"{__file__}, line" in said
    assert f"in {act.__name__}" in said
    assert not out.exists()


@pytest.mark.parametrize("method", ["build_model", "dataset", "loss"])
def test_eval_tells_it_too(tmp_path, method) -> None:
    save_run(tmp_path, LinearTask().states(2))
    with pytest.raises(TaskError, match=r"SystemExit: 4[\s\S]*in gives_up"):
        evaluate([tmp_path], broken(method, gives_up))


@pytest.mark.parametrize(("data", "said"), [(iter([1]), "map-style"), ([], "is empty")])
def test_eval_needs_examples(tmp_path, data, said) -> None:
    task = LinearTask()
    task.dataset = lambda: data
    save_run(tmp_path, task.states(2))
    with pytest.raises(TaskError, match=said):
        evaluate([tmp_path], task)


def test_the_line_is_the_tasks_own_not_the_librarys_that_it_called(tmp_path) -> None:
    class Torn(LinearTask):
        def loss(self, model, batch):
            x, y = batch
            return model(x[:, :2]) - y

    save_run(tmp_path / "run", LinearTask().states(2))
    with pytest.raises(TaskError, match=r"test_user_code\.py, line \d+, in loss"):
        merge([tmp_path / "run"], Torn(), tmp_path / "merged")


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        (lambda size: {"accuracy": torch.tensor(0.5)}, "metric accuracy gave shape []"),
        (lambda size: {"accuracy": torch.ones(size, 2)}, f"shape [{60}, 2]"),
        (lambda size: {"accuracy": 0.5}, "metric accuracy gave float"),
        (lambda size: torch.ones(size), "Tensor"),
        (lambda size: {}, None),
        (lambda size: {"accuracy": torch.ones(size, dtype=torch.bool)}, None),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_metric_is_one_number_per_example(tmp_path, metrics, found, together) -> None:
    task = LinearTask()
    if together:
        task.loss_and_metrics = lambda m, b: (task.loss(m, b), metrics(len(b[0])))
    else:
        task.metrics = lambda m, b: metrics(len(b[0]))
    save_run(tmp_path, task.states(2))
    if found is None:
        assert evaluate([tmp_path], task, data_config=DataConfig(batch_size=60))
        return
    with pytest.raises(TaskError) as caught:
        evaluate([tmp_path], task, data_config=DataConfig(batch_size=60))
    said = str(caught.value)
    assert found in said
    assert "expected: " in said
    assert "60" in said


def test_a_metric_that_is_nan_for_some_examples_picks_no_winner(tmp_path) -> None:
    task = LinearTask()
    task.metrics = lambda m, b: {"iou": torch.where(b[0][:, 0] > 0.0, torch.nan, 1.0)}
    save_run(tmp_path / "run", task.states(3))
    said = r"metric iou .*\n.*finite.*\n.*9 of 15 values \(number .* of last"
    with pytest.raises(TaskError, match=said):
        merge(
            [tmp_path / "run"],
            task,
            tmp_path / "merged",
            fit=FitConfig(blocks="global", max_evaluations=2),
            guard=GuardConfig(select="metric:iou", candidates="quick"),
        )
    assert not (tmp_path / "merged").exists()


def test_a_metric_without_a_number_is_told_before_the_fit(tmp_path, monkeypatch) -> None:
    task = LinearTask()
    task.metrics = lambda m, b: {"iou": torch.full((len(b[0]),), torch.nan)}
    save_run(tmp_path / "run", task.states(3))
    monkeypatch.setattr("twa_merge.pipeline.train_stages", None)
    guard = GuardConfig(select="metric:iou")
    with pytest.raises(TaskError, match=r"metric iou is not finite .*\n.*\n.* 15 of 15") as caught:
        merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    assert "leave out of its data" in caught.value.details["what to do"]


def test_metrics_that_fail_on_test_data_do_so_before_the_fit(tmp_path, monkeypatch) -> None:
    task = LinearTask()
    task.test_dataset = task.dataset
    task.metrics = lambda m, b: {"iou": torch.zeros(len(b[0]) + 1)}
    save_run(tmp_path / "run", task.states(3))
    monkeypatch.setattr("twa_merge.pipeline.train_stages", None)
    with pytest.raises(TaskError, match="iou"):
        merge([tmp_path / "run"], task, tmp_path / "merged")


def test_an_example_that_no_candidate_has_a_loss_of_is_named_before_the_fit(
    tmp_path, monkeypatch
) -> None:
    task = LinearTask()
    number = split(task, 0.25, 0).guard.indices[2]
    task.y[number] = torch.nan
    save_run(tmp_path / "run", task.states(3))
    monkeypatch.setattr("twa_merge.pipeline.train_stages", None)
    with pytest.raises(TaskError, match=rf"1 of 15 losses \(number {number} of the dataset\) of"):
        merge([tmp_path / "run"], task, tmp_path / "merged")


class Bounded(LinearTask):
    """Has no loss where a bias is too large."""

    def loss(self, model, batch):
        return super().loss(model, batch) / (model[0].bias[0] < 10.0)


def test_examples_that_one_checkpoint_alone_has_losses_of_are_enough(tmp_path) -> None:
    task = Bounded()
    states = task.states(3)
    for k in (0, 2):
        states[k]["0.bias"][0] = 20.0
    save_run(tmp_path / "run", states)
    document = merge([tmp_path / "run"], task, tmp_path / "merged")
    row = next(c for c in document["candidates"] if c["name"] == document["chosen"])
    assert row["guard_loss"] < 1000.0


def test_a_loss_that_comes_with_metrics_is_one_number_per_example_too(tmp_path) -> None:
    task = LinearTask()
    task.loss_and_metrics = lambda m, b: (task.loss(m, b).mean(), {})
    save_run(tmp_path, task.states(2))
    with pytest.raises(TaskError, match=r"shape \[\]"):
        evaluate([tmp_path], task)


def test_float64_data_that_meets_the_model_is_explained(tmp_path):
    class Wide(LinearTask):
        def loss(self, model, batch):
            x, y = batch
            return super().loss(model, (x.double(), y))

    save_run(tmp_path / "run", LinearTask().states(2))
    with pytest.raises(TaskError) as caught:
        merge([tmp_path / "run"], Wide(), tmp_path / "out")
    assert "models are held in it" in str(caught.value)
    assert "x.float(); see " in str(caught.value)
