"""How options become an object: a decorator that adds them and hands over what they build.

A command then receives ``selection: Selection, fit: FitConfig, ...`` instead of forty parameters.
Defaults are read from the dataclasses, so that they are written down once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click

from .command import TopicOption

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


@dataclass(frozen=True)
class Opt:
    """One option: the parameter it fills, how it is written, and click's attributes for it."""

    name: str
    flag: str
    help: str
    attributes: dict[str, Any] = field(default_factory=dict)


def opt(name: str, flag: str, help: str, **attributes: Any) -> Opt:
    return Opt(name, flag, help, attributes)


def group(
    into: str,
    build: Callable[..., Any],
    topics: dict[str, list[Opt]],
    *,
    make: Callable[..., Any] | None = None,
) -> Decorator:
    """Adds options to a command and hands it ``build(**their values)`` as parameter ``into``.

    Args:
        build: a dataclass, whose defaults become the options', or a function.
        topics: heading in the help text → options below it.
        make: called instead of ``build``, where more than the values must be looked at.
    """
    options = [(topic, option) for topic, listed in topics.items() for option in listed]

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(**values: Any) -> Any:
            own = {option.name: values.pop(f"{into}_{option.name}") for _, option in options}
            return function(**values, **{into: (make or build)(**own)})

        for topic, option in reversed(options):
            attributes = {**_from_default(build, option.name), **option.attributes}
            # Two dataclasses may have fields of the same name.
            names = [*option.flag.split(), f"{into}_{option.name}"]
            wrapper = click.option(
                *names, cls=TopicOption, topic=topic, help=option.help, **attributes
            )(wrapper)
        return wrapper

    return decorate


def _from_default(build: Callable[..., Any], name: str) -> dict[str, Any]:
    default = getattr(build, name, None)
    if isinstance(default, bool):
        return {"is_flag": True, "default": default}
    return {"default": default, "show_default": True} if default is not None else {}


class NumberOrAuto(click.ParamType):
    """``auto`` → None, anything else a number."""

    name = "auto|number"

    def __init__(self, kind: type[int] | type[float] = float) -> None:
        self.kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None or str(value).lower() == "auto":
            return None
        try:
            return self.kind(value)
        except ValueError:
            self.fail(f"{value!r} is neither 'auto' nor a number.", param, ctx)


_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class Bytes(click.ParamType):
    """``80GB``, ``512 MiB`` or a plain number of bytes.

    Args:
        least: bytes; what is less must have lost its unit.
    """

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self._least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size such as 80GB or 512MiB.", param, ctx)
        base = 1024 if match[3] else 1000
        found = int(float(match[1]) * base ** _UNITS[match[2].lower()])
        if found < self._least:
            lost_its_unit = found > 0 and not match[2]
            remedy = f"say {match[1]}GB" if lost_its_unit else "give a size such as 80GB"
            self.fail(f"{value!r} is only {found} bytes; {remedy}.", param, ctx)
        return found
