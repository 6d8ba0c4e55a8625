"""The verdict: all candidates compared on the guard split, the winner's lead measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import Candidate, fixed, greedy, parse_families
from .errors import ConfigError
from .fit import Fitted
from .guard import Improvement, Scored, improvement, pick
from .progress import Advanced, Started
from .run import Run

# A greedy soup takes 2n evaluations; on more examples it would cost more than the fit.
_GREEDY_EXAMPLES = 128


@dataclass
class Verdict:
    """What the guard said.

    Attributes:
        shown: the headline candidates, with fit and test losses.
        others: all that were tried besides.
    """

    winner: Scored
    shown: list[Scored]
    others: list[Scored]
    over_single: Improvement
    over_uniform: Improvement | None


def judge(run: Run, fitted: Sequence[Fitted]) -> Verdict:
    families = parse_families(run.choices.guard.candidates)
    candidates = fixed(run.n, families)
    if "greedy" in families and run.n > 2:
        sample = range(min(run.fitter.batches.size, _GREEDY_EXAMPLES))
        losses = [run.fitter.score(_one_hot(run.n, i), sample) for i in range(run.n)]
        candidates.append(greedy(run.n, losses, lambda a: run.fitter.score(a, sample)))
    cost = 0.0
    for stage in fitted:
        cost += stage.evaluations
        if stage.name in families or (stage.name != "twa" and "twa-layers" in families):
            rank = 7 if stage.name == "twa" else 8
            candidates.append(Candidate(stage.name, stage.alphas, rank, cost))
    run.progress(Started("Comparing candidates", len(candidates), "candidates"))
    scored = []
    for candidate in candidates:
        scored.append(run.jury.score(candidate))
        run.progress(Advanced())
    return _verdict(run, scored)


def _one_hot(n: int, i: int) -> Tensor:
    alphas = torch.zeros(1, n, dtype=torch.float64)
    alphas[0, i] = 1.0
    return alphas


def _verdict(run: Run, scored: list[Scored]) -> Verdict:
    select, seed = run.choices.guard.select, run.choices.data.seed
    _require_metric(scored[0], select)
    singles = [s for s in scored if s.name == "last" or s.name.startswith("single:")]
    best_single = _renamed(pick(singles, select), "best_single", 1)
    families: dict[str, list[Scored]] = {}
    for item in scored:
        family = item.name.partition(":")[0]
        if family != "single":
            families.setdefault(family, []).append(item)
    shown = [pick(group, select) for group in families.values()]
    shown.insert(1, best_single)
    winner = pick([*shown], select)
    run.jury.complete(shown)
    others = [s for s in scored if not any(s is item for item in shown)]
    uniform = next((s for s in shown if s.name == "uniform"), None)
    return Verdict(
        winner,
        shown,
        others,
        improvement(winner, best_single, select, seed),
        improvement(winner, uniform, select, seed) if uniform else None,
    )


def _renamed(item: Scored, name: str, rank: int) -> Scored:
    candidate = Candidate(name, item.candidate.alphas, rank)
    return Scored(candidate, item.guard, item.metrics, batch_norm=item.batch_norm)


def _require_metric(item: Scored, select: str) -> None:
    name = select.removeprefix("metric:")
    if select != "loss" and name not in item.metrics:
        raise ConfigError(
            "--select names a metric that the task does not have.",
            expected=", ".join(item.metrics) or "a task with metrics()",
            found=name,
        )
