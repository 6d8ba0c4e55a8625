"""Several processes, really launched, against one."""

from __future__ import annotations

import json
import signal
import subprocess

import kinked_task
import psutil
import pytest
import torch
from kinked_task import Kinked
from launches import (
    TASK,
    assert_same_tensors,
    command,
    distance,
    document,
    documents_in,
    environment,
    here,
    in_turn,
    ranks_of,
    run,
    wait_for_evaluations,
)
from runs import save_run, states_of
from small_task import train

STORES = ("device", "disk")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A folder with merges by 1, 2 and 4 processes: one for each store, and ``kinked``."""
    folder = tmp_path_factory.mktemp("merged")
    train(folder / "run")
    train(folder / "kinks", of=Kinked)

    def options(k, store):
        # fmt: off
        return ["train", folder / "run", "--task", TASK, "-o", folder / f"{store}{k}",
                "--batch-size", 30, "--blocks", "tensors", "--max-evaluations", 8, "--ridge",
                "0.01", "--candidates", "last,uniform,greedy,twa,twa-layers,blend", "--store",
                store, "--device", "cpu"]
        # fmt: on

    def kinked(k):
        # fmt: off
        return ["train", folder / "kinks", "--task", kinked_task.__file__, "-o",
                folder / f"kinked{k}", "--batch-size", 4, "--blocks", "tensors", "--ridge", "0.001",
                "--candidates", "last,twa,twa-tensors", "--device", "cpu"]
        # fmt: on

    def commands(k):
        return [*(options(k, store) for store in STORES), kinked(k)]

    for one in commands(1):
        here(*one)
    for k in (2, 4):
        done = in_turn(k, *commands(k))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("store", STORES)
def test_2_and_4_processes_give_the_coefficients_of_one(merged, store):
    """Fewer rows than ranks in one tensor, fewer batches than ranks: both work."""
    documents = {k: document(merged / f"{store}{k}") for k in (1, 2, 4)}
    for k in (2, 4):
        assert documents[k]["world_size"] == k
        assert documents[k]["chosen"] == documents[1]["chosen"]
        for kind in documents[1]["coefficients"]:
            one, other = (documents[i]["coefficients"][kind] for i in (1, k))
            assert distance(one, other) < 1e-5
        assert_same_tensors(merged / f"{store}1", merged / f"{store}{k}")


def test_fits_with_kinks_are_the_same_on_any_number_of_processes(merged):
    """An activation that changes sides in one fit alone parts it from the others by 4e-3."""
    one, *others = (document(merged / f"kinked{k}")["candidates"] for k in (1, 2, 4))
    for other in others:
        for name in ("twa", "twa-tensors"):
            a, b = (next(r for r in rows if r["name"] == name) for rows in (one, other))
            assert distance(a["coefficients"], b["coefficients"]) < 1e-5


NESTED = """
from torch import nn
from small_task import Small


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = Inner()

    def forward(self, x):
        return self.mixer(x).tanh()


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x)


class Task(Small):
    no_split_modules = ("Outer", "Inner")

    def build_model(self):
        return nn.Sequential(Outer(), Outer(), nn.Linear(6, 3))


