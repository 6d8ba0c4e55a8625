"""The real command line in one process or, by torchrun, in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parent
TASK = TESTS / "small_task.py"


def command(k: int, *arguments: object) -> list[str]:
    """The command line under torchrun, or alone."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(k)]
    return [sys.executable, *(launch if k > 1 else []), "-m", "twa_merge_cli", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def run(k: int, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(k, *arguments), env=environment(**more), capture_output=True, text=True, timeout=240
    )


def document(folder: Path) -> dict:
    return json.loads((folder / "twa_merge.json").read_text())


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = (load_file(f / "model.safetensors") for f in (one, other))
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def wait_for_evaluations(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Until the run that writes to ``output`` is in the middle of its fit."""
    state = output.with_name(output.name + ".partial") / "state.jsonl"
    deadline = time.monotonic() + 120
    while not (state.exists() and len(state.read_text().splitlines()) > count):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def ranks_of(parent: psutil.Process) -> list[psutil.Process]:
    return [p for p in parent.children(recursive=True) if "RANK" in _environ(p)]


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if "twa_merge_cli" in " ".join(process.cmdline()) else {}
    except psutil.Error:
        return {}
