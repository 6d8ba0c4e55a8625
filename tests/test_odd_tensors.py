"""Tensors that few models have: judged as they are, and alike by several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launches import assert_same_tensors, document, here, run
from odd_task import OddTask, train
from runs import save_run
from safetensors.torch import load_file
from torch import nn

from twa_merge import average, merge
from twa_merge.config import EngineConfig, FitConfig, GuardConfig, OutputConfig, StoreConfig
from twa_merge.errors import CheckpointError, TaskError

TASK = Path(__file__).with_name("odd_task.py")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("store", ["device", "disk"])
def test_the_losses_are_those_of_the_model_that_was_saved(tmp_path, store):
    states = train(tmp_path / "run")
    fit, guard = FitConfig(ridge=0.01), GuardConfig(candidates="last,uniform,twa,twa-layers")
    data, offsets = OddTask(), StoreConfig(store)
    found = merge([tmp_path / "run"], data, tmp_path / "m", fit=fit, guard=guard, store=offsets)
    model = data.build_model()
    model.load_state_dict(states[-1])
    held_out = data.x[60:], data.y[60:]
    with torch.no_grad():
        loss = float(data.loss(model, held_out).mean())
    last = next(c for c in found["candidates"] if c["name"] == "last")
    assert last["test_loss"] == pytest.approx(loss, abs=1e-6)
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(written["mask"], states[-1]["mask"])
    # What counts steps is longer than all weights: in the subspace it would be all there is.
    assert found["subspace"]["rank"] == 4


def test_two_processes_merge_them_as_one_does(tmp_path):
    train(tmp_path / "run")
    # fmt: off
    options = ["train", tmp_path / "run", "--task", TASK, "--ridge", "0.01", "--device", "cpu",
               "--max-evaluations", 8, "--candidates", "last,twa,twa-layers", "-o"]
    # fmt: on
    done = run(2, *options, tmp_path / "m2")
    assert done.returncode == 0, done.stderr
    here(*options, tmp_path / "m1")
    one, two = (document(tmp_path / f"m{k}")["coefficients"]["blocks"] for k in (1, 2))
    for block, values in one.items():
        assert two[block] == pytest.approx(values, abs=1e-5)
    assert_same_tensors(tmp_path / "m1", tmp_path / "m2")


def test_complex_tensors_are_refused_in_words(tmp_path):
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3))
            self.register_buffer("phase", torch.ones(3, dtype=torch.complex64))

    task = OddTask()
    task.build_model = Spectral
    save_run(tmp_path / "run", [Spectral().state_dict() for _ in range(3)])
    with pytest.raises(TaskError, match="complex") as caught:
        merge([tmp_path / "run"], task, tmp_path / "m", engine=EngineConfig(device="cpu"))
    assert caught.value.details["tensor"] == "phase"
    assert "twa-merge average" in caught.value.details["what to do"]


@pytest.mark.parametrize("saved", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("written", ["float32", "bfloat16", "float16"])
def test_a_mask_is_itself_in_another_dtype(tmp_path, saved, written):
    mask = torch.full((4, 4), -torch.inf).triu(1) + torch.eye(4)
    states = [{"w": torch.ones(3), "mask": mask.to(getattr(torch, saved))} for _ in range(3)]
    save_run(tmp_path / "run", states)
    average([tmp_path / "run"], tmp_path / "m", out=OutputConfig(dtype=written))
    found = load_file(tmp_path / "m" / "model.safetensors")["mask"]
    assert found.dtype == getattr(torch, written)
    assert torch.equal(found.float(), mask)


def test_infinities_are_those_of_a_mask_where_all_checkpoints_have_them(tmp_path):
    mask = torch.tensor([0.0, -torch.inf, torch.inf, 1.0])
    states = [{"w": torch.full((3,), float(i)), "mask": mask + 0.0} for i in range(3)]
    save_run(tmp_path / "run", states)
    average([tmp_path / "run"], tmp_path / "m", weights="0.9,-0.4,0.5")
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["mask"], mask)
    states[1]["mask"][1] = torch.inf
    save_run(tmp_path / "other", states)
    with pytest.raises(CheckpointError, match="not finite"):
        average([tmp_path / "other"], tmp_path / "n")
