"""Choosing the winner, and how sure one can be of it."""

from __future__ import annotations

import math

import pytest
import torch
from runs import LinearTask, save_run

from twa_merge import merge
from twa_merge.candidates import Candidate, single
from twa_merge.config import GuardConfig
from twa_merge.guard import Scored, first_unless_beaten, improvement, pick
from twa_merge.task import split
from twa_merge.verdict import best_of, best_single_of, picked, winner_of


def scored(name: str, losses: torch.Tensor, rank: int, **more) -> Scored:
    return Scored(Candidate(name, single(2, 0)[None], rank), losses.double(), **more)


def test_the_least_mean_wins():
    a = scored("a", torch.tensor([1.0, 3.0]), 0)
    b = scored("b", torch.tensor([1.5, 1.5]), 5)
    assert pick([a, b], "loss") is b


def test_ties_go_to_the_simpler():
    a = scored("twa", torch.tensor([1.0, 2.0]), 7)
    b = scored("last", torch.tensor([1.0, 2.0]), 0)
    assert pick([a, b], "loss") is b


def test_the_best_single_checkpoint_is_the_last_where_another_is_luck():
    """What the guard split alone would pick is bad on the unseen examples."""
    means = {"single:1": (1.0, 3.0), "single:2": (1.1, 1.0), "last": (1.4, 1.4)}
    singles = [
        scored(name, torch.full((4,), guard), 1, unseen=torch.full((4,), unseen).double())
        for name, (guard, unseen) in means.items()
    ]
    assert float(best_of(singles, "loss").evidence("loss").mean()) > 1.4
    best = best_single_of(singles, "loss")
    assert best is singles[-1]
    for item in singles[:2]:
        item.guard, item.unseen = item.guard - 0.5, item.unseen - 2.0
    assert best_single_of(singles, "loss").name == "single:2"
    assert best_single_of(singles[-1:], "loss") is singles[-1]


def test_the_blend_stands_until_it_is_beaten_by_a_standard_error():
    noise = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # of their mean: 1 / sqrt(3) = 0.58
    blend = scored("blend", torch.full((4,), 2.0), 9)
    for lead, winner in ((0.5, "blend"), (0.7, "twa")):
        assert winner_of([scored("twa", 2.0 - lead + noise, 7), blend], "loss").name == winner
    tie = scored("twa", 2.0 + noise, 7)
    assert winner_of([tie, blend], "loss") is tie
    other = scored("uniform", 1.5 + noise, 2)
    assert winner_of([other, tie], "loss") is other  # no other candidate has that right
    broken = scored("blend", torch.full((4,), torch.nan), 9)
    assert winner_of([tie, broken], "loss") is tie


def test_a_metric_is_taken_at_its_word():
    right = {"twa": [1.0, 1.0, 1.0, 0.0], "blend": [1.0, 1.0, 0.0, 0.0]}
    shown = [
        scored(name, torch.ones(4), rank, metrics={"accuracy": torch.tensor(values).double()})
        for rank, (name, values) in enumerate(right.items())
    ]
    assert winner_of(shown, "metric:accuracy").name == "twa"


def test_examples_that_a_cross_validation_held_out_count_as_much_as_guard_examples():
    lucky = scored("lucky", torch.tensor([0.9]), 0, unseen=torch.tensor([2.0, 2.0]).double())
    sound = scored("sound", torch.tensor([1.0]), 5, unseen=torch.tensor([1.0, 1.0]).double())
    assert pick([lucky, sound], "loss") is sound
    assert abs(float(lucky.evidence("loss").mean()) - 4.9 / 3) < 1e-6
    assert improvement(sound, lucky, "loss", seed=0).mean < 0  # measured on the guard split alone


def test_the_best_of_many_is_judged_by_what_did_not_pick_it():
    """Twenty candidates alike but for noise: the least mean is far below what they are worth."""
    generator = torch.Generator().manual_seed(0)
    guard = 1.0 + torch.randn(20, 10, generator=generator).double()
    unseen = 1.0 + torch.randn(20, 10, generator=generator).double()
    family = [
        scored(f"window:{i}", g, 3, unseen=u)
        for i, (g, u) in enumerate(zip(guard, unseen, strict=True))
    ]
    best = best_of(family, "loss")
    pooled = torch.cat([guard, unseen], 1).mean(1)
    assert best.name == f"window:{int(pooled.argmin())}"
    expected = (guard[unseen.mean(1).argmin()].mean() + unseen[guard.mean(1).argmin()].mean()) / 2
    evidence = float(best.evidence("loss").mean())
    assert abs(evidence - float(expected)) < 1e-12
    assert evidence > float(pooled.min()) + 0.1
    alone = scored("uniform", guard[0], 2, unseen=unseen[0])
    assert float(best_of([alone], "loss").evidence("loss").mean()) == float(pooled[0])


