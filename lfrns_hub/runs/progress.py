"""Phases of a call: a bar while one runs on a terminal, a line with its seconds when it ends, everywhere.

All bars of the package come from here, so that they look alike and never overwrite each other.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Self

from lfrns_hub.format.terminal import plain_console

if TYPE_CHECKING:
    from rich.progress import Progress, Task

NAME_WIDTH = 40  # characters of a line before its seconds
_ABOUT: ContextVar[str] = ContextVar("about", default="")


class _Screen:
    """What is shown on the terminal: the phases that run, the outer one first, and their bars."""

    def __init__(self) -> None:
        self.running: list[Phase] = []
        self.bars: Progress | None = None

    def open(self, phase: "Phase") -> None:
        """Show a phase."""
        self.running.append(phase)
        if self.bars is None and (bars := _make_bars()) is not None:
            self.bars = bars
            bars.start()
        if self.bars is not None:
            phase.task = self.bars.add_task(phase.name, total=phase.total, completed=phase.done, note="")

    def close(self, phase: "Phase") -> None:
        """Remove a phase, and with the last one the bars."""
        self.running.remove(phase)
        if self.bars is None:
            return
        self.bars.remove_task(phase.task)
        if not self.running:
            self.bars.stop()
            self.bars = None

    def print(self, line: str) -> None:
        """Print a line above the bars."""
        if self.bars is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bars.console.print(line, highlight=False, soft_wrap=True)


class Phase:
    """A phase that runs. One inside of another leaves no line.

    Args:
        name: Its name on the terminal, followed by what `about` says.
        total: Number of its steps, if it is known.
        done: Number of steps that an earlier run did.
        show: Whether it is shown.

    Attributes:
        seconds: Its duration, once it has ended.
    """

    def __init__(self, name: str, total: int | None = None, *, done: int = 0, show: bool = True):
        about = _ABOUT.get()
        self.name, self.total, self.done = f"{name}, {about}" if about else name, total, done
        self.task, self.seconds, self._note = None, 0.0, ""
        self._started, self._shown, self._is_inner = time.perf_counter(), show, bool(_SCREEN.running)
        if show:
            _SCREEN.open(self)

    def advance(self, count: int = 1) -> None:
        """Advance the bar."""
        if _SCREEN.bars is not None and self.task is not None:
            _SCREEN.bars.advance(self.task, count)

    def note(self, text: str) -> None:
        """Show a short text beside the bar, and in the end on the line."""
        self._note = text
        if _SCREEN.bars is not None and self.task is not None:
            _SCREEN.bars.update(self.task, note=text)

    def say(self, line: str) -> None:
        """Print a line, if the phase is shown."""
        if self._shown:
            _SCREEN.print(line)

    def end(self, *, failed: bool = False) -> None:
        """End the phase, with its line unless it has failed."""
        self.seconds = time.perf_counter() - self._started
        if not self._shown:
            return
        if not (failed or self._is_inner):
            _SCREEN.print(f"{self.name:<{NAME_WIDTH}} {self.seconds:>8.1f} s  {self._note}".rstrip())
        _SCREEN.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(failed=kind is not None)


_SCREEN = _Screen()


class Clock:
    """Phases that follow each other, and the seconds of each."""

    def __init__(self, show: bool):
        self.seconds: dict[str, float] = {}
        self._show, self._name = show, ""
        self._phase: Phase | None = None

    def step(self, name: str, total: int | None = None) -> None:
        """End the running phase and start another."""
        self.end()
        self._name, self._phase = name, Phase(name, total, show=self._show)

    def advance(self, count: int) -> None:
        """Advance the running phase's bar."""
        if self._phase:
            self._phase.advance(count)

    def end(self, *, failed: bool = False) -> None:
        """End the running phase."""
        if self._phase:
            self._phase.end(failed=failed)
            self.seconds[self._name] = round(self.seconds.get(self._name, 0.0) + self._phase.seconds, 2)
            self._phase = None


@contextmanager
def clocked(show: bool) -> Iterator[Clock]:
    """Time phases that follow each other, shown where `show`."""
    clock = Clock(show)
    try:
        yield clock
    except BaseException:
        clock.end(failed=True)
        raise
    clock.end()


@contextmanager
def about(what: str) -> Iterator[None]:
    """Name what the phases inside are about, where a run has several: the budget, or the model that trains."""
    token = _ABOUT.set(what)
    try:
        yield
    finally:
        _ABOUT.reset(token)


def _make_bars() -> "Progress | None":
    """Return bars for the terminal or the notebook; None where what is drawn cannot be erased: a pipe, a log."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn  # imported here: only bars need it
    from rich.table import Column
    from rich.text import Text

    console = plain_console(stderr=True)
    if not console.is_jupyter and (console.is_dumb_terminal or not sys.stderr.isatty()):
        return None

    class Told(ProgressColumn):
        """How many steps are done, the time that is left or, where the end is not known, has passed, and the note."""

        def render(self, task: "Task") -> Text:
            steps = "" if task.total is None else f"{int(task.completed)}/{int(task.total)}"
            seconds = task.elapsed if task.total is None else task.time_remaining
            left = "" if seconds is None else f"{int(seconds // 60)}:{int(seconds % 60):02}"
            left += " left" if left and steps else ""
            return Text(", ".join(filter(None, [steps, left, task.fields["note"]])))

    name = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=12),
        Told(table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        expand=True,
        redirect_stdout=sys.stdout.isatty(),
    )
