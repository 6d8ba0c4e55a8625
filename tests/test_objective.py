"""Gradients in coordinates against finite differences; fits against optima that are known."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import LinearTask, Pairs, save_run, states_of
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import default_collate
from transformers import BatchEncoding

from twa_merge import evaluate, merge, scoring
from twa_merge.batches import Batches, nbytes
from twa_merge.candidates import window
from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import DataConfig, FitConfig, GuardConfig, StoreConfig
from twa_merge.distributed import World
from twa_merge.errors import ConfigError, TaskError
from twa_merge.fit import Fitter
from twa_merge.ingest import ingest
from twa_merge.layout import global_block, make_layout, tensor_blocks
from twa_merge.model import build
from twa_merge.objective import Engine, Objective
from twa_merge.progress import Evaluated, Noted, silent
from twa_merge.resume import EvaluationLog
from twa_merge.store import make_store
from twa_merge.subspace import Chart, make_subspace
from twa_merge.task import split


def engine_for(task, folder: Path, *, by_tensor: bool = False):
    """Engine, Gram matrices and batches over all of the task's data."""
    world = World()
    checkpoints = open_checkpoints([folder])
    layout = make_layout(checkpoints)
    live = build(task, layout, checkpoints[-1], world)
    blocks = tensor_blocks(layout) if by_tensor else global_block(layout)
    store = make_store(checkpoints, layout, blocks, world, StoreConfig("device"), shared={})
    grams = ingest(checkpoints, layout, world, store=store, shared={})
    batches = Batches(task.dataset(), task, 16, 0, world)
    return Engine(live, store, blocks, task, world), grams, batches


def fitter_for(engine, batches, folder: Path, **options) -> Fitter:
    log = EvaluationLog(folder / "state", {}, World())
    return Fitter(engine, batches, FitConfig(**options), log, silent)


@pytest.mark.parametrize("by_tensor", [False, True])
def test_gradient_in_coordinates_is_that_of_finite_differences(tmp_path, by_tensor):
    task = LinearTask()
    save_run(tmp_path, task.states(5))
    engine, grams, batches = engine_for(task, tmp_path, by_tensor=by_tensor)
    subspaces = [make_subspace(g) for g in grams.by_block(engine.blocks)]
    base = torch.full((len(subspaces), 5), 0.2, dtype=torch.float64)
    chart = Chart(base, subspaces)
    objective = Objective(engine, chart, batches, range(batches.size), ridge=0.3)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(chart.size, generator=generator, dtype=torch.float64)
    _, gradient = objective(z)
    # The loss is quadratic: central differences are exact but for rounding in float32.
    step = 1e-2
    for k in range(chart.size):
        up, down = z.clone(), z.clone()
        up[k] += step
        down[k] -= step
        slope = (objective(up)[0] - objective(down)[0]) / (2 * step)
        assert abs(slope - float(gradient[k])) < 2e-3 * max(1.0, abs(slope))


