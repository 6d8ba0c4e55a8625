"""Fixed coefficients against their definitions."""

from __future__ import annotations

import re

import pytest
import torch

from twa_merge.candidates import ALL, fixed, greedy, parse_families, window
from twa_merge.errors import ConfigError
from twa_merge.fixed_weights import ema, parse_weights, schedule


def test_ema_is_the_recursion_started_anywhere_far_enough_back():
    alpha = torch.from_numpy(ema(30, 0.5))
    average = torch.zeros(30, dtype=torch.float64)
    for i in range(30):
        average = 0.5 * average + 0.5 * torch.eye(30, dtype=torch.float64)[i]
    torch.testing.assert_close(alpha, average, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "decay"), [("linear", lambda t: 1 - t), ("1-sqrt", lambda t: 1 - t**0.5)]
)
def test_schedules_weigh_updates_as_a_decay_would(name, decay):
    """A mean of w_j = Σ_{k ≤ j} u_k holds update u_k with weight Σ_{j ≥ k} α_j."""
    alpha = torch.from_numpy(schedule(8, name))
    tails = alpha.flip(0).cumsum(0).flip(0)
    expected = torch.tensor([decay(k / 8) for k in range(8)], dtype=torch.float64)
    torch.testing.assert_close(tails, expected)


def test_a_linear_decay_is_the_uniform_mean():
    """As the help of average says."""
    for n in (2, 7, 60):
        assert schedule(n, "linear").tolist() == pytest.approx([1 / n] * n, rel=1e-12)


def test_every_fixed_candidate_adds_up_to_one():
    found = fixed(9, parse_families("all"))
    assert len({c.name for c in found}) == len(found)
    for candidate in found:
        assert abs(float(candidate.alphas.sum()) - 1) < 1e-12
        assert candidate.alphas.shape == (1, 9)
    names = [c.name for c in found]
    assert [n for n in names if n.startswith("window")] == [f"window:{k}" for k in range(2, 9)]


def test_two_checkpoints_give_candidates_without_repeats():
    assert [c.name for c in fixed(2, parse_families("all"))] == ["single:1", "last", "uniform"]


def test_greedy_keeps_what_does_not_hurt():
    target = window(4, 2)

    def score(alphas):
        return float((alphas[0] - target).square().sum())

    losses = torch.tensor([score(torch.eye(4, dtype=torch.float64)[i][None]) for i in range(4)])
    assert torch.equal(greedy(losses, score).alphas[0], target)
    # One that has diverged is the worst of all, wherever it stands.
    for i in range(2):
        losses[i] = torch.nan
        assert torch.equal(greedy(losses, score).alphas[0], target)


@pytest.mark.parametrize(
    "text", ["", "median", "ema:1.5", "ema:x", "0.5 0.5", "1 1 1", "nan 1 0", "linear:3"]
)
def test_weights_that_mean_nothing_are_refused(text):
    with pytest.raises(ConfigError):
        parse_weights(text, 3)


@pytest.mark.parametrize(
    "text", ["1,1,1", "1 2 4", "0.33,0.33,0.33", "0.4,0.3,0.300004", "123,-456,1000.7"]
)
def test_numbers_that_a_remedy_names_are_taken(text):
    with pytest.raises(ConfigError, match="do not add up to one") as caught:
        parse_weights(text, 3)
    remedy = caught.value.details["what to do"].removeprefix("give ")
    assert " " not in remedy, "a shell splits at spaces"
    numbers = [float(part) for part in text.replace(",", " ").split()]
    wanted = [x / sum(numbers) for x in numbers]
    assert parse_weights(remedy, 3).tolist() == pytest.approx(wanted, rel=1e-8)
    assert float(caught.value.details["found"]) != 1


def test_no_numbers_are_advised_where_the_sum_is_zero():
    with pytest.raises(ConfigError) as caught:
        parse_weights("0.1,0.2,-0.3", 3)
    assert caught.value.details["what to do"] == "choose other numbers"


def test_numbers_that_were_rounded_when_they_were_typed_add_up_to_one():
    found = parse_weights("0.333333,0.333333,0.333333", 3)
    assert found.tolist() == pytest.approx([1 / 3] * 3, rel=1e-12)
    assert abs(found.sum() - 1) < 1e-12
    assert parse_weights("0.7,-0.2,0.5", 3).tolist() == [0.7, -0.2, 0.5]


def test_weights_of_every_kind():
    assert parse_weights("uniform", 4).tolist() == window(4, 4).tolist()
    assert parse_weights("ema:0.9", 4).tolist() == ema(4, 0.9).tolist()
    assert parse_weights("-0.5, 0.5 1", 3).tolist() == [-0.5, 0.5, 1.0]


def test_what_is_fitted_by_block_has_the_names_that_are_shown():
    for name in ("twa-layers", "twa-tensors", "twa-blocks"):
        assert parse_families(f"twa,{name}") == {"twa", "twa-layers"}


def test_unknown_families_are_refused():
    with pytest.raises(ConfigError, match="candidates") as caught:
        parse_families("twa,medians")
    for name in ("quick", "all", *ALL, "twa-tensors", "twa-blocks"):
        assert re.search(rf"\b{name}\b", caught.value.details["expected"])


@pytest.mark.parametrize("text", ["blend", "last", "last,blend"])
def test_what_is_advised_where_nothing_is_to_be_compared_would_do(text):
    with pytest.raises(ConfigError, match="nothing that could be better") as caught:
        parse_families(text)
    names = caught.value.details["expected"].removeprefix("some of ").split(", ")
    assert "blend" not in names
    for name in names:
        assert parse_families(name) == {name}
