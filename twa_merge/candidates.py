"""Every model that could be written, as coefficients of the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import ConfigError

EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)
SCHEDULES = ("linear", "1-sqrt")
# These take part in every comparison.
SINGLES = ("last", "best_single")
QUICK = (*SINGLES, "uniform", "window", "twa", "twa-layers", "blend")
ALL = (*QUICK, "ema", "wsm", "greedy")


@dataclass(frozen=True)
class Candidate:
    """A model that could be written.

    Attributes:
        name: as in the report.
        alphas: coefficients, (B, n), or (1, n) for all blocks alike; float64.
        rank: simplicity, 0 the simplest: ties go to the smaller.
        cost: what finding it took, in evaluations of the whole fit split.
        blend_of: name → weight of the candidates that it is a mean of.
    """

    name: str
    alphas: Tensor
    rank: int
    cost: float = 0.0
    blend_of: Mapping[str, float] = field(default_factory=dict)


def single(n: int, i: int) -> Tensor:
    """Coefficients (n,) of checkpoint i alone."""
    alpha = torch.zeros(n, dtype=torch.float64)
    alpha[i] = 1.0
    return alpha


def window(n: int, k: int) -> Tensor:
    """Uniform mean of the last k checkpoints, (n,)."""
    alpha = torch.zeros(n, dtype=torch.float64)
    alpha[n - k :] = 1.0 / k
    return alpha


def ema(n: int, decay: float) -> Tensor:
    """Exponential moving average over checkpoints: α_i ∝ decay^(n − 1 − i), (n,)."""
    alpha = decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    return alpha / alpha.sum()


def schedule(n: int, name: str) -> Tensor:
    """Fixed merge weights of warmup-stable-merge (arXiv 2507.17634), (n,), Σ = 1.

    A mean with coefficients α weighs the updates between checkpoints j − 1 and j by
    d_j = Σ_{i ≥ j} α_i, so α_j = d_j − d_{j+1} imitates a learning rate that decays as d(j/n) from
    d(0) = 1 to d(1) = 0. A linear decay is the uniform mean; ``1-sqrt``, d(t) = 1 − √t, leans on
    the oldest.

    Raises:
        ConfigError: the schedule is not known.
    """
    t = torch.arange(n + 1, dtype=torch.float64) / n
    if name == "linear":
        decay = 1.0 - t
    elif name == "1-sqrt":
        decay = 1.0 - t.sqrt()
    else:
        raise ConfigError("The schedule is not known.", expected=", ".join(SCHEDULES), found=name)
    return decay[:-1] - decay[1:]


def parse_weights(text: str, n: int) -> Tensor:
    """Coefficients (n,) from ``uniform``, ``ema:DECAY``, ``linear``, ``1-sqrt`` or numbers.

    Numbers are taken as they are: they must add up to one, because anything else scales the model.

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
    if abs(sum(numbers) - 1.0) > 1e-6:
        scaled = " ".join(f"{x / sum(numbers):.6g}" for x in numbers) if sum(numbers) else None
        raise ConfigError(
            "The coefficients do not add up to one, so the result would be scaled.",
            expected="a sum of 1",
            found=f"{sum(numbers):g}",
            remedy=f"give {scaled}" if scaled else "choose other numbers",
        )
    return torch.tensor(numbers, dtype=torch.float64)


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


def fixed(n: int, names: Collection[str]) -> list[Candidate]:
    """All candidates that need no data: singles, uniform, windows, EMA and schedules.

    Args:
        names: families, a subset of ``ALL``; ``last`` and ``best_single`` always take part.
    """
    found = [
        Candidate(f"single:{i + 1}" if i < n - 1 else "last", single(n, i)[None], int(i < n - 1))
        for i in range(n)
    ]
    if "uniform" in names:
        found.append(Candidate("uniform", window(n, n)[None], 2))
    if "window" in names:
        found += [Candidate(f"window:{k}", window(n, k)[None], 3) for k in range(2, n)]
    if "ema" in names and n > 2:
        found += [Candidate(f"ema:{d}", ema(n, d)[None], 4) for d in EMA_DECAYS]
    if "wsm" in names and n > 2:
        # The linear schedule is the uniform mean of the window.
        found += [
            Candidate("wsm:1-sqrt" + (f":{k}" if k < n else ""), _tail(n, k)[None], 5)
            for k in sorted({n, n // 2, n // 4})
            if k > 2
        ]
    return found


def _tail(n: int, k: int) -> Tensor:
    return torch.cat([torch.zeros(n - k, dtype=torch.float64), schedule(k, "1-sqrt")])


def greedy(losses: Tensor, score: Callable[[Tensor], float]) -> Candidate:
    """Greedy soup (Model soups, arXiv 2203.05482, recipe 1) of the single checkpoints.

    Checkpoints are taken in the order of their losses; each stays if the uniform mean of all
    that stayed does not get worse by it.

    Args:
        losses: of the single checkpoints, (n,).
        score: coefficients (1, n) → loss, on the data that ``losses`` were taken on.
    """
    n = len(losses)
    order = sorted(range(n), key=lambda i: float(losses[i]))
    kept = single(n, order[0])
    best = float(losses[order[0]])
    for i in order[1:]:
        trial = kept + single(n, i)
        loss = score((trial / trial.sum())[None])
        if loss <= best:
            kept, best = trial, loss
    return Candidate("greedy", (kept / kept.sum())[None], 6)


def parse_families(text: str) -> frozenset[str]:
    """Families of candidates from ``quick``, ``all`` or names separated by commas.

    Raises:
        ConfigError: a name is not known.
    """
    if text == "all":
        return frozenset(ALL)
    if text == "quick":
        return frozenset(QUICK)
    names = frozenset(part.strip() for part in text.split(",") if part.strip())
    wrong = names - frozenset(ALL)
    if wrong or not names:
        raise ConfigError(
            "--candidates is not known.",
            expected=f"quick, all, or some of {', '.join(ALL)}",
            found=", ".join(sorted(wrong)) or text,
        )
    if names <= {*SINGLES, "blend"}:
        raise ConfigError(
            "--candidates names nothing that could be better than a checkpoint.",
            expected=f"some of {', '.join(n for n in ALL if n not in SINGLES)}",
            found=text,
            remedy="name what is to be compared, and mixed by blend",
        )
    return names
