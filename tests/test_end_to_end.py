"""Whole merges through the library, on real folders."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import launches
import pytest
import torch
from runs import LinearTask, save_run
from safetensors.torch import load_file
from small_task import Small, train

from twa_merge import average, evaluate, inspect, merge
from twa_merge.config import (
    DataConfig,
    EngineConfig,
    FitConfig,
    GuardConfig,
    OutputConfig,
    Selection,
    StoreConfig,
)
from twa_merge.errors import CheckpointError, ConfigError, NoImprovement, OutputError, TaskError
from twa_merge.progress import Evaluated, Noted, Started
from twa_merge.task import split

QUICK = {"fit": FitConfig(blocks="global", ridge=0.0)}


def make(tmp_path, n=5, **options):
    task = LinearTask(examples=80, **options)
    states = task.states(n)
    save_run(tmp_path / "run", states)
    return task, states, tmp_path / "run", tmp_path / "merged"


def written(folder):
    return load_file(folder / "model.safetensors")


def combined(states, alphas):
    """Σ α_i w_i in float64, rounded once."""
    return {
        k: sum(a * s[k].double() for a, s in zip(alphas, states, strict=True)).to(v.dtype)
        for k, v in states[0].items()
    }


class Wide:
    """Rows long enough to be packed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 256, generator=generator)
        self.y = self.x[:, :1] * 2

    def build_model(self):
        return torch.nn.Linear(256, 1)

    def dataset(self):
        return torch.utils.data.TensorDataset(self.x, self.y)

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean(1)


@pytest.mark.usefixtures("undrawn")
def test_candidates_are_compared_as_written_whatever_the_store(tmp_path):
    generator = torch.Generator().manual_seed(1)
    states = []
    for _ in range(4):
        weight = 0.1 * torch.randn(1, 256, generator=generator)
        weight[0, 0] += 2
        states.append({"weight": weight, "bias": torch.zeros(1)})
    save_run(tmp_path / "run", states)
    losses, of_all = {}, {}
    for store in (StoreConfig("disk"), StoreConfig("device", "int1")):
        document = merge([tmp_path / "run"], Wide(), tmp_path / f"{store.kind}", store=store)
        rows = document["candidates"] + document["other_candidates"]
        losses[store.kind] = {c["name"]: c["guard_loss"] for c in rows}
        known = document["data"]["guard_examples"] + document["data"]["fit_examples"]
        assert all(c["selection_examples"] == known for c in document["candidates"])
        of_all[store.kind] = {c["name"]: c["selection_loss"] for c in document["candidates"]}
    # Which single checkpoint is the best one depends on more than the guard split.
    fixed = {"last", "uniform", "single:1", "single:2", "single:3"} & set(losses["disk"])
    for name in fixed & set(losses["device"]):
        assert abs(losses["device"][name] / losses["disk"][name] - 1) < 1e-5, name
    for name in fixed & set(of_all["device"]) & set(of_all["disk"]):
        assert abs(of_all["device"][name] / of_all["disk"][name] - 1) < 1e-5, name


@pytest.mark.usefixtures("undrawn")
def test_random_directions_are_judged_by_held_out_fit_examples_as_well(tmp_path):
    task, _, run, out = make(tmp_path)
    document = merge([run], task, out, fit=FitConfig(subspace="random:3"))
    used = document["data"]["guard_examples_used"]
    assert all(c["selection_examples"] > used for c in document["candidates"])


