"""The mean of the candidates by likelihood: against closed forms, and where the truth is known."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from runs import LinearTask, save_run

from twa_merge import evaluate, merge
from twa_merge.blend import blended, distinct, likelihoods
from twa_merge.config import FitConfig, GuardConfig


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def test_weights_are_the_chances_to_be_as_good_as_the_best():
    generator = torch.Generator().manual_seed(0)
    best = torch.randn(50, generator=generator).double()
    gap = 0.3 + torch.randn(50, generator=generator).double().abs()
    close, far = best + 0.1 * gap, best + torch.linspace(-3, 4, 50).double()
    found = likelihoods(torch.stack([close, best, far])).tolist()
    chances = []
    for other in (close, best, far):
        differences = (other - best).tolist()
        error = statistics.stdev(differences) / 50**0.5
        chances.append(phi(-statistics.fmean(differences) / error) if error else 0.5)
    for weight, chance in zip(found, chances, strict=True):
        assert abs(weight - chance / sum(chances)) < 1e-9


def test_what_is_certain_is_not_blended_and_what_is_not_finite_takes_no_part():
    costs = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)).double()
    costs[0] -= 5.0
    assert float(likelihoods(costs)[0]) > 1 - 1e-9
    costs[0, 3] = math.nan
    costs[1, 3] = math.inf
    assert likelihoods(costs).tolist() == [0.0, 0.0, 1.0]
    assert likelihoods(costs[:1].nan_to_num(0.0)).tolist() == [1.0]


def test_a_candidate_that_has_exploded_takes_no_part_however_uncertain_its_mean_is():
    costs = torch.rand(3, 80, generator=torch.Generator().manual_seed(1)).double()
    costs[2] = 1.0
    # One enormous loss: the mean lies one standard error above the others'.
    costs[2, 5] = 1e14
    found = likelihoods(costs)
    assert float(found[2]) == 0.0
    assert min(found[:2]) > 0.01


def test_equal_candidates_share():
    costs = torch.rand(1, 30, generator=torch.Generator().manual_seed(2)).double().expand(4, -1)
    assert likelihoods(costs).tolist() == [0.25] * 4


def test_one_example_tells_nothing():
    costs = torch.tensor([[1.0], [0.5], [math.inf], [0.7]], dtype=torch.float64)
    assert likelihoods(costs).tolist() == [1 / 3, 1 / 3, 0.0, 1 / 3]


def test_the_same_model_under_two_names_counts_once():
    last, mean = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[0.5, 0.5]]).double()
    blocks = last.expand(3, -1).clone()
    assert distinct([last, mean, blocks, mean + 1e-15, mean + 1e-6]) == [0, 1, 4]


def test_coefficients_of_one_and_of_many_blocks_and_of_more_directions_add_up():
    weights = torch.tensor([0.25, 0.75]).double()
    whole, blocks = torch.tensor([[1.0, 0.0]]).double(), torch.rand(3, 4).double()
    found = blended(weights, [whole, blocks])
    expected = 0.25 * torch.tensor([1.0, 0, 0, 0]).double() + 0.75 * blocks
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_the_blend_is_better_than_the_pick_where_the_evidence_is_weak():
    """Losses are squared distances to the origin plus noise: the truth is the distance."""
    generator = torch.Generator().manual_seed(3)
    gains = []
    for _ in range(200):
        points = torch.randn(6, 8, generator=generator).double()
        noise = 20.0 * torch.randn(6, 25, generator=generator).double()
        costs = points.square().sum(1)[:, None] + noise
        mean = blended(likelihoods(costs), [p[None] for p in points])[0]
        gains.append(float(points[costs.mean(1).argmin()].square().sum() - mean.square().sum()))
    assert statistics.fmean(gains) > 3 * statistics.stdev(gains) / 200**0.5


@pytest.mark.usefixtures("undrawn")
def test_a_merge_names_what_it_blended(tmp_path):
    task = LinearTask(examples=40)
    task.y = task.y + 8 * torch.randn(40, 4, generator=torch.Generator().manual_seed(7))
    save_run(tmp_path / "run", task.states(5))
    document = merge([tmp_path / "run"], task, tmp_path / "merged")
    rows = {row["name"]: row for row in document["candidates"]}
    blend = rows["blend"]
    assert abs(sum(blend["blend_of"].values()) - 1) < 1e-12
    assert set(blend["blend_of"]) <= set(rows) - {"blend"}
    for block, values in blend["coefficients"].items():
        expected = torch.zeros(5, dtype=torch.float64)
        for name, weight in blend["blend_of"].items():
            found = rows[name]["coefficients"]
            row = found[block] if isinstance(found, dict) else found
            expected += weight * torch.tensor(row, dtype=torch.float64)
        found = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # Judged by as many examples as the rest.
    assert blend["selection_examples"] == rows["uniform"]["selection_examples"]
    assert blend["selection_examples"] > document["data"]["guard_examples"]
    # What less loss there is than the winner's is said to have been passed over.
    assert (
        rows[document["passed_over"]]["selection_loss"] < rows[document["chosen"]]["selection_loss"]
    )


@pytest.mark.usefixtures("undrawn")
def test_it_can_be_left_out(tmp_path):
    task = LinearTask(examples=40)
    save_run(tmp_path / "run", task.states(3))
    guard = GuardConfig(candidates="uniform,twa")
    document = merge([tmp_path / "run"], task, tmp_path / "merged", guard=guard)
    assert {r["name"] for r in document["candidates"]} == {"last", "best_single", "uniform", "twa"}


@pytest.mark.usefixtures("undrawn")
def test_noise_that_a_loss_draws_is_the_same_for_all_candidates(tmp_path):
    class Noisy(LinearTask):
        def loss(self, model, batch):
            losses = super().loss(model, batch)
            return losses + self.noise * torch.rand(len(losses))

    task = Noisy(examples=134)
    generator = torch.Generator().manual_seed(1)
    states = [
        {
            "0.weight": task.truth + 0.5 * torch.randn(task.truth.shape, generator=generator),
            "0.bias": torch.zeros(task.outputs),
        }
        for _ in range(4)
    ]
    save_run(tmp_path / "run", states)
    gains = []
    for noise in (0.0, 20.0):
        task.noise = noise
        document = merge([tmp_path / "run"], task, tmp_path / f"m{noise}")
        losses = {row["name"]: row["selection_loss"] for row in document["candidates"]}
        gains.append(losses["uniform"] - losses["twa"])
    assert gains[1] == pytest.approx(gains[0], abs=0.01)


@pytest.mark.usefixtures("undrawn")
def test_noise_that_is_fitted_is_other_noise_in_the_guard_split_and_in_the_test_data(tmp_path):
    """All there is of an example is drawn: nothing can be learnt but the noise itself."""

    class Noise(LinearTask):
        def dataset(self):
            return list(range(128))

        def test_dataset(self):
            return list(range(96))

        def loss(self, model, batch):
            x = torch.randn(len(batch), self.inputs)
            losses = (model(x) - torch.randn(len(batch), self.outputs)).square().mean(1)
            if not losses.requires_grad:
                judged.append(float(losses.mean()))
            return losses

    task, judged = Noise(inputs=24), []
    generator = torch.Generator().manual_seed(1)
    save_run(
        tmp_path / "run",
        [
            {
                "0.weight": 0.1 * torch.randn(task.outputs, task.inputs, generator=generator),
                "0.bias": torch.zeros(task.outputs),
            }
            for _ in range(30)
        ],
    )
    fit, guard = FitConfig(ridge=0.0, blocks="global"), GuardConfig(candidates="uniform,twa")
    document = merge([tmp_path / "run"], task, tmp_path / "merged", fit=fit, guard=guard)
    rows = {row["name"]: row for row in document["candidates"]}
    assert rows["twa"]["fit_loss"] < rows["uniform"]["fit_loss"] - 0.05
    for data in ("guard_loss", "test_loss"):
        assert rows["twa"][data] > rows["uniform"][data]
    [row] = evaluate([tmp_path / "merged"], task)["models"]
    assert row["loss"] > 0.9
