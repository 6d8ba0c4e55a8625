"""States that modules save beside their tensors: ``torch.nn.Module.get_extra_state``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LinearTask, Pairs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twa_merge import average, evaluate, merge
from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import FitConfig, OutputConfig
from twa_merge.errors import CheckpointError
from twa_merge.layout import make_layout
from twa_merge.progress import Event, Noted

SCALE = 3.0
QUICK = {"fit": FitConfig(blocks="global", ridge=0.0), "out": OutputConfig(overwrite=True)}


class Scaled(nn.Module):
    """Multiplies by a number that is no parameter and no buffer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bias) * self.scale


class ScaledByTensor(Scaled):
    def get_extra_state(self) -> Any:
        return torch.tensor([self.scale])

    def set_extra_state(self, state: Any) -> None:
        self.scale = state.item()


class ScaledTask(LinearTask):
    def __init__(self, last: type[Scaled]) -> None:
        super().__init__()
        self.last = last

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.inputs, self.outputs), self.last(self.outputs))

    def dataset(self) -> Pairs:
        return Pairs(self.x, SCALE * self.y)


class Plain(nn.Module):
    """As ``Scaled``, but for its extra state."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bias) * SCALE


def save(folder: Path, task: ScaledTask, n: int = 4, **extra: Any) -> Path:
    """A run whose extra states differ: the newest's alone fits the data; or with another one."""
    folder.mkdir()
    for k, weights in enumerate(task.states(n)):
        model = task.build_model()
        with torch.no_grad():
            model[0].weight.copy_(weights["0.weight"])
            model[0].bias.copy_(weights["0.bias"])
        model[1].scale = SCALE if k == n - 1 else 0.5
        state = model.state_dict()
        if extra:
            state["1._extra_state"] = extra["state"]
        torch.save({"model": state}, folder / f"step_{k + 1}.pt")
    return folder


def test_a_tensor_is_copied_from_the_newest_and_given_to_the_model(tmp_path: Path) -> None:
    task = ScaledTask(ScaledByTensor)
    run = save(tmp_path / "run", task)
    found = open_checkpoints([run])
    assert make_layout(found).copied == ["1._extra_state"]
    merge([run], task, tmp_path / "merged", **QUICK)
    average([run], tmp_path / "mean")
    for folder in ("merged", "mean"):
        state = load_file(tmp_path / folder / "model.safetensors")
        assert state["1._extra_state"].tolist() == [SCALE]
        model = task.build_model()
        model.load_state_dict(state)
        with torch.no_grad():
            loss = task.loss(model, (task.x, SCALE * task.y)).mean()
        (row,) = evaluate([tmp_path / folder], task)["models"]
        assert row["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_tensor_is_given_to_the_model_under_a_prefix(tmp_path: Path) -> None:
    task = ScaledTask(ScaledByTensor)
    run = save(tmp_path / "run", task)
    state = torch.load(run / "step_4.pt")["model"]
    torch.save({f"net.{k}": v for k, v in state.items()}, tmp_path / "x.pt")
    with_prefix, without = evaluate([tmp_path / "x.pt", run / "step_4.pt"], task)["models"]
    assert with_prefix["loss"] == without["loss"]


def test_what_safetensors_cannot_hold_is_refused(tmp_path: Path) -> None:
    task = ScaledTask(Scaled)
    run = save(tmp_path / "run", task)
    for refuse in (
        lambda: merge([run], task, tmp_path / "out", **QUICK),
        lambda: evaluate([run / "step_1.pt"], task),
        lambda: average([run], tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="safetensors cannot hold") as caught:
            refuse()
        details = caught.value.details
        assert details["tensor"] == "1._extra_state"
        assert details["checkpoint"] == str(run / "step_1.pt")
        assert "dict" in details["found"]
        assert "register_buffer" in details["what to do"]
        assert not (tmp_path / "out").exists()


def notes_of(run: Path, task: ScaledTask, out: Path) -> str:
    notes: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)

    merge([run], task, out, **QUICK, progress=hear)
    return "\n".join(notes)


def test_what_the_tasks_model_has_no_use_for_is_left_out_and_told(tmp_path: Path) -> None:
    run = save(tmp_path / "run", ScaledTask(Scaled))
    said = notes_of(run, ScaledTask(Plain), tmp_path / "out")
    assert "left out: 1._extra_state" in said


def test_a_state_that_the_checkpoints_lack_is_told(tmp_path: Path) -> None:
    run = save(tmp_path / "run", ScaledTask(Scaled))
    for path in run.iterdir():
        saved = torch.load(path)
        del saved["model"]["1._extra_state"]
        torch.save(saved, path)
    said = notes_of(run, ScaledTask(Scaled), tmp_path / "out")
    assert "1._extra_state" in said
    assert "as build_model() leaves" in said
    with_tensor = save(tmp_path / "tensors", ScaledTask(ScaledByTensor))
    assert "extra state" not in notes_of(with_tensor, ScaledTask(ScaledByTensor), tmp_path / "out")


@pytest.mark.parametrize("state", [None, {}, "", []])
def test_empty_states_are_no_obstacle(tmp_path: Path, state: object) -> None:
    task = ScaledTask(Scaled)
    run = save(tmp_path / "run", task, state=state)
    merge([run], task, tmp_path / "merged", **QUICK)
    average([run], tmp_path / "mean")
    assert "1._extra_state" not in load_file(tmp_path / "mean" / "model.safetensors")
    evaluate([run], task)


def test_bytes_in_tensors_are_copied(tmp_path: Path) -> None:
    """As libraries for training in 8 bits save what they know of scales."""
    for step in (1, 2):
        state = {"w": torch.full((3, 3), float(step)), "_extra_state": torch.empty(0)}
        state["l._extra_state"] = torch.full((5,), step, dtype=torch.uint8)
        save_file(state, tmp_path / f"step_{step}.safetensors")
    average([tmp_path], tmp_path / "mean")
    merged = load_file(tmp_path / "mean" / "model.safetensors")
    assert merged["l._extra_state"].tolist() == [2] * 5
    assert merged["_extra_state"].numel() == 0
    assert merged["w"][0, 0] == 1.5
