"""Models that do not come to the same layers for every batch, in several processes."""

from __future__ import annotations

import runpy

import pytest
from launches import document, documents_in, here, in_turn, run

# Examples of kind 0 and 1 take turns, a batch each, so that each of two ranks sees one kind.
ROUTED = """
import torch
from runs import Pairs, save_run
from torch import nn

KIND, HIDDEN = 6, 8


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.up(x).tanh()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Expert(), Expert()])

    def forward(self, x, kind):
        return x + self.experts[kind](x)


class Net(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.first = nn.Linear(KIND, HIDDEN)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.heads = nn.ModuleList([heads(HIDDEN, 3), heads(HIDDEN, 3)])

    def forward(self, x):
        kind = int(x[0, 0] > 0)
        h = self.first(x[:, : KIND])
        for block in self.blocks:
            h = block(h, kind)
        return self.heads[kind](h)


class Head(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.linear = nn.Linear(*shape)

    def forward(self, x):
        return self.linear(x)


class Routed:
    heads = nn.Linear

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(24, 8, KIND, generator=generator)
        x[..., 0] = (torch.arange(24) % 2 * 2.0 - 1.0)[:, None]
        self.x, self.y = x, x[..., 1:4].argmax(-1)
        self.y[1::2] = 2 - self.y[1::2]

    def build_model(self):
        return Net(self.heads)

    def dataset(self):
        return Pairs(self.x, self.y)

    def collate(self, examples):
        (x, y), = examples
        return x, y

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)[None]


task = Routed


def train(folder):
    torch.manual_seed(0)
    data, states = task(), []
    model = data.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(12):
        optimizer.zero_grad()
        data.loss(model, (data.x[step], data.y[step])).backward()
        optimizer.step()
        if step % 4 == 3:
            states.append({k: v.clone() for k, v in model.state_dict().items()})
    save_run(folder, states)
"""

ROUTED_ITSELF = "\n\ntask = Routed\n"
HEADS_OF_MODULES = "\n\nclass task(Routed):\n    heads = Head\n"
# Every batch comes to all blocks, and its loss to one of the last two.
EARLY_EXITS = """

class Exits(Net):
    def forward(self, x):
        h, hidden = self.first(x), []
        for block in self.blocks:
            h = block(h, 0)
            hidden.append(h)
        return self.heads[0](hidden[-1 - int(x[0, 0] > 0)])


class task(Routed):
    def build_model(self):
        return Exits(self.heads)
"""
GATHERED_AT_ONCE = HEADS_OF_MODULES + "    no_split_modules = ()\n"


def write(folder, more):
    folder.mkdir(exist_ok=True)
    task = folder / "routed.py"
    task.write_text(ROUTED.replace(ROUTED_ITSELF, more))
    runpy.run_path(str(task))["train"](folder / "run")
    return task


def merging(folder, task, out, gather):
    # fmt: off
    return ["train", folder / "run", "--task", task, "-o", folder / out, "--batch-size", 1,
            "--blocks", "global", "--ridge", "0.01", "--max-evaluations", 4, "--candidates",
            "last,twa", "--gather", gather, "--device", "cpu"]
    # fmt: on


def evaluating(folder, task):
    # fmt: off
    return ["eval", folder / "run", "--task", task, "--batch-size", 1, "--device", "cpu", "--json"]
    # fmt: on


GATHERED = ("layer", "model")
INSIDE_AND_BEHIND = {"inside": ROUTED_ITSELF, "behind": EARLY_EXITS}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with merges by one and two processes, and the documents of two evaluations."""
    folder = tmp_path_factory.mktemp("routed")
    tasks = {name: write(folder / name, more) for name, more in INSIDE_AND_BEHIND.items()}
    whole = evaluating(folder / "whole", write(folder / "whole", GATHERED_AT_ONCE))
    for name, task in tasks.items():
        here(*merging(folder / name, task, "alone", "layer"))
    merges = (
        merging(folder / name, task, gather, gather)
        for name, task in tasks.items()
        for gather in GATHERED
    )
    launched = in_turn(2, whole, *merges)
    assert launched.returncode == 0, launched.stderr
    return folder, [documents_in(printed)[0] for printed in (here(*whole), launched.stdout)]


@pytest.mark.parametrize("gather", GATHERED)
@pytest.mark.parametrize("what", INSIDE_AND_BEHIND)
def test_what_the_data_choose_inside_layers_and_behind_them(done, what, gather):
    """A rank sums up gradients of experts and of layers that its own batch did without."""
    alone, both = (document(done[0] / what / out) for out in ("alone", gather))
    assert both["world_size"] == 2
    one, other = ([row["guard_loss"] for row in found["candidates"]] for found in (alone, both))
    assert other == pytest.approx(one, abs=1e-6)
    one, other = (found["coefficients"]["global"] for found in (alone, both))
    assert other == pytest.approx(one, abs=1e-5)


def test_a_task_may_have_its_model_gathered_as_a_whole(done):
    one, other = ([row["loss"] for row in found["models"]] for found in done[1])
    assert other == pytest.approx(one, abs=1e-6)


def test_layers_that_not_every_batch_comes_to_are_named(tmp_path):
    """The two heads are of one shape: mixed up they would give a loss of no model at all."""
    task = write(tmp_path, HEADS_OF_MODULES)
    here(*evaluating(tmp_path, task), "--precision", "bf16")
    done = run(2, *evaluating(tmp_path, task))
    assert done.returncode != 0
    assert done.stderr.count("Not every batch comes to the same layers") == 1
    assert "heads.0" in done.stderr
    assert "heads.1" in done.stderr
    assert "no_split_modules" in done.stderr


def test_gradients_of_two_widths_are_refused_in_words(tmp_path):
    """Gathered once, the first rank's last batch is the only one that needs the second expert."""
    task = write(tmp_path, ROUTED_ITSELF)
    # fmt: off
    done = run(2, "train", tmp_path / "run", "--task", task, "-o", tmp_path / "m", "--batch-size",
               1, "--blocks", "global", "--ridge", "0.01", "--candidates", "last,twa",
               "--fit-examples", 4, "--gather", "model", "--precision", "bf16", "--device", "cpu")
    # fmt: on
    assert done.returncode != 0
    assert done.stderr.count("--gather layer") == 1
    assert not (tmp_path / "m").exists()
