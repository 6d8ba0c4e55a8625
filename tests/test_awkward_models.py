"""Models of which several processes could come to other gradients than one, and losses."""

from __future__ import annotations

import warnings

import awkward_task
import numpy as np
import pytest
import torch
from awkward_task import MODELS, REFUSED, REPLACING, Awkward
from launches import distance, document, here, in_turn, run
from runs import save_run
from small_task import train
from torch import nn

from twa_merge.building import build_module
from twa_merge.checkpoints import open_checkpoints
from twa_merge.distributed import World
from twa_merge.errors import TaskError
from twa_merge.layout import make_layout
from twa_merge.sharding import _Order, checkpoint_activations, in_one_piece


def merging(folder, name, k):
    # fmt: off
    return ["train", folder / name, "--task", awkward_task.__file__, "--data", name, "-o",
            folder / f"{name}{k}", "--batch-size", 8, "--max-evaluations", 6,
            "--blocks", "tensors", "--ridge", "0.0003", "--candidates", "last,twa,twa-tensors",
            "--device", "cpu"]
    # fmt: on


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A folder with the merges of all models, by one process and by two."""
    folder = tmp_path_factory.mktemp("awkward")
    for name in MODELS:
        train(folder / name, of=lambda _, name=name: Awkward(name), lr=0.05)
        here(*merging(folder, name, 1))
    launched = in_turn(2, *(merging(folder, name, 2) for name in MODELS))
    assert launched.returncode == 0, launched.stderr
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_come_to_what_one_does(merged, name):
    one, other = (document(merged / f"{name}{k}")["candidates"] for k in (1, 2))
    for a, b in zip(one, other, strict=True):
        assert a["name"] == b["name"]
        assert b["guard_loss"] == pytest.approx(a["guard_loss"], abs=1e-6)
        assert distance(a["coefficients"], b["coefficients"]) < 1e-9


@pytest.mark.parametrize("loss", ["penalty", "decayed"])
def test_losses_that_layers_gathered_in_turn_do_not_bear_say_what_does(merged, tmp_path, loss):
    done = run(
        2, "train", merged / "Again", "--task", f"{awkward_task.__file__}:{loss}", "-o",
        tmp_path / "out", "--device", "cpu", "--max-evaluations", 4,
    )  # fmt: skip
    assert done.returncode != 0
    assert "no_split_modules" in done.stderr
    assert "SIGSEGV" not in done.stderr


def test_such_losses_do_where_the_model_is_gathered_as_a_whole(merged, tmp_path):
    def commands(k):
        for loss in ("whole_penalty", "whole_decayed"):
            # fmt: off
            yield ["train", merged / "Again", "--task", f"{awkward_task.__file__}:{loss}", "-o",
                   tmp_path / f"{loss}{k}", "--device", "cpu", "--max-evaluations", 4, "--ridge",
                   "0.01", "--candidates", "last,twa", "--batch-size", 16]
            # fmt: on

    for command in commands(1):
        here(*command)
    done = in_turn(2, *commands(2))
    assert done.returncode == 0, done.stderr
    for loss in ("whole_penalty", "whole_decayed"):
        one, other = (document(tmp_path / f"{loss}{k}")["candidates"] for k in (1, 2))
        for a, b in zip(one, other, strict=True):
            assert distance(a["coefficients"], b["coefficients"]) < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_layers_gathered_in_turn_do_not_bear_say_what_does(tmp_path, name):
    """Gathering is the same in one process, which has narrow passes of FSDP2 too."""
    train(tmp_path / name, of=lambda _: Awkward(name), lr=0.05, checkpoints=3)
    command = merging(tmp_path, name, 1)
    here(*command)
    with pytest.raises(TaskError) as caught:
        here(*command, "--precision", "bf16", "-o", tmp_path / "narrow")
    assert "no_split_modules" in caught.value.details["what to do"]


@pytest.mark.parametrize("name", REPLACING)
@pytest.mark.parametrize("gather", ["layer", "model"])
def test_a_forward_pass_that_replaces_weights_is_refused(tmp_path, name, gather):
    train(tmp_path / name, of=lambda _: Awkward(name), lr=0.05, checkpoints=3)
    command = merging(tmp_path, name, 1)
    here(*command)
    with pytest.raises(TaskError, match="replaces weights of the model") as caught:
        here(*command, "--precision", "bf16", "-o", tmp_path / "narrow", "--gather", gather)
    assert caught.value.details["tensor"].endswith("weight")


class Sending(World):
    """Has to read the numbers of a tensor to tell the others, as gloo has."""

    def gather(self, value):
        torch.ones(2)[:1].cpu().numpy()
        return [value, value]


def test_processes_compare_notes_inside_transforms_of_torch_func():
    order, layer, x = _Order(Sending()), nn.Linear(4, 4), torch.ones(3, 4)
    expected = layer(x)
    order.watch(layer, "layer")
    order.begin("loss")
    y, _ = torch.func.vjp(layer, x)
    torch.testing.assert_close(order.end(y), expected)


class Set(nn.Linear):
    """Makes other weights than its parent's, in ways that the meta device does not bear."""

    def __init__(self, how):
        super().__init__(3, 3)
        if how == "data":
            self.weight.data = torch.zeros(3, 3)
        elif how == "numpy":
            self.weight.data = torch.from_numpy(2 * self.weight.detach().numpy())
        else:
            self.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(3)})
        self.largest = float(np.abs(self.weight.detach().numpy()).max()) if how == "numpy" else 0.0


class OfSet:
    def __init__(self, how):
        self.how = how

    def build_model(self):
        return Set(self.how)


@pytest.mark.parametrize("how", ["data", "numpy", "loaded"])
def test_constructors_that_the_meta_device_does_not_bear(tmp_path, how):
    save_run(tmp_path, [nn.Linear(3, 3).state_dict() for _ in range(2)])
    layout = make_layout(open_checkpoints([tmp_path]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = build_module(OfSet(how), layout, meta=True)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert how != "numpy" or module.largest > 0


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation, self.linear = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x, y):
        return self.linear(self.activation(x) + y.mul_(2.0))


class WrittenTo(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(WritesToItsInput() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, x * 3.0)
        return x


def test_layers_may_write_to_their_inputs_in_one_process():
    require_same_gradients(WrittenTo(), torch.randn(3, 4))


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_what_layers_write_to_dicts_and_lists_is_kept_in_one_process(activation_checkpointing):
    model, x = MODELS["Notes"](), torch.randn(3, 36)
    expected = model(x)
    require_same_gradients(model, x, activation_checkpointing)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def require_same_gradients(model, x, activation_checkpointing=False):
    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    before = gradients()
    if activation_checkpointing:
        checkpoint_activations(model, Awkward())
    in_one_piece(model, Awkward())
    for found, expected in zip(gradients(), before, strict=True):
        torch.testing.assert_close(found, expected)
