"""Running statistics against torch's own, and layers whose statistics are not to be touched."""

from __future__ import annotations

import json

import pytest
import torch
from runs import LinearTask, save_run
from safetensors.torch import load_file
from test_objective import engine_for
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from twa_merge import average, merge
from twa_merge.batchnorm import reestimate
from twa_merge.config import FitConfig, GuardConfig
from twa_merge.objective import batch_statistics
from twa_merge.progress import Noted
from twa_merge.task import split, to_device


class Towers(nn.Module):
    """A siamese network: one batch norm used twice; another one in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.beside = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.norm(self.body(x)) + self.norm(self.body(3.0 + 2.0 * x))
        return y + self.beside(y) if self.training else y


class Fixed(nn.BatchNorm1d):
    """In evaluation mode for good, as in fine-tunings."""

    def train(self, mode: bool = True):
        return super().train(False)


class Unknown(nn.Module):
    """The same for who does not know that it is a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, tensor in nn.BatchNorm1d(width).state_dict().items():
            if name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False
        )


class Task(LinearTask):
    def __init__(self, build, examples: int = 120) -> None:
        super().__init__(examples=examples)
        self.build_model = build


def trained(folder, task: Task, checkpoints: int = 4) -> None:
    """Checkpoints of a real run."""
    torch.manual_seed(0)
    model = task.build_model().train()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape) * 4 + 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    states = []
    for _ in range(checkpoints):
        for rows in torch.randint(len(task.x), (5, 8)):
            optimizer.zero_grad()
            task.loss(model, (task.x[rows], task.y[rows])).mean().backward()
            optimizer.step()
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    save_run(folder, states)


def fixed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), Fixed(4), nn.Linear(4, 4))


def test_statistics_are_those_of_torch_where_a_layer_is_used_twice(tmp_path):
    task = Task(Towers)
    trained(tmp_path, task)
    engine, _, batches = engine_for(task, tmp_path)
    engine.set_weights(torch.full((1, 4), 0.25, dtype=torch.float64))
    module = engine.live.module
    averaged = {k: v.clone() for k, v in module.state_dict().items()}
    reestimate(engine, batches, range(100))
    again = Towers()
    again.load_state_dict(averaged)
    given = [to_device(batch, torch.device("cpu"))[0] for _, batch, _ in batches.rounds(range(100))]
    update_bn(given, again)
    for kind in ("running_mean", "running_var"):
        found, expected = getattr(module.norm, kind), getattr(again.norm, kind)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not module.training
    assert module.norm.momentum == 0.1


def test_statistics_that_no_evaluation_comes_to_stay_averaged(tmp_path):
    task = Task(Towers)
    trained(tmp_path, task)
    engine, _, batches = engine_for(task, tmp_path)
    engine.set_weights(torch.full((1, 4), 0.25, dtype=torch.float64))
    beside = engine.live.module.beside
    averaged = beside.running_mean.clone(), beside.running_var.clone()
    assert averaged[0].abs().max() > 1e-3
    reestimate(engine, batches, range(100))
    assert torch.equal(beside.running_mean, averaged[0])
    assert torch.equal(beside.running_var, averaged[1])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("batch_norm", ["auto", "reestimate"])
