"""What FSDP leaves behind; under torchrun, each process saves its own parts."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


class Net(nn.Module):
    """Rows that two processes cannot share evenly, several dtypes, tied weights and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()])
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.scale = nn.Parameter(torch.randn(1))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers[0](self.embed(x)) + self.experts.mean() * self.scale)
        return self.head(self.layers[1](x.bfloat16()).float())


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """Two steps of training, so that there are moments to be saved."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.arange(6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def placement(parameter: nn.Parameter) -> Shard | None:
    """Some of them by columns."""
    return Shard(1) if parameter.shape == (4, 4) else None


def fsdp2(folder: Path) -> None:
    for step in (1, 2):
        torch.manual_seed(step)
        model = Net()
        for layer in model.layers:
            fully_shard(layer, shard_placement_fn=placement)
        fully_shard(model)
        weights, moments = get_state_dict(model, trained(model))
        content: dict[str, Any] = {"model": weights, "optim": moments, "step": step}
        dcp.save(content, checkpoint_id=folder / f"step_{step}")


def replicas(folder: Path) -> None:
    """Each process has the whole of each tensor, and one of them saves it."""
    torch.manual_seed(3)
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts")))
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)


def fsdp1(folder: Path, kind: StateDictType) -> None:
    torch.manual_seed(4)
    policy = ModuleWrapPolicy({nn.BatchNorm1d})
    net = Net().float()
    net.head = nn.Linear(4, 7, bias=False)
    model = FullyShardedDataParallel(net, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.state_dict_type(model, kind):
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder)


def cut(folder: Path) -> None:
    """Tensors cut in any dimension, unevenly."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(5)
    whole = {
        "rows": torch.randn(5, 3),
        "columns": torch.randn(4, 7),
        "middle": torch.randn(3, 5, 4).bfloat16(),
        "last": torch.randint(9, (2, 3, 5)),
        "one": torch.randn(1, 3),
    }
    axes = {"columns": 1, "middle": 1, "last": 2}
    parts: dict[str, DTensor | Tensor] = {
        name: distribute_tensor(tensor, mesh, [Shard(axes.get(name, 0))])
        for name, tensor in whole.items()
    }
    dcp.save({"app": {"net": parts}}, checkpoint_id=folder)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    fsdp2(folder / "fsdp2")
    replicas(folder / "replicas")
    fsdp1(folder / "fsdp1", StateDictType.SHARDED_STATE_DICT)
    fsdp1(folder / "flat", StateDictType.LOCAL_STATE_DICT)
    cut(folder / "cut")
    dist.barrier()
    # A gloo thread that lets go of its last tensor while the interpreter is being taken down aborts
    # the process.
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