@pytest.mark.usefixtures("undrawn")
def test_a_merge_beats_everything_and_is_written_exactly(tmp_path):
    task, states, run, out = make(tmp_path)
    guard = GuardConfig(candidates="uniform,window,twa")
    document = merge([run], task, out, **QUICK | {"guard": guard})
    assert document["chosen"] == "twa"
    losses = {c["name"].split(":")[0]: c["guard_loss"] for c in document["candidates"]}
    assert losses["twa"] == min(losses.values())
    assert document["improvement"]["ci95"][0] > 0
    expected = combined(states, document["coefficients"]["global"])
    for name, tensor in written(out).items():
        assert torch.equal(tensor, expected[name]), name
    on_disk = json.loads((out / "twa_merge.json").read_text())
    assert on_disk["coefficients"] == document["coefficients"]
    assert (out / "README.md").read_text()
    assert not (tmp_path / "merged.partial").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("fit", "steps"),
    [
        (FitConfig(blocks="global", ridge=0.1, max_evaluations=9), 9),
        (FitConfig(optimizer="sgd", lr=1e-4, epochs=3), 3 * 2),
        (FitConfig(), None),
    ],
)
def test_evaluations_say_how_many_may_follow(tmp_path, fit, steps):
    task, _, run, out = make(tmp_path)
    events = []
    merge([run], task, out, fit=fit, progress=events.append)
    stages, evaluated = 0, []
    for event in events:
        if isinstance(event, Started):
            stages, evaluated = stages + bool(evaluated), []
        if isinstance(event, Evaluated):
            evaluated.append(event)
            assert event.left is not None
            assert event.left >= 0
            assert not event.growing
            # Never more than was said before: fits that end early leave some out.
            assert len(evaluated) == 1 or event.left < evaluated[-2].left
            assert steps is None or event.left == steps - len(evaluated)
    assert stages == (1 if steps else 2)


@pytest.mark.usefixtures("undrawn")
def test_the_report_has_the_documented_keys(tmp_path):
    task, _, run, out = make(tmp_path)
    document = merge([run], task, out, **QUICK)
    keys = {"format", "version", "method", "seed", "checkpoints", "coefficients", "subspace"}
    keys |= {"optimizer", "data", "candidates", "chosen", "improvement", "timings"}
    keys |= {"peak_memory_bytes", "world_size", "device"}
    assert keys <= set(document)
    assert set(document["subspace"]) == {"rank", "orthogonality_error", "explained"}
    assert document["subspace"]["rank"] == 4
    assert document["subspace"]["orthogonality_error"] < 1e-5
    data = document["data"]
    assert (data["fit_examples"], data["guard_examples"], data["test_examples"]) == (60, 20, 0)
    names = [c["name"] for c in document["candidates"]]
    assert names[:3] == ["last", "best_single", "uniform"]
    assert sum(n.startswith("window:") for n in names) == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("kind", "dtype", "used"),
    [
        ("auto", "auto", {"kind": "device", "dtype": "float32"}),
        ("host", "int8", {"kind": "device", "dtype": "int8"}),
        ("disk", "auto", {"kind": "disk", "dtype": "as saved"}),
        ("disk", "int8", {"kind": "disk", "dtype": "as saved"}),
    ],
)
def test_the_report_tells_the_store(tmp_path, kind, dtype, used):
    task, _, run, out = make(tmp_path)
    notes = []
    store = StoreConfig(kind, dtype)
    document = merge([run], task, out, store=store, progress=notes.append, **QUICK)
    ignored = any("changes nothing on disk" in getattr(note, "text", "") for note in notes)
    assert ignored == ((kind, dtype) == ("disk", "int8"))
    assert document["options"]["store"] == {"kind": kind, "dtype": dtype}
    assert document["options"]["engine"]["precision"] == "fp32"
    assert document["store"] == used


@pytest.mark.usefixtures("undrawn")
def test_narrow_passes_follow_the_weights_however_the_model_is_gathered(tmp_path):
    """On one process there is nothing to gather, and nothing gathered that could be left over."""
    task, _, run, _ = make(tmp_path)
    found = []
    for gather in ("layer", "model"):
        engine = EngineConfig(precision="bf16", gather=gather)
        document = merge([run], task, tmp_path / gather, engine=engine, **QUICK)
        found.append({c["name"]: c["guard_loss"] for c in document["candidates"]})
    assert found[0] == found[1]
    assert found[1]["twa"] < found[1]["last"]


