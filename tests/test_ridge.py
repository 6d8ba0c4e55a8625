"""How the ridge is chosen: from losses on examples that no fit has seen."""

from __future__ import annotations

import math

import pytest
import torch
from runs import LinearTask, Pairs, save_run
from safetensors.torch import load_file
from torch import nn

from twa_merge import merge
from twa_merge.config import DataConfig
from twa_merge.ridge import FOLDS, RIDGES, RidgePath, folds_of, scale_of, too_far
from twa_merge.sampling import paired


def with_folds(groups: torch.Tensor) -> RidgePath:
    """Members of each group have one loss."""
    return RidgePath(groups, folds_of(groups, groups.double()))


def path_of(means: dict[float, float], noise: float = 0.0, size: int = 400) -> RidgePath:
    """One fold whose paired differences between ridges have a standard deviation of ``noise``."""
    generator = torch.Generator().manual_seed(0)
    path, count = with_folds(torch.arange(size)), size // FOLDS
    shared = torch.randn(count, generator=generator, dtype=torch.float64)
    for ridge, mean in means.items():
        own = torch.randn(count, generator=generator, dtype=torch.float64)
        own = noise * (own - own.mean())
        path.add(ridge, torch.tensor([mean], dtype=torch.float64), mean + shared + own)
    return path


def test_every_example_is_unseen_once():
    path = with_folds(torch.arange(10))
    assert sorted(p for part in path.parts for p in part) == list(range(10))
    for fold, unseen in enumerate(path.parts):
        assert sorted(path.without(fold) + unseen) == list(range(10))
    assert path.parts == [[3, 7], [2, 6], [1, 5, 9], [0, 4, 8]]


def test_groups_are_unseen_as_a_whole():
    groups = torch.tensor([5, 1, 5, 2, 1, 5, 3, 7, 7, 9, 2, 5])
    parts = folds_of(groups, groups.double())
    assert sorted(p for part in parts for p in part) == list(range(12))
    assert sorted(map(len, parts)) == [2, 3, 3, 4]
    for label in groups.unique():
        members = (groups == label).nonzero().flatten().tolist()
        assert sum(bool(set(part) & set(members)) for part in parts) == 1
    assert with_folds(torch.tensor([1, 0, 1, 0, 0])).parts == [[0, 2], [1, 3, 4]]
    assert len(with_folds(torch.zeros(8, dtype=torch.int64)).parts) == FOLDS
    assert with_folds(torch.arange(3)).parts == []


def test_groups_that_are_hardly_alike_are_dealt_one_by_one():
    """To do without whole documents costs more than their other sequences tell."""
    groups = torch.arange(64) // 8
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(64, generator=generator, dtype=torch.float64)
    shared = torch.randn(8, generator=generator, dtype=torch.float64)[groups]
    assert folds_of(groups, own + 0.5 * shared) == with_folds(torch.arange(64)).parts
    for losses in (0.1 * own + shared, torch.full((64,), torch.nan, dtype=torch.float64)):
        assert folds_of(groups, losses) == with_folds(groups).parts


def test_a_gain_that_few_groups_tell_of_asks_for_more_folds():
    for count, settled in ((28, False), (32, True)):
        grouped = path_of({math.inf: 2.0, 0.1: 1.0}, noise=0.01)
        grouped.groups = torch.arange(400) % count
        grouped.parts = with_folds(grouped.groups).parts
        assert grouped.settled() == settled


def test_without_noise_the_best_ridge_is_chosen():
    path = path_of({math.inf: 2.0, 0.1: 1.5, 0.01: 1.2, 0.003: 1.0, 0.001: 1.1})
    assert path.choice() == 0.003
    assert path.settled()


def test_rounding_errors_do_not_choose_between_ridges():
    for little in (1e-7, -1e-7):
        path = path_of({math.inf: 2.0, 0.1: 1.5, 0.01: 1.0 + little, 0.003: 1.0})
        assert path.choice() == 0.01


def test_where_nothing_beats_the_base_the_strongest_ridge_stays_closest_to_it():
    path = path_of({math.inf: 1.0, 0.1: 1.2, 0.01: 1.3})
    assert path.choice() == RIDGES[0]
    assert path.settled()


def test_a_gain_within_noise_asks_for_more_folds():
    assert not path_of({math.inf: 1.001, 0.1: 1.0}, noise=1.0).settled()


def test_a_gain_of_two_standard_errors_asks_for_more_folds():
    path = path_of({math.inf: 1.35, 0.1: 1.0}, noise=1.0)
    gain, error = paired(path.complete()[math.inf], path.complete()[0.1])
    assert 2.0 < gain / error < 3.0
    assert not path.settled()


def test_a_gain_on_a_handful_of_examples_asks_for_more_folds():
    means = {math.inf: 2.0, 0.1: 1.0}
    assert path_of(means, noise=0.01, size=120).settled()
    assert not path_of(means, noise=0.01, size=64).settled()


