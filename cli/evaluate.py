"""``twa-merge eval``: the losses of any models."""

from __future__ import annotations

from twa_merge import config

from . import options
from .boundary import debug_option
from .command import command as define
from .command import execute


@define(
    "eval",
    "Losses of any models on the data of `train`.",
    "twa-merge eval merged/ runs/lm/checkpoint-900 --task causal-lm --data held_out.txt",
    "twa-merge eval a.pt b.pt --task task.py --json",
)
@options.checkpoints_argument("models")
@options.task_options
@options.data_options
@options.json_option
@options.engine_options
@debug_option
@options.launch_options
def command(
    models: tuple[str, ...],
    choice: options.TaskChoice,
    data_config: config.DataConfig,
    engine: config.EngineConfig,
    as_json: bool,
) -> None:
    """Evaluate MODELS (folders or files) on the same parts of the data as `train` does."""
    from twa_merge.pipeline import evaluate

    from .render import show_evaluation

    execute(
        lambda progress: evaluate(
            models,
            choice.task,
            data=choice.data,
            test_data=choice.test_data,
            data_config=data_config,
            engine=engine,
            progress=progress,
            task_options=choice.options,
        ),
        show_evaluation,
        as_json=as_json,
    )
