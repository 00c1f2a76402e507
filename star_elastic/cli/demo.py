"""`star-elastic demo`: a recipe run to its report; longer recipes print theirs alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Option

from star_elastic.cli.bars import progress_bars
from star_elastic.cli.options import AsJson
from star_elastic.cli.terminal import show
from star_elastic.report.findings import with_interval
from star_elastic.tables import Table

if TYPE_CHECKING:
    from star_elastic.demo import Recipe


def demo(
    out: Path = Option(Path("runs/demo"), help="New directory for everything the demo makes."),
    as_json: AsJson = False,
) -> None:
    """The whole road on the bundled parent: rank, train three sizes, slice, evaluate, plot."""
    from star_elastic.demo import DEMO

    run_and_show(DEMO, out, as_json)


def run_and_show(recipe: Recipe, out: Path, as_json: bool) -> None:
    """Runs a recipe with progress bars and prints its report."""
    from star_elastic.demo import run_recipe

    with progress_bars(f"stopped; the same command goes on where {out} stands") as progress:
        report = run_recipe(recipe, out, progress)
    files = f"report: {out / 'report.json'}   plot: {out / 'pareto.png'}"
    show(as_json, report, *report_parts(report), f"{files}   family: {out}/run/elastic")


def report_parts(report: Mapping[str, Any]) -> Iterator[Table]:
    """The report's two tables: the sizes, and the ways to think and answer."""
    parent = report["parent"]
    rows = [
        ["parent", _millions(parent["active"]), _millions(parent["total"]), "", "",
         with_interval(parent), "", ""]
    ]  # fmt: skip
    for name, size in report["sizes"].items():
        untrained = size["untrained_accuracy"]
        rows.append([
            name,
            f"{_millions(size['active'])} {size['active_share']:.1%}",
            f"{_millions(size['total'])} {size['total_share']:.1%}",
            f"{size['budget_miss']:.2%}",
            f"{size['kl_to_parent']:.4f}",
            with_interval(size),
            f"{size['share_of_parent']:.1%}",
            "" if untrained is None else f"{untrained:.1%}",
        ])  # fmt: skip
    columns = ["size", "active params", "total params", "off budget", "KL",
               "accuracy (95%)", "of parent", "untrained"]  # fmt: skip
    yield Table("Sizes: thinking, held-out problems", columns, rows)
    rows = [
        [e["label"], f"{e['accuracy']:.1%}", f"{1e3 * e['seconds']:.1f}",
         f"{e['flops'] / 1e6:,.0f}", f"{e['bytes_per_token'] / 1e6:.2f}",
         f"{e['thinking_tokens']:.0f}", f"{e['cut_share']:.0%}"]
        for e in sorted(report["evaluations"], key=lambda e: e["flops"])
    ]  # fmt: skip
    columns = ["thinks>answers@budget", "accuracy", "ms/problem", "MFLOP/problem", "MB/token",
               "thinking tokens", "cut short"]  # fmt: skip
    yield Table("Ways to think and answer, cheapest first", columns, rows)


def _millions(count: float) -> str:
    """`1.26M`."""
    return f"{count / 1e6:.2f}M"