task = Task
"""


def test_modules_that_are_not_to_be_split_may_lie_in_one_another(tmp_path):
    """As those of Mamba do."""
    shapes = {"0.mixer.linear": (6, 6), "1.mixer.linear": (6, 6), "2": (3, 6)}
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    save_run(tmp_path / "run", states_of(2, shapes=weights | biases))
    (tmp_path / "nested.py").write_text(NESTED)
    options = ["eval", tmp_path / "run", "--task", tmp_path / "nested.py", "--device", "cpu"]
    options.append("--json")
    done = run(2, *options)
    assert done.returncode == 0, done.stderr
    (one,), (two,) = documents_in(here(*options)), documents_in(done.stdout)
    expected = [row["loss"] for row in one["models"]]
    assert [row["loss"] for row in two["models"]] == pytest.approx(expected, abs=1e-6)


def test_average_and_geometry_on_several_processes(tmp_path):
    save_run(tmp_path / "run", states_of(4))
    average, inspect = ["average", tmp_path / "run", "-o"], ["inspect", tmp_path / "run"]
    inspect += ["--geometry", "--json"]
    done = in_turn(2, inspect, [*average, tmp_path / "a2"])
    assert done.returncode == 0, done.stderr
    here(*average, tmp_path / "a1")
    assert_same_tensors(tmp_path / "a1", tmp_path / "a2")
    one, two = (documents_in(printed)[0] for printed in (here(*inspect), done.stdout))
    for key in ("distances", "cosines"):
        a, b = (torch.tensor(d["geometry"][key], dtype=torch.float64) for d in (one, two))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nproc_starts_the_same_thing(tmp_path):
    train(tmp_path / "run")
    # fmt: off
    done = run(1, "train", tmp_path / "run", "--task", TASK, "-o", tmp_path / "m", "--nproc", 2,
               "--blocks", "global", "--ridge", "0", "--max-evaluations", 3, "--device", "cpu",
               "--json")
    # fmt: on
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2


_IMPOSTOR = """
from pathlib import Path
Path(__file__).with_suffix(".mark").touch()
"""


def test_a_plan_is_of_as_many_processes_as_are_named(tmp_path):
    train(tmp_path / "run")
    done = run(1, "inspect", tmp_path / "run", "--plan", "--gpus", 0, "--nproc", 2, "--json")
    assert json.loads(done.stdout)["plan"]["processes"] == 2


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_working_directory_shadows_no_package(tmp_path, monkeypatch, nproc):
    """While what lies beside the task file can be imported."""
    train(tmp_path / "run", checkpoints=2)
    here = tmp_path / "here"
    (here / "tasks").mkdir(parents=True)
    for name in ("rich", "click", "safetensors", "beside"):
        (here / f"{name}.py").write_text(_IMPOSTOR)
    (here / "tasks" / "beside.py").write_text("from small_task import Small")
    (here / "tasks" / "task.py").write_text("from beside import Small as task")
    monkeypatch.chdir(here)
    done = run(1, "eval", tmp_path / "run", "--task", "tasks/task.py", "--nproc", nproc)
    assert done.returncode == 0, done.stderr
    assert not list(here.glob("*.mark"))


_TIDY = """
import atexit, os
from pathlib import Path
from small_task import Small as task


class Aborts:
    def __del__(self):
        os.abort()


ABORTS = Aborts()  # by the end of the process, and no sooner
atexit.register(lambda: Path(f"left.{os.environ['RANK']}").touch())
"""


def test_a_rank_that_is_done_outlives_no_interpreter(tmp_path, monkeypatch):
    """As threads of gloo can, whatever aborts while the interpreter is taken down; exit
    handlers run."""
    train(tmp_path / "run")
    (tmp_path / "tidy.py").write_text(_TIDY)
    monkeypatch.chdir(tmp_path)
    # fmt: off
    done = run(2, "eval", tmp_path / "run", "--task", "tidy.py", "--device", "cpu")
    # fmt: on
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "left.0").exists()
    assert (tmp_path / "left.1").exists()


def test_a_user_error_is_one_message_from_all_processes(tmp_path):
    train(tmp_path / "run", checkpoints=1)
    done = run(
        2, "train", tmp_path / "run", "--task", TASK, "-o", tmp_path / "m", "--device", "cpu"
    )
    assert done.returncode != 0
    assert done.stderr.count("only one checkpoint") == 1
    assert not (tmp_path / "m").exists()


def test_a_killed_rank_ends_the_run_and_another_number_of_ranks_continues_it(tmp_path):
    train(tmp_path / "run")
    # fmt: off
    options = ["train", tmp_path / "run", "--task", TASK, "--blocks", "global", "--ridge", "0.001",
               "--max-evaluations", 12, "--candidates", "last,twa", "--device", "cpu", "-o"]
    # fmt: on
    here(*options, tmp_path / "whole")
    killed = subprocess.Popen(
        command(2, *options, tmp_path / "m"),
        env=environment(SMALL_TASK_SLEEP="0.05"),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_evaluations(killed, tmp_path / "m", 3)
    state = tmp_path / "m.partial" / "state.jsonl"
    ranks_of(psutil.Process(killed.pid))[1].send_signal(signal.SIGKILL)
    killed.communicate(timeout=120)
    assert killed.returncode not in (0, None)
    assert not (tmp_path / "m").exists()
    assert len(state.read_text()) < 20_000
    done = run(1, *options, tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert "Continuing" in done.stderr
    one, other = (document(tmp_path / f)["coefficients"]["global"] for f in ("whole", "m"))
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-5


def test_ranks_whose_rounding_differs_go_the_way_of_rank_zero():
    done = run(2, module="unlike_ranks")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[[2.0, 4.0, 6.0], [1.0, 2.0, 3.0]]] * 2


def test_a_process_that_does_not_answer_is_not_said_to_have_ended():
    done = run(2, module="stuck")
    assert "has not answered for 30 minutes" in done.stdout, done.stderr