@pytest.mark.usefixtures("undrawn")
def test_the_guard_loss_is_that_of_the_written_file(tmp_path):
    task, _, run, out = make(tmp_path)
    document = merge([run], task, out, out=OutputConfig(dtype="bfloat16"), **QUICK)
    from twa_merge.task import split

    guard = split(task, 0.25, 0).guard
    model = task.build_model()
    model.load_state_dict({k: v.float() for k, v in written(out).items()})
    x = torch.stack([guard[i][0] for i in range(len(guard))])
    y = torch.stack([guard[i][1] for i in range(len(guard))])
    with torch.no_grad():
        expected = float(task.loss(model, (x, y)).double().mean())
    row = next(c for c in document["candidates"] if c["name"] == document["chosen"])
    assert abs(row["guard_loss"] - expected) < 1e-4 * expected
    assert written(out)["0.weight"].dtype is torch.bfloat16


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_gives_the_same_coefficients(tmp_path):
    task, _, run, out = make(tmp_path)
    first = merge([run], task, out)
    second = merge([run], task, tmp_path / "again")
    assert first["coefficients"] == second["coefficients"]
    other = merge([run], task, tmp_path / "other", data_config=DataConfig(seed=1))
    assert other["coefficients"] != first["coefficients"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("candidates", "noise", "chosen"),
    [("twa,twa-layers", 0.0, "twa-tensors"), ("all", 8.0, "blend")],
)
def test_blocks_can_be_merged_again_from_the_report(tmp_path, candidates, noise, chosen):
    task, _, run, out = make(tmp_path)
    task.y = task.y + noise * torch.randn(80, 4, generator=torch.Generator().manual_seed(7))
    fit, guard = FitConfig(blocks="tensors", ridge=0.0), GuardConfig(candidates=candidates)
    document = merge([run], task, out, fit=fit, guard=guard)
    assert document["chosen"] == chosen
    average([run], tmp_path / "again", weights=f"@{out / 'twa_merge.json'}")
    for name, tensor in written(tmp_path / "again").items():
        assert torch.equal(tensor, written(out)[name])


def test_nothing_is_written_without_the_required_improvement(tmp_path):
    task, states, run, out = make(tmp_path)
    # All checkpoints alike: no merge can be better than one of them.
    shutil.rmtree(run)
    save_run(run, [states[0]] * 3)
    with pytest.raises(NoImprovement) as caught:
        merge([run], task, out, guard=GuardConfig(require_improvement=True))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == [run]
    assert "What was picked is no merge but the last checkpoint; nothing" in str(caught.value)
    assert "the best merge, uniform: 0.0000 [" in str(caught.value)


@pytest.mark.parametrize(("examples", "said"), [(60, ""), (16, ", of 4 examples: too few")])
def test_a_merge_that_is_not_certainly_better_is_named(tmp_path, examples, said):
    task = LinearTask(examples=examples)
    save_run(tmp_path / "run", task.states(3, spread=0.5 if said else 0.02))
    guard = GuardConfig(candidates="twa", require_improvement=True)
    with pytest.raises(NoImprovement, match="What was picked, twa, is not certainly") as caught:
        merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    assert re.search(rf"twa: \S+ \[\S+, \S+\]{said}\n", str(caught.value))
    # For who wants to decide by other figures.
    found = caught.value.document
    assert (found["chosen"], found["written"]) == ("twa", False)
    assert found["improvement"]["certain"] is False


class CountsHits(LinearTask):
    def metrics(self, model, batch):
        return {"closeness": -self.loss(model, batch)}


def test_a_missing_improvement_of_a_metric_says_of_which(tmp_path):
    task = CountsHits(examples=60)
    save_run(tmp_path / "run", [task.states(1)[0]] * 3)
    guard = GuardConfig(candidates="uniform", select="metric:closeness", require_improvement=True)
    with pytest.raises(NoImprovement) as caught:
        merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    assert re.search(r"uniform: \S+ \[\S+, \S+\] in closeness\n", str(caught.value))


class TinyLosses(LinearTask):
    def loss(self, model, batch):
        return 1e-12 * super().loss(model, batch)


def test_a_missing_improvement_is_said_in_the_unit_of_the_loss(tmp_path):
    task = TinyLosses(examples=80)
    good, bad = task.states(2)
    save_run(tmp_path / "run", [good, {k: v + 100 for k, v in bad.items()}])
    guard = GuardConfig(candidates="uniform", require_improvement=True)
    with pytest.raises(NoImprovement, match="no merge but the best single checkpoint") as caught:
        merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    assert re.search(r"uniform: -[1-9]\.\d+e-\d+ \[-[1-9]\.\d+e-\d+, ", str(caught.value))


def test_nothing_is_written_where_no_loss_is_finite(tmp_path):
    task, _, run, out = make(tmp_path)
    task.y = task.y * float("nan")
    with pytest.raises(TaskError, match="not finite for any candidate"):
        merge([run], task, out, **QUICK)
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.usefixtures("undrawn")
def test_identical_checkpoints_merge_into_themselves(tmp_path):
    task, states, run, out = make(tmp_path)
    shutil.rmtree(run)
    save_run(run, [states[0]] * 3)
    document = merge([run], task, out)
    assert document["chosen"] == "last"
    for name, tensor in written(out).items():
        assert torch.equal(tensor, states[0][name])


