"""Every subcommand as a user types it, on a real run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import launches
import pytest
import torch
from safetensors.torch import load_file
from small_task import Small, train
from twa_merge_cli import boundary
from twa_merge_cli.main import cli

TESTS = Path(__file__).parent
TASK = TESTS / "small_task.py"


def command(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).with_name("twa-merge")), *map(str, arguments)]


def run(*arguments: object, pictures: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=launches.environment(pictures=pictures, COLUMNS="120"),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run and its merge, made by ``twa-merge train`` with default settings."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "run")
    options = ("--task", TASK, "--device", "cpu", "-o", folder / "merged")
    done = run("train", folder / "run", *options, pictures=True)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_train_prints_the_table_and_writes_the_folder(trained: Path) -> None:
    printed = (trained / "stdout.txt").read_text()
    report = json.loads((trained / "merged" / "twa_merge.json").read_text())
    assert f"> {report['chosen']}" in printed
    assert "95 % interval" in printed
    written = {p.name for p in (trained / "merged").iterdir()}
    assert {"model.safetensors", "twa_merge.json", "README.md", "report.html"} <= written
    assert not list(trained.glob("*.partial"))
    best = min(c["selection_loss"] for c in report["candidates"])
    chosen = next(c for c in report["candidates"] if c["name"] == report["chosen"])
    # The blend stands unless another is ahead of it by a standard error, and says so.
    if abs(chosen["selection_loss"] - best) >= 1e-6:
        assert chosen["name"] == "blend"
        assert "ahead of it by less than one standard error" in " ".join(printed.split())


def test_eval_agrees_with_torch(trained: Path) -> None:
    done = run("eval", trained / "merged", trained / "run", "--task", TASK, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["models"]
    assert len(rows) == 7
    task = Small()
    model = task.build_model().eval()
    model.load_state_dict(load_file(trained / "merged" / "model.safetensors"))
    with torch.no_grad():
        losses = task.loss(model, (task.x, task.y))
        hits = task.metrics(model, (task.x, task.y))["accuracy"]
    assert abs(rows[0]["loss"] - float(losses.mean())) < 1e-6
    assert abs(rows[0]["metrics"]["accuracy"] - float(hits.mean())) < 1e-6
    table = launches.here("eval", trained / "merged", "--task", TASK)
    assert "merged" in table
    assert "90 examples" in table


def test_inspect_counts_what_is_there(trained: Path) -> None:
    done = run("inspect", trained / "run", "--geometry", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [c["step"] for c in document["checkpoints"]] == [100, 200, 300, 400, 500, 600]
    assert document["geometry"]["orthogonality_error"] < 1e-5
    assert "checkpoint-100" in run("inspect", trained / "run").stdout


def test_average_makes_a_merge_again_from_its_report(trained: Path) -> None:
    report = trained / "merged" / "twa_merge.json"
    done = run("average", trained / "run", "--weights", f"@{report}", "-o", trained / "again")
    assert done.returncode == 0, done.stderr
    one, other = (
        load_file(trained / folder / "model.safetensors") for folder in ("merged", "again")
    )
    statistics = {name for name in one if "running" in name}
    assert all(torch.equal(one[name], other[name]) for name in one.keys() - statistics)


def test_an_unknown_metric_is_told_before_anything_is_trained(tmp_path: Path, capsys) -> None:
    train(tmp_path / "run")
    # fmt: off
    arguments = ["train", tmp_path / "run", "--task", TASK, "-o", tmp_path / "m",
                 "--select", "metric:f1"]
    # fmt: on
    assert boundary.run(cli, [str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "accuracy" in said
    assert "Training" not in said
    assert not (tmp_path / "m").exists()


def test_kill_9_and_the_same_command_again(trained: Path, tmp_path: Path) -> None:
    options = ("train", trained / "run", "--task", TASK, "--device", "cpu", "-o")
    killed = subprocess.Popen(
        command(*options, tmp_path / "merged"),
        env=launches.environment(SMALL_TASK_SLEEP="0.02"),
        stderr=subprocess.DEVNULL,
    )
    state = tmp_path / "merged.partial" / "state.jsonl"
    deadline = time.monotonic() + 60
    while not (state.exists() and len(state.read_text().splitlines()) > 20):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "merged").exists()
    done = run(*options, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "Continuing" in done.stderr
    one, other = (
        json.loads((folder / "merged" / "twa_merge.json").read_text())
        for folder in (trained, tmp_path)
    )
    assert one["chosen"] == other["chosen"]
    assert one["coefficients"] == other["coefficients"]


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({"RANK": "1"}, 0),
        ({"RANK": "1", "WORLD_SIZE": "1"}, 0),
        ({"WORLD_SIZE": ""}, 2),
        ({"WORLD_SIZE": "two"}, 2),
        ({"WORLD_SIZE": "2", "RANK": "2"}, 2),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 2),
    ],
)
def test_what_an_environment_says_of_other_processes(
    trained: Path, tmp_path: Path, variables: dict[str, str], code: int
) -> None:
    """Left behind by a launcher, or half of what one sets."""
    done = subprocess.run(
        command("average", trained / "run", "-o", tmp_path / "mean"),
        env=launches.environment(**variables), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert (tmp_path / "mean").exists() == (code == 0)
    assert ("WORLD_SIZE" in done.stderr) == (code == 2)
    assert "traceback" not in done.stderr.lower()
    assert code == 2 or "Written to" in done.stdout


def test_restarts_without_processes_to_restart_are_refused(tmp_path: Path, capsys) -> None:
    train(tmp_path / "run")
    arguments = ["average", tmp_path / "run", "-o", tmp_path / "m", "--max-restarts", 2]
    assert boundary.run(cli, [str(argument) for argument in arguments]) == 2
    assert "--nproc" in capsys.readouterr().err
