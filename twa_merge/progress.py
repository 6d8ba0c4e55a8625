"""What a long run tells its caller, so that the library itself never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """A stage begins; ``total`` steps of ``unit`` follow, None where the number is not known."""

    stage: str
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class Advanced:
    """The current stage got ``amount`` steps further."""

    amount: int = 1


@dataclass(frozen=True)
class Evaluated:
    """The fit evaluated its objective once more.

    Attributes:
        left: evaluations that the stage may still take with samples of this size, as far as it
            knows.
        growing: whether a larger sample may follow.
    """

    number: int
    loss: float
    best: float
    left: int | None = None
    growing: bool = False


@dataclass(frozen=True)
class Noted:
    """Something that the user should know, in one sentence."""

    text: str


Event = Started | Advanced | Evaluated | Noted
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Tells nobody."""
