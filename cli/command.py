"""What every command has in common: help by topic, and how it is carried out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from twa_merge.errors import NoImprovement

from .console import is_rank_zero, make_console, stdout_to_stderr, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from twa_merge.progress import Progress

Document = dict[str, Any]


class TopicOption(click.Option):
    """An option that is listed under ``topic`` in the help text."""

    def __init__(self, *args: Any, topic: str = "Other", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.topic = topic


class TopicCommand(click.Command):
    """Lists its options by topic, in the order in which the topics come up, `Other` last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = [
            (getattr(parameter, "topic", "Other"), record)
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option)
            and (record := parameter.get_help_record(ctx)) is not None
        ]
        topics = dict.fromkeys(topic for topic, _ in records)
        ordered = sorted(topics, key=lambda topic: topic == "Other")
        by_topic = {t: [r for topic, r in records if topic == t] for t in ordered}
        for topic, rows in by_topic.items():
            with formatter.section(topic):
                formatter.write_dl(rows)


def command(
    name: str, summary: str, *examples: str
) -> Callable[[Callable[..., Any]], click.Command]:
    """``click.command`` for one of ours, with examples below its help.

    Args:
        summary: the line in `twa-merge --help`.
    """
    lines = itertools.chain(["\b", "Examples:"], (f"  {example}" for example in examples))
    return click.command(
        name,
        cls=TopicCommand,
        short_help=summary,
        epilog="\n".join(lines),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def execute(
    work: Callable[[Progress], Document],
    show: Callable[[Document, Console], None],
    *,
    as_json: bool,
) -> Document:
    """Does the work with live progress on stderr, then puts the document on stdout.

    Args:
        show: draws the document, where --json did not ask for the document itself.
    """
    from .live import live_progress

    try:
        with stdout_to_stderr(as_json), live_progress(make_console(stderr=True)) as progress:
            document = work(progress)
    except NoImprovement as error:
        # What a pipeline bases its own decision on.
        if as_json and error.document is not None:
            write_json(error.document)
        raise
    if as_json:
        write_json(document)
    elif is_rank_zero():
        show(document, make_console())
    return document


def given(**values: Any) -> Mapping[str, Any]:
    """Only what the user has really chosen."""
    return {
        name: value for name, value in values.items() if value is not None and value is not False
    }
