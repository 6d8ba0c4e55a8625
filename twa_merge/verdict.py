"""The verdict: all candidates compared on the guard split, the winner's lead measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blend import blended, distinct, likelihoods
from .candidates import Candidate, fixed, parse_families
from .comparable import require_finite
from .fitted import Fitted
from .guard import Improvement, Scored, finite_mean, improvement, is_ahead, pick, stands
from .held_out import HeldOut, Soups
from .progress import Advanced, Started
from .run import Run
from .sampling import independent, paired

# A mixture so much of which is one candidate is that candidate: the rest would dilute it.
_ALONE = 0.9
# What the names of stages by layer and by tensor begin with, and the mixture of both.
_BY_BLOCK = "twa-"
# With fewer independent examples than the first of two numbers, what is not plain wins if it is
# ahead of the plainest means by so many standard errors; else it is worse too often
# (bench/quality).
_SURE = ((30, 3.0), (100, 2.0))
_PLAINEST = ("last", "uniform")
_PLAIN = (*_PLAINEST, "window", "ema")
_MIXED = "twa-blocks"


@dataclass
class Verdict:
    """What the guard said.

    Attributes:
        shown: the best of each family, with fit and test losses; of stages by layer and by tensor
            both and their mixture, although only one of them took part in the choice.
        others: all that were tried besides.
        passed_over: what has less loss than the winner, which caution preferred to it.
    """

    winner: Scored
    shown: list[Scored]
    others: list[Scored]
    passed_over: Scored | None
    over_single: Improvement
    over_uniform: Improvement | None


def judge(run: Run, fitted: Sequence[Fitted]) -> Verdict:
    """All candidates of the run compared, and the winner among them. A collective.

    Raises:
        TaskError: no candidate has finite losses, or finite values of the chosen metric.
    """
    families = parse_families(run.choices.guard.candidates)
    candidates = fixed(run.n, families)
    soups = Soups(run) if "greedy" in families and run.n > 2 else None
    if soups:
        candidates.append(soups.of_all())
    whole, *by_block = fitted
    # One that was given up stands where it began.
    by_block = [stage for stage in by_block if math.isfinite(stage.result.loss)]
    if whole.name in families and math.isfinite(whole.result.loss):
        candidates.append(Candidate(whole.name, whole.alphas, 7, whole.evaluations))
    for stage in by_block:
        cost = whole.evaluations + stage.evaluations
        complexity = 8 if stage.name == "twa-layers" else 9
        candidates.append(Candidate(stage.name, stage.alphas, complexity, cost))
    run.progress(Started("Comparing candidates", len(candidates), "candidates"))
    scored = []
    for candidate in candidates:
        scored.append(run.jury.score(candidate))
        run.progress(Advanced())
    held_out = HeldOut(run, fitted, soups)
    if held_out.parts:
        _cross_validate(run, scored, held_out)
    cost = sum(stage.evaluations for stage in fitted)
    if "blend" in families:
        fits = {stage.name for stage in by_block}
        both = [s for s in scored if s.name in fits]
        scored += _mixture(run, _MIXED, 10, both, held_out, cost) if len(both) > 1 else []
    shown, best_single = _headlines(run, scored)
    if "blend" in families:
        shown += _mixture(run, "blend", 11, shown, held_out, cost)
    return _verdict(run, scored, shown, best_single)


def _cross_validate(run: Run, scored: Sequence[Scored], held_out: HeldOut) -> None:
    """Adds losses on the fit examples that the cross-validation of the ridge held out.

    The guard split alone is often too small to tell a good merge from a lucky one. What has been
    fitted is judged by what it comes to without the example; the rest has not seen any.
    """
    run.progress(Started("Comparing them on held-out fit examples", len(scored), "candidates"))
    for item in scored:
        held_out.judge(item)
        run.progress(Advanced())
    held_out.leave_out_broken(scored)


def _mixture(
    run: Run,
    name: str,
    complexity: int,
    parts: Sequence[Scored],
    held_out: HeldOut,
    cost: float,
) -> list[Scored]:
    """The mean of ``parts`` by likelihood; nothing where that is one of them."""
    select = run.choices.guard.select
    # The last checkpoint is often the best one as well, and a greedy soup a window.
    parts = [parts[i] for i in distinct([s.candidate.alphas for s in parts])]
    costs = torch.stack([s.evidence(select) for s in parts])
    weights = likelihoods(costs, parts[0].evidence_groups)
    if not float(weights.max()) < _ALONE:
        return []
    candidates = [s.candidate for s in parts]
    alphas, shares = blended(weights, [c.alphas for c in candidates]), _shares(weights, candidates)
    item = run.jury.score(Candidate(name, alphas, complexity, cost, shares))
    if held_out.parts:
        without = zip(*(held_out.alphas(c) for c in candidates), strict=True)
        held_out.add(name, [blended(weights, a) for a in without])
        held_out.judge(item)
    return [item]


def _shares(weights: Tensor, candidates: Sequence[Candidate]) -> dict[str, float]:
    """Name → share of the mean; of what is itself a mean, the names that it is made of."""
    found: dict[str, float] = {}
    for weight, candidate in zip(weights.tolist(), candidates, strict=True):
        for name, share in (candidate.blend_of or {candidate.name: 1.0}).items():
            found[name] = found.get(name, 0.0) + weight * share
    return found


def _headlines(run: Run, scored: Sequence[Scored]) -> tuple[list[Scored], Scored]:
    """The best of each family, and the best single checkpoint."""
    select = run.choices.guard.select
    singles = [s for s in scored if s.name == "last" or s.name.startswith("single:")]
    best_single = _renamed(best_single_of(singles, select), "best_single", 1)
    families: dict[str, list[Scored]] = {}
    for item in scored:
        families.setdefault(_family(item.name), []).append(item)
    families.pop("single", None)
    # Between two of nearly the same fit there is little luck to correct for.
    shown = [
        winner_of(group, select, _MIXED) if family == _BY_BLOCK else best_of(group, select)
        for family, group in families.items()
    ]
    shown.insert(1, best_single)
    return shown, best_single


def _family(name: str) -> str:
    """Of one family one candidate may win, so that many alike do not outweigh the others."""
    return _BY_BLOCK if name.startswith(_BY_BLOCK) else name.partition(":")[0]


def best_of(family: Sequence[Scored], select: str) -> Scored:
    """The best of one family, with evidence that the choice itself has not coloured.

    The least of many means is too good to be true. So the family is judged by who would have been
    picked on the guard split, taken on the unseen examples, and the other way round.
    """
    best, both = pick(family, select), [(s.guard, s.unseen) for s in family if s.unseen is not None]
    if len(family) == 1 or len(both) < len(family):
        return best
    _, on_unseen = min(both, key=lambda losses: finite_mean(losses[0]))
    on_guard, _ = min(both, key=lambda losses: finite_mean(losses[1]))
    return dataclasses.replace(best, crossed=torch.cat([on_guard, on_unseen]))


def best_single_of(singles: Sequence[Scored], select: str) -> Scored:
    """The best single checkpoint; the last one, where none is seen to be better.

    What half of the examples would have picked can be worse than the last on the other half: then
    the losses that it was picked by are luck.
    """
    best, last = best_of(singles, select), next(s for s in singles if s.name == "last")
    behind = finite_mean(best.evidence(select)) > finite_mean(last.evidence(select))
    return last if behind else best


def winner_of(shown: Sequence[Scored], select: str, mixture: str = "blend") -> Scored:
    """The candidate of least mean cost, or the mixture where that is not ahead of it for certain.

    A metric is what was asked for, so it is taken at its word.
    """
    best = pick(shown, select)
    mixed = next((s for s in shown if s.name == mixture), None)
    return mixed if select == "loss" and mixed and stands(mixed, best) else best


def picked(shown: Sequence[Scored], select: str, examples: int) -> tuple[Scored, Scored | None]:
    """The winner; by few examples what is not plain only wins where it is ahead for certain.

    They may all be easy, and then a candidate looks the better the bolder it is.

    Args:
        examples: independent ones, that were fitted and that guard.

    Returns:
        It and what it was preferred to although that has less loss, None where nothing has.
    """
    winner = winner_of(shown, select)
    errors = next((errors for few, errors in _SURE if examples < few), 0.0)
    if select == "loss" and errors:
        plainest = pick([s for s in shown if s.name in _PLAINEST], select)
        losses = plainest.evidence(select), winner.evidence(select)
        gain, error = paired(*losses, winner.evidence_groups)
        if not gain > errors * error:
            plain = pick([s for s in shown if _family(s.name) in _PLAIN], select)
            return plain, winner if is_ahead(winner, plain) else None
    return winner, _ahead_of(winner, shown, select)


def _ahead_of(winner: Scored, others: Sequence[Scored], select: str) -> Scored | None:
    best = pick(others, select)
    return None if best is winner else best


def _examples(run: Run) -> int:
    """Independent ones, of both splits.

    Those of the fit split count even if no cross-validation has held them out, as with a ridge
    that is given: asking for two errors of fewer than 100 guard examples does harm there
    (bench/quality).
    """
    fitted, guarding = range(run.fitter.limit), run.jury.guard_sample
    groups = run.fitter.batches.groups(fitted), run.jury.guard.groups(guarding)
    return sum(independent(len(labels), labels) for labels in groups)


def _verdict(
    run: Run, scored: Sequence[Scored], shown: list[Scored], best_single: Scored
) -> Verdict:
    select, seed = run.choices.guard.select, run.choices.data.seed
    winner, passed_over = picked(shown, select, _examples(run))
    if winner.name == _MIXED:
        by_block = [s for s in scored if _family(s.name) == _BY_BLOCK]
        passed_over = _ahead_of(winner, by_block, select)
    require_finite(run.jury.guard, winner, select)
    names = {s.name for s in shown}
    rest = [s for s in scored if s.name not in names]
    shown = [*shown, *(s for s in rest if _family(s.name) == _BY_BLOCK)]
    others = [s for s in rest if _family(s.name) != _BY_BLOCK]
    run.jury.complete(shown)
    uniform = [s for s in shown if s.name == "uniform"]
    leading, alone, *mean = run.jury.on_more([winner, best_single, *uniform])
    return Verdict(
        winner,
        shown,
        others,
        passed_over,
        improvement(leading, alone, select, seed),
        improvement(leading, mean[0], select, seed) if mean else None,
    )


def _renamed(item: Scored, name: str, complexity: int) -> Scored:
    candidate = Candidate(name, item.candidate.alphas, complexity)
    return dataclasses.replace(item, candidate=candidate)
