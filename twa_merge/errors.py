"""What can go wrong for a user, said so that the user can act on it.

Every error names what it knows of: the checkpoint, the tensor, what was expected, what was found
and what to do. The command line prints them and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any


class TwaMergeError(Exception):
    """Base of every error that a user can cause or mend.

    Args:
        message: one sentence, what went wrong.
        checkpoint: path of the checkpoint or file that it went wrong in.
        tensor: name of the tensor.
        expected: what should have been there.
        found: what was there.
        remedy: what the user can do.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        checkpoint: str | PathLike[str] | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.details: dict[str, str] = {
            label: str(value)
            for label, value in (
                ("checkpoint", checkpoint),
                ("tensor", tensor),
                ("expected", expected),
                ("found", found),
                ("what to do", remedy),
            )
            if value is not None
        }
        super().__init__(message)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {k}: {v}" for k, v in self.details.items())])


class ConfigError(TwaMergeError):
    """An option or an argument is wrong."""


class CheckpointError(TwaMergeError):
    """A checkpoint cannot be read, or does not fit the others."""


class TaskError(TwaMergeError):
    """The task, its data or its model is wrong."""


class OutputError(TwaMergeError):
    """The result cannot be written."""


class NoImprovement(TwaMergeError):
    """Nothing beat the best single checkpoint although ``require_improvement`` was set.

    Attributes:
        document: that would have been written, as ``twa_merge.json``, had it been asked for less.
    """

    exit_code = 3
    document: Mapping[str, Any] | None = None


def listing(names: Iterable[str], limit: int = 5) -> str:
    """``a, b, c and 7 more``: names for an error message, at most ``limit`` of them."""
    names = list(names)
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
