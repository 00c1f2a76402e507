"""Those who are told what a run does, and remember it or act on it."""

from __future__ import annotations

import os
import signal

from star_elastic.progress import Silent


class Said(Silent):
    """The lines that are said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Stages(Silent):
    """The stages that a run goes through."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.names.append(name)


class KillIn(Said):
    """Sends this process a signal, once, when a stage has done some units."""

    def __init__(self, stage: str, done: int = 1):
        super().__init__()
        self.wanted, self.done, self.now = stage, done, ""

    def stage(self, name: str, total: int) -> None:
        self.now = name

    def advance(self, done: int, note: str = "") -> None:
        if self.now == self.wanted and done >= self.done > 0:
            self.done = 0
            os.kill(os.getpid(), signal.SIGTERM)