def test_what_is_not_finite_never_wins():
    a = scored("twa", torch.tensor([float("nan"), -9.0]), 7)
    b = scored("last", torch.tensor([5.0, 5.0]), 0)
    assert pick([a, b], "loss") is b


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_metric_that_is_not_finite_never_wins(value):
    a = scored("a", torch.ones(2), 0, metrics={"iou": torch.tensor([0.9, value])})
    b = scored("b", torch.ones(2), 1, metrics={"iou": torch.tensor([0.1, 0.1])})
    assert winner_of([a, b], "metric:iou") is b


def test_a_metric_may_decide():
    a = scored("a", torch.tensor([1.0]), 0, metrics={"accuracy": torch.tensor([0.5])})
    b = scored("b", torch.tensor([2.0]), 1, metrics={"accuracy": torch.tensor([0.9])})
    assert pick([a, b], "metric:accuracy") is b


def test_ties_of_a_metric_go_to_the_lower_loss():
    same = {"accuracy": torch.tensor([1.0, 0.0])}
    a = scored("last", torch.tensor([2.0, 2.0]), 0, metrics=same)
    b = scored("twa", torch.tensor([1.0, 1.0]), 7, metrics=same)
    c = scored("greedy", torch.tensor([1.0, 1.0]), 6, metrics=same)
    assert pick([a, b, c], "metric:accuracy") is c


def test_a_handful_of_examples_is_never_certain():
    for count in (1, 5, 6):
        better = scored("better", torch.zeros(count), 0)
        worse = scored("worse", torch.linspace(1, 2, count), 0)
        assert improvement(better, worse, "loss", seed=0).certain == (count >= 6)


def test_one_example_again_and_again_is_never_certain():
    found = improvement(
        scored("a", torch.zeros(200), 0), scored("b", torch.ones(200), 0), "loss", 0
    )
    assert (found.low, found.high) == (1.0, 1.0)
    assert not found.certain


def test_a_paired_difference_is_far_surer_than_the_losses():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(100, generator=generator, dtype=torch.float64)
    found = improvement(scored("b", losses - 0.01, 3), scored("a", losses, 0), "loss", seed=0)
    assert found.certain
    assert abs(found.mean - 0.01) < 1e-9
    same = improvement(scored("b", losses, 3), scored("a", losses, 0), "loss", seed=0)
    assert not same.certain


def test_statistics_change_hands_only_for_a_certain_gain():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(100, generator=generator, dtype=torch.float64)
    noise = torch.randn(100, generator=generator, dtype=torch.float64)
    noise -= noise.mean()

    first = scored("first", base, 0)
    lucky = scored("lucky", base + noise - 0.1, 0)  # one standard error
    better = scored("better", base + 0.1 * noise - 0.1, 0)  # ten of them
    ruined = scored("ruined", base * torch.nan, 0)
    assert first_unless_beaten([first, lucky, ruined], "loss").name == "first"
    assert first_unless_beaten([first, lucky, better], "loss").name == "better"
    assert first_unless_beaten([ruined, lucky], "loss").name == "lucky"
    # One example says nothing about how certain its difference is.
    for few in (1, 2, 5):
        less = base[:few] - 1.0 - 1e-3 * base[:few]
        variants = [scored("first", base[:few], 0), scored("other", less, 0)]
        assert first_unless_beaten(variants, "loss").name == "first"


def test_a_handful_of_groups_is_never_certain():
    """Sixty examples, all of which say the same, are as many as they have groups."""
    better = scored("better", torch.zeros(60), 0, groups=torch.arange(60) % 5)
    worse = scored("worse", 1.0 + 0.02 * torch.arange(60), 0)
    found = improvement(better, worse, "loss", seed=0)
    assert (found.examples, found.groups, found.certain) == (60, 5, False)
    better.groups = torch.arange(60) % 6
    assert improvement(better, worse, "loss", seed=0).certain


