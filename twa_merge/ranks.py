"""The processes that write a merge together: those of torchrun, or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol


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
    """How many processes torchrun has started, by the environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
