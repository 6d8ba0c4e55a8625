"""Every model that could be written, as coefficients of the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import fixed_weights
from .errors import ConfigError

EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)
# These take part in every comparison.
SINGLES = ("last", "best_single")
# The family of what is fitted by block, and what others of it are called where they are shown.
BY_BLOCK = "twa-layers"
_SAME = ("twa-tensors", "twa-blocks")
QUICK = (*SINGLES, "uniform", "window", "twa", BY_BLOCK, "blend")
ALL = (*QUICK, "ema", "wsm", "greedy")


@dataclass(frozen=True)
class Candidate:
    """A model that could be written.

    Attributes:
        name: as in the report.
        alphas: coefficients, (B, n), or (1, n) for all blocks alike; float64.
        complexity: 0 for the simplest: ties go to the smaller.
        cost: what finding it took, in evaluations of loss and gradient over the whole fit split.
        blend_of: name → weight of the candidates that it is a mean of.
    """

    name: str
    alphas: Tensor
    complexity: int
    cost: float = 0.0
    blend_of: Mapping[str, float] = field(default_factory=dict)


def single(n: int, i: int) -> Tensor:
    """Coefficients (n,) of checkpoint i alone."""
    alpha = torch.zeros(n, dtype=torch.float64)
    alpha[i] = 1.0
    return alpha


def window(n: int, k: int) -> Tensor:
    """Uniform mean of the last k checkpoints, (n,)."""
    return torch.from_numpy(fixed_weights.window(n, k))


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
        found += [
            Candidate(f"ema:{d}", torch.from_numpy(fixed_weights.ema(n, d))[None], 4)
            for d in EMA_DECAYS
        ]
    if "wsm" in names and n > 2:
        # The linear schedule is the uniform mean of the window.
        found += [
            Candidate("wsm:1-sqrt" + (f":{k}" if k < n else ""), _tail(n, k)[None], 5)
            for k in sorted({n, n // 2, n // 4})
            if k > 2
        ]
    return found


def _tail(n: int, k: int) -> Tensor:
    rest = torch.from_numpy(fixed_weights.schedule(k, "1-sqrt"))
    return torch.cat([torch.zeros(n - k, dtype=torch.float64), rest])


def greedy(losses: Tensor, score: Callable[[Tensor], float]) -> Candidate:
    """Greedy soup (Model soups, arXiv 2203.05482, recipe 1) of the single checkpoints.

    Checkpoints are taken in the order of their losses; each stays if the uniform mean of all
    that stayed does not get worse by it.

    Args:
        losses: of the single checkpoints, (n,), that order them.
        score: coefficients (1, n) → loss, infinite where it is not a number.
    """
    n, losses = len(losses), losses.nan_to_num(torch.inf)
    order = sorted(range(n), key=lambda i: float(losses[i]))
    kept = single(n, order[0])
    best = score(kept[None])
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
    given = (part.strip() for part in text.split(",") if part.strip())
    names = frozenset(BY_BLOCK if name in _SAME else name for name in given)
    wrong = names - frozenset(ALL)
    if wrong or not names:
        raise ConfigError(
            "--candidates is not known.",
            expected=f"quick, all, or some of {', '.join(ALL)}; {' and '.join(_SAME)} mean "
            f"{BY_BLOCK} as well: all that is fitted by block",
            found=", ".join(sorted(wrong)) or text,
        )
    if names <= {*SINGLES, "blend"}:
        raise ConfigError(
            "--candidates names nothing that could be better than a checkpoint.",
            expected=f"some of {', '.join(n for n in ALL if n not in (*SINGLES, 'blend'))}",
            found=text,
            remedy="name what is to be compared, and mixed by blend",
        )
    return names
