"""What commands, recipes and benchmarks share at a terminal: tables, reports, how they end.

Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Abort, TyperException

from star_elastic.cli.bars import Bars
from star_elastic.errors import (
    ConfigError,
    Interrupted,
    StarElasticError,
    is_out_of_memory,
    printable,
    reason,
)
from star_elastic.generate.phases import THINKING, Generation, Token
from star_elastic.report.findings import with_interval
from star_elastic.signals import interrupting, is_first_rank, num_ranks


def print_json(content: object) -> None:
    """One JSON object on stdout."""
    spells_all = (sys.stdout.encoding or "").lower().startswith("utf")
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=not spells_all) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1
) -> None:
    """A table on stdout; the first `text` columns are text, the others numbers."""
    # As texts of rich's own: a path with brackets is no markup.
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number < text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    # A number cut short would be worse than a long line.
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)


def run_and_show(recipe: Any, out: Path, as_json: bool, run_recipe: Any) -> None:
    """Runs a recipe with progress bars and prints its report."""
    with Bars(f"stopped; the same command goes on where {out} stands") as bars:
        report = run_recipe(recipe, out, bars)
    if as_json:
        print_json(report)
        return
    show_report(report)
    print(f"report: {out / 'report.json'}   plot: {out / 'pareto.png'}   family: {out}/run/elastic")


def show_report(report: Mapping[str, Any]) -> None:
    """The report's two tables: the sizes, and the ways to think and answer."""
    parent = report["parent"]
    rows = [
        ["parent", millions(parent["active"]), millions(parent["total"]), "", "",
         with_interval(parent), "", ""]
    ]  # fmt: skip
    for name, size in report["sizes"].items():
        untrained = size["untrained_accuracy"]
        rows.append([
            name,
            f"{millions(size['active'])} {size['active_share']:.1%}",
            f"{millions(size['total'])} {size['total_share']:.1%}",
            f"{size['budget_miss']:.2%}",
            f"{size['kl_to_parent']:.4f}",
            with_interval(size),
            f"{size['share_of_parent']:.1%}",
            "" if untrained is None else f"{untrained:.1%}",
        ])  # fmt: skip
    columns = ["size", "active params", "total params", "off budget", "KL",
               "accuracy (95%)", "of parent", "untrained"]  # fmt: skip
    print_table("Sizes: thinking, held-out problems", columns, rows)
    plans = [
        [e["label"], f"{e['accuracy']:.1%}", f"{1e3 * e['seconds']:.1f}",
         f"{e['flops'] / 1e6:,.0f}", f"{e['bytes_per_token'] / 1e6:.2f}",
         f"{e['thinking_tokens']:.0f}", f"{e['cut_share']:.0%}"]
        for e in sorted(report["evaluations"], key=lambda e: e["flops"])
    ]  # fmt: skip
    columns = ["thinks>answers@budget", "accuracy", "ms/problem", "MFLOP/problem", "MB/token",
               "thinking tokens", "cut short"]  # fmt: skip
    print_table("Ways to think and answer, cheapest first", columns, plans)


def print_verdict(verdict: Mapping[str, Any]) -> None:
    """A verdict (`train/verdict.py`) on stdout: a table of the sizes, a sample, what to know, and
    what to type next."""
    untrained = any(size["untrained"] for size in verdict["sizes"].values())
    origin = any(size["widths_from"] for size in verdict["sizes"].values())
    rows = []
    for name, size in verdict["sizes"].items():
        cut = size["untrained"]
        rows.append([
            name, f"{size['kl']:.4f}", f"{size['equal_top1']:.1%}",
            _perplexity(size["perplexity"]), _perplexity(size["reference_perplexity"]),
            *([_perplexity(cut["perplexity"]) if cut else ""] if untrained else []),
            *([size["widths_from"]] if origin else []),
        ])  # fmt: skip
    columns = ["size", "KL, nats/token", "equal top-1", "perplexity", f"of {verdict['reference']}"]
    columns += ["same cut, untrained"] if untrained else []
    columns += ["widths from"] if origin else []
    title = f"{verdict['held_out_rows']} held-out rows, {verdict['tokens']:,} tokens"
    print_table(title, columns, rows)
    sample = verdict["sample"]
    print(f"prompt: {_one_line(sample['prompt'])}")
    print(f"  {verdict['reference']}: {_one_line(sample['reference'])}")
    for name, text in sample["sizes"].items():
        print(f"  {name}: {_one_line(text)}")
    for remark in verdict["remarks"]:
        print(f"note: {remark}")
    print(f"next: {verdict['next']}")


def _perplexity(value: float | None) -> str:
    return "infinite" if value is None else f"{value:,.4g}"


