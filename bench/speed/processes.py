"""Whole processes, timed: wall clock, CPU time and peak anonymous memory of the process tree."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Measured:
    """One process: seconds by the clock, seconds of CPU, peak bytes; children included."""

    wall: float
    cpu: float
    anonymous: int = 0


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, *, memory: bool = False
) -> Measured:
    """Runs one command to its end and measures it.

    Args:
        memory: look every ten milliseconds how much RssAnon the process and its children hold
            together: what they have allocated, without the pages of mapped files. Looking takes
            CPU time from the command, so its seconds mean little then.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        sampler = _Sampler(process.pid)
        if memory:
            sampler.start()
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        if memory:
            sampler.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{said}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, sampler.peak)


class _Sampler(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(_anonymous, _tree(self._pid))))

    def stop(self) -> None:
        self._end.set()
        self.join()


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        # Threads and processes may end while they are being looked at.
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{thread}/children").read_text()
                found += map(int, children.split())
    return found


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines())
    return sum(int(words[1]) << 10 for words in lines if words[0] == "RssAnon:")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (least to most)``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def machine() -> str:
    """The machine, and how busy it was, in a line."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"machine: {os.cpu_count()} cores, {name}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, load {load}"
    )
