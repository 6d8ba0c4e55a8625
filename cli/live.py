"""Live progress: one line that moves in a terminal, a few plain lines everywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.text import Text

from twa_merge.progress import Advanced, Evaluated, Event, Noted, Started

from .console import plain
from .figures import amount, duration, loss

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

# Seconds between two lines where lines cannot be redrawn; the pause grows with the run, so that an
# hour makes some fifty lines.
_PAUSE, _GROWTH = 10.0, 0.1
_BAR, _SHORTEST_BAR = 24, 6
# Share of the newest evaluation in how long one takes.
_NEWEST = 0.3
# Counts beyond this are shortened.
_LARGE = 99_999


class Stage:
    """How far one stage has come."""

    def __init__(self, event: Started) -> None:
        self.name = plain(event.stage)
        self.total = event.total
        self.unit = plain(event.unit)
        self.done = 0
        self.evaluated: Evaluated | None = None
        self.began = time.monotonic()
        # A fit that counts its evaluations reports each of them once, as an evaluation.
        self._by_evaluation = "evaluation" in event.unit
        self._before: int | None = None
        # Seconds an evaluation takes, of late: samples grow.
        self._pace = 0.0
        self._last = self.began

    def take(self, event: Advanced | Evaluated) -> None:
        if isinstance(event, Advanced):
            if not self._by_evaluation:
                self.done += event.amount
            return
        self.evaluated = event
        now = time.monotonic()
        took, self._last = now - self._last, now
        self._pace = took if self.done == 0 else self._pace + _NEWEST * (took - self._pace)
        if self._by_evaluation:
            if self._before is None:
                self._before = event.number - 1
            self.done = event.number - self._before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def share(self) -> float | None:
        if self.evaluated is not None and self.evaluated.left is not None:
            return self.done / max(1, self.done + self.evaluated.left)
        return min(1.0, self.done / self.total) if self.total else None

    def figures(self, *, finished: bool = False) -> list[str]:
        """What is known, in the order of interest."""
        figures = []
        if self.total:
            done, total = (
                amount(n) if self.total > _LARGE else str(n) for n in (self.done, self.total)
            )
            figures.append(f"{done}/{total} {self.unit}".rstrip())
        elif self.done:
            figures.append(f"{self.done} {self.unit}".rstrip())
        if self.evaluated is not None:
            # The best is of one fit, and a stage makes many: at its end it is that of the last.
            least, found = (
                ("least ", self.evaluated.best) if finished else ("", self.evaluated.loss)
            )
            figures.append(f"{least}loss + ridge {loss(found)}")
        if not finished:
            figures += self._time_left()
        return figures

    def _time_left(self) -> list[str]:
        if self.evaluated is not None and self.evaluated.left:
            sample = " with this sample" if self.evaluated.growing else ""
            return [f"up to about {duration(self._pace * self.evaluated.left)} left{sample}"]
        if self.total and self.share and self.done:
            return [f"{duration(self.seconds * (1 / self.share - 1))} left"]
        return []

    def line(self) -> str:
        return "  ".join([self.name, *self.figures()])

    def last_line(self) -> str:
        return "  ".join([self.name, *self.figures(finished=True), duration(self.seconds)])


class Narrator:
    """Receives the library's events. Subclasses decide how to show them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage: Stage | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Noted):
            self._say(Text.assemble(("note: ", "yellow"), plain(event.text)))
        elif isinstance(event, Started):
            self._finish()
            self.stage = Stage(event)
            self._begin(self.stage)
        elif self.stage is not None:
            self.stage.take(event)
            self._update(self.stage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        self.stage = None

    def _finish(self) -> None:
        if self.stage is not None:
            self._say(Text(self.stage.last_line(), "dim"))
            self.stage = None

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)

    def _begin(self, stage: Stage) -> None: ...

    def _update(self, stage: Stage) -> None: ...


class LineNarrator(Narrator):
    """For logs, pipes and dumb terminals: a line when a stage starts and ends, some between."""

    def _begin(self, stage: Stage) -> None:
        self._next = stage.began + _PAUSE

    def _update(self, stage: Stage) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + max(_PAUSE, _GROWTH * stage.seconds)
            self._say(Text(stage.line()))


class TerminalNarrator(Narrator):
    """For terminals: the current stage is redrawn in place, the finished ones stay above it."""

    def __enter__(self) -> Self:
        from rich.live import Live

        self._live: Live = Live(
            console=self.console,
            get_renderable=self._draw,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=True,
        )
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._live.stop()

    def _draw(self) -> Text:
        stage = self.stage
        if stage is None:
            return Text("")
        text = Text(stage.name + "  ", no_wrap=True, overflow="ellipsis")
        said = "  ".join(stage.figures() or [duration(stage.seconds)])
        if stage.share is not None:
            full, empty = ("#", "-") if self.console.options.ascii_only else ("━", "─")
            # What is said is worth more than the bar.
            bar = min(_BAR, self.console.width - len(text) - len(said) - 2)
            if bar >= _SHORTEST_BAR:
                cells = round(stage.share * bar)
                text.append(full * cells, "cyan").append(empty * (bar - cells) + "  ", "dim")
        return text.append(said)


def live_progress(console: Console) -> Narrator:
    """The narrator that suits where ``console`` writes to."""
    # FORCE_COLOR makes rich take a log for a terminal: colours are fine there, redrawing is not.
    redraws = console.is_interactive and not console.is_dumb_terminal and console.file.isatty()
    return (TerminalNarrator if redraws and not console.quiet else LineNarrator)(console)