@pytest.mark.usefixtures("undrawn")
def test_two_checkpoints_duplicates_and_frozen_tensors_do_no_harm(tmp_path):
    task = LinearTask(examples=80)
    a, b = task.states(2)
    b["0.bias"] = a["0.bias"]
    save_run(tmp_path / "run", [a, b, a])
    document = merge([tmp_path / "run"], task, tmp_path / "out", **QUICK)
    assert document["subspace"]["rank"] == 1
    document = merge([tmp_path / "run"], task, tmp_path / "o2", selection=Selection(last=2))
    assert len(document["checkpoints"]) == 2


def test_a_line_of_checkpoints_has_no_plane(tmp_path):
    task, _, run, out = make(tmp_path, n=2)
    said = []
    merge([run], task, out, progress=said.append, **QUICK)
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any("no landscape: fewer than two of the directions" in note for note in notes)
    assert "The plane of the checkpoints" not in (out / "report.html").read_text()


def test_one_checkpoint_is_a_clear_error(tmp_path):
    task, _, run, out = make(tmp_path, n=1)
    with pytest.raises(CheckpointError, match="only one checkpoint"):
        merge([run], task, out)
    assert not out.exists()


def test_a_task_for_another_model_is_a_clear_error(tmp_path):
    _, _, run, out = make(tmp_path)
    with pytest.raises(TaskError, match="another shape"):
        merge([run], LinearTask(inputs=9), out)

    class Bigger(LinearTask):
        def build_model(self):
            return torch.nn.Sequential(super().build_model()[0], torch.nn.Linear(4, 4))

    with pytest.raises(TaskError, match="checkpoints lack"):
        merge([run], Bigger(), out)
    assert list(tmp_path.iterdir()) == [run]


def test_an_existing_folder_is_not_overwritten_unasked(tmp_path):
    task, _, run, out = make(tmp_path)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            merge([run], task, out, out=OutputConfig(overwrite=overwrite), **QUICK)
    assert (out / "thesis.txt").read_text() == "mine"


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_that_is_not_finite_is_named_and_left_out_where_others_remain(tmp_path):
    task, states, run, out = make(tmp_path)
    shutil.rmtree(run)
    states[2]["0.weight"][1, 2] = float("inf")
    save_run(run, states)
    told = []
    uniform = GuardConfig(candidates="uniform")
    document = merge([run], task, out, guard=uniform, progress=told.append)
    assert len(document["checkpoints"]) == 4
    assert any("checkpoint-300" in e.text for e in told if isinstance(e, Noted))
    # Whoever chooses coefficients means all of them.
    with pytest.raises(CheckpointError) as caught:
        average([run], tmp_path / "mean")
    assert caught.value.details["checkpoint"].endswith("checkpoint-300")
    with pytest.raises(CheckpointError, match="not finite"):
        merge([run / "checkpoint-200", run / "checkpoint-300"], task, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_average_is_exact_and_weights_are_reported(tmp_path):
    _, states, run, out = make(tmp_path)
    document = average([run], out, weights="ema:0.7")
    expected = combined(states, document["coefficients"]["global"])
    for name, tensor in written(out).items():
        assert torch.equal(tensor, expected[name])
    with pytest.raises(ConfigError, match="number of coefficients"):
        average([run], tmp_path / "x", weights="0.5 0.5")


def test_blocks_of_a_report_are_known_by_name_and_other_steps_are_said(tmp_path):
    _, states, run, out = make(tmp_path, n=2)
    rows = {"b": [0.0, 1.0], "a": [1.0, 0.0]}
    names = sorted(states[0])
    members = {"a": names[:1], "b": names[1:]}
    document = {
        "checkpoints": [{"step": 7}, {"step": 9}],
        "coefficients": {"blocks": rows},
        "blocks": {"kind": "tensors", "members": members},
    }
    (tmp_path / "r.json").write_text(json.dumps(document))
    said: list[object] = []
    average([run], out, weights=f"@{tmp_path / 'r.json'}", progress=said.append)
    for name, tensor in written(out).items():
        assert torch.equal(tensor, states[0 if name in members["a"] else 1][name])
    assert any("of other steps" in event.text for event in said if isinstance(event, Noted))
    rows["c"] = rows["a"]
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="other blocks than it describes"):
        average([run], tmp_path / "again", weights=f"@{tmp_path / 'r.json'}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 99, "coefficients": {"global": [0.5, 0.5]}}', r"format 1\n  found: format 99"),
        ('{"format": "1", "coefficients": {"global": [0.5, 0.5]}}', "found: format '1'"),
        ('{"coefficients": {"global": [0.5', "what to do: "),
        (None, r"No such file[\s\S]*what to do: "),
        ('{"format": 1, "models": []}', "what to do: "),
        ("[1, 2]", "what to do: "),
    ],
)
def test_a_report_that_is_not_understood_is_refused(tmp_path, text, said):
    _, _, run, out = make(tmp_path, n=2)
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        average([run], out, weights=f"@{tmp_path / 'r.json'}")
    assert "r.json" in str(caught.value)
    assert not out.exists()


