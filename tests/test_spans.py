"""The paper's linear span and random directions, from the gradient to the written file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import LinearTask, save_run
from safetensors.torch import load_file
from test_objective import fitter_for
from torch import nn

import twa_merge.pipeline
from twa_merge import average, merge
from twa_merge.batches import Batches
from twa_merge.checkpoints import Checkpoint, open_checkpoints
from twa_merge.config import (
    DataConfig,
    EngineConfig,
    FitConfig,
    GuardConfig,
    OutputConfig,
    StoreConfig,
)
from twa_merge.distributed import World
from twa_merge.errors import ConfigError
from twa_merge.ingest import ingest
from twa_merge.layout import global_block, make_layout, tensor_blocks
from twa_merge.model import build
from twa_merge.objective import Engine, Objective
from twa_merge.progress import Noted, silent
from twa_merge.random_directions import DirectionReader, RandomDirections, draw
from twa_merge.random_store import RandomStore
from twa_merge.store import make_store
from twa_merge.subspace import (
    Chart,
    make_subspace,
    random_subspace,
    root_mean_square,
    with_centre,
)
from twa_merge.tensors import tensor_rows

TESTS = Path(__file__).parent
LINEAR = FitConfig(span="linear", blocks="global", ridge=0.0)
RANDOM = FitConfig(subspace="random:6", ridge=0.0)


def no_report(document, plane) -> str:
    return ""


def no_landscape(*args) -> None:
    return None


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    """Drawing them takes longer than all the rest."""
    if not getattr(request.function, "pictures", False):
        monkeypatch.setattr(twa_merge.pipeline, "html_report", no_report)
        monkeypatch.setattr(twa_merge.pipeline, "landscape", no_landscape)


def engine_for(task, folder: Path, *, by_tensor: bool = False, kind: str = "device"):
    world = World()
    checkpoints = open_checkpoints([folder])
    layout = make_layout(checkpoints)
    live = build(task, layout, checkpoints[-1], world)
    blocks = tensor_blocks(layout) if by_tensor else global_block(layout)
    store = make_store(checkpoints, layout, blocks, world, StoreConfig(kind), shared={})
    grams = ingest(checkpoints, layout, world, store=store, shared={})
    batches = Batches(task.dataset(), task, 16, 0, world)
    return Engine(live, store, blocks, task, world), grams, batches


def flat(state) -> torch.Tensor:
    return torch.cat([v.double().reshape(-1) for v in state.values()])


def flat_of_all(states) -> torch.Tensor:
    return torch.stack([flat(s) for s in states])


def loss_at(task: LinearTask, weights: torch.Tensor) -> float:
    """Mean loss, in float64, of flat weights in the order bias, weight or weight, bias."""
    shape = (task.outputs, task.inputs)
    matrix, bias = weights.split([task.outputs * task.inputs, task.outputs])
    out = task.x.double() @ matrix.view(shape).T + bias
    return float((out - task.y.double()).square().sum(1).mean())


def optimum(task: LinearTask, start: torch.Tensor, directions: torch.Tensor) -> float:
    """Least loss over start + span of the directions (k, D), by float64 least squares."""

    def predictions(weights: torch.Tensor) -> torch.Tensor:
        matrix, bias = weights.split([task.outputs * task.inputs, task.outputs])
        matrix = matrix.view(task.outputs, task.inputs)
        return (task.x.double() @ matrix.T + bias).reshape(-1)

    zero = predictions(torch.zeros_like(start))
    columns = torch.stack([predictions(d) - zero for d in directions], 1)
    target = task.y.double().reshape(-1) - predictions(start)
    solution = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution
    return float((target - (columns @ solution)[:, 0]).square().sum() / len(task.x))


def shrunk(task: LinearTask, n: int, factor: float = 0.8, spread: float = 0.5):
    """Checkpoints around a multiple of the truth: the best scale is not one."""
    return [{k: factor * v for k, v in s.items()} for s in task.states(n, spread)]


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    a, b = written(one), written(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


# The linear span.


@pytest.mark.parametrize("kind", ["device", "disk"])
@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("along", [0.3, -1.0])
def test_the_linear_gradient_is_that_of_finite_differences(tmp_path, kind, by_tensor, along):
    """Along −1 nothing of the centre is left in the weights to tell its product from."""
    task = LinearTask()
    save_run(tmp_path, shrunk(task, 4))
    engine, grams, batches = engine_for(task, tmp_path, by_tensor=by_tensor, kind=kind)
    subspace = with_centre(make_subspace(grams.exact.sum(0)), grams.centre, grams.cross)
    assert subspace.span == "linear"
    chart = Chart(torch.full((1, 4), 0.25, dtype=torch.float64), [subspace])
    objective = Objective(engine, chart, batches, range(batches.size), ridge=0.3)
    z = torch.tensor([0.4, -0.9, 0.2, along], dtype=torch.float64)
    _, gradient = objective(z)
    step = 1e-2
    for k, unit in enumerate(torch.eye(4, dtype=torch.float64)):
        slope = (objective(z + step * unit)[0] - objective(z - step * unit)[0]) / (2 * step)
        assert abs(slope - float(gradient[k])) < 2e-3 * max(1.0, abs(slope))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "lbfgs", "ridge": 0.0, "max_evaluations": 60},
        {"optimizer": "sgd", "lr": 0.02, "epochs": 30},
        {"optimizer": "adamw", "lr": 0.1, "epochs": 30},
    ],
)
def test_every_optimizer_finds_the_optimum_of_the_linear_span(tmp_path, options):
    task = LinearTask()
    states = shrunk(task, 4)
    save_run(tmp_path / "run", states)
    weights = flat_of_all([{k: s[k] for k in ("0.weight", "0.bias")} for s in states])
    best = optimum(task, torch.zeros(28, dtype=torch.float64), weights)
    affine = optimum(task, weights[0], weights[1:] - weights[0])
    assert affine > best + 0.1
    engine, grams, batches = engine_for(task, tmp_path / "run")
    subspace = with_centre(make_subspace(grams.exact.sum(0)), grams.centre, grams.cross)
    fitter = fitter_for(engine, batches, tmp_path, **options)
    fitted = fitter.stage("twa", Chart(torch.full((1, 4), 0.25).double(), [subspace]))
    found = loss_at(task, fitted.alphas[0] @ weights)
    assert -1e-9 < found - best < (1e-4 if options["optimizer"] == "lbfgs" else 1e-2)


def test_a_linear_merge_is_written_exactly_and_again_from_its_report(tmp_path):
    task = LinearTask(examples=80)
    states = shrunk(task, 5)
    save_run(tmp_path / "run", states)
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=LINEAR)
    assert document["chosen"] == "twa"
    alphas = document["coefficients"]["global"]
    assert sum(alphas) > 1.1
    for name, tensor in written(tmp_path / "out").items():
        expected = sum(a * s[name].double() for a, s in zip(alphas, states, strict=True))
        assert torch.equal(tensor, expected.float())
    assert document["subspace"]["rank"] == 5
    assert document["subspace"]["orthogonality_error"] < 1e-5
    assert f"add up to {sum(alphas):.6g}" in (tmp_path / "out" / "README.md").read_text()
    average([tmp_path / "run"], tmp_path / "again", weights=f"@{tmp_path / 'out/twa_merge.json'}")
    assert_equal(tmp_path / "out", tmp_path / "again")


def test_blocks_around_a_linear_solution_keep_its_sum(tmp_path):
    task = LinearTask(examples=80)
    save_run(tmp_path / "run", shrunk(task, 5))
    fit = dataclasses.replace(LINEAR, blocks="tensors", start="last")
    guard = GuardConfig(candidates="twa,twa-layers")
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, guard=guard)
    assert document["chosen"] == "twa-tensors"
    sums = {round(sum(row), 9) for row in document["coefficients"]["blocks"].values()}
    assert sums == {round(sum(document["coefficients"]["global"]), 9)}
    average([tmp_path / "run"], tmp_path / "again", weights=f"@{tmp_path / 'out/twa_merge.json'}")
    assert_equal(tmp_path / "out", tmp_path / "again")


def test_the_linear_span_of_leading_axes_and_of_identical_checkpoints(tmp_path):
    task = LinearTask(examples=160)
    states = shrunk(task, 5)
    save_run(tmp_path / "run", states)
    fit = dataclasses.replace(LINEAR, subspace="pca:2")
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit)
    assert document["subspace"]["rank"] == 3
    save_run(tmp_path / "same", [states[0]] * 3)
    document = merge([tmp_path / "same"], task, tmp_path / "scaled", fit=LINEAR)
    assert document["subspace"]["rank"] == 1
    assert sum(document["coefficients"]["global"]) != 1


@pytest.mark.parametrize("options", [{}, {"span": "linear"}])
def test_leading_axes_are_all_that_blocks_train_in_as_well(tmp_path, options):
    task = LinearTask(examples=80)
    save_run(tmp_path / "run", task.states(5))
    fit = FitConfig(subspace="pca:1", blocks="tensors", ridge=0.0, **options)
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit)
    whole, blocks = document["optimizer"]["stages"]
    assert whole["coordinates"] == (2 if options else 1)
    assert blocks["coordinates"] == 2, "one axis of each of two tensors"


@pytest.mark.parametrize(
    ("subspace", "most"),
    [("pca:5", "5 checkpoints span 4"), ("pca:99", "pca:4"), ("random:29", "28 numbers")],
)
def test_more_directions_than_there_can_be_are_refused(tmp_path, subspace, most):
    save_run(tmp_path / "run", LinearTask().states(5))
    with pytest.raises(ConfigError, match=most):
        merge([tmp_path / "run"], LinearTask(), tmp_path / "out", fit=FitConfig(subspace=subspace))
    assert not (tmp_path / "out").exists()


def test_fewer_directions_than_were_asked_for_are_said(tmp_path):
    states = LinearTask().states(4)
    save_run(tmp_path / "run", [*states, states[-1]])
    for subspace, said in (("pca:4", True), ("pca:3", False), ("checkpoints", False)):
        notes = []
        fit = FitConfig(subspace=subspace, blocks="global", ridge=0.0)
        out = tmp_path / f"out-{subspace.replace(':', '-')}"
        merge([tmp_path / "run"], LinearTask(), out, fit=fit, progress=notes.append)
        texts = [note.text for note in notes if isinstance(note, Noted)]
        assert any("3 directions" in text for text in texts) == said


# Random directions.

_MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The published generator, in Python's own integers."""
    x = state & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def expected_signs(seed: int, direction: int, name: str, numel: int) -> torch.Tensor:
    text = f"{seed}\n{direction}\n{name}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    words = [splitmix64(key + (w + 1) * 0x9E3779B97F4A7C15) for w in range(numel // 64 + 1)]
    bits = [words[i // 64] >> (i % 64) & 1 for i in range(numel)]
    return 2.0 * torch.tensor(bits, dtype=torch.float64) - 1.0


def directions_of(document, states) -> torch.Tensor:
    """The directions of a report, (R, D) float64, in the order of the states' tensors."""
    found = document["coefficients"]["random"]
    shapes = {name: tensor.numel() for name, tensor in states[0].items()}
    return found["scale"] * torch.stack(
        [
            torch.cat([expected_signs(found["seed"], j, k, m) for k, m in shapes.items()])
            for j in range(len(found["values"]))
        ]
    )


def drawn_for(states, folder: Path, count: int = 3, scale: float = 0.25) -> RandomDirections:
    save_run(folder, states)
    return RandomDirections(make_layout(open_checkpoints([folder])), 7, count, scale)


def test_the_generator_is_the_published_one():
    numbers = [splitmix64(1234567 + (w + 1) * 0x9E3779B97F4A7C15) for w in range(2)]
    assert numbers == [6457827717110365317, 3203168211198807973]


def test_rows_are_the_same_however_they_are_cut(tmp_path):
    drawn = drawn_for([{"w": torch.zeros(37, 29), "scalar": torch.zeros(())}], tmp_path)
    reader = DirectionReader(drawn, 2, _infos(drawn))
    checkpoint = Checkpoint(tmp_path, None, "none", reader)
    whole = tensor_rows(checkpoint, "w")
    assert torch.equal(whole.reshape(-1).double(), 0.25 * expected_signs(7, 2, "w", 37 * 29))
    for cuts in ([0, 1, 2, 37], [0, 11, 30, 37], [0, 36, 37]):
        parts = [tensor_rows(checkpoint, "w", a, b) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert checkpoint.rows("scalar", 0, 1).shape == ()


def _infos(drawn: RandomDirections):
    return {name: entry.info for name, entry in drawn.layout.entries.items()}


def test_directions_tensors_and_seeds_are_independent(tmp_path):
    drawn = drawn_for([{"a": torch.zeros(100, 100), "b": torch.zeros(100, 100)}], tmp_path)
    cpu = torch.device("cpu")
    signs = torch.cat(
        [
            drawn.signs("a", range(3), 0, 10_000, cpu),
            drawn.signs("b", range(3), 0, 10_000, cpu),
            dataclasses.replace(drawn, seed=8).signs("a", range(3), 0, 10_000, cpu),
        ]
    )
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    # Five standard deviations of a mean of 10,000 signs.
    assert signs.mean(1).abs().max() < 0.05
    assert (signs @ signs.T / 10_000 - torch.eye(9)).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["device", "disk"])
def test_the_store_projects_and_combines_along_the_directions(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("twa_merge.random_directions._PIECE_CPU", 256)
    task = LinearTask(inputs=31, outputs=9)
    states = task.states(4)
    save_run(tmp_path, states)
    engine, _, _ = engine_for(task, tmp_path, kind=kind)
    layout = make_layout(open_checkpoints([tmp_path]))
    drawn = RandomDirections(layout, 7, 3, 0.25)
    store = RandomStore(engine.store, drawn, 4, World())
    rows = {k: torch.stack([expected_signs(7, j, k, v.numel()) for j in range(3)])
            for k, v in states[0].items()}  # fmt: skip
    gram = drawn.gram(World(), silent)
    explicit = 0.25**2 * sum(r @ r.T for r in rows.values())
    assert torch.equal(gram, explicit)
    gradients = {k: torch.randn_like(v) for k, v in states[0].items()}
    products = store.project(gradients | {"0.weight": gradients["0.weight"]})
    expected = sum(0.25 * rows[k] @ g.double().reshape(-1) for k, g in gradients.items())
    assert products.shape == (1, 7)
    torch.testing.assert_close(products[0, 4:], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(products[:, :4], engine.store.project(gradients))
    alphas = torch.tensor([[0.1, 0.2, 0.3, 0.4, 1.5, -2.0, 0.5]], dtype=torch.float64)
    targets = {k: torch.empty_like(v) for k, v in states[0].items()}
    store.combine(alphas, targets)
    for name, target in targets.items():
        wanted = sum(a * s[name].double() for a, s in zip(alphas[0], states, strict=False))
        wanted = wanted + (0.25 * alphas[0, 4:] @ rows[name]).view(wanted.shape)
        torch.testing.assert_close(target.double(), wanted, rtol=1e-5, atol=1e-5)
    plain = {k: torch.empty_like(v) for k, v in states[0].items()}
    store.combine(alphas[:, :4], targets)
    engine.store.combine(alphas[:, :4], plain)
    assert all(torch.equal(targets[k], plain[k]) for k in plain)


def test_the_gradient_along_random_directions_is_that_of_finite_differences(tmp_path):
    task = LinearTask()
    save_run(tmp_path, task.states(4))
    engine, grams, batches = engine_for(task, tmp_path)
    layout = make_layout(open_checkpoints([tmp_path]))
    length = root_mean_square(grams.exact.sum(0))
    drawn = draw(layout, 0, 5, length, engine.live)
    # Otherwise files, which hold float32 rows, and the fit would not see the same directions.
    assert drawn.scale == float(torch.tensor(drawn.scale, dtype=torch.float32))
    gram = drawn.gram(World(), silent)
    torch.testing.assert_close(gram.diag(), torch.full((5,), length**2).double())
    subspace = random_subspace(4, gram, length)
    engine.store = RandomStore(engine.store, drawn, 4, World())
    base = torch.nn.functional.pad(torch.full((1, 4), 0.25, dtype=torch.float64), (0, 5))
    objective = Objective(engine, Chart(base, [subspace]), batches, range(batches.size), ridge=0.1)
    z = torch.tensor([0.4, -0.9, 0.2, 1.0, -0.3], dtype=torch.float64)
    _, gradient = objective(z)
    for k, unit in enumerate(torch.eye(5, dtype=torch.float64)):
        slope = (objective(z + 0.01 * unit)[0] - objective(z - 0.01 * unit)[0]) / 0.02
        assert abs(slope - float(gradient[k])) < 2e-3 * max(1.0, abs(slope))


@pytest.mark.parametrize(
    "options",
    [{"ridge": 0.0}, {"optimizer": "sgd", "lr": 0.02, "epochs": 40, "ridge": 0.0}],
)
@pytest.mark.parametrize("kind", ["device", "disk"])
def test_the_optimum_along_random_directions_is_found_and_written(tmp_path, options, kind):
    task = LinearTask(examples=80)
    states = task.states(4)
    save_run(tmp_path / "run", states)
    fit = FitConfig(subspace="random:6", **options)
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, store=StoreConfig(kind))
    assert document["chosen"] == "twa"
    alphas, random = document["coefficients"]["global"], document["coefficients"]["random"]
    directions = directions_of(document, states)
    names = list(states[0])
    # Each number rounded once, from float64 sums in the order of the files: the last one at last.
    shape = {k: v.shape for k, v in states[0].items()}
    rows = [dict(zip(names, d.split([s.numel() for s in shape.values()]), strict=True))
            for d in directions]  # fmt: skip
    for name, tensor in written(tmp_path / "out").items():
        terms = [(a, s[name].double()) for a, s in zip(alphas[:-1], states, strict=False)]
        terms += [
            (g, r[name].view(shape[name])) for g, r in zip(random["values"], rows, strict=True)
        ]
        terms.append((alphas[-1], states[-1][name].double()))
        expected = torch.zeros(shape[name], dtype=torch.float64)
        for a, w in terms:
            if a != 0.0:
                expected = expected + a * w
        assert torch.equal(tensor, expected.float())
    from twa_merge.task import split

    part = split(task, 0.25, 0).fit
    seen = LinearTask(examples=80)
    seen.x = torch.stack([part[i][0] for i in range(len(part))])
    seen.y = torch.stack([part[i][1] for i in range(len(part))])
    start = sum(a * flat(s) for a, s in zip(alphas, states, strict=True))
    found = loss_at(seen, start + torch.tensor(random["values"]).double() @ directions)
    best = optimum(seen, start, directions)
    assert loss_at(seen, start) > best + 0.1
    assert -1e-9 < found - best < (1e-4 if "optimizer" not in options else 2e-2)


def pictures(test):
    test.pictures = True
    return test


@pytest.mark.parametrize(
    "options", [{"span": "linear", "blocks": "global"}, {"subspace": "random:6"}]
)
@pictures
def test_pictures_of_the_report(tmp_path, options):
    task = LinearTask(examples=80)
    save_run(tmp_path / "run", shrunk(task, 4))
    fit = FitConfig(ridge=0.0, max_evaluations=6, **options)
    guard = GuardConfig(candidates="twa,uniform")
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, guard=guard)
    html = (tmp_path / "out" / "report.html").read_text()
    linear = "span" in options
    assert ("6 random directions" in html) != linear
    assert ("The plane of the checkpoints" in html) == linear
    if linear:
        assert f"add up to {sum(document['coefficients']['global']):.6g}" in html


def test_a_random_merge_repeats_from_its_report_and_its_seed(tmp_path):
    task = LinearTask(examples=160)
    save_run(tmp_path / "run", task.states(4))
    first, again, other = (
        merge([tmp_path / "run"], task, tmp_path / name, fit=RANDOM,
              data_config=DataConfig(seed=seed), out=OutputConfig(dtype="bfloat16"))
        for name, seed in (("one", 3), ("two", 3), ("three", 4))
    )  # fmt: skip
    assert first["coefficients"] == again["coefficients"]
    assert other["coefficients"]["random"]["seed"] == 4
    assert_equal(tmp_path / "one", tmp_path / "two")
    assert "6 random directions" in (tmp_path / "one" / "README.md").read_text()
    # A report of a merge, and the report of what was made from it.
    for source, target in (("one", "a"), ("a", "b")):
        average([tmp_path / "run"], tmp_path / target, out=OutputConfig(dtype="bfloat16"),
                weights=f"@{tmp_path / source / 'twa_merge.json'}")  # fmt: skip
        assert_equal(tmp_path / "one", tmp_path / target)


class Mixed(LinearTask):
    """Tied matrices that the files hold twice, batch norm, a float buffer, a tensor of no model."""

    def build_model(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        model[1].weight = model[0].weight
        model.register_buffer("table", torch.zeros(70))
        return model

    def saved(self, n: int):
        generator = torch.Generator().manual_seed(5)
        states = []
        for _ in range(n):
            state = {k: v.clone() for k, v in self.build_model().state_dict().items()}
            for name in state:
                if state[name].is_floating_point():
                    noise = torch.randn(state[name].shape, generator=generator)
                    state[name] = 0.3 * (noise.abs() if "running_var" in name else noise)
            state["1.weight"] = state["0.weight"].clone()
            states.append(state | {"stranger": torch.randn(65, generator=generator)})
        return states


def test_only_parameters_are_moved_and_tied_ones_together(tmp_path):
    task = Mixed(examples=80)
    states = task.saved(3)
    save_run(tmp_path / "run", states)
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=RANDOM)
    assert document["chosen"] == "twa"
    alphas, random = document["coefficients"]["global"], document["coefficients"]["random"]
    assert random["exceptions"] == {"1.weight": "0.weight", "table": None, "stranger": None}
    found = written(tmp_path / "out")
    assert torch.equal(found["0.weight"], found["1.weight"])
    assert torch.equal(found["2.num_batches_tracked"], states[-1]["2.num_batches_tracked"])
    for name in ("table", "stranger", "0.weight"):
        mean = sum(a * s[name].double() for a, s in zip(alphas, states, strict=True)).float()
        assert torch.equal(found[name], mean) == (name != "0.weight")
    average([tmp_path / "run"], tmp_path / "again", weights=f"@{tmp_path / 'out/twa_merge.json'}")
    again = written(tmp_path / "again")
    for name in found:
        # Statistics that were estimated anew are no average.
        assert "running" in name or torch.equal(found[name], again[name])


def test_tensors_that_the_files_tie_follow_their_root(tmp_path):
    w, b = torch.randn(8, 8), torch.randn(8)
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save({"a": w, "b": w, "c": b, "i": torch.arange(3)}, folder / "model.pt")
    layout = make_layout(open_checkpoints([tmp_path]))
    drawn = RandomDirections(layout, 0, 2, 1.0)
    assert drawn.sources == {"a": "a", "b": "a", "c": "c"}
    assert drawn.numel == 72
    reader = DirectionReader(drawn, 1, _infos(drawn))
    checkpoint = Checkpoint(tmp_path, None, "none", reader)
    assert torch.equal(tensor_rows(checkpoint, "a"), tensor_rows(checkpoint, "b"))


def test_another_winner_is_written_without_random_directions(tmp_path):
    task = LinearTask(examples=80)
    states = task.states(4)
    save_run(tmp_path / "run", states)
    fit, guard = FitConfig(subspace="random:3", ridge=1e9), GuardConfig(candidates="uniform,twa")
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, guard=guard)
    assert document["chosen"] != "twa"
    assert set(document["coefficients"]) == {"global"}
    alphas = document["coefficients"]["global"]
    for name, tensor in written(tmp_path / "out").items():
        expected = sum(a * s[name].double() for a, s in zip(alphas, states, strict=True))
        assert torch.equal(tensor, expected.float())


def test_identical_checkpoints_leave_random_directions_no_length(tmp_path):
    task = LinearTask(examples=80)
    states = task.states(1) * 3
    save_run(tmp_path / "run", states)
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=RANDOM)
    assert (document["chosen"], document["subspace"]["rank"]) == ("last", 0)