def test_batch_norm_that_was_frozen_in_training_stays_so(tmp_path, batch_norm):
    """Its statistics are the same in all checkpoints."""
    trained(tmp_path / "run", Task(fixed))

    def unknown() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), Unknown(4), nn.Linear(4, 4))

    found = {}
    for build in (fixed, unknown):
        document = merge(
            [tmp_path / "run"],
            Task(build),
            tmp_path / build.__name__,
            fit=FitConfig(blocks="global", ridge=0.01, max_evaluations=5),
            guard=GuardConfig(candidates="uniform,twa", batch_norm=batch_norm),
        )
        found[build.__name__] = document["candidates"]
    assert found["fixed"] == found["unknown"]
    saved = load_file(tmp_path / "run" / "checkpoint-100" / "model.safetensors")
    written = load_file(tmp_path / "fixed" / "model.safetensors")
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(written[name], saved[name], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("undrawn")
def test_copies_of_one_checkpoint_are_that_checkpoint(tmp_path):
    task = Task(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    trained(tmp_path / "run", task, checkpoints=1)
    state = load_file(tmp_path / "run" / "checkpoint-100" / "model.safetensors")
    save_run(tmp_path / "copies", [state] * 3)
    document = merge([tmp_path / "copies"], task, tmp_path / "out")
    assert document["chosen"] == "last"
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in state.items():
        assert torch.equal(written[name], tensor), name


def test_a_layer_left_as_it_is_normalises_by_no_batch():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    module[0].track_running_stats = False
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    expected = module[0](x)
    with batch_statistics(module):
        assert torch.equal(module[0](x), expected)
        assert module[1](x).mean(0).abs().max() < 1e-6


@pytest.mark.parametrize("batch_norm", ["reestimate", "newest"])
def test_a_checkpoint_keeps_its_own_statistics_whatever_means_take(tmp_path, batch_norm):
    def build():
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    task = Task(build)
    trained(tmp_path / "run", task)
    losses = {}
    for name in ("average", batch_norm):
        document = merge(
            [tmp_path / "run"],
            task,
            tmp_path / name,
            guard=GuardConfig(candidates="uniform", batch_norm=name),
        )
        rows = document["candidates"] + document["other_candidates"]
        losses[name] = {row["name"]: row["guard_loss"] for row in rows}
    uniform = [found.pop("uniform") for found in losses.values()]
    assert uniform[0] != uniform[1]
    assert losses["average"] == losses[batch_norm]


def test_statistics_that_no_checkpoint_holds_stay_as_they_are_built(tmp_path):
    """They cannot be written: nothing may be judged with others."""

    def build():
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))

    task = Task(build, examples=200)
    trained(tmp_path / "whole", task)
    states = [
        {k: v for k, v in load_file(path).items() if not k.startswith(("1.running", "1.num"))}
        for path in sorted((tmp_path / "whole").rglob("*.safetensors"))
    ]
    save_run(tmp_path / "run", states)
    said = []
    settled = GuardConfig(batch_norm="reestimate")
    document = merge(
        [tmp_path / "run"], task, tmp_path / "out", guard=settled, progress=said.append
    )
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any("running statistics of batch norm in 1;" in note for note in notes)
    guard = split(task, 0.25, 0).guard
    x, y = (torch.stack(column) for column in zip(*guard, strict=True))
    model, written = build().eval(), load_file(tmp_path / "out" / "model.safetensors")
    for name, state in (("last", states[-1]), (document["chosen"], written)):
        model.load_state_dict(build().state_dict() | state)
        with torch.no_grad():
            expected = float(task.loss(model, (x, y)).double().mean())
        row = next(row for row in document["candidates"] if row["name"] == name)
        assert row["guard_loss"] == pytest.approx(expected, rel=1e-5)


def test_averaging_tells_that_a_report_had_statistics_of_data(tmp_path):
    task = Task(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    trained(tmp_path / "run", task)
    guard = GuardConfig(candidates="uniform", batch_norm="reestimate")
    document = merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    for chosen, told in (("last", False), ("uniform", True)):
        path, said = tmp_path / f"{chosen}.json", []
        path.write_text(json.dumps(document | {"chosen": chosen}))
        average([tmp_path / "run"], tmp_path / chosen, weights=f"@{path}", progress=said.append)
        noted = [event.text for event in said if isinstance(event, Noted)]
        assert any("batch norm are averaged here" in text for text in noted) is told


@pytest.mark.usefixtures("undrawn")
def test_the_example_that_spoils_a_batch_is_named_alone(tmp_path):
    task = Task(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    trained(tmp_path / "run", task)
    number = split(task, 0.25, 0).fit.indices[3]
    task.x[number] = torch.nan
    said = []
    merge([tmp_path / "run"], task, tmp_path / "merged", progress=said.append)
    notes = [event.text for event in said if isinstance(event, Noted)]
    assert any(f"1 of 90 examples (number {number} of the dataset)" in n for n in notes)
