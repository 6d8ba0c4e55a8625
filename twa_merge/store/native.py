"""Project and combine on a CPU: C that is compiled where it runs, for the processor it runs on.

Expressions under torch.compile do not do: what it writes for processors with AVX2 loads narrow
numbers by way of the stack and stays below a fifth of a copy (bench/scale), and it takes twenty
seconds where this takes one. So there is no cache to go stale, or to be tampered with, either.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from ctypes import CDLL, c_float, c_int, c_ssize_t, c_void_p
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from .tiles import Tiles

_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared")
# Not every compiler knows its processor by this name, or has threads.
_WANTED = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
_COMPILERS = ("cc", "gcc", "clang")
_PATIENCE = 120.0
# Numbers of all offsets that are worth a thread of their own.
_A_THREADS = 1 << 18


class Native:
    """Project and combine in one width; compiled at the first use.

    Every tile is one thread's, so that sums do not depend on their number. The threads are
    OpenMP's, which torch works with as well: others would compete with those that it keeps ready.
    As with torch, a process that was forked from one that had used them cannot.

    Raises (every method):
        OSError: no compiler works here, or what it made cannot be loaded.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def takes(self, tiles: Tiles) -> bool:
        return True

    def project(self, tiles: Tiles, gradient: Tensor, row: int) -> Tensor:
        """⟨Δ_i, g⟩ of every tile: gradient (u, T) float32 → (u, n) float64.

        Args:
            row: numbers in a row of the tensor.
        """
        gradient = gradient.contiguous()
        sums = torch.empty(len(tiles), tiles.data.shape[-2], dtype=torch.float64)
        call = getattr(_library(), f"project_{self._dtype}")
        *sizes, threads = _sizes(tiles)
        place = c_void_p(sums.data_ptr())
        call(*_offsets(tiles), _place(gradient), place, *sizes, c_ssize_t(row), threads)
        return sums

    def combine(
        self, tiles: Tiles, centre: Tensor, beta: Tensor, total: Tensor, out: Tensor
    ) -> None:
        """out = total·c + Σ β_i Δ_i: (u, T), (n,), (1,), (u, T), all float32."""
        assert out.is_contiguous()
        centre, beta, factor = centre.contiguous(), beta.contiguous(), c_float(float(total))
        call = getattr(_library(), f"combine_{self._dtype}")
        places = _place(beta), factor, _place(centre), _place(out)
        call(*_offsets(tiles), *places, *_sizes(tiles))


def _place(numbers: Tensor) -> c_void_p:
    assert numbers.dtype == torch.float32
    return c_void_p(numbers.data_ptr())


def _offsets(tiles: Tiles) -> tuple[c_void_p, c_void_p]:
    assert tiles.data.is_contiguous()
    data = c_void_p(tiles.data.data_ptr())
    return data, c_void_p() if tiles.scales is None else _place(tiles.scales)


def _sizes(tiles: Tiles) -> tuple[c_ssize_t, c_ssize_t, c_ssize_t, c_int]:
    u, n = len(tiles), tiles.data.shape[-2]
    threads = max(1, min(torch.get_num_threads(), u, u * n * tiles.width // _A_THREADS))
    return c_ssize_t(u), c_ssize_t(n), c_ssize_t(tiles.width), c_int(threads)


@functools.cache
def _library() -> CDLL:
    source = resources.files(__package__).joinpath("native.c").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Path(folder, "native.so")
        reason = "cc, gcc and clang are missing"
        for wanted in _WANTED:
            for compiler in _compilers():
                failed = _compile([*compiler, *_FLAGS, *wanted], source, made)
                if failed is None:
                    return CDLL(str(made))
                reason = f"{compiler[0]}: {failed}"
    raise OSError(reason)


def _compilers() -> list[list[str]]:
    """What CC names, then whatever there is."""
    asked = shlex.split(os.environ.get("CC", ""))
    found = [[path] for name in _COMPILERS if (path := shutil.which(name))]
    return [asked, *found] if asked else found


def _compile(command: list[str], source: str, made: Path) -> str | None:
    """Compiles ``source`` to the file ``made``; returns what was wrong.

    Raises:
        OSError: it takes for ever.
    """
    command = [*command, "-x", "c", "-", "-o", str(made)]
    try:
        # In a group of its own, so that what a compiler has started ends with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    with process:
        try:
            _, said = process.communicate(source, _PATIENCE)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise OSError(f"{command[0]} takes longer than {_PATIENCE:g} s") from error
    if process.returncode == 0 and made.exists():
        return None
    errors = [line for line in said.strip().splitlines() if "error" in line]
    return errors[0] if errors else f"no library, and exit code {process.returncode}"
