"""How the live model is sharded: one process shards too where its passes are in bfloat16."""

from __future__ import annotations

import pytest
import torch
from runs import LinearTask, Pairs, save_run
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from twa_merge import evaluate, merge
from twa_merge.building import build_module, parameters_on_meta
from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import EngineConfig, FitConfig, GuardConfig
from twa_merge.distributed import World
from twa_merge.errors import TaskError
from twa_merge.layers import gathered_layers
from twa_merge.layout import make_layout
from twa_merge.model import LiveModel, build
from twa_merge.task import Task

N, WIDTH = 3, 6


class Encoder(nn.Module):
    """Another class of layers than the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.linear(x).tanh()


class Odd(nn.Module):
    """Two stacks, scalars inside and outside of them, layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Encoder() for _ in range(3))
        self.decoder = nn.Sequential(Scaled(), Scaled())
        self.tied = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.tied[1].weight = self.tied[0].weight
        self.head = nn.Linear(WIDTH, 4)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def features(self, x: Tensor) -> Tensor:
        for layer in [*self.encoder, self.decoder, *self.tied]:
            x = layer(x).tanh()
        return x


class OddTask(LinearTask):
    """Its loss calls parts of its model, and never the model itself."""

    def build_model(self) -> nn.Module:
        return Odd()

    def dataset(self) -> Pairs:
        return Pairs(self.x, self.y)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        features = model.features(x.to(model.head.weight.dtype))
        scores = model.head(features).float() / model.temperature.exp()
        assert y.dtype == torch.float32
        return (scores - y).square().sum(1)


def save_odd(folder) -> None:
    states = []
    for seed in range(N):
        torch.manual_seed(seed)
        states.append({k: v.clone() for k, v in Odd().state_dict().items()})
    save_run(folder, states)


def live_of(folder, precision: str = "fp32", task: Task | None = None) -> LiveModel:
    found = open_checkpoints([folder])
    return build(task or OddTask(), make_layout(found), found[-1], World(), precision=precision)


def test_every_stack_is_sharded_layer_by_layer_but_for_what_shares_a_weight(tmp_path):
    save_odd(tmp_path / "run")
    live = live_of(tmp_path / "run", "bf16")
    sharded = {k for k, m in live.module.named_modules() if isinstance(m, FSDPModule)}
    encoder, decoder = (
        {f"{name}.{i}" for i in range(k)} for name, k in (("encoder", 3), ("decoder", 2))
    )
    assert sharded == encoder | decoder


@pytest.mark.parametrize(("width", "alone"), [(WIDTH, 2), (10 * WIDTH, 0)])
def test_bare_layers_are_gathered_one_by_one_where_they_are_most_of_the_model(width, alone):
    """Of few others they may be heads, of which a batch needs one."""
    bare = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
    model = nn.ModuleDict({"first": nn.Linear(width, WIDTH, bias=False), "bare": bare})
    assert gathered_layers(model) == list(bare)[:alone]


def test_a_layer_in_two_lists_is_gathered_once_and_lists_of_lists_layer_by_layer():
    first, second = Encoder(), Encoder()
    twice = nn.ModuleDict({"there": nn.ModuleList([first, second]), "back": nn.ModuleList()})
    twice["back"].extend([second, first])
    assert gathered_layers(twice) == [first, second]
    of_lists = nn.ModuleList([nn.ModuleList([first, Scaled()]), nn.ModuleList([second, Scaled()])])
    assert not any(isinstance(layer, nn.ModuleList) for layer in gathered_layers(of_lists))


def test_layers_that_a_task_names_have_to_be_there(tmp_path):
    save_odd(tmp_path / "run")
    found, task = open_checkpoints([tmp_path / "run"]), OddTask()
    task.no_split_modules = ["Encodr"]
    with pytest.raises(TaskError, match="names no layer") as error:
        build(task, make_layout(found), found[-1], World(), precision="bf16")
    assert "Encoder" in error.value.details["expected"]


@pytest.mark.usefixtures("undrawn")
def test_scalars_and_parts_of_a_model_that_a_loss_calls_by_itself(tmp_path):
    save_odd(tmp_path / "run")
    losses = []
    for precision in ("fp32", "bf16"):
        done = merge(
            [tmp_path / "run"],
            OddTask(),
            tmp_path / precision,
            fit=FitConfig(blocks="tensors", ridge=0.1, max_evaluations=2),
            guard=GuardConfig(candidates="quick"),
            engine=EngineConfig("cpu", precision),
        )
        losses.append({row["name"]: row["guard_loss"] for row in done["candidates"]})
    assert losses[1]["last"] == pytest.approx(losses[0]["last"], rel=0.02)
    assert losses[1].keys() == losses[0].keys()


