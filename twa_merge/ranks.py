"""The processes that write a merge together: those of torchrun, or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import ConfigError


class Ranks(Protocol):
    """This process among all; its methods are collectives, as those of ``distributed.World``."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def is_zero(self) -> bool: ...

    def gather(self, value: Any) -> list[Any]: ...

    def broadcast(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class Alone:
    """One process, which has no need of torch."""

    rank: int = 0
    size: int = 1
    is_zero: bool = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def world_size() -> int:
    """How many processes torchrun has started, by the environment; 1 without it.

    Raises:
        ConfigError: the environment does not say it in a number.
    """
    return _number("WORLD_SIZE", 1, 1)


def own_rank() -> int:
    """Which of these processes this one is; 0 where it is alone, whatever was left behind in RANK.

    Raises:
        ConfigError: the environment gives no such number.
    """
    size = world_size()
    rank = _number("RANK", 0, 0) if size > 1 else 0
    if rank >= size:
        raise _unclear("RANK", f"a number below WORLD_SIZE, {size}")
    return rank


def local_rank() -> int:
    """Which of the processes on its node it is.

    Raises:
        ConfigError: the environment gives no such number.
    """
    return _number("LOCAL_RANK", 0, 0) if world_size() > 1 else 0


def _number(name: str, alone: int, least: int) -> int:
    text = os.environ.get(name, str(alone))
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise _unclear(name, f"a whole number of at least {least}")
    return int(text)


def _unclear(name: str, expected: str) -> ConfigError:
    return ConfigError(
        f"The environment does not say which process of which run this is: {name}.",
        expected=expected,
        found=repr(os.environ.get(name, "")),
        remedy="start the processes with torchrun, or leave RANK and WORLD_SIZE out of the "
        "environment",
    )
