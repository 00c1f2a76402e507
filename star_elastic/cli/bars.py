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
        self.bars.start()
        self._task = self.bars.add_task(STAGES.get(name, name), total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
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
        self._over = threading.Event()
        self.drop()

    def stage(self, name: str, total: int) -> None:
        """Begins a stage; the one before ends."""
        self.close()
        self._label, self._total, self._done, self._note = STAGES.get(name, name), total, 0, ""
        self._begin, self._from = time.monotonic(), None
        self._over = threading.Event()
        threading.Thread(target=self._tell, args=(self._over,), daemon=True).start()

    def advance(self, done: int, note: str = "") -> None:
        """Moves the stage on; the last unit ends it."""
        if self._from is None:  # work that goes on begins in the middle, and the first unit is slow
            self._from = time.monotonic(), done
        self._done, self._note = done, note
        if done >= self._total:
            self.close()

    def say(self, line: str) -> None:
        """A line of its own."""
        with self._lock:
            self._write(line)

    def close(self) -> None:
        """Writes the last line of the stage: how far it came, and how long it took."""
        if not self._over.is_set():
            self._over.set()
            self._say_with(f"{duration(time.monotonic() - self._begin)} in all")

    def drop(self) -> None:
        """Ends the stage without a line."""
        self._over.set()

    def _tell(self, over: threading.Event) -> None:
        """Until the stage is over: how far it is, and how long the rest will take."""
        wait = self._first
        while not over.wait(wait):
            left = ""
            if self._from is not None and self._done > self._from[1]:
                pace = (time.monotonic() - self._from[0]) / (self._done - self._from[1])
                left = f"about {duration(pace * (self._total - self._done))} left"
            self._say_with(left)
            wait = self._every

    def _say_with(self, time_: str) -> None:
        share = self._done / self._total if self._total else 1.0
        reached = f"{self._label}  {self._done:,}/{self._total:,}, {share:.0%}"
        self.say(", ".join(filter(None, [reached, time_, self._note])))
