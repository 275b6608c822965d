"""Time of each step, and its progress bar on the terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Clock:
    """Seconds of each step, and its line on the terminal."""

    def __init__(self, bars: "Progress | None"):
        self.bars, self.task = bars, None
        self.seconds: dict[str, float] = {}
        self.name, self.started = "", time.perf_counter()

    def step(self, name: str, total: int = 1) -> None:
        """End the running step and start another."""
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + now - self.started, 2)
        self.name, self.started = name, now
        if self.bars:
            if self.task is not None:
                self.bars.update(self.task, completed=self.bars.tasks[self.task].total)
            self.task = self.bars.add_task(name, total=total) if name else None

    def advance(self, count: int) -> None:
        """Advance the running step's bar."""
        if self.bars and self.task is not None:
            self.bars.advance(self.task, count)


@contextmanager
def clocked(show: bool) -> Iterator[Clock]:
    """Time the steps, with bars where `show`."""
    bars = None
    if show:
        from rich.console import Console  # imported here: rich is needed only for bars
        from rich.progress import Progress

        bars = Progress(console=Console(stderr=True))
        bars.start()
    clock = Clock(bars)
    try:
        yield clock
        clock.step("")
    finally:
        if bars:
            bars.stop()
