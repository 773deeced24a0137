"""Lines of progress: what they count, and over what time."""

from __future__ import annotations

from itertools import count

import pytest

from infra import progress
from infra.progress import Progress


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds pass between any two looks at it."""
    ticks = count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


def test_what_was_done_before_is_counted_but_is_no_part_of_the_rate() -> None:
    lines: list[str] = []
    with Progress(lines.append).bar("policy", 100, "step", initial=80) as bar:
        bar.advance(10, loss=0.5)
    assert "90/100" in lines[0] and "1.00step/s" in lines[0] and "loss 0.5" in lines[0]