@pytest.mark.parametrize("options", [{"blocks": "tensors"}, {"span": "linear"}])
def test_what_random_directions_leave_no_choice_of_is_refused(tmp_path, options):
    task = LinearTask(examples=80)
    save_run(tmp_path / "run", task.states(3))
    with pytest.raises(ConfigError, match="Random directions"):
        merge([tmp_path / "run"], task, tmp_path / "out",
              fit=FitConfig(subspace="random:3", **options))  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "record",
    [
        {"seed": 1, "scale": 0.5},
        {"seed": 1, "scale": 0.5, "values": []},
        {"seed": 1, "scale": float("nan"), "values": [1.0]},
        {"seed": 1, "scale": 0.5, "values": ["x"]},
        {"seed": 1, "scale": 0.5, "values": [1.0], "exceptions": {"nowhere": None}},
        7,
    ],
)
def test_a_report_whose_directions_cannot_be_made_is_refused(tmp_path, record):
    save_run(tmp_path / "run", LinearTask().states(2))
    report = tmp_path / "twa_merge.json"
    report.write_text(json.dumps({"coefficients": {"global": [0.5, 0.5], "random": record}}))
    with pytest.raises(ConfigError, match="random directions"):
        average([tmp_path / "run"], tmp_path / "out", weights=f"@{report}")


