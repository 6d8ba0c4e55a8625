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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_float, c_ssize_t, c_void_p
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .tiles import Tiles

_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared")
# Not every compiler knows its processor by this name.
_PROCESSOR = (("-march=native",), ())
_COMPILERS = ("cc", "gcc", "clang")
_PATIENCE = 120.0
# Numbers of all offsets that are worth a thread of their own.
_A_THREADS = 1 << 19


class Native:
    """Project and combine in one width; compiled at the first use.

    Raises (every method):
        OSError: no compiler works here, or what it made cannot be loaded.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def takes(self, tiles: Tiles) -> bool:
        return True

    def project(self, tiles: Tiles, gradient: Tensor) -> Tensor:
        """⟨Δ_i, g⟩ of every tile: gradient (u, T) float32 → (u, n) float32."""
        call, gradient = getattr(_library(), f"project_{self._dtype}"), gradient.contiguous()
        n = tiles.data.shape[-2]
        sums = torch.empty(len(tiles), n)

        def some(part: slice) -> None:
            here = tiles[part]
            pointers = (*_offsets(here), gradient[part].data_ptr(), sums[part].data_ptr())
            call(*map(c_void_p, pointers), *map(c_ssize_t, (len(here), n, here.width)))

        _spread(some, tiles)
        return sums

    def combine(
        self, tiles: Tiles, centre: Tensor, beta: Tensor, total: Tensor, out: Tensor
    ) -> None:
        """out = total·c + Σ β_i Δ_i: (u, T), (n,), (1,), (u, T), all float32."""
        call, n = getattr(_library(), f"combine_{self._dtype}"), len(beta)
        centre, beta, factor = centre.contiguous(), beta.contiguous(), float(total)
        assert out.is_contiguous()

        def some(part: slice) -> None:
            here = tiles[part]
            places = (centre[part].data_ptr(), out[part].data_ptr())
            before = map(c_void_p, (*_offsets(here), beta.data_ptr()))
            sizes = map(c_ssize_t, (len(here), n, here.width))
            call(*before, c_float(factor), *map(c_void_p, places), *sizes)

        _spread(some, tiles)


def _offsets(tiles: Tiles) -> tuple[int, int | None]:
    assert tiles.data.is_contiguous()
    return tiles.data.data_ptr(), None if tiles.scales is None else tiles.scales.data_ptr()


def _spread(work: Callable[[slice], None], tiles: Tiles) -> None:
    """Runs ``work`` on all tiles, by as many threads as torch takes; every tile is one thread's."""
    numbers = len(tiles) * tiles.width * tiles.data.shape[-2]
    threads = max(1, min(torch.get_num_threads(), len(tiles), numbers // _A_THREADS))
    cuts = [len(tiles) * k // threads for k in range(threads + 1)]
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    if threads == 1:
        work(parts[0])
    else:
        list(_pool(threads).map(work, parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "kernels")


@functools.cache
def _library() -> CDLL:
    source = resources.files(__package__).joinpath("native.c").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Path(folder, "native.so")
        reason = "cc, gcc and clang are missing"
        for compiler in _compilers():
            for processor in _PROCESSOR:
                failed = _compile([*compiler, *_FLAGS, *processor], source, made)
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
