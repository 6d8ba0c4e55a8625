"""What goes wrong, and what is unusual, in several processes that are really launched."""

from __future__ import annotations

import runpy
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from launches import (
    TASK,
    command,
    distance,
    document,
    environment,
    here,
    in_turn,
    ranks_of,
    run,
    wait_for_evaluations,
)
from small_task import train

from twa_merge.errors import ConfigError

# Rows of 200 and 150 numbers: no whole groups of a packed store, and no rank's are either. A
# scalar, which FSDP2 refuses, and a loss that does without the model's own forward.
WIDE = """
import torch
from runs import Pairs, save_run
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 3))
        self.temperature = nn.Parameter(torch.tensor(1.0))


class Wide:
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 200, generator=generator)
        self.y = (self.x[:, :3] + self.x[:, 3:6]).argmax(1)

    def build_model(self):
        return Net()

    def dataset(self):
        return Pairs(self.x, self.y)

    def loss(self, model, batch):
        x, y = batch
        hidden = model[1](model[0](x))
        scores = model[2](hidden) * model.temperature
        return nn.functional.cross_entropy(scores, y, reduction="none")


def task():
    return Wide()


def train(folder):
    torch.manual_seed(0)
    data, states = Wide(), []
    model = data.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(20):
        optimizer.zero_grad()
        chosen = torch.randint(40, (8,))
        data.loss(model, (data.x[chosen], data.y[chosen])).mean().backward()
        optimizer.step()
        if step % 4 == 3:
            states.append({k: v.clone() for k, v in model.state_dict().items()})
    save_run(folder, states)
"""


RANKS_AND_GATHER = {1: "layer", 2: "model", 3: "layer"}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Merges by one process and by several: ``packed1``, ``packed2``, ``packed3``, ``bf16-1``, …"""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "wide.py").write_text(WIDE)
    runpy.run_path(str(folder / "wide.py"))["train"](folder / "wide")
    train(folder / "small")

    def packed(k):
        # fmt: off
        return ["train", folder / "wide", "--task", folder / "wide.py", "-o", folder / f"packed{k}",
                "--batch-size", 8, "--blocks", "tensors", "--max-evaluations", 4, "--ridge", "0.1",
                "--store-dtype", "int4", "--candidates", "last,twa,twa-layers",
                "--gather", RANKS_AND_GATHER[k], "--device", "cpu"]
        # fmt: on

    def bf16(k):
        # fmt: off
        return ["train", folder / "small", "--task", TASK, "-o", folder / f"bf16-{k}",
                "--precision", "bf16", "--blocks", "global", "--ridge", "0.1", "--device", "cpu",
                "--max-evaluations", 4, "--candidates", "last,twa"]
        # fmt: on

    here(*packed(1))
    here(*bf16(1))
    for done in (in_turn(2, packed(2), bf16(2)), run(3, *packed(3))):
        assert done.returncode == 0, done.stderr
    return folder


def test_packed_offsets_give_the_same_coefficients_on_any_number_of_ranks(merged):
    """Whether ranks gather a layer at a time or the whole model."""
    one, *others = (document(merged / f"packed{k}") for k in RANKS_AND_GATHER)
    assert "twa-tensors" in {row["name"] for row in one["candidates"]}
    assert [other["world_size"] for other in others] == [2, 3]
    for other in others:
        for a, b in zip(one["candidates"], other["candidates"], strict=True):
            assert distance(a["coefficients"], b["coefficients"]) < 1e-5
            assert a["guard_loss"] == pytest.approx(b["guard_loss"], abs=1e-5)


def test_bf16_passes_in_one_process_and_in_two(merged):
    """Weights and the sum over the ranks stay in float32: only the passes are narrower."""
    one, two = (document(merged / f"bf16-{k}")["candidates"] for k in (1, 2))
    # Not of the chosen one: a checkpoint has the same coefficients whatever was fitted.
    assert "twa" in {row["name"] for row in one}
    for a, b in zip(one, two, strict=True):
        assert distance(a["coefficients"], b["coefficients"]) < 1e-5


def interruptible(output: Path, *arguments: object) -> list[object]:
    # fmt: off
    return ["train", output.parent / "run", "--task", TASK, "-o", output, "--blocks", "global",
            "--ridge", "0.001", "--max-evaluations", 12, "--candidates", "last,twa",
            "--device", "cpu", *arguments]
    # fmt: on


def start(k: int, output: Path, *arguments: object) -> subprocess.Popen[str]:
    """A run that is slow enough to be caught in the middle."""
    return subprocess.Popen(
        command(k, *interruptible(output, *arguments)),
        env=environment(SMALL_TASK_SLEEP="0.05"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_file_that_is_lost_in_mid_run_ends_all_ranks_and_can_be_brought_back(tmp_path, capsys):
    train(tmp_path / "run")
    process = start(2, tmp_path / "m", "--store", "disk")
    wait_for_evaluations(process, tmp_path / "m", 3)
    victim = tmp_path / "run" / "checkpoint-300" / "model.safetensors"
    weights = victim.read_bytes()
    victim.unlink()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("has vanished or changed") == 1
    assert str(victim) in said
    assert "bring the file back" in said
    assert not (tmp_path / "m").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "m.partial"}
    victim.write_bytes(weights[:-4] + b"\0\0\0\0")
    with pytest.raises(ConfigError, match="other inputs"):
        here(*interruptible(tmp_path / "m", "--store", "disk"))
    victim.write_bytes(weights)
    here(*interruptible(tmp_path / "m", "--store", "disk"))
    assert "evaluations are known" in capsys.readouterr().err
    assert (tmp_path / "m").exists()


def signalled(folder: Path, signum: signal.Signals) -> tuple[int, str]:
    """Exit code and errors of two processes, the second of which gets a signal in mid-run."""
    train(folder / "run")
    process = start(1, folder / "m", "--nproc", 2)
    wait_for_evaluations(process, folder / "m", 3)
    ranks_of(psutil.Process(process.pid))[1].send_signal(signum)
    _, said = process.communicate(timeout=120)
    assert f"continues from {folder / 'm.partial'}" in said
    return process.returncode, said


def test_a_killed_rank_is_not_blamed_on_the_task(tmp_path):
    """The other rank is in the middle of the task's loss, waiting for rows of the dead one."""
    code, said = signalled(tmp_path, signal.SIGKILL)
    assert code == 1
    assert "The task" not in said
    assert said.count("was killed by SIGKILL") == 1


