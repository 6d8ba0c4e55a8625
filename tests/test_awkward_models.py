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
from small_task import Small, train
from torch import nn
from torch.utils._pytree import tree_leaves

from twa_merge import evaluate
from twa_merge.building import build_module
from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import EngineConfig
from twa_merge.distributed import World
from twa_merge.errors import TaskError
from twa_merge.layout import make_layout
from twa_merge.model import build
from twa_merge.sharding import _apart, _Order, checkpoint_activations, in_one_piece


def merging(folder, name, k):
    # fmt: off
    return ["train", folder / name, "--task", awkward_task.__file__, "--data", name, "-o",
            folder / f"{name}{k}", "--batch-size", 8, "--max-evaluations", 6,
            "--blocks", "tensors", "--ridge", "0.0003", "--candidates", "last,twa,twa-tensors",
            "--device", "cpu"]
    # fmt: on


class InTraining(Awkward):
    """As it would be on GPUs, where SyncBatchNorm can be trained."""

    def build_model(self):
        model = super().build_model()
        for part in model.modules():
            if isinstance(part, nn.SyncBatchNorm):
                part.__class__ = nn.BatchNorm1d
        return model


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A folder with the merges of all models, by one process and by two."""
    folder = tmp_path_factory.mktemp("awkward")
    for name in MODELS:
        train(folder / name, of=lambda _, name=name: InTraining(name), lr=0.05)
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


def test_layers_that_hold_a_layer_in_common_are_gathered_with_the_rest():
    assert _apart(MODELS["Common"](), Awkward()) == []
    model, activation = MODELS["Again"](), nn.ReLU()
    for layer in model.layers:
        layer.activation = activation
    model.last = model.layers[-1]
    assert _apart(model, Awkward()) == [*model.layers]


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


class Drawing(nn.Linear):
    """Draws numbers of its own after those of its parameters, from a seeded generator."""

    def __init__(self, how):
        torch.manual_seed(0)
        np.random.seed(0)
        if how == "before":
            self_drawn = torch.randn(3)
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.rand(3))
        self.built_on_meta = self.weight.is_meta
        self.register_buffer("steps", torch.arange(3), persistent=False)
        if how == "buffer":
            self.register_buffer("drawn", torch.randn(3), persistent=False)
        elif how == "list":
            self.drawn = [{"order": torch.randperm(30)}]
        elif how == "array":
            self.drawn = np.random.permutation(int(100 * torch.rand(())) + 50)
        elif how == "table":
            self.drawn = (self.bias.detach().cos(),)
        elif how == "before":
            self.drawn = self_drawn


class OfDrawing(OfSet):
    def build_model(self):
        return Drawing(self.how)


def drawing_layout(folder):
    save_run(folder, [Drawing("no").state_dict() for _ in range(2)])
    return make_layout(open_checkpoints([folder]))


@pytest.mark.parametrize("how", ["buffer", "list", "array", "table"])
def test_what_constructors_draw_or_compute_is_the_same_on_the_meta_device(tmp_path, how):
    one, other = (
        build_module(OfDrawing(how), drawing_layout(tmp_path / str(meta)), meta=meta)
        for meta in (False, True)
    )
    assert all(parameter.is_meta for parameter in other.parameters())
    for a, b in zip(tree_leaves(one.drawn), tree_leaves(other.drawn), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("how", ["no", "before"])
def test_constructors_whose_draws_go_into_parameters_stay_on_the_meta_device(tmp_path, how):
    assert build_module(OfDrawing(how), drawing_layout(tmp_path), meta=True).built_on_meta


class Referring(nn.Sequential):
    """Keeps its weights in a list."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3))
        self.kept = [self[0].weight]

    def forward(self, x):
        return x @ self.kept[0].T + self[0].bias


def test_a_list_of_parameters_is_refused_where_they_are_replaced(tmp_path):
    task = Small()
    task.build_model = Referring
    save_run(tmp_path, [Referring().state_dict() for _ in range(2)])
    with pytest.raises(TaskError, match="list or dict keeps parameters") as caught:
        build_module(task, make_layout(open_checkpoints([tmp_path])), meta=True)
    assert caught.value.details["found"] == "Referring.kept"
    with pytest.raises(TaskError, match="list or dict keeps parameters"):
        evaluate([tmp_path], task, engine=EngineConfig(precision="bf16"))


def wrapped(how):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        return how(nn.Sequential(nn.Linear(3, 3)))


def test_a_compiled_model_is_taken_as_it_was(tmp_path):
    save_run(tmp_path, [wrapped(torch.compile).state_dict() for _ in range(2)])
    checkpoints = open_checkpoints([tmp_path])
    layout, task = make_layout(checkpoints), Small()
    task.build_model = lambda: wrapped(torch.compile)
    assert type(build_module(task, layout, meta=True)) is nn.Sequential
    live = build(task, layout, checkpoints[-1], World())
    assert set(live.names.values()) == {"0.weight", "0.bias"}
    assert type(live.module) is nn.Sequential


def test_scripted_models_are_refused(tmp_path):
    save_run(tmp_path, [nn.Sequential(nn.Linear(3, 3)).state_dict() for _ in range(2)])
    layout, task = make_layout(open_checkpoints([tmp_path])), Small()
    task.build_model = lambda: wrapped(torch.jit.script)
    for meta in (False, True):
        with pytest.raises(TaskError, match="TorchScript") as caught:
            build_module(task, layout, meta=meta)
        assert "scripted or traced" in caught.value.details["what to do"]


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
