"""Dates and times in the names of checkpoints: they order a run, and are no training steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import product

_YEAR = r"(?P<year>20[1-3]\d)"
_MONTH, _DAY = r"(?P<month>0[1-9]|1[0-2])", r"(?P<day>0[1-9]|[12]\d|3[01])"
_BARE_MONTH, _BARE_DAY = r"(?P<month>0?[1-9]|1[0-2])", r"(?P<day>0?[1-9]|[12]\d|3[01])"
_BETWEEN, _AGAIN = r"(?P<between>[-_.:])", r"(?P=between)"
# With the day first before with the month first: where both are possible, most of the world means
# the former.
_DATES = (
    f"{_YEAR}{_BETWEEN}{_BARE_MONTH}{_AGAIN}{_BARE_DAY}",
    f"{_YEAR}{_MONTH}{_DAY}",
    f"{_DAY}{_BETWEEN}{_MONTH}{_AGAIN}{_YEAR}",
    f"{_MONTH}{_BETWEEN}{_DAY}{_AGAIN}{_YEAR}",
)
_CLOCKS = (
    r"(?P<hour>[01]?\d|2[0-3])(?P<mark>[-_.:])(?P<minute>[0-5]?\d)(?:(?P=mark)(?P<second>[0-5]?\d))?",
    r"(?P<hour>[01]\d|2[0-3])(?P<minute>[0-5]\d)(?P<second>[0-5]\d)?",
)
_ZONE = r"(?:[.,]\d+)?(?:z|[-+]\d\d:?\d\d)?"
_CLOCK_ALONE = (
    r"(?P<hour>[01]\d|2[0-3])(?P<mark>[-:])(?P<minute>[0-5]\d)(?P=mark)(?P<second>[0-5]\d)"
)
# Seconds and milliseconds since 1970, from 2008 on.
_SINCE_1970 = r"(?P<since>1[2-9]\d{8})(?P<thousandths>\d{3})?(?P<fraction>\.\d+)?"
# The longest first: a date by itself is a part of a date and a time.
_KINDS = tuple(
    re.compile(rf"(?<!\d){kind}(?!\d)")
    for kind in (
        *(f"{date}[-_ .t@]{{0,3}}{clock}{_ZONE}" for date, clock in product(_DATES, _CLOCKS)),
        *_DATES,
        _CLOCK_ALONE,
        _SINCE_1970,
    )
)
_FIELDS = ("year", "month", "day", "hour", "minute", "second")
_NUMBER = re.compile(r"\d+")
Times = tuple[float, ...]


def without_times(names: Sequence[str]) -> tuple[list[str], list[Times]]:
    """Names that differ in their digits alone, without the times in them, and these.

    Eight digits may be a date, and a number of steps as well: they are a time where they can be
    one in every name.

    Args:
        names: in lower case.

    Returns:
        The names with ``@`` in the place of times, and of each name its times in seconds, in the
        order in which they stand in it; empty where there are none.
    """
    for kind in _KINDS:
        times = [tuple(_seconds(kind, name)) for name in names]
        rest = [kind.sub("@", name) for name in names]
        alike = len({_NUMBER.sub("#", name) for name in rest}) == 1
        if alike and all(found and None not in found for found in times):
            return rest, [tuple(t for t in found if t is not None) for found in times]
    return list(names), [()] * len(names)


def _seconds(kind: re.Pattern[str], name: str) -> Iterator[float | None]:
    """Each time in the name, in seconds; None for the 31st of February."""
    for match in kind.finditer(name):
        fields = match.groupdict()
        if since := fields.get("since"):
            milliseconds = int(fields["thousandths"] or 0)
            yield float(f"{since}{fields['fraction'] or ''}") + milliseconds / 1000
            continue
        year, month, day, hour, minute, second = (int(fields.get(f) or 0) for f in _FIELDS)
        try:
            when = datetime(year or 1970, month or 1, day or 1, hour, minute, second, tzinfo=UTC)
        except ValueError:
            yield None
        else:
            yield when.timestamp()