_LAUNCHED = """
import sys
from pathlib import Path
from test_spans import merge_both

merge_both(Path(sys.argv[1]), 2)
"""


def merge_both(folder: Path, k: int) -> None:
    """A linear and a random merge of three rows of weights, which two ranks cannot halve."""
    task = LinearTask(inputs=10, outputs=3, examples=80)
    guard, device = GuardConfig(candidates="twa,twa-layers"), EngineConfig(device="cpu")
    options = {
        "linear": {"span": "linear", "blocks": "tensors"},
        "random": {"subspace": "random:9"},
    }
    twa_merge.pipeline.html_report, twa_merge.pipeline.landscape = no_report, no_landscape
    for name, chosen in options.items():
        fit = FitConfig(ridge=0.01, max_evaluations=8, **chosen)
        merge([folder / "run"], task, folder / f"{name}{k}", fit=fit, guard=guard, engine=device)


def test_2_processes_give_the_coefficients_of_one(tmp_path):
    save_run(tmp_path / "run", shrunk(LinearTask(inputs=10, outputs=3), 4))
    (tmp_path / "launched.py").write_text(_LAUNCHED)
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "launched.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    merge_both(tmp_path, 1)
    for name in ("linear", "random"):
        one, two = (
            json.loads((tmp_path / f"{name}{k}" / "twa_merge.json").read_text()) for k in (1, 2)
        )
        assert two["world_size"] == 2
        assert one["chosen"] == two["chosen"]
        assert one["chosen"].startswith("twa")
        a, b = (torch.tensor(d["coefficients"]["global"]) for d in (one, two))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        c, d = (written(tmp_path / f"{name}{k}") for k in (1, 2))
        for key in c:
            torch.testing.assert_close(c[key], d[key], rtol=1e-5, atol=1e-5)
    assert one["coefficients"]["random"]["scale"] == two["coefficients"]["random"]["scale"]


@pytest.mark.parametrize(
    "blocks", [5, "x", {"members": 3}, {"members": ["w"]}, {"members": {"x": 5}}, [1]]
)
def test_a_report_with_other_things_for_blocks_is_refused(tmp_path, blocks):
    save_run(tmp_path / "run", LinearTask().states(2))
    report = tmp_path / "twa_merge.json"
    coefficients = {"blocks": {"x": [0.5, 0.5]}}
    report.write_text(json.dumps({"coefficients": coefficients, "blocks": blocks}))
    with pytest.raises(ConfigError, match="report"):
        average([tmp_path / "run"], tmp_path / "out", weights=f"@{report}")
    report.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        average([tmp_path / "run"], tmp_path / "out", weights=f"@{report}")
