"""What commands, recipes and benchmarks share at a terminal: how results look, how programs end.

Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from typer import TyperException

from star_elastic.errors import (
    ConfigError,
    Interrupted,
    StarElasticError,
    is_out_of_memory,
    printable,
    reason,
)
from star_elastic.signals import is_first_rank, num_ranks
from star_elastic.tables import Table


def show(as_json: bool, content: object, *parts: Table | str) -> None:
    """Prints a result on stdout: its plain data as one JSON object, or the tables and lines that
    say the same to people."""
    if as_json:
        spells_all = (sys.stdout.encoding or "").lower().startswith("utf")
        parts = (json.dumps(content, indent=2, ensure_ascii=not spells_all),)
    for part in parts:
        if isinstance(part, str):
            print(part)
        else:
            print_table(part.title, part.columns, part.rows, text=part.num_text)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1
) -> None:
    """A table on stdout; the first `text` columns are text, the others numbers."""
    # As texts of rich's own: a path with brackets is no markup.
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number < text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    # A number cut short would be worse than a long line.
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    # By itself: the title of a table is broken where the table ends.
    console.print(Text(title), soft_wrap=True)
    console.print(table)


LOST = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF, errno.EDQUOT)
"""What an output says that takes nothing more."""


LONGEST_ERROR = 4_000
"""Characters of an error line, about: room for two long paths. What is longer keeps its two ends,
what is wrong and what to do."""


def run_program(program: Any, arguments: Sequence[str] | None) -> None:
    """Runs what typer made of an app. A mistake in the arguments is a ConfigError, not a box."""
    try:
        code = program.main(args=arguments, standalone_mode=False)
    except TyperException as error:
        said = " ".join(error.format_message().split())
        if not said:  # no arguments: the help was printed
            raise SystemExit(error.exit_code) from None
        context = getattr(error, "ctx", None)
        # Some of typer's errors do not know their command.
        command = [word for word in (arguments or sys.argv[1:])[:1] if not word.startswith("-")]
        path = context.command_path if context else " ".join(["star-elastic", *command])
        raise ConfigError(f"{said.rstrip('.')}; see {path} --help") from None
    if isinstance(code, int) and code:
        raise SystemExit(code)


@contextmanager
def at_the_command_line() -> Iterator[None]:
    """What every program of ours does around its work: libraries stay quiet, a mistake of the user
    or a stop ends in one line with its exit code, and so does an output that takes nothing more."""
    # Progress is ours to draw; which kernels are missing on this machine is no news to its owner.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when torch is loaded. Threads that spin while they wait for one another lose a whole time
    # slice where another process wants the core: a token then takes fifty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "transformers" in sys.modules:  # which read both when it was imported
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    _open_outputs()
    said, code = "", 0
    try:
        yield
        sys.stdout.flush()
    except StarElasticError as error:
        if os.environ.get("STAR_ELASTIC_TRACEBACK"):
            raise
        # A path may hold a line end, and a damaged file a value of any length.
        said, code = f"error: {printable(str(error), LONGEST_ERROR)}", 2
    except (Interrupted, KeyboardInterrupt) as error:  # the second has no words
        said, code = (str(error) or "stopped") if is_first_rank() else "", 1
    except OSError as error:
        # What is written to files has its own message; an error of an open stream names none.
        if error.filename is not None or error.errno not in LOST:
            raise
        said, code = f"error: the output cannot be written ({error.strerror}); make room", 1
        if error.errno == errno.EPIPE:  # whoever reads has enough
            said = ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "use smaller batches or shorter texts, a smaller dtype, or another device"
        said, code = f"error: memory ran out ({reason(error)}); {advice}", 2
    except SystemExit as error:
        if error.code and not isinstance(error.code, int):
            raise
        code = error.code or 0
    if said:  # by every rank: torchrun stops the others as soon as one has ended
        with suppress(OSError):
            print(said, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the interpreter would try again, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if num_ranks() > 1:
        # gloo's threads may abort a process that ends in the ordinary way, after all work is done.
        os._exit(code)
    if code:
        raise SystemExit(code)


def _open_outputs() -> None:
    """Lets both outputs take any text, and be there: what an encoding lacks is written as escapes,
    and what goes to an output that the caller has closed goes nowhere."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def command_line(script: str) -> str:
    """How a recipe or benchmark was started, without where its result goes."""
    given = re.sub(r"--out[= ]\S+", "", " ".join(sys.argv[1:]))
    return " ".join(["python", script, *given.split()])
