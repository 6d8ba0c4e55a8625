"""How many threads to work with."""

from __future__ import annotations

import os


def available() -> int:
    """As many as OMP_NUM_THREADS says, which torchrun sets too, or a thread for each processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
