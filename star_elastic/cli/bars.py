"""How long work is shown on stderr: bars on a terminal, a plain line now and then where there is
none (nohup, batch systems, pipes). Either way Ctrl-C and SIGTERM end the work between two units.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from star_elastic.errors import Interrupted
from star_elastic.progress import Progress, duration
from star_elastic.signals import Stoppable, is_first_rank, stop_on_signals

STAGES = {
    "rank": "Rank units", "rank layers": "Rank layers", "train": "Train sizes", "slice": "Slice",
    "evaluate": "Evaluate", "latency": "Latency", "calibrate": "Calibrate", "reuse": "Hand over",
    "compare": "Compare", "quantize": "Quantise", "rows": "Read rows", "basis": "Find basis",
    "write": "Write", "judge": "Judge",
}  # fmt: skip
"""What the stages of long work are called in front of the user; others by their own name."""
FIRST_LINE, LINE_EVERY = 5.0, 30.0
"""Seconds after which a stage is first told of where there is no terminal, and between two lines.
Stages that end sooner have one line, when they end."""


@contextmanager
def progress_bars(stopped: str = "stopped") -> Iterator[Progress]:
    """Shows what long work tells the yielded object, while the block lasts; of several ranks only
    the first is shown.

    SIGINT and SIGTERM are answered at once; then `stage` and `advance` raise Interrupted with the
    message `stopped`. Where the block ends by an error, its message is the last that is said: the
    stage that was at hand says no more.
    """
    speaks = is_first_rank()
    bars = speaks and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    shown = OnTerminal() if bars else Lines(_print if speaks else lambda line: None)
    try:
        with stop_on_signals(shown.say) as stop:
            yield Stoppable(shown, stop, lambda: stopped)
    except Exception as error:
        if not isinstance(error, Interrupted):
            shown.drop()
        raise
    finally:
        shown.close()


def _print(line: str) -> None:
    with suppress(OSError, ValueError):  # whoever shows nothing may not end the work
        print(line, file=sys.stderr, flush=True)


class OnTerminal:
    """A bar per stage; the display begins with the first one."""

    def __init__(self) -> None:
        self.bars = RichProgress(
            TextColumn("{task.description:12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),  # names are the user's
            console=Console(stderr=True),
        )
        self._task: Any = None

    def stage(self, name: str, total: int) -> None:
        """See `Progress.stage`."""
        self.bars.start()
        self._task = self.bars.add_task(STAGES.get(name, name), total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        """See `Progress.advance`."""
        self.bars.update(self._task, completed=done, note=note)

    def say(self, line: str) -> None:
        """A line above the bars if there are any."""
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """The bars stand as they are."""
        if self._task is not None:
            self.bars.stop()

    drop = close


class Lines:
    """Tells of the current stage in plain lines: `first` seconds after it began, then `every` so
    many seconds, and when it ends. Lines come while a unit lasts, too: a thread writes them.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        first: float = FIRST_LINE,
        every: float = LINE_EVERY,
    ) -> None:
        self._write, self._first, self._every = write, first, every
        self._lock = threading.Lock()
        self._stage: _Stage | None = None

    def stage(self, name: str, total: int) -> None:
        """Begins a stage; the one before ends."""
        self.close()
        self._stage = _Stage(STAGES.get(name, name), total)
        threading.Thread(target=self._tell, args=(self._stage,), daemon=True).start()

    def advance(self, done: int, note: str = "") -> None:
        """Moves the stage on; the last unit ends it."""
        assert self._stage is not None, "advance comes after stage"
        self._stage.move(done, note)
        if done >= self._stage.total:
            self.close()

    def say(self, line: str) -> None:
        """A line of its own."""
        with self._lock:
            self._write(line)

    def close(self) -> None:
        """Writes the last line of the stage, unless it is over."""
        if self._stage is not None and not self._stage.over.is_set():
            self._stage.over.set()
            self.say(self._stage.last_line())

    def drop(self) -> None:
        """Ends the stage without a line."""
        if self._stage is not None:
            self._stage.over.set()

    def _tell(self, stage: _Stage) -> None:
        wait = self._first
        while not stage.over.wait(wait):
            self.say(stage.line())
            wait = self._every


class _Stage:
    """Where a stage stands, and whether it is `over`."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.over = label, total, threading.Event()
        self._begin = time.monotonic()
        self._done, self._note = 0, ""
        self._from: tuple[float, int] | None = None

    def move(self, done: int, note: str) -> None:
        """`done` units are finished now."""
        if self._from is None:  # work that goes on begins in the middle, and the first unit is slow
            self._from = time.monotonic(), done
        self._done, self._note = done, note

    def line(self) -> str:
        """How far the stage is, and how long the rest will take."""
        left = ""
        if self._from is not None and self._done > self._from[1]:
            pace = (time.monotonic() - self._from[0]) / (self._done - self._from[1])
            left = f"about {duration(pace * (self.total - self._done))} left"
        return self._joined(left)

    def last_line(self) -> str:
        """How far the stage came, and how long it took."""
        return self._joined(f"{duration(time.monotonic() - self._begin)} in all")

    def _joined(self, taken: str) -> str:
        share = self._done / self.total if self.total else 1.0
        reached = f"{self.label}  {self._done:,}/{self.total:,}, {share:.0%}"
        return ", ".join(filter(None, [reached, taken, self._note]))