def test_evaluate_agrees_with_the_task_itself(tmp_path):
    task, states, run, _ = make(tmp_path, n=3)
    document = evaluate([run], task)
    for row, state in zip(document["models"], states, strict=True):
        model = task.build_model()
        model.load_state_dict(state)
        with torch.no_grad():
            expected = float(task.loss(model, (task.x, task.y)).double().mean())
        assert abs(row["loss"] - expected) < 1e-5 * expected
    assert document["examples"] == 80


_COUNTED = """
import gc, weakref
from pathlib import Path
from runs import LinearTask

BUILT = []


def mark(what):
    with (Path(__file__).parent / "marks").open("a") as file:
        file.write(what)


class Counted(LinearTask):
    def dataset(self):
        mark("d")
        return super().dataset()

    def build_model(self):
        if any(model() is not None for model in BUILT):
            mark("alive")
        model = super().build_model()
        BUILT.append(weakref.ref(model))
        return model


mark("t")
task = Counted
"""


def test_evaluate_loads_a_task_once_and_one_model_at_a_time(tmp_path):
    _, _, run, _ = make(tmp_path, n=3)
    (tmp_path / "counted.py").write_text(_COUNTED)
    document = evaluate([run], str(tmp_path / "counted.py"))
    assert len(document["models"]) == 3
    assert (tmp_path / "marks").read_text() == "td"


def test_a_selection_is_of_runs_and_spares_a_model_that_is_named(tmp_path):
    """A merge, whose step nobody knows, beside the run that it is of."""
    task, _, run, out = make(tmp_path, n=4)
    average([run], out)
    named = run / "checkpoint-100"
    selection = Selection(from_step=200, to_step=300, last=1)
    document = evaluate([run, out, named], task, selection=selection)
    found = [row["path"] for row in document["models"]]
    assert found == [str(run / "checkpoint-300"), str(out), str(named)]
    with pytest.raises(CheckpointError, match="left by the selection"):
        evaluate([run, out], task, selection=Selection(from_step=900))


def test_geometry_against_explicit_float64(tmp_path):
    _, states, run, _ = make(tmp_path, n=4)
    document = inspect([run], geometry=True)
    flat = torch.stack([torch.cat([v.reshape(-1) for v in s.values()]) for s in states]).double()
    offsets = flat - flat.mean(0)
    geometry = document["geometry"]
    close = {"rtol": 1e-9, "atol": 1e-9}
    found = torch.tensor(geometry["distances"], dtype=torch.float64)
    torch.testing.assert_close(found, torch.cdist(flat, flat), rtol=1e-6, atol=1e-6)
    unit = offsets / offsets.norm(dim=1, keepdim=True)
    cosines = torch.tensor(geometry["cosines"], dtype=torch.float64)
    torch.testing.assert_close(cosines, unit @ unit.T, **close)
    norms = torch.tensor(geometry["norms"], dtype=torch.float64)
    torch.testing.assert_close(norms, flat.norm(dim=1), **close)
    spectrum = torch.linalg.svdvals(offsets)[:3].square()
    explained = torch.tensor(geometry["spectrum"], dtype=torch.float64)
    torch.testing.assert_close(explained, spectrum / spectrum.sum(), **close)
    assert geometry["rank"] == 3
    assert geometry["orthogonality_error"] < 1e-6


