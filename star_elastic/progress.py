"""What long work tells its watcher while it runs; the command line draws bars and lines from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Told what a run does."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the stage are finished."""

    def say(self, line: str) -> None:
        """One line that the user should read, now and afterwards (a fact, a warning)."""


class Silent(Progress):
    """Progress that nobody watches: whatever it is told is ignored."""


def staged(progress: Progress, name: str) -> Callable[[int, int], None]:
    """Tells of work that counts (done, total): the stage begins with its first unit."""
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            progress.stage(name, total)
        begun = True
        progress.advance(done)

    return advance


def duration(seconds: float) -> str:
    """A time in words, as exact as one plans with: `8 s`, `3 min`, `1 h 20 min`."""
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"
