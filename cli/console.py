"""Where text goes: results to stdout, everything else to stderr, and only from rank zero."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from twa_merge.errors import ConfigError
from twa_merge.ranks import own_rank

if TYPE_CHECKING:
    from rich.console import Console

_CI_WIDTH = 110


def is_rank_zero() -> bool:
    """Whether this process may speak: torchrun's first one, or the only one."""
    try:
        return own_rank() == 0
    except ConfigError:
        return True


def make_console(*, stderr: bool = False) -> Console:
    """A console that takes every text literally: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    class Literal(Console):
        def on_broken_pipe(self) -> None:
            # Rich would exit with 1; the error boundary knows better.
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    # Rich takes 80 columns where there is no terminal, which cuts tables short in logs.
    width = None if stream.isatty() or "COLUMNS" in os.environ else _CI_WIDTH
    return Literal(
        file=stream,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        quiet=not is_rank_zero(),
    )


def plain(text: object) -> str:
    """``text`` on one line, with everything that could steer a terminal made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def write_json(document: Mapping[str, Any]) -> None:
    """The document on stdout, from rank zero alone."""
    if is_rank_zero():
        sys.stdout.write(json.dumps(finite(document), indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def stdout_to_stderr(active: bool) -> Iterator[None]:
    """Keeps stdout for the one document of --json.

    A task's own prints go to stderr, and so does what native libraries write to the file
    descriptor (NCCL's version line, for one).
    """
    if not active:
        yield
        return
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, io.UnsupportedOperation, AttributeError):
            target, source = sys.__stdout__.fileno(), sys.__stderr__.fileno()  # type: ignore[union-attr]
            saved = os.dup(target)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, target)
            os.dup2(source, target)
        yield
