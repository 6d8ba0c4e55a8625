"""Two nodes, each with files, folders and packages of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from launches import document, environment, ranks_of, wait_for_evaluations
from small_task import train

TASK = Path(__file__).with_name("small_task.py")
# fmt: off
QUICK = ["--task", TASK, "--blocks", "global", "--ridge", "0.001", "--max-evaluations", 4,
         "--candidates", "last,twa", "--device", "cpu"]
# fmt: on


def start(
    node: int,
    port: int,
    *arguments: object,
    before: Sequence[str] = (),
    pictures: bool = False,
    **more: str,
) -> subprocess.Popen[str]:
    # fmt: off
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
                str(node), "--master-addr", "127.0.0.1", "--master-port", str(port),
                "--nproc-per-node", "1", "-m", "twa_merge_cli"]
    # fmt: on
    return subprocess.Popen(
        [*before, *torchrun, *map(str, arguments)],
        env=environment(pictures=pictures, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def both(
    *commands: list[object], first: Mapping[str, Any] | None = None, **second: Any
) -> tuple[list[int], list[str]]:
    """Exit codes and errors of two nodes.

    Args:
        first, second: as for ``start``, for one of them alone.
    """
    port, own = free_port(), (first or {}, second)
    nodes = [
        start(i, port, *command, **more)
        for i, (command, more) in enumerate(zip(commands, own, strict=True))
    ]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    return [node.returncode for node in nodes], said


def test_a_node_with_other_weights_under_the_same_names_ends_the_run(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", seed=1)
    codes, said = both(
        *(["train", tmp_path / run, "-o", tmp_path / "m", *QUICK] for run in ("a", "b"))
    )
    assert 0 not in codes
    assert "do not read the same checkpoints" in said[0]
    assert str(tmp_path / "a" / "checkpoint-100" / "model.safetensors") in said[0]
    assert str(tmp_path / "b" / "checkpoint-100" / "model.safetensors") in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_nodes_that_were_asked_for_something_else_end_before_the_work(tmp_path):
    train(tmp_path / "run")
    command = ["average", tmp_path / "run", "-o", tmp_path / "m"]
    codes, said = both(command, [*command, "--weights", "ema:0.5"])
    assert 0 not in codes
    assert "do not have the same coefficients" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


OWN_DISK = ["unshare", "-rm"]


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.call([*OWN_DISK, "true"]) != 0,
    reason="needs a mount namespace, which stands for the disk of another node",
)
def test_an_output_folder_that_a_node_does_not_see_is_noticed_before_the_work(tmp_path):
    train(tmp_path / "run")
    (tmp_path / "out").mkdir()
    command = ["train", tmp_path / "run", "-o", tmp_path / "out" / "m", *QUICK]
    mount = f'mount -t tmpfs tmpfs {tmp_path / "out"} && exec "$@"'
    codes, said = both(command, command, before=[*OWN_DISK, "sh", "-c", mount, "sh"])
    assert 0 not in codes
    assert "is not the same folder for all processes" in said[0]
    assert "evaluation" not in said[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_node_without_matplotlib_holds_nobody_up(tmp_path):
    train(tmp_path / "run")
    command = ["train", tmp_path / "run", "-o", tmp_path / "m", *QUICK]
    codes, said = both(command, command, first={"pictures": True})
    assert codes == [0, 0], said
    assert (tmp_path / "m" / "report.html").exists()
    assert document(tmp_path / "m")["world_size"] == 2


def test_a_process_that_is_killed_on_another_node_is_spoken_of(tmp_path):
    train(tmp_path / "run")
    command = ["train", tmp_path / "run", "-o", tmp_path / "m", *QUICK, "--tolerance", 0]
    port = free_port()
    nodes = [
        start(i, port, *command, "--max-evaluations", 500, SMALL_TASK_SLEEP="0.05") for i in (0, 1)
    ]
    wait_for_evaluations(nodes[0], tmp_path / "m", 3)
    ranks_of(psutil.Process(nodes[1].pid))[0].send_signal(signal.SIGKILL)
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert 0 not in [node.returncode for node in nodes]
    assert "internal error" not in said[0]
    assert "Another process of this run has ended" in said[0]
    assert f"continues from {tmp_path / 'm.partial'}" in said[0]