@pytest.mark.usefixtures("undrawn")
def test_the_newest_statistics_are_written_as_they_are_saved(tmp_path):
    """Whatever the store rounds them to; the report and the card say where they came from."""
    train(tmp_path / "run")
    guard = GuardConfig(candidates="twa", batch_norm="newest")
    document = merge(
        [tmp_path / "run"],
        Small(),
        tmp_path / "merged",
        fit=FitConfig(blocks="global", ridge=0.0, max_evaluations=2),
        guard=guard,
        store=StoreConfig(dtype="int4"),
    )
    newest = load_file(sorted((tmp_path / "run").rglob("*.safetensors"))[-1])
    for name, tensor in written(tmp_path / "merged").items():
        if "running" in name:
            assert torch.equal(tensor, newest[name]), name
    assert document["chosen"] == "twa"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "were taken from the newest checkpoint" in card
    assert "come out averaged that way" in card


def test_matplotlib_that_cannot_be_imported_costs_the_picture_alone(tmp_path, monkeypatch):
    broken = tmp_path / "site" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise AttributeError('_ARRAY_API not found')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    task, _, run, out = make(tmp_path)
    said = []
    fit = FitConfig(blocks="global", ridge=0.1, max_evaluations=2)
    merge([run], task, out, fit=fit, progress=said.append)
    assert (out / "model.safetensors").exists()
    assert not (out / "report.html").exists()
    assert any("_ARRAY_API not found" in event.text for event in said if isinstance(event, Noted))


def test_an_earlier_merge_in_the_run_folder_is_no_checkpoint(tmp_path):
    _, states, run, _ = make(tmp_path)
    for _ in range(2):
        average([run], run / "merged", out=OutputConfig(overwrite=True))
        assert len(inspect([run])["checkpoints"]) == len(states)
    # It may be had by name, and in a folder of nothing else.
    assert len(inspect([run, run / "merged"])["checkpoints"]) == len(states) + 1
    shutil.move(run / "merged", tmp_path / "merges" / "a")
    assert len(inspect([tmp_path / "merges"])["checkpoints"]) == 1


def test_what_a_task_object_would_ignore_is_refused(tmp_path):
    task, _, run, out = make(tmp_path)
    for more in ({"data": "text.txt"}, {"fit": FitConfig(label_smoothing=0.1)}):
        with pytest.raises(ConfigError, match="A task object brings its own"):
            merge([run], task, out, **more)
    assert not out.exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("which", "size"), [(0, 1e25), (2, 1e6), (4, 1e6)])
def test_a_checkpoint_that_exploded_spoils_no_other(tmp_path, monkeypatch, which, size):
    task = LinearTask(examples=80)
    states = task.states(5)
    states[which] = {k: size * v for k, v in states[which].items()}
    run = tmp_path / "run"
    save_run(run, states)
    said: list[object] = []
    document = merge([run], task, tmp_path / "out", progress=said.append)
    exploded = f"checkpoint-{100 * (which + 1)}"
    assert any(exploded in e.text and "diverged" in e.text for e in said if isinstance(e, Noted))
    chosen = next(c for c in document["candidates"] if c["name"] == document["chosen"])
    guard = split(task, 0.25, 0).guard
    model = task.build_model()
    model.load_state_dict(written(tmp_path / "out"))
    with torch.no_grad():
        losses = [task.loss(model, [t[None] for t in guard[i]]) for i in range(len(guard))]
    assert float(torch.cat(losses).mean()) == pytest.approx(chosen["guard_loss"], rel=1e-4)
    # It has no part in anything, as if it were not there.
    sound = [run / f"checkpoint-{100 * (i + 1)}" for i in range(5) if i != which]
    without = merge(sound, task, tmp_path / "without")
    assert [c["guard_loss"] for c in document["candidates"]] == [
        c["guard_loss"] for c in without["candidates"]
    ]
    assert document["improvement"]["mean"] > 0
    # The card's command takes the same ones.
    monkeypatch.chdir(tmp_path)
    shutil.copy("out/twa_merge.json", ".")
    command = re.search(r"^twa-merge average .*$", Path("out/README.md").read_text(), re.M)
    launches.here(*shlex.split(command[0])[1:])
    expected = load_file("out/model.safetensors")
    torch.testing.assert_close(load_file("merged-again/model.safetensors"), expected)


