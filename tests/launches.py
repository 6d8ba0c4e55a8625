"""The real command line in one process or, by torchrun, in several."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from twa_merge_cli.main import cli

TESTS = Path(__file__).parent
TASK = TESTS / "small_task.py"
WITHOUT_PICTURES = TESTS / "without_pictures"


def command(k: int, *arguments: object, module: str = "twa_merge_cli") -> list[str]:
    """The command line under torchrun, or alone."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(k)]
    return [sys.executable, *(launch if k > 1 else []), "-m", module, *map(str, arguments)]


def environment(*, pictures: bool = False, **more: str) -> dict[str, str]:
    """Of a process that is launched.

    Args:
        pictures: whether it may draw those of report.html, which takes longer than a small merge.
    """
    paths = [*([] if pictures else [WITHOUT_PICTURES]), TESTS, os.environ.get("PYTHONPATH")]
    # An empty one would be the working directory.
    path = os.pathsep.join(str(p) for p in paths if p)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def run(
    k: int,
    *arguments: object,
    module: str = "twa_merge_cli",
    pictures: bool = False,
    **more: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(k, *arguments, module=module),
        env=environment(pictures=pictures, **more),
        capture_output=True,
        text=True,
        timeout=240,
    )


def in_turn(k: int, *commands: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """All commands in the ranks of one launch, up to the first that fails."""
    given = json.dumps([[str(argument) for argument in arguments] for arguments in commands])
    return run(k, given, module="in_turn")


def here(*arguments: object) -> str:
    """The command line in this process, which has imported torch already; what it printed.

    What several processes find is held against that.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        cli.main([str(argument) for argument in arguments], "twa-merge", standalone_mode=False)
    return printed.getvalue()


def documents_in(printed: str) -> list[dict]:
    """What commands with --json have printed one after the other, before any other output."""
    found = []
    while printed.startswith("{"):
        document, end = json.JSONDecoder().raw_decode(printed)
        found.append(document)
        printed = printed[end:].lstrip()
    return found


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


def distance(one: dict | list, other: dict | list) -> float:
    """The largest difference between two sets of coefficients."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        return max(distance(one[key], other[key]) for key in one)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
