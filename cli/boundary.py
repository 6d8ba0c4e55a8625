"""The single place where errors become messages and exit codes.

0 done, 1 internal error, 2 wrong input or usage, 3 no improvement when required, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

from twa_merge.errors import TwaMergeError

from .console import is_rank_zero, make_console, plain
from .streams import discard, guarded_streams

INTERNAL, WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

# Set for processes that `--nproc` started: their parent speaks about interruptions.
LAUNCHED = "TWA_MERGE_LAUNCHED"

# The folder where they leave a file named by their rank once they have said all they had to: a
# user's code, or native code, may end a process with any exit code and no word.
SAID = "TWA_MERGE_SAID"

# Processes of one run mostly fail together, or one after another because of the first.
# So a process that may not be the first holds its message back this long: if another one was, the
# launcher ends this one meanwhile, and only the cause is heard.
_GRACE_SECONDS = 3.0
# Ctrl-C reaches a worker twice, from the terminal and from its launcher.
_SAME_SIGNAL_SECONDS = 2.0


@dataclass
class Session:
    """One run of the command line: what the boundary must know about it.

    Attributes:
        output: where the result would go, once a command knows it.
    """

    argv: list[str]
    debug: bool = False
    output: Path | None = None


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Exited(Exception):
    """The command has an exit code of its own, and everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def debug_option(command: Any) -> Any:
    """``--debug``, before or after the command's name."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_object(Session).debug = True  # type: ignore[union-attr]

    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Show the traceback of an internal error.",
    )(command)


def run(command: click.Command, argv: list[str]) -> int:
    """Runs ``command`` and returns the exit code; nothing but that leaves here."""
    session = Session(list(argv))
    with guarded_streams():
        try:
            with _signals():
                code = _invoke(command, session)
                if code == 0:
                    _leave_group()
                return code
        except KeyboardInterrupt as error:
            _say_interrupted(session, error)
            return INTERRUPTED
        except BrokenPipeError:
            discard(sys.stdout)
            return BROKEN_PIPE


def leave_word() -> None:
    """Lets the launcher know that this process ends by its own decision."""
    if SAID in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ[SAID], os.environ["RANK"]).touch()


def _invoke(command: click.Command, session: Session) -> int:
    try:
        if "_TWA_MERGE_COMPLETE" in os.environ:
            command.main(session.argv, prog_name="twa-merge", standalone_mode=False)
        # Not through Command.main, which takes an EOFError for Ctrl-C.
        with command.make_context("twa-merge", list(session.argv), obj=session) as ctx:
            command.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except Exited as exited:
        return exited.code
    except click.ClickException as error:
        if is_rank_zero():
            error.show()
        return WRONG_INPUT
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except TwaMergeError as error:
        _report(error)
        return error.exit_code
    except BrokenPipeError:
        raise
    # A task's own sys.exit() has no meaning here.
    except (Exception, SystemExit) as error:
        _report_internal(error, session)
        return INTERNAL


def _leave_group() -> None:
    distributed = sys.modules.get("twa_merge.distributed")
    if distributed is not None:
        distributed.stop()


def _report(error: TwaMergeError) -> None:
    """The message, then one line for each thing that is known."""
    from rich.text import Text

    if not is_rank_zero():
        time.sleep(_GRACE_SECONDS)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
        return  # the launcher is going to try again, and only the last attempt's error counts
    console = make_console(stderr=True)
    console.quiet = False
    text = Text.assemble(("error: ", "bold red"), _lines(error.message, "       "))
    width = max((len(label) for label in error.details), default=0)
    for label, value in error.details.items():
        text.append(f"\n  {label:<{width}}  ", "dim").append(_lines(value, " " * (width + 4)))
    console.print(text, soft_wrap=True)


def _of_lost_rank(error: BaseException) -> str | None:
    """What to say where the error is that another process is gone; None where it is not."""
    distributed = sys.modules.get("twa_merge.distributed")
    if distributed is None or not distributed.is_lost_rank(error):
        return None
    if distributed.has_timed_out(error):
        return (
            f"Another process of this run has not answered for {distributed.TIMEOUT_MINUTES:g} "
            "minutes; look for one that hangs."
        )
    return "Another process of this run has ended; its own output says why."


def _report_internal(error: BaseException, session: Session) -> None:
    from rich.text import Text

    details = "".join(traceback.format_exception(error))
    if "RANK" in os.environ:
        # Rank zero speaks before the others do.
        time.sleep(_GRACE_SECONDS if is_rank_zero() else 2 * _GRACE_SECONDS)
    kind = "out of memory" if _is_out_of_memory(error) else "internal error"
    first = str(error).strip().partition("\n")[0]
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    lost = _of_lost_rank(error)
    if lost:
        # One that was killed says nothing itself, and its launcher may be on another node.
        kind, said = "error", f"{lost}\n{how_to_continue(session)}".rstrip()
    text = Text.assemble((f"{kind}: ", "bold red"), _lines(said, "  "))
    if kind == "out of memory":
        text.append("\n  try a smaller --batch-size; for train also --activation-checkpointing")
        text.append(" or --store disk")
    if session.debug:
        text.append("\n" + details.rstrip())
    else:
        text.append(f"\n  traceback: {_log(details)} (or on the screen with --debug)", "dim")
    console = make_console(stderr=True)
    console.quiet = False
    console.print(text, soft_wrap=True)


def _say_interrupted(session: Session, error: KeyboardInterrupt) -> None:
    if not is_rank_zero() or LAUNCHED in os.environ:
        return
    by_launcher = "RANK" in os.environ and getattr(error, "signum", None) == signal.SIGTERM
    said = "Interrupted."
    if by_launcher:
        said = "Stopped by the launcher, because of another process or because it was told to."
    with contextlib.suppress(BrokenPipeError):
        make_console(stderr=True).print(plain(f"{said} {how_to_continue(session)}".strip()))


def how_to_continue(session: Session) -> str:
    """What an interrupted command left, in a sentence; nothing for one that writes nothing."""
    if session.output is None:
        return ""
    from twa_merge.output_folder import state_folder

    partial = state_folder(session.output)
    if partial.exists():
        return f"The same command continues from {partial}; --fresh starts over."
    return "Nothing was written; the same command starts again."


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise ``Stopped``, once for each request."""
    last = -_SAME_SIGNAL_SECONDS

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SAME_SIGNAL_SECONDS:
            last = now
            raise Stopped(signum)

    try:
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: somebody else's program, somebody else's signals
        before = {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(
        sign in f"{type(error).__name__} {error}"
        for sign in ("OutOfMemoryError", "not enough memory", "can't allocate memory")
    )


def _log(details: str) -> str:
    try:
        handle, path = tempfile.mkstemp(prefix="twa-merge-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(details)
    except OSError as error:
        return f"could not be saved: {error.strerror}"
    return path


def _lines(text: str, indent: str) -> str:
    return f"\n{indent}".join(plain(line) for line in text.splitlines())
