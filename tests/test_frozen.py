"""Runs that saved no more than the part of the model that they trained."""

from __future__ import annotations

import adapted_task
import pytest
import torch
from adapted_task import Adapters
from launches import assert_same_tensors, document, here, in_turn
from runs import save_run
from safetensors.torch import load_file

from twa_merge import evaluate, merge
from twa_merge.config import FitConfig
from twa_merge.errors import TaskError
from twa_merge.progress import Noted


def merging(folder, k, precision):
    # fmt: off
    return ["train", folder / "run", "--task", adapted_task.__file__, "-o",
            folder / f"{precision}{k}", "--batch-size", 8, "--max-evaluations", 6, "--ridge",
            "0.001", "--candidates", "last,twa,twa-layers", "--blocks", "tensors",
            "--precision", precision, "--device", "cpu"]
    # fmt: on


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    adapted_task.train(folder / "run")
    for precision in ("fp32", "bf16"):
        here(*merging(folder, 1, precision))
    launched = in_turn(2, *(merging(folder, 2, precision) for precision in ("fp32", "bf16")))
    assert launched.returncode == 0, launched.stderr
    assert "0.base.weight, 0.base.bias" in launched.stderr
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_processes_agree_and_what_is_written_is_what_was_saved(merged, precision):
    one, two = merged / f"{precision}1", merged / f"{precision}2"
    assert_same_tensors(one, two)
    newest = sorted((merged / "run").rglob("*.safetensors"))[-1]
    assert load_file(one / "model.safetensors").keys() == load_file(newest).keys()
    losses = [
        {row["name"]: row["guard_loss"] for row in document(folder)["candidates"]}
        for folder in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_losses_are_those_of_the_whole_model(merged):
    model, task = Adapters().build_model(), Adapters()
    state = load_file(merged / "fp321" / "model.safetensors")
    assert model.load_state_dict(state, strict=False).missing_keys[0] == "0.base.weight"
    with torch.no_grad():
        expected = float(task.loss(model, (task.x, task.y)).double().mean())
    found = evaluate([merged / "fp321"], task)["models"][0]["loss"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_what_stays_as_it_was_built_is_told_and_has_to_be_frozen(merged, tmp_path):
    said = []
    merge([merged / "run"], Adapters(), tmp_path / "out", progress=said.append)
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any(
        "has frozen; they stay as build_model() leaves them: 0.base.weight" in n for n in notes
    )

    class Thawed(Adapters):
        frozen = False

        def build_model(self):
            return super().build_model().requires_grad_(not self.frozen)

    # Nothing says that these were not trained: neither that all are, nor that none is.
    for Thawed.frozen in (False, True):
        with pytest.raises(TaskError, match="parameters that the checkpoints lack") as caught:
            merge([merged / "run"], Thawed(), tmp_path / "other")
        assert "freeze it" in caught.value.details["what to do"]


class Wide(Adapters):
    """Built in float64, and looks for the type of parameters that are all frozen."""

    def build_model(self):
        return super().build_model().double()

    def loss(self, model, batch):
        x, y = batch
        assert next(model[0].base.parameters()).dtype is torch.float32
        return super().loss(model, (x, y))


def test_frozen_parameters_are_parameters_in_float32(merged, tmp_path):
    plain, wide = (
        merge([merged / "run"], task, tmp_path / type(task).__name__, fit=FitConfig(ridge=0.01))
        for task in (Adapters(), Wide())
    )
    losses = [{r["name"]: r["guard_loss"] for r in d["candidates"]} for d in (plain, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_two_networks_with_one_frozen_part_are_not_guessed_between(merged, tmp_path):
    states = [load_file(path) for path in sorted((merged / "run").rglob("*.safetensors"))]
    both = [{f"{n}.{k}": v.clone() for n in ("net", "ema") for k, v in s.items()} for s in states]
    save_run(tmp_path / "run", both)
    with pytest.raises(TaskError, match="hold the task's model more than once"):
        merge([tmp_path / "run"], Adapters(), tmp_path / "out")