def test_a_gain_that_can_only_be_tiny_asks_for_no_more_folds():
    assert path_of({math.inf: 1.001, 0.1: 1.0}, noise=0.01).settled()


def test_weaker_ridges_are_given_up_once_they_do_worse():
    path = path_of({math.inf: 2.0, 0.1: 1.0, 0.01: 1.0, 0.003: 1.5})
    assert path.hopeless(0.001)
    # The first two are always tried: the base may be at a saddle.
    assert not path_of({math.inf: 1.0, 0.1: 1.5}).hopeless(0.01)


def test_a_ridge_that_diverges_loses():
    path = path_of({math.inf: 2.0, 0.1: 1.0, 0.01: math.nan})
    assert path.choice() == 0.1
    assert path.hopeless(0.003)


def test_a_ridge_that_one_fold_gave_up_is_out():
    path = path_of({math.inf: 2.0, 0.1: 1.0, 0.01: 0.5})
    for ridge, mean in ((math.inf, 2.0), (0.1, 1.0)):
        losses = torch.full((100,), mean, dtype=torch.float64)
        path.add(ridge, torch.zeros(1, dtype=torch.float64), losses)
    assert path.folds == 2
    assert path.choice() == 0.1


def test_ridges_follow_the_unit_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    losses = 1.4 + 0.35 * torch.randn(256, generator=generator, dtype=torch.float64)
    assert scale_of(losses) == 1.0
    for unit in (1e-4, 1e4):
        assert scale_of(unit * losses) == unit
    for odd in (losses[:1], torch.ones(4), torch.tensor([1.0, math.nan])):
        assert scale_of(odd) == 1.0


@pytest.mark.usefixtures("undrawn")
def test_another_unit_of_the_loss_gives_the_same_merge(tmp_path):
    """One power of ten cancels in the ridge, in the optimizer and in the choice of the winner."""
    found = {}
    for unit in (1.0, 1e-4, 1e4):
        task = LinearTask(examples=60)
        task.y = task.y + torch.randn(60, 4, generator=torch.Generator().manual_seed(7))
        plain = task.loss
        task.loss = lambda model, batch, plain=plain, unit=unit: unit * plain(model, batch)
        save_run(tmp_path / f"{unit}" / "run", task.states(5))
        document = merge([tmp_path / f"{unit}" / "run"], task, tmp_path / f"{unit}" / "merged")
        found[unit] = document["coefficients"]["global"], document["chosen"]
    for unit in (1e-4, 1e4):
        alphas, chosen = (torch.tensor(found[unit][0]), found[unit][1])
        torch.testing.assert_close(alphas, torch.tensor(found[1.0][0]), rtol=0, atol=1e-4)
        assert chosen == found[1.0][1]


def test_the_way_from_the_base_is_paid_for_by_the_examples():
    z = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert too_far(z, 15)
    assert not too_far(z, 16)
    assert not too_far(torch.zeros(0, dtype=torch.float64), 1)


