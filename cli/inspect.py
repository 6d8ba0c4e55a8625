"""``twa-merge inspect``: what is in a folder, before anything is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from twa_merge import config
from twa_merge.ranks import world_size

from . import options
from .boundary import debug_option
from .command import TopicOption, execute
from .command import command as define
from .groups import Bytes, group, opt


@dataclass(frozen=True)
class Plan:
    plan: bool
    gpus: int | None
    nodes: int
    gpu_memory: int | None
    gather: str
    store: str
    store_dtype: str

    @property
    def asked(self) -> bool:
        on_what = self.gpus is not None or self.gpu_memory is not None or self.nodes > 1
        return self.plan or on_what or (self.store, self.store_dtype) != ("auto", "auto")

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "gpus": world_size() if self.gpus is None else self.gpus,
            "nodes": self.nodes,
            "gpu_memory": self.gpu_memory,
            "gather": self.gather,
            "store": self.store,
            "store_dtype": self.store_dtype,
        }


plan_options = group(
    "plan",
    Plan,
    {
        "Memory plan": [
            opt("plan", "--plan", "What `train` would need.", is_flag=True),
            opt("gpus", "--gpus",
                "Of all nodes; as many as --nproc unless given. 0 is this machine's CPU.",
                type=click.IntRange(0)),
            opt("nodes", "--nodes", "That these GPUs are on.", type=click.IntRange(1),
                default=1, show_default=True),
            opt("gpu_memory", "--gpu-memory", "Of one, such as 80GB.", type=Bytes(1 << 20),
                metavar="SIZE"),
            opt("gather", "--gather", "As `train` would.", type=click.Choice(config.GATHERS),
                default="auto", show_default=True),
            opt("store", "--store", "As `train` would.", type=click.Choice(config.STORES),
                default="auto", show_default=True),
            opt("store_dtype", "--store-dtype", "As `train` would.",
                type=click.Choice(config.STORE_DTYPES), default="auto", show_default=True),
        ]
    },
)  # fmt: skip


@define(
    "inspect",
    "What a folder holds; its geometry; a memory plan.",
    "twa-merge inspect runs/lm",
    "twa-merge inspect runs/lm --last 10 --geometry",
    "twa-merge inspect runs/lm --plan --gpus 8 --gpu-memory 80GB",
)
@options.checkpoints_argument()
@click.option(
    "--geometry",
    is_flag=True,
    cls=TopicOption,
    topic="What to look at",
    help="Distances, cosines, spectrum and rank: one pass over the files.",
)
@options.selection_options
@plan_options
@options.json_option
@debug_option
@options.launch_options
def command(
    checkpoints: tuple[str, ...],
    geometry: bool,
    selection: config.Selection,
    plan: Plan,
    as_json: bool,
) -> None:
    """Show what CHECKPOINTS hold: steps, formats, sizes, tensors by kind, differences.

    CHECKPOINTS: a run's folder, several folders, or files.
    """
    from twa_merge import inspect

    from .render import show_inspection

    extra = {"plan": plan.arguments} if plan.asked else {}
    execute(
        lambda progress: inspect(
            checkpoints, selection=selection, geometry=geometry, progress=progress, **extra
        ),
        show_inspection,
        as_json=as_json,
    )
