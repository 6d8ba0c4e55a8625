"""``twa-merge average``: fixed coefficients, no data."""

from __future__ import annotations

from pathlib import Path

import click

from twa_merge import config

from . import options
from .boundary import debug_option
from .command import TopicOption, execute
from .command import command as define


@define(
    "average",
    "Fixed coefficients: uniform, ema, a schedule, any numbers.",
    "twa-merge average runs/lm -o merged/ --last 10",
    "twa-merge average runs/lm -o merged/ --weights ema:0.9",
    "twa-merge average a/ b/ c/ -o merged/ --weights 0.5,0.7,-0.2",
    "twa-merge average runs/lm -o again/ --weights @merged/twa_merge.json",
)
@options.checkpoints_argument()
@click.option(
    "--weights",
    cls=TopicOption,
    topic="Coefficients",
    default="uniform",
    show_default=True,
    metavar="HOW",
    help="uniform or linear (the same), ema:DECAY, 1-sqrt (leans on the oldest), numbers with "
    "commas, or @twa_merge.json.",
)
@options.selection_options
@options.output_option
@options.average_out_options
@options.json_option
@debug_option
@options.launch_options
def command(
    checkpoints: tuple[str, ...],
    weights: str,
    selection: config.Selection,
    output: Path,
    out: config.OutputConfig,
    as_json: bool,
) -> None:
    """Average CHECKPOINTS with fixed coefficients. Needs no data and little memory.

    CHECKPOINTS: a run's folder, several folders, or files.
    """
    from twa_merge import average

    from .render import show_average

    execute(
        lambda progress: average(
            checkpoints, output, weights=weights, selection=selection, out=out, progress=progress
        ),
        lambda document, console: show_average(document, console, output),
        as_json=as_json,
    )
