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

    Raises (every method):
        OSError: no compiler works here, or what it made cannot be loaded.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def takes(self, tiles: Tiles) -> bool:
        return True

    def project(self, tiles: Tiles, gradient: Tensor) -> Tensor:
        """⟨Δ_i, g⟩ of every tile: gradient (u, T) float32 → (u, n) float32."""
        gradient = gradient.contiguous()
        sums = torch.empty(len(tiles), tiles.data.shape[-2], dtype=torch.float32)
        call = getattr(_library(), f"project_{self._dtype}")
        call(*_offsets(tiles), _place(gradient), _place(sums), *_sizes(tiles))
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
    return c_void_p(numbers.data_ptr())


def _offsets(tiles: Tiles) -> tuple[c_void_p, c_void_p]:
    assert tiles.data.is_contiguous()
    return _place(tiles.data), c_void_p() if tiles.scales is None else _place(tiles.scales)


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
        for compiler in _compilers():
            for wanted in _WANTED:
                failed = _compile([*compiler, *_FLAGS, *wanted], source, made)
                if failed is None:
                    return CDLL(str(made))
                reason = f"{compiler[0]}: {failed}"
    raise OSError(reason)


def _compilers() -> list[list[str]]:
    """What CC names, or else whatever there is."""
    if asked := shlex.split(os.environ.get("CC", "")):
        return [asked]
    return [[found] for name in _COMPILERS if (found := shutil.which(name))]


def _compile(command: list[str], source: str, made: Path) -> str | None:
    """Compiles ``source`` to the file ``made``; returns what was wrong."""
    command = [*command, "-x", "c", "-", "-o", str(made)]
    try:
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    errors = done.stderr.strip().splitlines()
    return next((line for line in errors if "error" in line), f"exit code {done.returncode}")
