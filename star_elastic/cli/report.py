"""`star-elastic report`: what `eval` has found as a page."""

from pathlib import Path

from typer import Argument

from star_elastic.cli.options import AsJson
from star_elastic.cli.terminal import show
from star_elastic.files.paths import exists
from star_elastic.files.writing import require_folder


def report(
    out: Path = Argument(help="Directory that eval has written."), as_json: AsJson = False
) -> None:
    """What eval has found as one page to read, report.html, and a plot, pareto.png."""
    from star_elastic.report.page import write_report

    if exists(out):
        require_folder(out)
    page, plot = write_report(out)
    show(as_json, {"page": str(page), "plot": str(plot)}, f"{page}   {plot}")