def test_a_process_that_ends_itself_is_told_of(tmp_path):
    """As native code does that aborts: nobody else says a word. The code is a user error's."""
    train(tmp_path / "run")
    task = tmp_path / "ends.py"
    task.write_text(
        "import os, small_task\n\n"
        "class Ends(small_task.Small):\n"
        "    def loss(self, model, batch):\n"
        "        if os.environ.get('RANK') == '1':\n"
        "            os._exit(2)\n"
        "        return super().loss(model, batch)\n\n"
        "def task():\n"
        "    return Ends()\n"
    )
    done = run(1, "train", tmp_path / "run", "--task", task, "-o", tmp_path / "m", "--nproc", 2,
               "--device", "cpu")  # fmt: skip
    assert done.returncode == 1
    assert "Process 1 of 2 ended itself with exit code 2." in done.stderr


def test_a_rank_that_is_told_to_stop_ends_all_with_one_message_and_no_warnings(tmp_path):
    code, said = signalled(tmp_path, signal.SIGTERM)
    assert code == 130
    assert said.count("was told to stop") == 1
    assert "Warning" not in said


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    train(tmp_path / "run")
    process = start(1, tmp_path / "m", "--nproc", 2)
    wait_for_evaluations(process, tmp_path / "m", 1)
    ranks = ranks_of(psutil.Process(process.pid))
    assert len(ranks) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=3)
    for rank in alive:
        rank.kill()
    process.communicate()
    assert not alive
    assert not (tmp_path / "m").exists()


def test_max_restarts_goes_on_after_a_killed_rank(tmp_path):
    train(tmp_path / "run")
    process = start(1, tmp_path / "m", "--nproc", 2, "--max-restarts", 1)
    wait_for_evaluations(process, tmp_path / "m", 3)
    ranks_of(psutil.Process(process.pid))[1].send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "was killed by SIGKILL, often a sign of too little memory. Starting again" in said
    assert "Continuing" in said
    assert document(tmp_path / "m")["world_size"] == 2


# Checkpoints around the solution: nothing but the landscape is further out than they are.
CAREFUL = """
import torch
from runs import Pairs, save_run
from torch import nn

AROUND = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])


class Careful:
    def build_model(self):
        return nn.Linear(2, 1, bias=False)

    def dataset(self):
        x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        return Pairs(x, torch.zeros(40, 1))

    def loss(self, model, batch):
        x, y = batch
        found = model(x)
        if (found.abs() > 1.1 * (x @ AROUND.T).abs().amax(1, keepdim=True)).any():
            raise ValueError("a loss that explodes")
        return (found - y).square().mean(1)


def task():
    return Careful()


def train(folder):
    save_run(folder, [{"weight": weight[None].clone()} for weight in AROUND])
"""


def test_a_task_that_fails_in_the_landscape_costs_a_run_of_several_processes_one_more(tmp_path):
    task = tmp_path / "careful.py"
    task.write_text(CAREFUL)
    runpy.run_path(str(task))["train"](tmp_path / "run")
    # fmt: off
    merging = ["train", tmp_path / "run", "--task", task, "-o", tmp_path / "m", "--blocks",
               "global", "--ridge", "0.01", "--candidates", "last,uniform,twa", "--device", "cpu"]
    # fmt: on
    failed = run(2, *merging, pictures=True)
    assert failed.returncode != 0
    assert "a loss that explodes" in failed.stderr
    assert "the same command again goes on without the report's landscape" in failed.stderr
    assert not (tmp_path / "m").exists()
    done = run(2, *merging, pictures=True)
    assert done.returncode == 0, done.stderr
    assert "no landscape: the task failed there" in done.stderr
    assert (tmp_path / "m" / "report.html").exists()
    assert not (tmp_path / "m.partial").exists()
