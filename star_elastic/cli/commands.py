"""All commands put together, as `program`. Each is a file of this room, named after it.

Results go to stdout (one JSON object with --json), progress to stderr. Exit codes: 0 done, 1 a
check failed or the user stopped the run, 2 the user's mistake, told in one line with nothing
written. Heavy imports happen inside commands, so that --help is quick.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from star_elastic.cli.adopt import adopt
from star_elastic.cli.check import check
from star_elastic.cli.config import config_reference
from star_elastic.cli.count import count
from star_elastic.cli.demo import demo
from star_elastic.cli.eval import evaluate
from star_elastic.cli.generate import generate
from star_elastic.cli.latency import latency
from star_elastic.cli.plan import plan
from star_elastic.cli.quantize import quantize
from star_elastic.cli.rank import rank
from star_elastic.cli.report import report
from star_elastic.cli.sizes import sizes
from star_elastic.cli.slice import slice_size
from star_elastic.cli.train import train
from star_elastic.errors import ConfigError


class Command(TyperCommand):
    """A command that takes no empty value: what a shell makes of a variable that is not set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See typer. Raises ConfigError for an empty value, before `Path("")` becomes `.`"""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.get_params(ctx):
            value = given.get(parameter.name or "")
            if "" in (value if isinstance(value, list) else [value]):
                name = parameter.opts[0]
                shown = name if name.startswith("-") else name.upper()
                advice = "" if parameter.required else ", or leave it out"
                raise ConfigError(f"{shown} is empty; give it a value{advice}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    help="One reasoning model, many nested sizes inside a single checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, command in {
    "demo": demo, "count": count, "plan": plan, "rank": rank, "latency": latency, "train": train,
    "config": config_reference, "sizes": sizes, "slice": slice_size, "quantize": quantize,
    "adopt": adopt, "check": check, "generate": generate, "eval": evaluate, "report": report,
}.items():  # fmt: skip
    app.command(name, cls=Command)(command)
program = typer.main.get_command(app)
"""All of it, built once however often a process runs it: that takes longer than many a command."""
