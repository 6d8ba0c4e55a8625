"""The command group. Commands are loaded when they are asked for, torch when they run."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import os
import signal
import sys
from typing import NoReturn

import click

from twa_merge import __version__

from .boundary import INTERNAL, LAUNCHED, debug_option, leave_word, run

# Command → the module of this package that defines it.
COMMANDS = {
    "train": "train",
    "average": "average",
    "eval": "evaluate",
    "inspect": "inspect",
    "demo": "demo",
}

EPILOG = """\b
Start here:
  twa-merge demo
  twa-merge inspect RUN_DIR
  twa-merge train RUN_DIR --task causal-lm --data held_out.txt -o merged/

\b
Exit codes:
  0    done
  1    internal error
  2    wrong input or usage
  3    no certain improvement (with --require-improvement)
  130  interrupted; the same command continues
"""


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name]}", __package__)
        return module.command


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="twa-merge", message="%(prog)s %(version)s")
@debug_option
def cli() -> None:
    """A folder of saved checkpoints goes in, one better model comes out."""


# Set by torchrun, and by --nproc.
_LAUNCHERS = {"TORCHELASTIC_RUN_ID", LAUNCHED}
# Linux's name for the signal that a process gets when the one that started it has died.
_PR_SET_PDEATHSIG = 1


def _end_with_launcher() -> None:
    """A launcher that was killed leaves ranks that may wait for each other for ever."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(LAUNCHED) not in (None, str(os.getppid())):
        sys.exit(INTERNAL)


def main(argv: list[str] | None = None) -> NoReturn:
    """The entry point: runs the command line and exits."""
    if _LAUNCHERS & os.environ.keys():
        _end_with_launcher()
    code = run(cli, sys.argv[1:] if argv is None else argv)
    if "RANK" in os.environ:
        leave_word()
        # A failed rank's orderly exit might wait for ranks that wait for it; and a gloo thread that
        # lets go of its last tensor while the interpreter is being taken down aborts the process.
        if not code:
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
