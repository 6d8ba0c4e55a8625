"""What the code of a task raises → an error that says which line of the task it came from."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .distributed import is_lost_rank
from .errors import TaskError, TwaMergeError

# Frames of this library, of the import machinery, and of what is installed.
_NOT_THE_USERS = (
    str(Path(__file__).parent) + os.sep,
    "<frozen",
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")},
)


# What torch says of batch norm in training on a batch of one, and of gradients under no_grad.
_ALONE = "more than 1 value per channel"
_NO_GRADIENT = "does not require grad"
# What its allocator says where a CPU has no more.
_NO_MEMORY = "can't allocate memory"
# What torch says of parameters that FSDP2 has not gathered, or whose numbers it has given up.
_NOT_GATHERED = (
    "mixed torch.Tensor and DTensor",
    ".numpy() is not supported for tensor subclasses",
    "storage of size 0",
)
# What it says of float64 that meets float32, in several wordings.
_DOUBLE, _FLOAT = re.compile(r"\bdouble\b", re.I), re.compile(r"\bfloat\b", re.I)
GATHER_AS_A_WHOLE = (
    "an empty list for the task's no_split_modules, which gathers the model as a whole, or one "
    "process"
)
_TAKE_GRADIENTS = "take gradients inside the model under `with torch.enable_grad():`"


@contextmanager
def user_code(doing: str, *, expected: str | None = None) -> Iterator[None]:
    """Turns an exception of the user's task into an error that says where it came from.

    Args:
        doing: what the task was asked for, as the end of a sentence.
    """
    with blamed(f"The task failed to {doing}.", expected=expected):
        try:
            yield
        except ValueError as error:
            if _ALONE not in str(error):
                raise
            raise TaskError(
                "Batch norm cannot normalise a single example.",
                expected="two examples in a batch, or more",
                remedy="a --batch-size of 2 or more, and as many examples to fit",
            ) from error
        except torch.OutOfMemoryError as error:
            raise TaskError(
                "The device ran out of memory.",
                found=str(error).split("\n")[0],
                remedy="a smaller --batch-size or --max-length, more processes, or another --store",
            ) from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
                raise TaskError(
                    "The process ran out of memory.",
                    found=str(error).split("\n")[0] or type(error).__name__,
                    remedy="a smaller --batch-size or --max-length, or --activation-checkpointing",
                ) from error
            if any(said in str(error) for said in _NOT_GATHERED):
                raise TaskError(
                    f"The task failed to {doing}.",
                    expected="weights of layers that are used inside these layers alone, and "
                    "layers that return what they make (in tensors, dicts, lists and tuples)",
                    found=f"{type(error).__name__}: {error}",
                    remedy=GATHER_AS_A_WHOLE,
                ) from error
            if _DOUBLE.search(str(error)) and _FLOAT.search(str(error)):
                raise TaskError(
                    f"The task failed to {doing}.",
                    expected="data in float32, as models are held in it while coefficients are "
                    "trained, whatever they are saved in",
                    found=f"{type(error).__name__}: {error}",
                    remedy="; ".join(filter(None, ["make floats of it: x.float()", _where(error)])),
                ) from error
            if _NO_GRADIENT not in str(error) or torch.is_grad_enabled():
                raise
            raise TaskError(
                f"The task failed to {doing}.",
                expected="losses that can be computed under torch.no_grad(), to be compared",
                found=f"{type(error).__name__}: {error}",
                remedy="; ".join(filter(None, [_TAKE_GRADIENTS, _where(error)])),
            ) from error


@contextmanager
def blamed(message: str, *, expected: str | None = None) -> Iterator[None]:
    """Turns what the user's code raises into a ``TaskError`` that starts with ``message``."""
    try:
        yield
    except TwaMergeError:
        raise
    # SystemExit too: a script that calls sys.exit must not end the merge with a code of its own.
    except (Exception, SystemExit) as error:
        if is_lost_rank(error):
            raise
        raise TaskError(
            message,
            expected=expected,
            found=f"{type(error).__name__}: {error}",
            remedy=_where(error),
        ) from error


def _where(error: BaseException) -> str | None:
    """The last line of the user's own code that the error came through, or else the last of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"see {error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS)] or frames[-1:]
    return f"see {own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else None
