"""What the measurements share: real launches, memory looked at from within, and the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "speed"))

import processes

ANSWER = "TWA_MERGE_BENCH_ANSWER"


def under_torchrun(
    k: int, script: str, arguments: Sequence[object] = (), *, threads: int = 1
) -> list[dict[str, Any]]:
    """Runs ``script`` in ``k`` processes; what each of them gave to ``answer``, by rank.

    Raises:
        SystemExit: a process failed; the output is shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={k}", script, *map(str, arguments),
        ]  # fmt: skip
        env = os.environ | {ANSWER: folder, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(k)]


def is_worker() -> bool:
    return ANSWER in os.environ


def answer(**values: Any) -> None:
    """Hands this rank's figures to the process that launched it."""
    rank = os.environ["RANK"]
    (Path(os.environ[ANSWER]) / f"{rank}.json").write_text(json.dumps(values))


class Anonymous:
    """Peak RssAnon of this process: what it has allocated, without the pages of mapped files.

    A thread looks every two milliseconds.
    """

    def __enter__(self) -> Anonymous:
        self.before = self.peak = anonymous()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """RssAnon of this process, bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    raise OSError("this system does not say how much anonymous memory a process has")


def machine() -> str:
    """The machine, how busy it was, and the torch that ran on it, in a line."""
    return f"{processes.machine()}; torch {torch.__version__}"


def mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f}"
