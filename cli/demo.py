"""``twa-merge demo``: trains a small run where there is none, then does the real thing with it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twa_merge import __version__
from twa_merge.config import DataConfig, OutputConfig
from twa_merge.errors import OutputError

from . import options
from .boundary import debug_option
from .command import Document, TopicOption, execute
from .command import command as define
from .console import is_rank_zero, make_console, plain

if TYPE_CHECKING:
    from twa_merge.progress import Progress

_MARKER = "twa-merge-demo.json"
_TASK = "twa_merge.demo:task"


@define(
    "demo",
    "Train a small run, merge it, see what it gains.",
    "twa-merge demo",
    "twa-merge demo --output /tmp/demo --seed 1",
)
@click.option(
    "-o",
    "--output",
    "folder",
    cls=TopicOption,
    topic="Output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("twa-merge-demo"),
    show_default=True,
    metavar="DIR",
    help="Folder to work in; a run that is already there is used again.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    cls=TopicOption,
    topic="Output",
    help="Of the run and the split.",
)
@options.json_option
@debug_option
def command(folder: Path, seed: int, as_json: bool) -> None:
    """Train a small language model for about a minute, then merge its checkpoints.

    On two cores merging takes about two minutes more.

    Nothing is downloaded: the text is the Python standard library's source, split by file into a
    part to train on, one to merge with and one to test on.
    """
    from .render import show_train

    run, output = folder / "run", folder / "merged"
    line = shlex.join(
        ["twa-merge", "train", str(run), "--task", _TASK, "--seed", str(seed), "-o", str(output)]
    )

    def work(progress: Progress) -> Document:
        from twa_merge import merge

        # A seed that is refused is refused before the minute of training.
        data_config = DataConfig(seed=seed)
        _prepare_run(folder, run, seed, progress)
        return merge(
            [run],
            _TASK,
            output,
            data_config=data_config,
            out=OutputConfig(overwrite=True),
            progress=progress,
        )

    execute(work, lambda document, console: show_train(document, console, output), as_json=as_json)
    if is_rank_zero():
        console = make_console(stderr=as_json)
        console.print(f"\nThe same by hand:\n  {plain(line)} --overwrite", soft_wrap=True)


def _prepare_run(folder: Path, run: Path, seed: int, progress: Progress) -> None:
    """Leaves a complete run of this version and seed in ``run``.

    Raises:
        OutputError: the folder is somebody else's.
    """
    from twa_merge.demo import train_run

    wanted: dict[str, Any] = {"version": __version__, "seed": seed, "complete": True}
    marker = folder / _MARKER
    try:
        if folder.exists() and not marker.is_file() and any(folder.iterdir()):
            raise OutputError(
                "The folder exists and holds no demo.",
                checkpoint=folder,
                remedy="choose another one with --output",
            )
        if _read(marker) == wanted:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Incomplete until the run has ended: a demo that was interrupted trains again.
        _write(marker, {**wanted, "complete": False})
        shutil.rmtree(run, ignore_errors=True)
        train_run(run, seed=seed, progress=progress)
        _write(marker, wanted)
    except OSError as error:
        raise OutputError(
            "The demo's folder cannot be written.",
            checkpoint=folder,
            found=error.strerror,
            remedy="choose another one with --output",
        ) from error


def _read(marker: Path) -> Any:
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(marker: Path, document: dict[str, Any]) -> None:
    marker.write_text(json.dumps(document) + "\n", encoding="utf-8")
