"""``--nproc N``: starts the same command N times through torch.distributed's own launcher."""

from __future__ import annotations

import logging
import os
import tempfile

from .boundary import INTERNAL, INTERRUPTED, LAUNCHED, Exited, Session, how_to_continue
from .console import make_console, plain


def relaunch(session: Session, nproc: int, max_restarts: int) -> None:
    """Runs this command in ``nproc`` processes on this machine.

    Raises:
        Exited: always, with the exit code of the process that failed first, or 0.
    """
    # As `python -m torch.distributed.run`, but in this process: the module's own main prints a
    # page about the failed child and turns every exit code into 1.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A store that outlives the workers would hand those that are started again the addresses of
    # the dead (pytorch/pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The launcher's default is one thread a process, with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    if not session.debug:
        logging.disable(logging.ERROR)
    options = ["--standalone", f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
    try:
        # The launcher leaves its own temporary folder behind.
        with tempfile.TemporaryDirectory(prefix="twa-merge-") as logs:
            arguments = torchrun.parse_args([*options, f"--log-dir={logs}", "-m", __package__])
            # Not parsed with the rest: argparse would take --nproc for one of its own.
            arguments.training_script_args = session.argv
            os.environ[LAUNCHED] = str(os.getpid())
            torchrun.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            _say(
                f"Process {rank} of {nproc} was killed by {failure.signal_name()}"
                f"{_guess(failure.exitcode)}. {how_to_continue(session)}"
            )
        elif failure.exitcode == INTERRUPTED:
            # A signal that was sent to it alone: this one would have heard of the terminal's.
            _say(f"Process {rank} of {nproc} was told to stop. {how_to_continue(session)}")
        raise Exited(failure.exitcode if failure.exitcode > 0 else INTERNAL) from None
    except (SignalException, KeyboardInterrupt):
        _say(f"Interrupted. {how_to_continue(session)}")
        raise Exited(INTERRUPTED) from None
    raise Exited(0)


def _guess(exitcode: int) -> str:
    return ", often a sign of too little memory" if exitcode == -9 else ""


def _say(sentence: str) -> None:
    make_console(stderr=True).print(plain(sentence.strip()), soft_wrap=True)
