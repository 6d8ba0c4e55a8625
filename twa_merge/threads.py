"""How many threads to work with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def available() -> int:
    """As many as OMP_NUM_THREADS says, which torchrun sets too, or a thread for each processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch's operations inside, and in threads that start inside, keep to their own thread."""
    import torch  # what only reads and writes files does without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
