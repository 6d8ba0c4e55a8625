"""The global generators of torch, numpy and Python, seeded for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn on the CPU and on ``device`` follows from ``seed`` (≥ 0) alone.

    Afterwards the generators are as they were.
    """
    devices = [device] if device.type == "cuda" else []
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng(devices):
        # Not torch.manual_seed, which would seed the generators of all other devices too.
        torch.default_generator.manual_seed(seed)
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        # Not more than 32 bits at a time.
        np.random.seed([seed % 2**32, seed >> 32])
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