def test_groups_of_the_guard_and_of_the_fit_split_are_apart():
    item = scored("a", torch.zeros(3), 0, groups=torch.tensor([4, 0, 4]))
    assert item.evidence_groups.tolist() == [4, 0, 4]
    item.unseen, item.unseen_groups = torch.zeros(2), torch.tensor([1, 1])
    assert item.evidence_groups.unique().numel() == 3


def test_a_bold_choice_has_to_beat_a_mixture_by_what_groups_differ():
    lead = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat_interleave(25)
    losses, groups = 2.0 - 0.3 + lead, torch.arange(100) // 25  # of groups 0.58, of examples 0.1
    blend = scored("blend", torch.full((100,), 2.0), 9)
    assert winner_of([scored("twa", losses, 7), blend], "loss").name == "twa"
    blend.groups = groups
    assert winner_of([scored("twa", losses, 7, groups=groups), blend], "loss").name == "blend"


@pytest.mark.usefixtures("undrawn")
def test_examples_without_a_finite_loss_do_not_spoil_the_choice(tmp_path):
    """No fit is to be had with them, but the others still tell the fixed ways apart."""
    task = LinearTask(examples=80)
    task.y[split(task, 0.25, 0).fit.indices[:2]] = torch.nan
    save_run(tmp_path / "run", task.states(6))
    document = merge([tmp_path / "run"], task, tmp_path / "merged")
    rows = document["candidates"]
    assert all(math.isfinite(row["selection_loss"]) for row in rows)
    losses = {row["name"]: row["selection_loss"] for row in rows}
    assert losses[document["chosen"]] < min(losses["last"], losses["best_single"])


def test_few_easy_examples_do_not_choose_what_was_fitted_to_them():
    """All but one have next to no loss, so that the boldest candidate has the least."""
    easy = torch.full((12,), 1e-3)
    easy[0] = 0.2
    last, uniform = scored("last", 3 * easy, 0), scored("uniform", easy, 2)
    bold = scored("twa", easy / 4, 7)
    assert winner_of([last, uniform, bold], "loss") is bold
    for examples, result in ((12, (uniform, bold)), (99, (uniform, bold)), (100, (bold, None))):
        assert picked([last, uniform, bold], "loss", examples) == result
    # Ahead on every single one.
    sure = scored("twa", torch.linspace(0.5, 0.6, 12), 7)
    others = [scored(name, torch.linspace(0.9, 1.2, 12), 4) for name in ("last", "ema:0.9")]
    assert picked([*others, sure], "loss", 12) == (sure, None)
    # Ahead by two and a half standard errors.
    noise = torch.tensor([1.0, -1.0]).repeat(6)
    ahead = scored("twa", others[1].guard - noise - 2.5 / 11**0.5, 7)
    assert picked([*others, ahead], "loss", 29) == (others[0], ahead)
    assert picked([*others, ahead], "loss", 30) == (ahead, None)


def test_what_is_passed_over_has_less_loss():
    """A tie is none, nor is a blend that would have stood against a plain mean."""
    noise = torch.tensor([1.0, -1.0]).repeat(6)
    plain, blend = scored("ema:0.9", 2.0 + noise, 4), scored("blend", 2.1 - noise, 11)
    last = scored("last", 9.0 + noise, 0)
    assert winner_of([last, plain, blend], "loss") is blend
    assert picked([last, plain, blend], "loss", 100) == (blend, plain)
    far = scored("last", 2.2 + noise, 0)
    assert picked([far, plain, blend], "loss", 29) == (plain, None)
    tie = scored("twa", 2.0 + noise - 1e-8, 7)
    assert picked([plain, last, tie], "loss", 100) == (plain, None)


@pytest.mark.usefixtures("undrawn")
def test_the_metric_that_decides_has_an_interval(tmp_path):
    task = LinearTask(examples=80)
    task.metrics = lambda model, batch: {"score": -task.loss(model, batch)}
    save_run(tmp_path / "run", task.states(3))
    guard = GuardConfig(candidates="uniform", select="metric:score")
    document = merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    for row in document["candidates"]:
        low, high = row["guard_ci95"]
        assert row["guard_metric_ci95"] == pytest.approx([-high, -low], rel=0.2)
        assert row["guard_metric_ci95"][0] < row["guard_metrics"]["score"]
        assert row["guard_metrics"]["score"] < row["guard_metric_ci95"][1]