class Frozen(LinearTask):
    """Its first layer is frozen, although the checkpoints differ in it."""

    def build_model(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        model[0].requires_grad_(False)
        return model

    def states(self, n):
        return states_of(
            n,
            shapes={"0.weight": (6, 6), "0.bias": (6,), "1.weight": (4, 6), "1.bias": (4,)},
            scale=0.3,
        )


class Sparse(LinearTask):
    """Its embedding's gradients are sparse."""

    def __init__(self):
        super().__init__(examples=60)
        self.x = torch.randint(9, (60, 3), generator=torch.Generator().manual_seed(0))

    def build_model(self):
        return nn.Sequential(nn.EmbeddingBag(9, 6, sparse=True), nn.Linear(6, 4))

    def states(self, n):
        shapes = {"0.weight": (9, 6), "1.weight": (4, 6), "1.bias": (4,)}
        return states_of(n, shapes=shapes, scale=0.3)


@pytest.mark.parametrize("kind", [Frozen, Sparse])
def test_frozen_parameters_and_sparse_gradients_count(tmp_path, kind):
    task = kind()
    save_run(tmp_path, task.states(5))
    engine, grams, batches = engine_for(task, tmp_path)
    chart = Chart(window(5, 5)[None], [make_subspace(grams.exact.sum(0))])
    objective = Objective(engine, chart, batches, range(batches.size))
    z = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    _, gradient = objective(z)
    step = 1e-2
    for k, along in enumerate(step * torch.eye(4, dtype=torch.float64)):
        slope = (objective(z + along)[0] - objective(z - along)[0]) / (2 * step)
        assert slope == pytest.approx(float(gradient[k]), rel=5e-3, abs=5e-3)


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_the_models_own_is_no_direction(tmp_path):
    """A counter that no part of the model reads is longer than all of its weights."""
    task = LinearTask()
    for name, state in (("plain", {}), ("more", {"tokens_seen": torch.tensor(1e6)})):
        states = [s | {k: i * v for k, v in state.items()} for i, s in enumerate(task.states(5))]
        save_run(tmp_path / name, states)
    found = [
        merge([tmp_path / name], task, tmp_path / f"{name}-m", fit=FitConfig(ridge=0.01))
        for name in ("plain", "more")
    ]
    plain, more = (document["subspace"] for document in found)
    assert (more["rank"], more["explained"]) == (plain["rank"], plain["explained"])
    assert found[1]["coefficients"]["global"] == found[0]["coefficients"]["global"]


class Shared(LinearTask):
    def build_model(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
        model[1] = model[0]
        return model


@pytest.mark.usefixtures("undrawn")
def test_a_tensor_that_was_saved_twice_counts_once(tmp_path):
    task = Shared()
    shapes = {"0.weight": (6, 6), "0.bias": (6,), "2.weight": (4, 6), "2.bias": (4,)}
    states = states_of(4, shapes=shapes)
    save_run(tmp_path / "once", states)
    twice = [s | {f"1.{k}": s[f"0.{k}"].clone() for k in ("weight", "bias")} for s in states]
    save_run(tmp_path / "twice", twice)
    once, again = (
        merge([tmp_path / name], task, tmp_path / f"{name}-m", fit=FitConfig(blocks="global"))
        for name in ("once", "twice")
    )
    assert again["subspace"]["explained"] == once["subspace"]["explained"]
    assert again["coefficients"]["global"] == once["coefficients"]["global"]


def exact_optimum(task: LinearTask, states, blockwise: bool) -> float:
    """Least loss over all coefficients that add up to one, by float64 least squares."""
    x = torch.cat([task.x, torch.ones(len(task.x), 1)], 1).double()
    if blockwise:
        predictions = [
            torch.stack([x[:, :-1] @ s["0.weight"].double().T for s in states]),
            torch.stack([(x[:, -1:] @ s["0.bias"].double()[None]) for s in states]),
        ]
    else:
        full = [torch.cat([s["0.weight"], s["0.bias"][:, None]], 1).double() for s in states]
        predictions = [torch.stack([x @ w.T for w in full])]
    target = task.y.double() - sum(p.mean(0) for p in predictions)
    columns = torch.cat([(p[:-1] - p[-1]).flatten(1) for p in predictions]).T
    # α = 1/n + any direction that adds up to zero.
    solution = torch.linalg.lstsq(columns, target.reshape(-1, 1), driver="gelsd").solution
    rest = target.reshape(-1) - (columns @ solution)[:, 0]
    return float(rest.square().sum() / len(task.x))


@pytest.mark.parametrize("by_tensor", [False, True])
def test_the_fit_finds_the_optimum_of_the_span(tmp_path, by_tensor):
    task = LinearTask()
    states = task.states(6)
    save_run(tmp_path / "run", states)
    engine, grams, batches = engine_for(task, tmp_path / "run", by_tensor=by_tensor)
    subspaces = [make_subspace(g) for g in grams.by_block(engine.blocks)]
    chart = Chart(torch.full((len(subspaces), 6), 1 / 6, dtype=torch.float64), subspaces)
    fitter = fitter_for(engine, batches, tmp_path, ridge=0.0, max_evaluations=60)
    fitted = fitter.stage("twa", chart)
    optimum = exact_optimum(task, states, by_tensor)
    assert fitted.result.loss - optimum < 1e-4
    assert fitted.result.loss - optimum > -1e-4
    assert (fitted.alphas.sum(1) - 1).abs().max() < 1e-12


def test_the_optimum_takes_at_most_15_evaluations(tmp_path):
    task = LinearTask()
    states = task.states(6)
    save_run(tmp_path / "run", states)
    engine, grams, batches = engine_for(task, tmp_path / "run")
    chart = Chart(
        torch.full((1, 6), 1 / 6, dtype=torch.float64), [make_subspace(grams.exact.sum(0))]
    )
    fitter = fitter_for(engine, batches, tmp_path, ridge=0.0, max_evaluations=15)
    assert fitter.stage("twa", chart).result.loss - exact_optimum(task, states, False) < 1e-4


def test_a_strong_ridge_stays_at_the_base(tmp_path):
    task = LinearTask()
    save_run(tmp_path / "run", task.states(4))
    engine, grams, batches = engine_for(task, tmp_path / "run")
    base = torch.tensor([[0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    chart = Chart(base, [make_subspace(grams.exact.sum(0))])
    fitted = fitter_for(engine, batches, tmp_path, ridge=1e6).stage("twa", chart)
    torch.testing.assert_close(fitted.alphas, base, rtol=0, atol=1e-4)


def test_the_start_is_the_best_window(tmp_path):
    task = LinearTask()
    states = task.states(4)
    # An early checkpoint far off ruins the mean.
    states[0]["0.weight"] = states[0]["0.weight"] + 50
    save_run(tmp_path / "run", states)
    engine, _, batches = engine_for(task, tmp_path / "run")
    start = fitter_for(engine, batches, tmp_path).start(4)
    assert start[0, 0] == 0


def test_dropout_is_off_and_evaluations_repeat_to_the_bit(tmp_path):
    class Dropping(LinearTask):
        def build_model(self):
            return nn.Sequential(nn.Linear(self.inputs, self.outputs), nn.Dropout(0.5))

    task = Dropping()
    save_run(tmp_path, task.states(3))
    engine, grams, batches = engine_for(task, tmp_path)
    chart = Chart(
        torch.full((1, 3), 1 / 3, dtype=torch.float64), [make_subspace(grams.exact.sum(0))]
    )
    objective = Objective(engine, chart, batches, range(batches.size))
    z = torch.ones(2, dtype=torch.float64)
    first, second = objective(z), objective(z)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_random_augmentation_is_the_same_in_every_evaluation(tmp_path):
    class Augmenting(Pairs):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn_like(x) + random.random() + np.random.rand(), y

    class Task(LinearTask):
        def dataset(self):
            return Augmenting(self.x, self.y)

    task = Task()
    batches = Batches(task.dataset(), task, 16, 0, World())
    one = [b[0] for _, b, _ in batches.rounds(range(60))]
    batches._cache.clear()
    two = [b[0] for _, b, _ in batches.rounds(range(60))]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def engine_with_metrics(task, folder, together):
    """Of a task whose only metric is its loss once more, in a pass of its own or in the same."""
    if together:
        task.loss_and_metrics = lambda model, batch: (
            (losses := task.loss(model, batch)),
            {"again": losses},
        )
    else:
        task.metrics = lambda model, batch: {"again": task.loss(model, batch)}
    save_run(folder, task.states(2))
    engine, _, batches = engine_for(task, folder)
    return engine, batches


@pytest.mark.parametrize("together", [False, True])
def test_a_loss_may_edit_and_empty_its_batch(tmp_path, together):
    class Encoded(LinearTask):
        def collate(self, examples):
            x, y = default_collate(examples)
            return BatchEncoding({"x": x, "parts": [y]})

        def loss(self, model, batch):
            x = batch.pop("x").sub_(0.1)
            return super().loss(model, (x, batch["parts"].pop().mul_(2.0)))

    task = Encoded()
    engine, batches = engine_with_metrics(task, tmp_path, together)
    alphas = torch.full((1, 2), 0.5, dtype=torch.float64)
    loss, _ = engine.loss_and_products(alphas, batches, range(60))
    for _ in range(2):
        losses, metrics = engine.example_losses(batches, range(60), with_metrics=True)
        assert torch.equal(metrics["again"], losses)
        assert float(losses.mean()) == pytest.approx(loss)


@pytest.mark.parametrize("together", [False, True])
def test_a_loss_that_draws_is_a_function_of_the_weights(tmp_path, together):
    class Noisy(LinearTask):
        def loss(self, model, batch):
            x, y = batch
            drawn.append((torch.randn_like(x), torch.rand(1), np.random.rand(), random.random()))
            x = x + drawn[-1][0] * sum(drawn[-1][1:])
            return super().loss(model, (x, y))

    def state():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    task, drawn = Noisy(), []
    engine, batches = engine_with_metrics(task, tmp_path, together)
    alphas, before = torch.full((1, 2), 0.5, dtype=torch.float64), state()
    loss, products = engine.loss_and_products(alphas, batches, range(60))
    assert len({d[1:] for d in drawn}) == 4, "each batch has noise of its own"
    assert torch.equal(engine.loss_and_products(alphas, batches, range(60))[1], products)
    losses, metrics = engine.example_losses(batches, range(60), with_metrics=True)
    assert torch.equal(metrics["again"], losses)
    assert float(losses.mean()) == pytest.approx(loss)
    assert state() == before


def test_a_loss_that_is_not_per_example_is_explained(tmp_path):
    class Summed(LinearTask):
        def loss(self, model, batch):
            return super().loss(model, batch).mean()

    save_run(tmp_path, LinearTask().states(2))
    engine, _, batches = engine_for(Summed(), tmp_path)
    with pytest.raises(TaskError, match="one number per example"):
        engine.example_losses(batches, range(8))


def test_an_exception_in_the_task_says_where(tmp_path):
    class Broken(LinearTask):
        def loss(self, model, batch):
            raise KeyError("labels")

    save_run(tmp_path, LinearTask().states(2))
    engine, _, batches = engine_for(Broken(), tmp_path)
    with pytest.raises(TaskError, match=r"test_objective\.py, line"):
        engine.example_losses(batches, range(8))


def test_a_loss_without_gradients_is_explained(tmp_path):
    task = LinearTask()
    task.loss = torch.no_grad()(task.loss)
    run, out = tmp_path / "run", tmp_path / "merged"
    save_run(run, task.states(3))
    with pytest.raises(TaskError, match="does not depend on the model's parameters"):
        merge([run], task, out)
    assert not out.exists()


class Backbone(LinearTask):
    """The checkpoints share their first layer; batches of ``without`` depend on that alone.

    Notes which parameters ask for gradients in each use of the loss.
    """

    without = ()

    def __init__(self):
        super().__init__()
        self.asked: list[tuple[bool, ...]] = []

    def build_model(self):
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))

    def states(self, n):
        first = states_of(1, shapes={"0.weight": (6, 6), "0.bias": (6,)}, scale=0.3)[0]
        shapes = {"1.weight": (4, 6), "1.bias": (4,)}
        return [first | own for own in states_of(n, shapes=shapes, scale=0.3)]

    def loss(self, model, batch):
        if torch.is_grad_enabled():
            self.asked.append(tuple(p.requires_grad for p in model.parameters()))
        if len(self.asked) in self.without:
            return model[0](batch[0]).square().mean(1)
        return super().loss(model, batch)


@pytest.mark.usefixtures("undrawn")
def test_no_gradients_are_taken_of_what_all_checkpoints_share(tmp_path):
    """A frozen backbone costs a fit no backward pass, and changes nothing in it."""
    task, whole = Backbone(), Backbone()
    save_run(tmp_path / "run", task.states(4))
    fit = FitConfig(blocks="tensors", ridge=0.01)
    found = merge([tmp_path / "run"], task, tmp_path / "merged", fit=fit)
    assert set(task.asked) == {(False, False, True, True)}
    # Of the paper's uncentred span the shared layer is a part.
    linear = FitConfig(blocks="global", ridge=0.01, span="linear")
    merge([tmp_path / "run"], whole, tmp_path / "linear", fit=linear)
    assert set(whole.asked) == {(True,) * 4}
    patch = pytest.MonkeyPatch()
    patch.setattr("twa_merge.model.LiveModel.freeze", lambda self, names: None)
    thawed = merge([tmp_path / "run"], task, tmp_path / "thawed", fit=fit)
    patch.undo()
    assert thawed["coefficients"] == found["coefficients"]


class Inner(LinearTask):
    """A loss that takes gradients for itself, all of the model's among them."""

    def loss(self, model, batch):
        losses = super().loss(model, batch)
        if torch.is_grad_enabled():
            super().loss(model, batch).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            model.zero_grad()
        return losses


def test_gradients_that_a_loss_takes_for_itself_are_its_own(tmp_path):
    save_run(tmp_path, LinearTask().states(3))
    found = []
    for task in (LinearTask(), Inner()):
        engine, _, batches = engine_for(task, tmp_path)
        engine.losses_of((task.x, task.y), len(task.x))  # before any sum was begun
        alphas = torch.full((1, 3), 1 / 3, dtype=torch.float64)
        found.append(engine.loss_and_products(alphas, batches, range(batches.size)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


class OwnNoise(LinearTask):
    generator = torch.Generator().manual_seed(0)

    def loss(self, model, batch):
        losses = super().loss(model, batch)
        return losses * torch.rand(len(losses), generator=self.generator)


class BatchMean(LinearTask):
    def loss(self, model, batch):
        return super().loss(model, batch).mean().expand(len(batch[0]))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("task", "said"),
    [(OwnNoise, "generator of its own"), (BatchMean, "have the same loss"), (LinearTask, "")],
)
def test_losses_that_are_not_what_they_seem_are_told(tmp_path, task, said):
    save_run(tmp_path / "run", task().states(3))
    notes = []
    fit, guard = FitConfig(blocks="global", ridge=0.1), GuardConfig(candidates="last,twa")
    merge([tmp_path / "run"], task(), tmp_path / "m", fit=fit, guard=guard, progress=notes.append)
    told = [e.text for e in notes if isinstance(e, Noted) and "loss" in e.text]
    assert len(told) == bool(said)
    assert all(said in text for text in told)


@pytest.mark.usefixtures("undrawn")
def test_a_batch_may_depend_on_nothing_that_differs(tmp_path):
    """As where experts are chosen of which one alone was tuned."""
    task = Backbone()
    task.without = (2,)
    save_run(tmp_path / "run", task.states(4))
    data = DataConfig(batch_size=16)
    fit = FitConfig(blocks="global", ridge=0.01)
    merge([tmp_path / "run"], task, tmp_path / "merged", fit=fit, data_config=data)
    assert task.asked[1:3] == [(False, False, True, True), (True,) * 4]
    task.loss = torch.no_grad()(task.loss)
    with pytest.raises(TaskError, match="does not depend on the model's parameters"):
        merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, data_config=data)


def test_a_fit_that_is_nan_everywhere_returns_its_base(tmp_path):
    class Nan(LinearTask):
        def loss(self, model, batch):
            return super().loss(model, batch) * math.nan

    task = Nan()
    save_run(tmp_path / "run", task.states(3))
    engine, grams, batches = engine_for(task, tmp_path / "run")
    base = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    fitted = fitter_for(engine, batches, tmp_path).stage(
        "twa", Chart(base, [make_subspace(grams.exact.sum(0))])
    )
    assert torch.equal(fitted.alphas, base)
    assert fitted.result.loss == math.inf


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_papers_optimizers_come_near_the_optimum(tmp_path, optimizer):
    task = LinearTask()
    states = task.states(5)
    save_run(tmp_path / "run", states)
    engine, grams, batches = engine_for(task, tmp_path / "run")
    chart = Chart(torch.full((1, 5), 0.2, dtype=torch.float64), [make_subspace(grams.exact.sum(0))])
    options = {"sgd": {"lr": 0.02}, "adamw": {"lr": 0.1}}[optimizer]
    fitter = fitter_for(engine, batches, tmp_path, optimizer=optimizer, epochs=30, **options)
    fitted = fitter.stage("twa", chart)
    found = fitter.score(fitted.alphas, range(batches.size))
    assert found - exact_optimum(task, states, False) < 1e-2


def test_sharpness_aware_steps_and_label_free_losses_run(tmp_path):
    task = LinearTask()
    save_run(tmp_path / "run", task.states(4))
    engine, grams, batches = engine_for(task, tmp_path / "run")
    chart = Chart(
        torch.full((1, 4), 0.25, dtype=torch.float64), [make_subspace(grams.exact.sum(0))]
    )
    fitter = fitter_for(engine, batches, tmp_path, optimizer="sgd", lr=0.02, sharpness=0.05)
    before = fitter.score(chart.base, range(batches.size))
    assert fitter.score(fitter.stage("twa", chart).alphas, range(batches.size)) < before


class Normed(LinearTask):
    """Batch norm over single features, which needs two examples at least."""

    def build_model(self):
        return nn.Sequential(nn.Linear(self.inputs, self.outputs), nn.BatchNorm1d(self.outputs))

    def states(self, n: int, spread: float = 0.5, seed: int = 1):
        norm = {f"1.{k}": v for k, v in nn.BatchNorm1d(self.outputs).state_dict().items()}
        states = [s | {k: v.clone() for k, v in norm.items()} for s in super().states(n, seed=seed)]
        for i, state in enumerate(states):
            # The same in all of them would be those of a frozen layer.
            state["1.running_mean"] += 0.01 * i
        return states


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("optimizer", ["lbfgs", "sgd"])
@pytest.mark.parametrize("examples", [7, 44, 230])
def test_no_example_is_left_alone_with_batch_norm(tmp_path, optimizer, examples):
    # A fold of 5 fit examples holds out one, 33 are a batch of 32 and one more, and of 173 a greedy
    # soup without a fold sees 129.
    task = Normed(examples=examples)
    save_run(tmp_path / "run", task.states(4))
    fit = FitConfig(optimizer=optimizer, **({"epochs": 2} if optimizer == "sgd" else {}))
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit)
    assert all(math.isfinite(row["guard_loss"]) for row in document["candidates"])
    batches = Batches(task.dataset(), task, 32, 0, World())
    assert [len(part) for part in batches.parts(range(97))] == [32, 32, 33]
    assert [len(part) for part in batches.parts(range(98))] == [32, 32, 32, 2]
    assert [len(part) for part in batches.parts(range(1))] == [1]


@pytest.mark.usefixtures("undrawn")
def test_statistics_of_few_examples_are_not_trusted_and_candidates_judged_as_written(tmp_path):
    task = Normed(examples=44)
    save_run(tmp_path / "run", task.states(4))
    document = merge([tmp_path / "run"], task, tmp_path / "out")
    rows = {row["name"]: row for row in document["candidates"]}
    assert {row["batch_norm"] for row in rows.values()} == {"average"}
    # With all four folds the evidence is the loss of all examples, by the statistics as saved.
    assert rows["last"]["selection_examples"] == 44
    model = task.build_model().eval()
    model.load_state_dict(task.states(4)[-1])
    own = float(task.loss(model, (task.x, task.y)).detach().double().mean())
    assert rows["last"]["selection_loss"] == pytest.approx(own, rel=1e-5)


class Twice(nn.Module):
    """One network under two names, as both towers of a siamese one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.first, self.second = network, network

    def forward(self, x):
        return (self.first(x) + self.second(x)) / 2


class Siamese(Normed):
    def build_model(self):
        return Twice(super().build_model())

    def states(self, n: int, spread: float = 0.5, seed: int = 1):
        towers = ("first", "second")
        return [
            {f"{tower}.{k}": v.clone() for tower in towers for k, v in state.items()}
            for state in super().states(n, seed=seed)
        ]


@pytest.mark.usefixtures("undrawn")
def test_a_layer_that_was_saved_twice_has_its_statistics_written_twice(tmp_path):
    task = Siamese(examples=200)
    # No checkpoint is any good with the statistics that it was saved with.
    spoilt = [
        {k: v + 10.0 if k.endswith("running_mean") else v for k, v in state.items()}
        for state in task.states(4)
    ]
    save_run(tmp_path / "run", spoilt)
    guard = GuardConfig(candidates="uniform", batch_norm="reestimate")
    fit = FitConfig(blocks="global", ridge=0.1, max_evaluations=2)
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, guard=guard)
    model = task.build_model().eval()
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert document["chosen"] == "uniform"
    assert not torch.equal(state["first.1.running_mean"], spoilt[-1]["first.1.running_mean"])
    for name in ("running_mean", "running_var"):
        assert torch.equal(state[f"first.1.{name}"], state[f"second.1.{name}"])
    model.load_state_dict(state)
    guarded = split(task, DataConfig().guard_fraction, 0).guard
    x, y = (torch.stack(column) for column in zip(*guarded, strict=True))
    judged = next(c["guard_loss"] for c in document["candidates"] if c["name"] == "uniform")
    assert float(task.loss(model, (x, y)).detach().double().mean()) == pytest.approx(
        judged, rel=1e-5
    )


def test_a_batch_of_one_with_batch_norm_is_said(tmp_path):
    task = Normed(examples=20)
    save_run(tmp_path / "run", task.states(4))
    with pytest.raises(TaskError, match="cannot normalise a single example") as error:
        merge([tmp_path / "run"], task, tmp_path / "out", data_config=DataConfig(batch_size=1))
    assert "--batch-size" in error.value.details["what to do"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("blocks", ["layers", "tensors"])
def test_blocks_of_a_model_that_has_none_are_said(tmp_path, blocks):
    task = LinearTask()
    task.build_model = lambda: nn.Sequential(nn.Linear(task.inputs, task.outputs, bias=False))
    save_run(tmp_path / "run", [{"0.weight": s["0.weight"]} for s in task.states(4)])
    said: list[object] = []
    fit = FitConfig(blocks=blocks, ridge=0.1, max_evaluations=2)
    merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, progress=said.append)
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any(f"--blocks {blocks}: the model has no layers" in note for note in notes)
    with pytest.raises(ConfigError, match="no fit by block"):
        merge(
            [tmp_path / "run"],
            task,
            tmp_path / "other",
            fit=FitConfig(blocks="global"),
            guard=GuardConfig(candidates="last,twa-layers"),
        )
    guard = GuardConfig(candidates="last,twa")
    with pytest.raises(ConfigError, match="a fit that no candidate comes from") as caught:
        merge([tmp_path / "run"], task, tmp_path / "other", fit=fit, guard=guard)
    assert caught.value.details["expected"].startswith(f"twa-{blocks} among the --candidates")


@pytest.mark.usefixtures("undrawn")
def test_a_last_step_to_nowhere_ends_in_another_candidate(tmp_path):
    task = LinearTask()
    save_run(tmp_path / "run", task.states(4))
    fit = FitConfig(optimizer="adamw", lr=1e200, weight_decay=1e200, epochs=1)
    document = merge(
        [tmp_path / "run"], task, tmp_path / "out", fit=fit, data_config=DataConfig(batch_size=512)
    )
    assert all(math.isfinite(row["guard_loss"]) for row in document["candidates"])


@pytest.mark.usefixtures("undrawn")
def test_a_learning_rate_that_is_too_high_is_said_and_ends_in_another_candidate(tmp_path):
    task = LinearTask(examples=80)
    save_run(tmp_path / "run", task.states(4))
    said: list[object] = []
    fit = FitConfig(optimizer="sgd", lr=1e12, epochs=3)
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, progress=said.append)
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any("twa diverged after" in note and "--lr" in note for note in notes)
    assert all(math.isfinite(row["guard_loss"]) for row in document["candidates"])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("lr", "rises"), [(3.0, True), (0.02, False)])
def test_a_fit_that_ends_above_its_start_is_told(tmp_path, lr, rises):
    task = LinearTask(examples=80)
    save_run(tmp_path / "run", task.states(4))
    said: list[object] = []
    fit = FitConfig(optimizer="sgd", lr=lr, epochs=3, blocks="global")
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, progress=said.append)
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any("twa ended at a loss of" in note and "--lr" in note for note in notes) == rises
    # The least loss that is shown is that of an epoch, not of a lucky batch.
    shown = [event for event in said if isinstance(event, Evaluated)]
    losses = [event.loss for event in shown]
    epoch = len(losses) // 3
    means = [sum(losses[k : k + epoch]) / epoch for k in (0, epoch)]
    assert shown[-1].best == pytest.approx(min(means))
    rows = {row["name"]: row for row in document["candidates"]}
    assert rows[document["chosen"]]["guard_loss"] <= rows["uniform"]["guard_loss"]


class Metrics(LinearTask):
    """Gives what ``names`` says, batch by batch."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.batches = names, 0

    def metrics(self, model, batch):
        name = self.names[min(self.batches, len(self.names) - 1)]
        self.batches += 1
        return {} if name is None else {name: torch.ones(len(batch[0]))}


@pytest.mark.parametrize("names", [("a", None), (None, "a"), ("a", "b"), ("",), (3,)])
def test_metrics_have_one_name_in_all_batches(tmp_path, names):
    """Those that a batch lacks would count as 0, and an empty name as the loss."""
    task = Metrics(*names)
    save_run(tmp_path / "run", task.states(3))
    with pytest.raises(TaskError, match="metric"):
        evaluate([tmp_path / "run"], task)


class Counting(LinearTask):
    """With a counter, and a mask that a network of halves has saved as such."""

    def build_model(self):
        model = super().build_model()
        model.register_buffer("mask", torch.tensor([True, False, True]))
        model.register_buffer("count", torch.tensor(0))
        return model

    def loss(self, model, batch):
        assert int(model.count) == 7
        assert model.mask.tolist() == [False, True, True]
        return super().loss(model, batch)


@pytest.mark.usefixtures("undrawn")
def test_whole_numbers_that_were_saved_as_floats_are_the_newest_ones(tmp_path):
    """As ``{k: v.half() for k, v in model.state_dict().items()}`` leaves them."""
    task = Counting()
    states = [
        {**state, "count": torch.tensor(float(k)).half(), "mask": torch.tensor([0.0, 1, 1]).half()}
        for k, state in zip((3, 5, 7), task.states(3), strict=True)
    ]
    save_run(tmp_path / "run", states)
    quick = GuardConfig(candidates="quick")
    merge([tmp_path / "run"], task, tmp_path / "m", guard=quick)
    evaluated = evaluate([tmp_path / "run" / "checkpoint-300"], task)
    assert math.isfinite(evaluated["models"][0]["loss"])


def test_batches_are_kept_up_to_a_size_that_is_known():
    class Held:
        def __init__(self):
            self.points = np.zeros((1000, 100))

    array = np.zeros((1000, 100))
    for batch in (array, [array], {"a": array}, Held(), torch.zeros(1000, 200)):
        assert 800_000 <= nbytes(batch) < 801_000


def test_where_a_training_got_worse_the_fit_starts_at_its_best_checkpoint(tmp_path):
    task = LinearTask()
    states = task.states(8)
    # Every mean of the last ones has one far off in it.
    for state in states[3:]:
        state["0.weight"] = state["0.weight"] + 50
    save_run(tmp_path / "run", states)
    engine, _, batches = engine_for(task, tmp_path / "run")
    fitter = fitter_for(engine, batches, tmp_path)
    start = fitter.start(8, singles=True)[0]
    assert int(start.argmax()) == int(fitter.single_losses(8).mean(1).argmin()) < 3
    assert float(start.max()) == 1.0
    assert fitter.start(8)[0].count_nonzero() in (1, 2, 4, 8)


@pytest.mark.usefixtures("undrawn")
def test_how_far_the_winner_is_ahead_is_measured_on_all_of_the_guard_split(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_GUARD_EXAMPLES", 20)
    task = LinearTask(examples=200)
    save_run(tmp_path / "run", task.states(4))
    document = merge([tmp_path / "run"], task, tmp_path / "m")
    assert document["data"]["guard_examples_used"] == 20
    assert document["data"]["guard_examples"] == 50
    found = document["improvement"]
    assert found["examples"] == 50
    guard = split(task, 0.25, 0).guard
    x, y = default_collate([guard[i] for i in range(50)])
    by_loss = {}
    for folder in ("m", *(f"run/checkpoint-{step}" for step in (100, 200, 300, 400))):
        model = task.build_model()
        model.load_state_dict(load_file(tmp_path / folder / "model.safetensors"))
        with torch.no_grad():
            by_loss[folder] = float(task.loss(model, (x, y)).double().mean())
    ours = by_loss.pop("m")
    assert min(abs(found["mean"] - (loss - ours)) for loss in by_loss.values()) < 1e-5


def test_the_start_is_looked_for_in_batches_that_are_alike(tmp_path):
    class AmongOthers(LinearTask):
        """As a loss against the negatives in a batch: the fewer they are, the less it is."""

        def loss(self, model, batch):
            return super().loss(model, batch) + math.log(len(batch[0]))

    task = AmongOthers(examples=300)
    generator = torch.Generator().manual_seed(0)
    states = [
        {"0.weight": w, "0.bias": torch.zeros(task.outputs)}
        for w in task.truth + 0.01 * torch.randn(8, *task.truth.shape, generator=generator)
    ]
    save_run(tmp_path / "run", states)
    engine, _, batches = engine_for(task, tmp_path / "run")
    start = fitter_for(engine, batches, tmp_path).start(8, singles=True)[0]
    assert start.count_nonzero() > 1


def test_fits_that_a_ridge_is_chosen_by_go_no_further_than_the_last_one(tmp_path):
    task = LinearTask()
    save_run(tmp_path, task.states(5))
    engine, _, batches = engine_for(task, tmp_path, by_tensor=False)
    usual = fitter_for(engine, batches, tmp_path)
    trial, whole = usual.trial(), usual.whole(batches.size)
    assert trial.evaluations < whole.evaluations
    assert trial.tolerance > whole.tolerance
    hasty = fitter_for(engine, batches, tmp_path, max_evaluations=3, tolerance=0.1)
    trial, whole = hasty.trial(), hasty.whole(batches.size)
    assert (trial.evaluations, trial.tolerance) == (whole.evaluations, whole.tolerance)
