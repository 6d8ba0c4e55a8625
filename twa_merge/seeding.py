"""The global generators of torch, numpy and Python, seeded for a while."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn on the CPU and on ``device`` follows from ``seed`` (≥ 0) alone.

    Afterwards the generators are as they were.
    """
    devices = [device] if device.type == "cuda" else []
    with generators_kept(devices):
        # Not torch.manual_seed, which would seed the generators of all other devices too.
        torch.default_generator.manual_seed(seed)
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        # Not more than 32 bits at a time.
        np.random.seed([seed % 2**32, seed >> 32])
        yield


@contextmanager
def generators_kept(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Afterwards the generators of the CPU, and those of GPUs among ``devices``, are as before."""
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def generator_states() -> bytes:
    """Where the generators of the CPU stand: other bytes once something has been drawn."""
    of_torch = torch.get_rng_state().numpy().tobytes()
    return pickle.dumps((of_torch, np.random.get_state(legacy=False), random.getstate()))


def draw_one() -> None:
    """Draws a number from each generator of the CPU."""
    torch.rand(()), np.random.random_sample(), random.random()
