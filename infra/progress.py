"""Progress of long work, as lines: they read the same in a terminal, in Dagster's log and in a file.

with Progress(print).bar("policy", total=120, unit="step") as bar:
    bar.advance(1, reward=0.61)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

EVERY_S = 5.0  # ours: at most one line per bar in this many seconds


class Bar:
    """One running count with rate and ETA. Made by `Progress.bar`."""

    def __init__(self, sink: Callable[[str], None], label: str, total: int, unit: str, initial: int):
        self.sink, self.label, self.total, self.unit, self.initial = sink, label, total, unit, initial
        self.count = initial
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1, **figures: float) -> None:
        """Add `count` finished units; `figures` are shown behind the rate."""
        self.count += count
        now = time.monotonic()
        if self.count < self.total and now - self._last < EVERY_S:
            return
        self._last = now
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.sink(
            tqdm.format_meter(
                self.count,
                self.total,
                now - self._start,
                ncols=100,
                prefix=self.label,
                unit=self.unit,
                ascii=True,
                postfix=shown,
                initial=self.initial,
            )
        )


class Progress:
    """Where progress goes: `sink` takes one line of text (print, Dagster's `context.log.info`, ...)."""

    def __init__(self, sink: Callable[[str], None] | None = None):
        self.sink = sink or (lambda line: None)

    def say(self, line: str) -> None:
        self.sink(line)

    @contextmanager
    def bar(self, label: str, total: int, unit: str = "it", initial: int = 0) -> Iterator[Bar]:
        """A count to `total`. `initial` units were done before: they are counted, but are no part of the rate."""
        yield Bar(self.sink, label, total, unit, initial)