class Normalising(nn.Module):
    """Its input's mean and deviation are buffers, which no kind of sharding narrows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((WIDTH,), 0.1))
        self.register_buffer("deviation", torch.full((WIDTH,), 2.0))
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - self.mean) / self.deviation)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 2)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.view(-1, 2, 1, 3).expand(-1, -1, 2, -1)).flatten(1)[:, :4]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("model", [Normalising, ChannelsLast])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_of_other_widths_and_orders_than_fsdp_wants(tmp_path, model, precision):
    states = []
    for seed in range(N):
        torch.manual_seed(seed)
        states.append({k: v.contiguous() for k, v in model().state_dict().items()})
    save_run(tmp_path / "run", states)
    task, engine = LinearTask(), EngineConfig("cpu", precision)
    task.build_model = model
    found = [row["loss"] for row in evaluate([tmp_path / "run"], task, engine=engine)["models"]]
    own = model()
    for state, loss in zip(states, found, strict=True):
        own.load_state_dict(state)
        expected = float(task.loss(own, (task.x, task.y)).detach().mean())
        assert loss == pytest.approx(expected, rel=0.02 if precision == "bf16" else 1e-6)
    fit = FitConfig(blocks="global", ridge=0.01, max_evaluations=8)
    guard = GuardConfig(candidates="last,twa")
    done = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, guard=guard, engine=engine)
    losses = {row["name"]: row["fit_loss"] for row in done["candidates"]}
    assert losses["twa"] < losses["last"]


def test_a_model_that_the_checkpoints_hold_twice_is_not_guessed(tmp_path):
    task = LinearTask()
    state = task.build_model().state_dict()
    networks = "ema_model", "online_model"
    both = {f"{network}.{k}": v.clone() for network in networks for k, v in state.items()}
    save_run(tmp_path, [both] * 2)
    with pytest.raises(TaskError, match="more than once") as caught:
        live_of(tmp_path, task=task)
    assert "model_names" in caught.value.details["what to do"]
    task.model_names = lambda module, names: {
        n: n.removeprefix("online_model.") for n in names if n.startswith("online_model.")
    }
    assert set(live_of(tmp_path, task=task).names) == {f"online_model.{k}" for k in state}


def test_weights_beside_their_moving_average_are_themselves(tmp_path):
    task = LinearTask()
    state = task.build_model().state_dict()
    saved = state | {f"ema.{k}": v + 100.0 for k, v in state.items()}
    # As a checkpoint of somebody's own, whose averages no reader knows.
    save_run(tmp_path, [saved] * 2)
    assert live_of(tmp_path, task=task).names == {k: k for k in state}


def test_a_network_that_a_module_holds_twice_is_one(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 3)
            self.again = self.first

    task = LinearTask()
    task.build_model = Twice
    save_run(tmp_path, [nn.Linear(2, 3).state_dict()] * 2)
    assert sorted(live_of(tmp_path, task=task).names) == ["bias", "weight"]


def test_a_lazy_model_is_refused_in_words(tmp_path):
    task = LinearTask()
    save_run(tmp_path / "run", task.states(3))
    task.build_model = lambda: nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(TaskError, match="shapes are not known") as caught:
        merge([tmp_path / "run"], task, tmp_path / "m")
    assert "LazyLinear" in caught.value.details["what to do"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_parameter_that_two_modules_share_is_one_on_the_meta_device():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            weight = nn.Parameter(torch.zeros(3, 3))
            self.one.weight = weight
            self.other.weight = weight

    with parameters_on_meta():
        model = Tied()
    assert model.one.weight is model.other.weight
    assert model.one.weight.is_meta
    assert model.one.bias is not model.other.bias


def test_norms_over_processes_keep_their_names(tmp_path):
    class Derived(nn.SyncBatchNorm):
        pass

    class Normed(LinearTask):
        def build_model(self):
            return nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4), Derived(4))

    save_run(tmp_path / "run", [Normed().build_model().state_dict()])
    layout = make_layout(open_checkpoints([tmp_path / "run"]))
    module = build_module(Normed(), layout, meta=False)
    assert [type(part).__name__ for part in module] == ["Linear", "SyncBatchNorm", "Derived"]
    assert isinstance(module[2], Derived)
    x = torch.randn(5, 4)
    # In training a norm over processes would refuse a CPU.
    torch.testing.assert_close(module[1](x), nn.BatchNorm1d(4)(x))
