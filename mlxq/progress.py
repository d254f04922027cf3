"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then, both on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

LINE_SECONDS = 30.0  # between two lines; work that takes less has none


class Progress:
    """What the work tells.

    what    in a word or two            total   of its units; 0 while it is not known
    """

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0

    def expect(self, total: int) -> None:
        """The total is known now."""
        self.total = total

    def describe(self, what: str) -> None:
        """Something else is worked on."""
        self.what = what

    def advance(self, count: int) -> None:
        """So many units more are done."""
        self.done += count


class _Lines(Progress):
    def __init__(self, what: str, total: int, unit: str, size: float):
        super().__init__(what, total)
        self.unit, self.size = unit, size
        self.begin = self.told = monotonic()

    def advance(self, count: int) -> None:
        super().advance(count)
        now = monotonic()
        if now - self.told < LINE_SECONDS or not 0 < self.done <= self.total:
            return
        self.told, elapsed = now, max(now - self.begin, 1e-9)
        left = elapsed * (self.total - self.done) / self.done
        rate = f"{self.done / self.size / elapsed:.3g} {self.unit}/s"
        share = f"{100 * self.done / self.total:.0f} %"
        print(f"mlxq: {self.what}: {share}, {rate}, about {left:.0f} s left", file=sys.stderr, flush=True)


class _Bar(Progress):
    def __init__(self, what: str, total: int, bar):
        super().__init__(what, total)
        self.bar, self.task = bar, bar.add_task(what, total=total or None)

    def expect(self, total: int) -> None:
        super().expect(total)
        self.bar.update(self.task, total=total)

    def describe(self, what: str) -> None:
        super().describe(what)
        self.bar.update(self.task, description=what)

    def advance(self, count: int) -> None:
        super().advance(count)
        self.bar.advance(self.task, count)


@contextmanager
def progress(what: str, total: int = 0, unit: str = "M weights", size: float = 1e6) -> Iterator[Progress]:
    """Progress of work in a `with` block; rates are told in `unit`s of `size` each."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task):
            return Text(f"{(task.speed or 0) / size:.1f} {unit}/s")

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total, unit, size)
        return
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), Rate("")]
    with Rich(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield _Bar(what, total, bar)