LINE = 200
"""Characters of a sample's text that are shown."""


def _one_line(text: str) -> str:
    """A text on one line, cut where it is long."""
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= LINE else f"{shown[:LINE]}…"


def millions(count: float) -> str:
    """`1.26M`."""
    return f"{count / 1e6:.2f}M"


def _say(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    """Text on stdout, verbatim; with a style on a terminal, where control codes are left out."""
    if console.is_terminal:
        console.out(text, style=style, highlight=False, end=end)
    else:
        sys.stdout.write(text + end)


LOST = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF, errno.EDQUOT)
"""What an output says that takes nothing more."""
BY_SIGINT = 130
"""How typer ends on Ctrl-C."""
COLOURS = ("cyan", "yellow", "green", "magenta")


def print_stream(
    events: Iterator[Token | Generation], console: Console, sizes: Sequence[str]
) -> Generation:
    """Prints tokens as they come, the trace dim, in a colour for each size; returns the result.

    Where some were printed as the answer and turned out to be thinking, the answer comes once more
    by itself. Ctrl-C ends the line at hand.
    """
    try:
        with interrupting():
            return _print_events(events, console, sizes)
    except KeyboardInterrupt:
        _say(console, "")
        raise Interrupted("stopped; what is written above is not all") from None


def _print_events(
    events: Iterator[Token | Generation], console: Console, sizes: Sequence[str]
) -> Generation:
    texts: list[str] = []
    is_recalled = False
    for event in events:
        if isinstance(event, Generation):
            _say(console, "")
            if is_recalled:
                _say(console, "[a part of this was still thinking; the answer is:]", "dim")
                _say(console, event.answer)
            return event
        colour = COLOURS[sizes.index(event.size) % len(COLOURS)] if event.size else "white"
        style = f"dim {colour}" if event.phase == THINKING else colour
        _say(console, event.text, style, end="")
        sys.stdout.flush()
        is_recalled |= any(texts[len(texts) - event.recalled :])
        texts.append(event.text)
    raise AssertionError("a stream ends with its result")


def print_generation(console: Console, result: Generation, *, streamed: bool = False) -> None:
    """A result's text as it was written (unless it was streamed), its trace dim, and a line for
    each phase."""
    if not streamed:
        text = result.text.rstrip()
        if text.endswith(result.answer):
            _say(console, text.removesuffix(result.answer), "dim", end="")
        else:  # some thinking comes last, or stands between parts of the answer
            _say(console, result.thinking, "dim")
        _say(console, result.answer)
    for phase in result.phases:
        shares = ", ".join(f"{name} {count}" for name, count in phase.by_size.items())
        _say(
            console,
            f"[{phase.name}: {phase.size}, {phase.tokens} tokens ({shares}), "
            f"{phase.seconds:.2f} s, {phase.ended}]",
            "dim",
        )


def run_program(program: Any, arguments: Sequence[str] | None) -> None:
    """Runs what typer made of an app. A mistake in the arguments is a ConfigError, not a box."""
    try:
        code = program.main(args=arguments, standalone_mode=False)
    except TyperException as error:
        said = " ".join(error.format_message().split())
        if not said:  # no arguments: the help was printed
            raise SystemExit(error.exit_code) from None
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "star-elastic"
        raise ConfigError(f"{said.rstrip('.')}; see {path} --help") from None
    except Abort:  # the end of an input
        raise Interrupted("stopped") from None
    if isinstance(code, int) and code:
        raise SystemExit(code)


@contextmanager
def at_the_command_line() -> Iterator[None]:
    """What every program of ours does around its work: libraries stay quiet, a mistake of the user
    or a stop ends in one line with its exit code, and so does an output that takes nothing more."""
    # Progress is ours to draw; which kernels are missing on this machine is no news to its owner.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
        said, code = f"error: {printable(str(error), sys.maxsize)}", 2  # a path may hold a line end
    except Interrupted as error:
        said, code = str(error) if is_first_rank() else "", 1
    except KeyboardInterrupt:  # before long work began
        said, code = "stopped", 1
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
        said, code = ("stopped", 1) if error.code == BY_SIGINT else ("", error.code or 0)
    if said:  # by every rank: torchrun stops the others as soon as one has ended
        with suppress(OSError):
            print(said, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        _empty(stream)
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


def _empty(stream: Any) -> None:
    """Writes what is left in an output, or, where it takes nothing more, nowhere: so that the
    interpreter does not try when it ends."""
    try:
        stream.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def command_line(script: str) -> str:
    """How a recipe or benchmark was started, without where its result goes."""
    given = iter(sys.argv[1:])
    kept = []
    for argument in given:
        if argument == "--out":
            next(given, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return " ".join(["python", script, *kept])
