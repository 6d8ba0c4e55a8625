"""``twa-merge eval``: the losses of any models."""

from __future__ import annotations

from twa_merge import config

from . import options
from .boundary import debug_option
from .command import command as define
from .command import execute


@define(
    "eval",
    "Losses of any models on a dataset.",
    "twa-merge eval merged/ runs/lm/checkpoint-900 --task causal-lm --data held_out.txt",
    "twa-merge eval a.pt b.pt --task task.py --json",
)
@options.checkpoints_argument("models")
@options.eval_task_options
@options.eval_data_options
@options.selection_options
@options.json_option
@options.eval_engine_options
@debug_option
@options.launch_options
def command(
    models: tuple[str, ...],
    choice: options.TaskChoice,
    data_config: config.DataConfig,
    selection: config.Selection,
    engine: config.EngineConfig,
    as_json: bool,
) -> None:
    """Evaluate MODELS on all of the task's dataset(); its test_dataset() is left alone.

    MODELS: models or checkpoints, folders or files, or folders of them.
    """
    from twa_merge import evaluate

    from .render import show_evaluation

    execute(
        lambda progress: evaluate(
            models,
            choice.task,
            data=choice.data,
            selection=selection,
            data_config=data_config,
            engine=engine,
            progress=progress,
            task_options=choice.options,
        ),
        show_evaluation,
        as_json=as_json,
    )