@pytest.mark.parametrize(("candidates", "stages"), [("last,uniform", []), ("twa,uniform", ["twa"])])
def test_what_is_no_candidate_is_not_fitted(tmp_path, candidates, stages):
    task, _, run, target = make(tmp_path)
    guard = GuardConfig(candidates=candidates)
    document = merge([run], task, target, guard=guard)
    assert [stage["name"] for stage in document["optimizer"]["stages"]] == stages
    assert (document["optimizer"]["evaluations"] == 0) == (not stages)
    assert document["chosen"] in ("uniform", *stages)
    assert "The plane of the checkpoints" in (target / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_layers_are_tried_beside_tensors(tmp_path):
    task, guard = Small(), GuardConfig(candidates="window,twa,twa-layers,blend")
    task.x, task.y = task.x[:40], task.y[:40]
    train(tmp_path / "run")
    document = merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    stages = document["optimizer"]["stages"]
    assert [stage["name"] for stage in stages] == ["twa", "twa-tensors", "twa-layers"]
    layers = next(c for c in document["candidates"] if c["name"] == "twa-layers")
    spent = [stage["evaluations"] for stage in stages]
    assert layers["cost"] == pytest.approx(spent[0] + spent[2], abs=0.02)
    of_block = layers["coefficients"]
    assert of_block["0.weight"] == of_block["0.bias"]
    assert of_block["3.weight"] == of_block["3.bias"]
    assert of_block["0.weight"] != of_block["3.weight"]
    # Both take part as one: twice as many votes would be for the same thing.
    rows = {c["name"]: c for c in document["candidates"]}
    mixed = rows["twa-blocks"]
    weights = mixed["blend_of"]
    assert sorted(weights) == ["twa-layers", "twa-tensors"]
    assert sum(weights.values()) == pytest.approx(1.0)
    for block, values in mixed["coefficients"].items():
        parts = [[w * a for a in rows[k]["coefficients"][block]] for k, w in weights.items()]
        assert values == pytest.approx([sum(p) for p in zip(*parts, strict=True)], abs=1e-6)
    assert mixed["cost"] == rows["blend"]["cost"] == pytest.approx(sum(spent), abs=0.02)
    shares = rows["blend"]["blend_of"]
    assert sum(shares.values()) == pytest.approx(1.0)
    ratio = weights["twa-layers"] / weights["twa-tensors"]
    assert shares["twa-layers"] / shares["twa-tensors"] == pytest.approx(ratio)


class TwoLayers(LinearTask):
    """Of its two checkpoints one has the right matrices, the other one the right biases."""

    def build_model(self):
        layers = torch.nn.Linear(self.inputs, self.inputs), torch.nn.Linear(6, self.outputs)
        return torch.nn.Sequential(*layers)

    def states(self):
        eye, truth = torch.eye(self.inputs), self.truth
        right, wrong = torch.zeros(self.inputs), torch.ones(self.inputs)
        first = {"0.weight": eye, "0.bias": wrong, "1.weight": truth, "1.bias": torch.ones(4)}
        last = {
            "0.weight": 0 * eye,
            "0.bias": right,
            "1.weight": 0 * truth,
            "1.bias": torch.zeros(4),
        }
        return [first, last]


@pytest.mark.usefixtures("undrawn")
def test_tensors_win_where_layers_cannot_do_what_they_do(tmp_path):
    task = TwoLayers()
    save_run(tmp_path / "run", task.states())
    document = merge([tmp_path / "run"], task, tmp_path / "merged")
    names = [stage["name"] for stage in document["optimizer"]["stages"]]
    assert names == ["twa", "twa-tensors", "twa-layers"]
    assert document["chosen"] == "twa-tensors"


@pytest.mark.usefixtures("undrawn")
def test_tensors_that_the_model_lacks_keep_the_coefficients_of_the_whole_model(tmp_path):
    task = TwoLayers()
    first, last = task.states()
    save_run(tmp_path / "run", [first | {"ema": torch.ones(3)}, last | {"ema": torch.zeros(3)}])
    fit, guard = FitConfig(blocks="layers", ridge=0.01), GuardConfig(candidates="twa,twa-layers")
    document = merge([tmp_path / "run"], task, tmp_path / "merged", fit=fit, guard=guard)
    found = {c["name"]: c["coefficients"] for c in document["candidates"]}
    assert found["twa-layers"]["elsewhere"] == pytest.approx(found["twa"])
    assert found["twa-layers"]["0"] != pytest.approx(found["twa"])


def test_a_task_that_fails_far_out_costs_the_landscape_alone(tmp_path):
    task, _, run, out = make(tmp_path)
    drawing, said, loss = [], [], task.loss

    def careful(model, batch):
        assert not drawing, "a loss that explodes"
        return loss(model, batch)

    def listen(event):
        said.append(event)
        drawing.extend([True] * ("landscape" in getattr(event, "stage", "")))

    task.loss = careful
    merge([run], task, out, progress=listen, **QUICK)
    assert drawing
    assert (out / "model.safetensors").exists()
    assert (out / "report.html").exists()
    assert any("a loss that explodes" in event.text for event in said if isinstance(event, Noted))


@pytest.mark.usefixtures("undrawn")
def test_a_start_that_does_not_exist_is_said_before_any_work(tmp_path):
    task, _, run, out = make(tmp_path)
    task.build_model = None
    with pytest.raises(ConfigError, match="--start names a step that no checkpoint has"):
        merge([run], task, out, fit=FitConfig(start="12345"))


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_does_not_go_on_with_other_examples(tmp_path):
    task, _, run, out = make(tmp_path)

    def stop(event):
        if getattr(event, "stage", "") == "Comparing candidates":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([run], task, out, progress=stop, **QUICK)
    task.y = task.y + 1.0
    with pytest.raises(ConfigError, match="other inputs or options") as caught:
        merge([run], task, out, **QUICK)
    assert "examples" in str(caught.value)


@pytest.mark.usefixtures("undrawn")
def test_the_state_never_goes_where_checkpoints_are(tmp_path):
    task, _, run, _ = make(tmp_path)
    run = run.rename(tmp_path / "lm.partial")
    before = sorted(run.rglob("*"))
    with pytest.raises(OutputError, match="holds something else"):
        merge([run], task, tmp_path / "lm", **QUICK)
    assert sorted(run.rglob("*")) == before


@pytest.mark.usefixtures("undrawn")
def test_an_example_that_spoils_the_fit_is_named_and_no_fit_is_listed(tmp_path):
    task, _, run, out = make(tmp_path)
    fit = split(task, DataConfig().guard_fraction, 0).fit
    task.y[fit.indices[3]] = float("nan")
    said: list[object] = []
    document = merge([run], task, out, progress=said.append)
    assert not {c["name"] for c in document["candidates"]} & {"twa", "twa-tensors", "twa-blocks"}
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any(f"1 of 60 examples (number {fit.indices[3]} of the dataset)" in n for n in notes)
    assert not any("--lr" in note for note in notes)


def meanwhile(harm):
    """What tells a merge's progress to harm a file once the coefficients are known."""

    def listen(event):
        if getattr(event, "stage", "") == "Comparing candidates":
            harm()

    return listen


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("how", ["written over", "cut short"])
def test_a_file_that_changes_before_it_is_written_from_is_told(tmp_path, suffix, how):
    task, states, run, out = make(tmp_path)
    if suffix == "pt":
        run = tmp_path / "pickles"
        run.mkdir()
        for i, state in enumerate(states):
            torch.save(state, run / f"step-{i}.pt")
    files = sorted(run.rglob(f"*.{suffix}"))
    victim, other = files[1], files[3].read_bytes()
    assert len(other) == victim.stat().st_size
    harm = meanwhile(lambda: victim.write_bytes(other if how == "written over" else other[:300]))
    with pytest.raises(CheckpointError, match="vanished or changed") as caught:
        merge([run], task, out, progress=harm, **QUICK)
    assert caught.value.details["checkpoint"] == str(victim)
    assert sorted(p.name for p in tmp_path.iterdir() if "merged" in p.name) == ["merged.partial"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_is_no_longer_there_is_still_read_where_it_is_open(tmp_path, how):
    """A trainer that keeps its last checkpoints removes those that are being merged."""
    task, states, run, out = make(tmp_path)
    victim = run / "checkpoint-200" / "model.safetensors"
    other = tmp_path / "other"
    shutil.copy(run / "checkpoint-400" / "model.safetensors", other)
    harm = meanwhile(victim.unlink if how == "removed" else lambda: other.replace(victim))
    document = merge([run], task, out, progress=harm, **QUICK)
    expected = combined(states, document["coefficients"]["global"])
    for name, tensor in written(out).items():
        assert torch.equal(tensor, expected[name])
