"""``twa-merge train``: coefficients learned on a small dataset."""

from __future__ import annotations

from pathlib import Path

from twa_merge import config

from . import options
from .boundary import debug_option
from .command import command as define
from .command import execute


@define(
    "train",
    "Learn coefficients on a little data, write the best model.",
    "twa-merge train runs/lm --task causal-lm --data held_out.txt -o merged/",
    "twa-merge train runs/cnn --task task.py --last 20 --blocks layers -o merged/",
    "twa-merge train runs/lm --task causal-lm --data dev.jsonl -o merged/ --nproc 4",
)
@options.checkpoints_argument()
@options.train_task_options
@options.train_data_options
@options.selection_options
@options.fit_options
@options.guard_options
@options.output_option
@options.train_out_options
@options.json_option
@options.store_options
@options.train_engine_options
@debug_option
@options.launch_options
def command(
    checkpoints: tuple[str, ...],
    choice: options.TaskChoice,
    data_config: config.DataConfig,
    selection: config.Selection,
    fit: config.FitConfig,
    guard: config.GuardConfig,
    output: Path,
    out: config.OutputConfig,
    store: config.StoreConfig,
    engine: config.EngineConfig,
    as_json: bool,
) -> None:
    """Learn the coefficients of CHECKPOINTS on a little data and write the best model.

    CHECKPOINTS: a run's folder, several folders, or files. The model that is written is the best
    of all candidates on a part of the data that nothing was fitted on.
    """
    from twa_merge import merge

    from .render import show_train

    execute(
        lambda progress: merge(
            checkpoints,
            choice.task,
            output,
            data=choice.data,
            test_data=choice.test_data,
            selection=selection,
            data_config=data_config,
            fit=fit,
            guard=guard,
            store=store,
            engine=engine,
            out=out,
            progress=progress,
            task_options=choice.options,
        ),
        lambda document, console: show_train(document, console, output),
        as_json=as_json,
    )
