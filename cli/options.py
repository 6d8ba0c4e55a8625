"""Option groups, one for each dataclass of ``twa_merge.config``."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from twa_merge import config
from twa_merge.errors import ConfigError

from .boundary import Session
from .command import TopicOption, given
from .groups import Decorator, Function, NumberOrAuto, Opt, group, opt


@dataclass(frozen=True)
class TaskChoice:
    """What is trained for: the task, its data and what only some tasks know."""

    task: str
    data: str | None
    test_data: str | None
    options: dict[str, Any]


def _task_choice(
    task: str, data: str | None, test_data: str | None = None, **own: Any
) -> TaskChoice:
    return TaskChoice(task, data, test_data, dict(given(**own)))


@dataclass(frozen=True)
class Launch:
    nproc: int
    max_restarts: int


def checkpoints_argument(name: str = "checkpoints") -> Decorator:
    """A run folder, several checkpoints, or files."""
    return click.argument(name, nargs=-1, required=True)


def _remember_output(ctx: click.Context, _: click.Parameter, value: Path) -> Path:
    session = ctx.find_object(Session)
    if session is not None:
        session.output = value
    return value


output_option: Decorator = click.option(
    "-o",
    "--output",
    cls=TopicOption,
    topic="Output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    callback=_remember_output,
    metavar="DIR",
    help="Folder to write; it appears complete or not at all.",
)

json_option: Decorator = click.option(
    "--json",
    "as_json",
    is_flag=True,
    cls=TopicOption,
    topic="Output",
    help="One JSON document on stdout, everything else on stderr.",
)


selection_options = group(
    "selection",
    config.Selection,
    {
        "Which checkpoints": [
            opt("last", "--last", "The last K only.", type=int, metavar="K"),
            opt("every", "--every", "Every K-th, back from the newest.", type=int, metavar="K"),
            opt("from_step", "--from-step", "From this step on.", type=int, metavar="STEP"),
            opt("to_step", "--to-step", "Up to this step.", type=int, metavar="STEP"),
        ]
    },
)

_TASK = opt(
    "task",
    "--task",
    "causal-lm, path/task.py or package.module:function.",
    required=True,
    metavar="TASK",
)


def _once(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    """The only value: the last of several would stand for all of them without a word."""
    if len(values) > 1:
        raise click.BadParameter("given more than once; name a folder or a pattern.", ctx, option)
    return values[0] if values else None


def _data(name: str, help: str) -> Opt:
    flag = "--" + name.replace("_", "-")
    return opt(name, flag, help, metavar="DATA", multiple=True, callback=_once)


_TEST_DATA = _data("test_data", "Only ever reported on.")
_CAUSAL_LM = [
    opt("model", "--model", "Architecture and tokenizer, if not the checkpoint's own.",
        metavar="MODEL"),
    opt("max_length", "--max-length", "Tokens a sequence.", type=click.IntRange(2), metavar="N"),
    opt("tokenizer", "--tokenizer", "Tokenizer, if not the model's own.", metavar="TOKENIZER"),
    opt("text_field", "--text-field", "Field of .jsonl and .parquet.  [default: text]",
        metavar="NAME"),
    opt("trust_remote_code", "--trust-remote-code", "Run model code from the folder.",
        is_flag=True),
]  # fmt: skip
_SEED = opt("seed", "--seed", "Of the split and of all that is drawn.")
_BATCH_SIZE = opt("batch_size", "--batch-size", "Examples a forward pass.")


def _task_group(data_help: str, *more: Opt) -> Decorator:
    data = _data("data", data_help)
    return group(
        "choice",
        _task_choice,
        {"Task and data": [_TASK, data, *more], "Task causal-lm": _CAUSAL_LM},
    )


train_task_options = _task_group("Small dataset to fit and guard with.", _TEST_DATA)
eval_task_options = _task_group("Dataset to evaluate on.")

train_data_options = group(
    "data_config",
    config.DataConfig,
    {
        "Task and data": [
            opt("guard_fraction", "--guard-fraction", "Share that picks the winner."),
            _SEED,
            _BATCH_SIZE,
            opt("sample", "--fit-examples", "At most; auto: more as long as they help.",
                type=NumberOrAuto(int), default="auto", show_default=True),
        ]
    },
)  # fmt: skip
eval_data_options = group("data_config", config.DataConfig, {"Task and data": [_SEED, _BATCH_SIZE]})


def _fit_config(**values: Any) -> config.FitConfig:
    """A default that was written out is a choice as well, and only click knows of it."""
    source = click.get_current_context().get_parameter_source
    default = click.core.ParameterSource.DEFAULT
    config.require_used(
        values["optimizer"], (name for name in values if source(f"fit_{name}") != default)
    )
    return config.FitConfig(**values)


fit_options = group(
    "fit",
    config.FitConfig,
    {
        "Fit": [
            opt("blocks", "--blocks",
                "What shares one set of coefficients; auto tries tensors and layers.",
                type=click.Choice(config.BLOCKS)),
            opt("ridge", "--ridge", "Pull towards the start; auto: what unseen examples prefer.",
                type=NumberOrAuto(), default="auto", show_default=True),
            opt("max_evaluations", "--max-evaluations",
                "Of each stage's fit; choosing the ridge takes more."),
            opt("tolerance", "--tolerance", "Relative decrease that counts as converged."),
            opt("start", "--start", "auto, mean, last or a step.", metavar="WHERE"),
            opt("subspace", "--subspace", "checkpoints, pca:R or random:R.", metavar="KIND"),
            opt("span", "--span", "affine (sums to 1) or the paper's linear.",
                type=click.Choice(("affine", "linear"))),
            opt("label_smoothing", "--label-smoothing", "Mixed into the loss of causal-lm."),
        ],
        "Fit as in the paper (sgd, adamw)": [
            opt("optimizer", "--optimizer", "lbfgs needs no learning rate.",
                type=click.Choice(config.OPTIMIZERS)),
            opt("lr", "--lr", "Learning rate."),
            opt("momentum", "--momentum", "Of sgd."),
            opt("weight_decay", "--weight-decay", "Of the coordinates."),
            opt("epochs", "--epochs", "Passes over the fit split."),
            opt("schedule", "--schedule", "Of the learning rate.",
                type=click.Choice(config.SCHEDULES)),
            opt("sharpness", "--sharpness", "Radius of sharpness-aware steps."),
        ],
    },
    make=_fit_config,
)  # fmt: skip

guard_options = group(
    "guard",
    config.GuardConfig,
    {
        "Guard": [
            opt("candidates", "--candidates",
                "all, quick (without ema, wsm and greedy), or names with commas: uniform, window, "
                "ema, wsm, greedy, twa, twa-layers (all that is fitted by block), blend (of the "
                "others). last and best_single always take part.", metavar="WHICH"),
            opt("select", "--select", "loss or metric:NAME (larger is better).", metavar="BY"),
            opt("require_improvement", "--require-improvement",
                "Exit 3 unless the best single is surely beaten."),
            opt("batch_norm", "--batch-norm", "Where a mean's running statistics come from.",
                type=click.Choice(config.BATCH_NORM)),
        ]
    },
)  # fmt: skip

store_options = group(
    "store",
    config.StoreConfig,
    {
        "Memory and speed": [
            opt("kind", "--store", "Where offsets live.", type=click.Choice(config.STORES)),
            opt("dtype", "--store-dtype", "How wide they are.",
                type=click.Choice(config.STORE_DTYPES)),
        ]
    },
)  # fmt: skip

_DEVICE = opt("device", "--device", "auto, cpu, cuda or cuda:N.", metavar="DEVICE")


def _precision(of: str) -> Opt:
    return opt("precision", "--precision", of, type=click.Choice(config.PRECISIONS))


train_engine_options = group(
    "engine",
    config.EngineConfig,
    {
        "Memory and speed": [
            _DEVICE,
            _precision("Of forward and backward passes."),
            opt("activation_checkpointing", "--activation-checkpointing",
                "Recompute activations to save memory."),
            opt("gather", "--gather", "A layer at a time, or the model once an evaluation.",
                type=click.Choice(config.GATHERS)),
        ]
    },
)  # fmt: skip
# Without a backward pass there are no activations to recompute, and layers are gathered in turn.
eval_engine_options = group(
    "engine",
    config.EngineConfig,
    {"Memory and speed": [_DEVICE, _precision("Of forward passes.")]},
)

_OUT = [
    opt("dtype", "--dtype", "Of averaged tensors.  [default: as saved]",
        type=click.Choice(config.DTYPES)),
    opt("overwrite", "--overwrite",
        "Replace an earlier merge in the same place, if nothing else is there."),
]  # fmt: skip
_FRESH = opt("fresh", "--fresh", "Start an interrupted run over.")

average_out_options = group("out", config.OutputConfig, {"Output": _OUT})
train_out_options = group("out", config.OutputConfig, {"Output": [*_OUT, _FRESH]})


def launch_options(function: Function) -> Function:
    """``--nproc`` and ``--max-restarts``. The last decorator of a command: it may never return."""

    def start(launch: Launch, **values: Any) -> Any:
        inside = os.environ.get("LOCAL_WORLD_SIZE")
        if inside is not None and launch.nproc not in (1, int(inside)):
            raise ConfigError(
                "--nproc is given inside of torchrun.",
                expected=f"no --nproc: torchrun has started {inside} processes",
                found=launch.nproc,
            )
        if launch.max_restarts and launch.nproc == 1:
            raise ConfigError(
                "--max-restarts is for processes that --nproc starts.",
                expected="--nproc with two processes or more",
                found=f"--max-restarts {launch.max_restarts}",
                remedy="torchrun has a --max-restarts of its own"
                if inside
                else "leave it out; the same command again continues",
            )
        if inside is None and launch.nproc > 1:
            from .launch import relaunch

            session = click.get_current_context().find_object(Session)
            relaunch(session or Session([]), launch.nproc, launch.max_restarts)
        return function(**values)

    functools.update_wrapper(start, function)
    return group(
        "launch",
        Launch,
        {
            "Memory and speed": [
                opt("nproc", "--nproc", "Processes on this machine.", type=click.IntRange(1, 1024),
                    default=1, show_default=True),
                opt("max_restarts", "--max-restarts", "After a process died.",
                    type=click.IntRange(0), default=0),
            ]
        },
    )(start)  # fmt: skip