class Alike(LinearTask):
    """Groups of eight examples that are nearly one, with noise that is the group's."""

    def __init__(self, groups: int, each: int, seed: int) -> None:
        super().__init__(inputs=16, examples=groups)
        generator = torch.Generator().manual_seed(seed)
        self.truth, self.each = self.truth / 4, each
        self.x = torch.randn(groups, 16, generator=generator).repeat_interleave(each, 0)
        self.x += 0.05 * torch.randn(self.x.shape, generator=generator)
        noise = torch.randn(groups, 4, generator=generator).repeat_interleave(each, 0)
        self.y = self.x @ self.truth.T + noise

    def build_model(self):
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))

    def states(self, n):
        base = {"0.weight": torch.eye(16), "1.weight": torch.eye(16), "2.weight": self.truth}
        base |= {"0.bias": torch.zeros(16), "1.bias": torch.zeros(16), "2.bias": torch.zeros(4)}
        generator = torch.Generator().manual_seed(100)
        return [
            {k: v + 0.12 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
            for _ in range(n)
        ]

    def groups(self):
        return [i // self.each for i in range(len(self.x))]


@pytest.mark.usefixtures("undrawn")
def test_a_ridge_is_not_chosen_by_examples_of_groups_that_the_fit_has_seen(tmp_path):
    """Otherwise a weak one looks good, with coefficients that fit the noise of 20 groups."""
    task, fresh = Alike(28, 8, seed=0), Alike(2000, 1, seed=1)
    states = task.states(14)
    save_run(tmp_path / "run", states)
    document = merge([tmp_path / "run"], task, tmp_path / "m")
    assert document["improvement"]["groups"] == 7
    assert document["improvement"]["examples"] == 56

    def loss(state: dict[str, torch.Tensor]) -> float:
        model = fresh.build_model().requires_grad_(False)
        model.load_state_dict(state)
        return float((model(fresh.x) - fresh.y).square().mean())

    mean = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
    assert loss(load_file(tmp_path / "m" / "model.safetensors")) < 1.02 * loss(mean)


class Sign:
    """The sign of the first input, which one label in seven gets wrong; none of these does."""

    def __init__(self, examples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(examples, 4, generator=generator)
        self.y = (self.x[:, 0] > 0).float()

    def build_model(self):
        return torch.nn.Linear(4, 1, bias=False)

    def dataset(self):
        return Pairs(self.x, self.y)

    def loss(self, model, batch):
        x, y = batch
        return torch.nn.functional.binary_cross_entropy_with_logits(
            model(x)[:, 0], y, reduction="none"
        )


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("examples", [6, 20, 32])
def test_few_easy_examples_do_not_take_the_merge_far(tmp_path, examples):
    """All losses that the fit can see fall the further it goes, those of wrong labels rise."""
    generator = torch.Generator().manual_seed(3)
    best = torch.tensor([[1.8, 0.0, 0.0, 0.0]])
    states = [{"weight": best + 0.5 * torch.randn(1, 4, generator=generator)} for _ in range(8)]
    save_run(tmp_path / "run", states)
    task = Sign(examples, seed=0)
    merge([tmp_path / "run"], task, tmp_path / "m")
    fresh = Sign(4000, seed=1)
    wrong = torch.rand(4000, generator=generator) < 1 / 7
    fresh.y = torch.where(wrong, 1 - fresh.y, fresh.y)

    def loss(weight: torch.Tensor) -> float:
        model = fresh.build_model().requires_grad_(False)
        model.weight.copy_(weight)
        return float(fresh.loss(model, (fresh.x, fresh.y)).mean())

    merged = load_file(tmp_path / "m" / "model.safetensors")["weight"]
    assert loss(merged) < 1.25 * loss(states[-1]["weight"])


class Noisy(LinearTask):
    """Labels that are mostly noise, of a truth as far from the checkpoints as they from another."""

    def __init__(self, examples: int, generator: torch.Generator, noise: float = 3.0) -> None:
        super().__init__(inputs=32, outputs=1, examples=examples)
        self.x = torch.randn(examples, 32, generator=generator)
        self.base = torch.randn(1, 32, generator=generator) / 32**0.5
        self.truth = self.base + 0.1 * torch.randn(1, 32, generator=generator)
        drawn = torch.randn(examples, 1, generator=generator)
        self.y = self.x @ self.truth.T + noise * drawn


@pytest.mark.usefixtures("undrawn")
def test_the_ridge_of_many_examples_is_weaker_than_that_of_few(tmp_path):
    """Few tell next to nothing; of 3,000 plain least squares is far better than the mean."""
    generator = torch.Generator().manual_seed(4)
    task = Noisy(4000, generator)
    weights = [task.base + 0.1 * torch.randn(1, 32, generator=generator) for _ in range(17)]
    save_run(tmp_path / "run", [{"0.weight": w, "0.bias": torch.zeros(1)} for w in weights])
    data = DataConfig(batch_size=256)
    document = merge([tmp_path / "run"], task, tmp_path / "m", data_config=data)
    assert document["data"]["fit_examples_used"] == 3000

    def excess(weight: torch.Tensor) -> float:
        return float((weight - task.truth).square().sum())

    mean = torch.stack(weights).mean(0)
    offsets = torch.cat(weights[1:]) - mean
    along = (task.x[:3000] @ offsets.T).double()
    rest = (task.y[:3000] - task.x[:3000] @ mean.T).double()
    squares = mean + torch.linalg.lstsq(along, rest).solution.T.float() @ offsets
    merged = load_file(tmp_path / "m" / "model.safetensors")["0.weight"]
    assert excess(squares) < 0.3 * excess(mean)
    assert excess(merged) < 1.1 * excess(squares)


@pytest.mark.usefixtures("undrawn")
def test_rounding_errors_do_not_weaken_the_ridge(tmp_path):
    """Of labels without noise every weaker one is better, by ever less."""
    generator, found = torch.Generator().manual_seed(4), []
    task = Noisy(4000, generator, noise=0.0)
    weights = [task.base + 0.1 * torch.randn(1, 32, generator=generator) for _ in range(40)]
    save_run(tmp_path / "run", [{"0.weight": w, "0.bias": torch.zeros(1)} for w in weights])
    for size in (64, 256):
        document = merge(
            [tmp_path / "run"], task, tmp_path / f"{size}", data_config=DataConfig(batch_size=size)
        )
        found.append([(s["ridge"], s["fit_examples"]) for s in document["optimizer"]["stages"]])
    assert found[0] == found[1]
    assert all(ridge > 1e-8 for ridge, _ in found[0])
