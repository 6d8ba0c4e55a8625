"""The process group: how many processes there are, what each owns, and sums over all."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError
from .ranks import local_rank, own_rank, world_size

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT_MINUTES = 30.0
# glibc's name for the size from which memory comes from the system, and goes back when freed.
_M_MMAP_THRESHOLD = -3
_RETURNED_FROM = 1 << 20
_LETTING_GO_SECONDS = 0.1
_DEVICES = "auto, cpu, cuda or cuda:N"
# Numbers that are gathered from all ranks at a time.
_PIECE = 1 << 18


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, computing on ``device``.

    Every method but ``share`` is a collective: all ranks call it, in the same order. With one
    process each is the identity.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_zero(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of ``tensor`` over the ranks, on the device that it came from.

        The parts are gathered and added in rank order, so that the sum does not depend on which
        rank was first: for coefficients and statistics, not for weights.
        """
        if self.size == 1:
            return tensor
        pieces = tensor.reshape(-1).split(_PIECE)
        sums = [
            torch.stack(self._gather_tensor(piece)).sum(0).to(tensor.device) for piece in pieces
        ]
        return torch.cat(sums).reshape(tensor.shape)

    def max(self, value: float) -> float:
        return max(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank zero's picklable ``value``, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def led(self, function: Callable[..., T], work: Callable[[Callable[..., T]], R]) -> R:
        """Rank zero's ``work(function)``, on every rank; all ranks make its calls of ``function``.

        For work whose way depends on the last bits of its numbers: on unlike processors every rank
        would go a way of its own.

        Args:
            function: a collective, of picklable arguments.
            work: with a picklable result.
        """
        if self.size == 1:
            return work(function)
        if self.is_zero:

            def told(*arguments: Any) -> T:
                self.broadcast((True, arguments))
                return function(*arguments)

            result = work(told)
            self.broadcast((False, result))
            return result
        while True:
            goes_on, what = self.broadcast(None)
            if not goes_on:
                return what
            function(*what)

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(torch.zeros(1))

    def share(self, rows: int) -> tuple[int, int]:
        """Rows [start, stop) of a dimension 0 of ``rows`` that this rank owns.

        The same split as ``torch.chunk`` and FSDP2's ``Shard(0)``: ceil(rows / size) rows a rank,
        the last ranks may own fewer or none.
        """
        step = -(-rows // self.size)
        return min(self.rank * step, rows), min((self.rank + 1) * step, rows)

    def _gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        local = tensor.detach().to(self.device).contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local)
        return parts


def is_sharded(tensor: Tensor) -> bool:
    # Only what is sharded has it; to import DTensor takes a second.
    return hasattr(tensor, "to_local")


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that may be sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def start(device: str = "auto", timeout_minutes: float = TIMEOUT_MINUTES) -> World:
    """Joins the process group that ``torchrun`` describes in the environment, if there is one.

    Args:
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        timeout_minutes: how long a collective waits for a rank before the run is given up.

    Raises:
        ConfigError: the device does not exist, or the processes do not find one another.
    """
    size, rank = world_size(), own_rank()
    where = _device(device, local_rank())
    if size > 1 and where.type == "cpu":
        _give_memory_back()
    if size > 1 and not dist.is_initialized():
        try:
            with _signals_end_it():
                dist.init_process_group(
                    _backend(where),
                    timeout=datetime.timedelta(minutes=timeout_minutes),
                    device_id=where if where.type == "cuda" else None,
                )
        except (dist.DistError, ValueError) as error:
            address = ":".join(os.environ.get(f"MASTER_{k}", "?") for k in ("ADDR", "PORT"))
            raise ConfigError(
                "The processes of this run do not find one another.",
                expected=f"{size} processes (WORLD_SIZE) that meet at {address} (MASTER_ADDR and "
                "MASTER_PORT)",
                found=str(error).split("\n")[0],
                remedy="start them with torchrun, or leave these variables out of the environment",
            ) from error
        if where.type == "cpu":
            # Not for NCCL, which may wait for ranks that are gone.
            atexit.register(_stop_at_exit)
    return World(rank, size, where)


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once: while C++ waits, no handler is heard."""
    heard = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                heard[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


def ensure_group(world: World) -> None:
    """Makes a process group of this process alone where there is none: FSDP2 insists on one."""
    if not dist.is_initialized():
        assert world.size == 1
        store = dist.HashStore()
        dist.init_process_group(_backend(world.device), store=store, rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed, which any pass of a sharded model may hold, as another rank did.

    Gloo raises plain runtime errors.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def has_timed_out(error: BaseException) -> bool:
    """Whether the lost rank is one that has not answered for ``start``'s timeout."""
    return "Timed out" in str(error)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _stop_at_exit() -> None:
    """Leaves the process group, and lets gloo's threads let go of their last tensors.

    FSDP2's caches keep the group, and so its threads, alive for longer; one that lets go of a
    tensor once the interpreter is being taken down aborts the process.
    """
    stop()
    time.sleep(_LETTING_GO_SECONDS)


def _give_memory_back() -> None:
    """Makes freed memory go back to the system at once, where that can be asked for (glibc).

    Left alone, glibc keeps every buffer of up to 32 MB for later once one has been freed. Layers
    that are gathered, reduced and freed in turn then pile up to several times the model.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _RETURNED_FROM)


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"There is no device called {name!r}.", expected=_DEVICES) from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ConfigError("The device cannot be used.", expected=_DEVICES, found=name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "No GPU can be used here.", found=f"--device {name}", remedy="use --device cpu"
            )
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "The processes of a node cannot share one GPU.",
                expected="--device cuda: each takes one of its own",
                found=f"--device {name}",
            )
        index = device.index if device.index is not None else local
        if index >= torch.cuda.device_count():
            raise ConfigError(
                "There are fewer GPUs than processes on this node.",
                expected=f"at most {torch.cuda.device_count()} processes a node",
                found=f"local rank {local}",
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
