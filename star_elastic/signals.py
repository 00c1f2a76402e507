"""SIGINT and SIGTERM in long work: the first asks it to stop soon, the second ends it at once.

Python runs its signal handlers between two instructions of its main thread, and one call into a
tensor library may last many seconds. So a thread of its own waits at the pipe into which the
interpreter writes every signal as it comes: it answers at once, whatever the main thread does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from star_elastic.errors import Interrupted
from star_elastic.progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "stopping as soon as this step is done; once more to stop at once"
Handler = Callable[[int, Any], object]
SHOW_CURSOR = b"\x1b[?25h"


class Stop:
    """Whether the user has asked for long work to stop. Workers look between two steps."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Asks for the work to stop, as a signal does."""
        self._asked.set()


class Stoppable:
    """Progress that ends the work it is told of: once `stop` is asked for, `stage` and `advance`
    raise Interrupted, saying what `how_it_ended` returns. What is told goes on to `progress`.

    The last unit of a stage raises nothing: what the stage was for can then be kept.
    """

    def __init__(self, progress: Progress, stop: Stop, how_it_ended: Callable[[], str]):
        self._progress, self._stop, self._how_it_ended = progress, stop, how_it_ended
        self._total = 0

    def check(self) -> None:
        """Raises Interrupted if the work is to stop."""
        if self._stop.is_asked:
            raise Interrupted(self._how_it_ended())

    def stage(self, name: str, total: int) -> None:
        """See `Progress.stage`. Raises Interrupted."""
        self.check()
        self._total = total
        self._progress.stage(name, total)

    def advance(self, done: int, note: str = "") -> None:
        """See `Progress.advance`. Raises Interrupted."""
        self._progress.advance(done, note)
        if done < self._total:
            self.check()

    def say(self, line: str) -> None:
        """See `Progress.say`."""
        self._progress.say(line)


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[Stop]:
    """A `Stop` that SIGINT and SIGTERM ask for while the block runs.

    The first signal is answered at once by `say`, from another thread. A second one ends the
    process as it would have without us: what is written under a temporary name stays behind, and
    nothing else. Blocks may be nested; the inner one gets the signals. Outside the main thread,
    which alone may handle signals, nothing is ever asked for.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading, stop, say), daemon=True)
    watcher.start()
    # Only for signals that have a handler in Python does the interpreter write to the pipe. This
    # one is sooner where the main thread is not busy.
    with _handling(dict.fromkeys(SIGNALS, lambda *_: stop.ask())):
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield stop
        finally:
            signal.set_wakeup_fd(before)
            os.close(writing)
            watcher.join()
            os.close(reading)


def is_first_rank() -> bool:
    """Whether this process speaks, of all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def num_ranks() -> int:
    """How many processes torchrun started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ending_on_signals() -> AbstractContextManager[None]:
    """While the block runs, SIGINT and SIGTERM end the process at once, in one line with exit code
    1, as long as nothing in it asks to be told of them in another way (`stop_on_signals`,
    `interrupting`). A signal that is ignored (nohup, jobs in the background) stays ignored."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return _handling(dict.fromkeys(heard, end_quietly))


def interrupting() -> AbstractContextManager[None]:
    """SIGINT raises KeyboardInterrupt while the block runs, for work that ends by it."""
    return _handling({signal.SIGINT: signal.default_int_handler})


def end_quietly(*_: object) -> None:
    """Ends the process with one line. What is under a temporary name stays there."""
    if is_first_rank():
        with suppress(OSError):
            os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + b"stopped\n")
    os._exit(1)


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Signals have these handlers while the block runs, then again those that they had. Outside the
    main thread, which alone may set any, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(reading: int, stop: Stop, say: Callable[[str], None]) -> None:
    """Answers the signals whose numbers come through a pipe, until its other end is closed."""
    answered = False
    while number := os.read(reading, 1):
        if number[0] not in SIGNALS:
            continue
        if answered:
            _end(number[0])
        stop.ask()
        say(STOPPING)
        answered = True


def _end(number: int) -> None:
    """Ends the process by a signal's default action."""
    if sys.stderr.isatty():
        os.write(2, SHOW_CURSOR)  # bars hide it
    # The main thread, which alone may call signal.signal, may be busy for long.
    set_handler = ctypes.pythonapi.PyOS_setsig
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(number, None)
    os.kill(os.getpid(), number)
