"""Coefficients that need no data, and what ``--weights`` says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .dtypes import Float64
from .errors import ConfigError

SCHEDULES = ("linear", "1-sqrt")
# What people round a coefficient by that they type.
_ROUNDING = 1e-6


def window(n: int, k: int) -> Float64:
    """Uniform mean of the last k checkpoints, (n,)."""
    alpha = np.zeros(n)
    alpha[n - k :] = 1.0 / k
    return alpha


def ema(n: int, decay: float) -> Float64:
    """Exponential moving average over checkpoints: α_i ∝ decay^(n − 1 − i), (n,)."""
    alpha = decay ** np.arange(n - 1, -1, -1, dtype=np.float64)
    return alpha / alpha.sum()


def schedule(n: int, name: str) -> Float64:
    """Fixed merge weights of warmup-stable-merge (arXiv 2507.17634), (n,), Σ = 1.

    A mean with coefficients α weighs the updates between checkpoints j − 1 and j by
    d_j = Σ_{i ≥ j} α_i, so α_j = d_j − d_{j+1} imitates a learning rate that decays as d(j/n) from
    d(0) = 1 to d(1) = 0. A linear decay is the uniform mean; ``1-sqrt``, d(t) = 1 − √t, leans on
    the oldest.

    Raises:
        ConfigError: the schedule is not known.
    """
    t = np.arange(n + 1) / n
    if name == "linear":
        decay = 1.0 - t
    elif name == "1-sqrt":
        decay = 1.0 - np.sqrt(t)
    else:
        raise ConfigError("The schedule is not known.", expected=", ".join(SCHEDULES), found=name)
    return decay[:-1] - decay[1:]


def parse_weights(text: str, n: int) -> Float64:
    """Coefficients (n,) from ``uniform``, ``ema:DECAY``, ``linear``, ``1-sqrt`` or numbers.

    Numbers must add up to one, because anything else scales the model; what rounding left over
    is taken out.

    Raises:
        ConfigError: the text means nothing, or does not fit n checkpoints.
    """
    word, _, argument = text.strip().partition(":")
    if word == "uniform" and not argument:
        return window(n, n)
    if word == "ema":
        return ema(n, _decay(argument))
    if word in SCHEDULES and not argument:
        return schedule(n, word)
    try:
        numbers = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(x) for x in numbers):
        raise ConfigError(
            "--weights is not known.",
            expected="uniform, ema:DECAY, linear, 1-sqrt, numbers, or @report.json",
            found=text,
        )
    if len(numbers) != n:
        raise ConfigError(
            "--weights has another number of coefficients than there are checkpoints.",
            expected=f"{n} numbers",
            found=f"{len(numbers)} numbers",
        )
    return _of_sum_one(numbers)


def _of_sum_one(numbers: Sequence[float]) -> Float64:
    total = math.fsum(numbers)
    if abs(total - 1.0) > _ROUNDING * len(numbers):
        scaled = ",".join(f"{x / total:.12g}" for x in numbers) if abs(total) > _ROUNDING else None
        raise ConfigError(
            "The coefficients do not add up to one, so the result would be scaled.",
            expected="a sum of 1",
            found=f"{total:.9g}",
            remedy=f"give {scaled}" if scaled else "choose other numbers",
        )
    return np.array(numbers) / total


def _decay(text: str) -> float:
    try:
        decay = float(text)
    except ValueError:
        decay = math.nan
    if not 0.0 < decay < 1.0:
        raise ConfigError(
            "The decay of ema is out of range.", expected="ema:DECAY, 0 < DECAY < 1", found=text
        )
    return decay
