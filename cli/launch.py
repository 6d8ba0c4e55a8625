"""``--nproc N``: starts the same command N times through torch.distributed's own launcher."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Container
from typing import TYPE_CHECKING

from twa_merge.errors import NoImprovement

from .boundary import (
    INTERNAL,
    INTERRUPTED,
    LAUNCHED,
    SAID,
    WRONG_INPUT,
    Exited,
    Session,
    how_to_continue,
)
from .console import make_console, plain

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Exit codes that the same command has again.
_ANSWERS = (WRONG_INPUT, NoImprovement.exit_code)
# Exit codes of a process that has said why.
_SAID = (INTERNAL, *_ANSWERS)


def relaunch(session: Session, nproc: int, max_restarts: int) -> None:
    """Runs this command in ``nproc`` processes on this machine, again where one of them has died.

    Raises:
        Exited: always, with the exit code of the process that failed first, or 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # The launcher's default is one thread a process, with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ[LAUNCHED] = str(os.getpid())
    if not session.debug:
        logging.disable(logging.ERROR)
    try:
        for left in reversed(range(max_restarts + 1)):
            failed = _launch(session, nproc)
            if failed is None:
                raise Exited(0)
            code = _report(*failed, session, nproc, left)
            if code is not None:
                raise Exited(code)
    except (SignalException, KeyboardInterrupt):
        _say(f"Interrupted. {how_to_continue(session)}")
        raise Exited(INTERRUPTED) from None


def _launch(session: Session, nproc: int) -> tuple[ChildFailedError, set[int]] | None:
    """Runs all processes once.

    Returns:
        Unless all is well: what became of them, and the ranks that have said all they had to.
    """
    # As `python -m torch.distributed.run`, but in this process: the module's own main prints a
    # page about the failed child and turns every exit code into 1.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Restarts are not left to the launcher, which would try again what the user has to mend.
    options = ["--standalone", f"--nproc-per-node={nproc}", "--max-restarts=0"]
    # The launcher leaves its own temporary folder behind.
    with (
        tempfile.TemporaryDirectory(prefix="twa-merge-") as logs,
        tempfile.TemporaryDirectory(prefix="twa-merge-") as said,
    ):
        os.environ[SAID] = said
        arguments = torchrun.parse_args([*options, f"--log-dir={logs}", "-m", __package__])
        # Not parsed with the rest: argparse would take --nproc for one of its own.
        arguments.training_script_args = session.argv
        try:
            torchrun.run(arguments)
        except ChildFailedError as error:
            return error, {int(rank) for rank in os.listdir(said)}
    return None


def _report(
    error: ChildFailedError, said: Container[int], session: Session, nproc: int, left: int
) -> int | None:
    """Says what the failed processes do not say themselves.

    Args:
        said: ranks that have said all they had to.
        left: how many more times they may be started.

    Returns:
        The exit code, or None where they are to be started again.
    """
    rank, failure = error.get_first_failure()
    known = {r: f.exitcode for r, f in error.failures.items() if r in said and f.exitcode in _SAID}
    again = left > 0 and not any(code in _ANSWERS for code in known.values())
    after = f"Starting again; restarts left after that: {left - 1}."
    then = after if again else how_to_continue(session)
    if failure.exitcode < 0:
        killed = f"was killed by {failure.signal_name()}{_guess(failure.exitcode)}"
        _say(f"Process {rank} of {nproc} {killed}. {then}")
    elif failure.exitcode == INTERRUPTED:
        # A signal that was sent to it alone: this one would have heard of the terminal's.
        _say(f"Process {rank} of {nproc} was told to stop. {then}")
    elif rank not in known:
        _say(f"Process {rank} of {nproc} ended itself with exit code {failure.exitcode}. {then}")
    elif again:
        _say(f"Process {rank} of {nproc} failed. {then}")
    if again:
        return None
    return known.get(rank, INTERRUPTED if failure.exitcode == INTERRUPTED else INTERNAL)


def _guess(exitcode: int) -> str:
    return ", often a sign of too little memory" if exitcode == -9 else ""


def _say(sentence: str) -> None:
    make_console(stderr=True).print(plain(sentence.strip()), soft_wrap=True)
