"""An evaluation as one page that stands alone: words, charts and tables; nothing is loaded."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from star_elastic.errors import CheckpointError
from star_elastic.evaluate.accuracy import Evaluation
from star_elastic.evaluate.pareto import plot_pareto
from star_elastic.evaluate.run import FORMAT_VERSION, RESULT
from star_elastic.files.paths import is_file
from star_elastic.files.writing import write_text
from star_elastic.report import sections
from star_elastic.report.findings import Data
from star_elastic.report.page import alone_labels, name_of
from star_elastic.report.style import STYLE
from star_elastic.report.verdicts import summary

PAGE, PLOT = "report.html", "pareto.png"


def write_report(out: str | Path) -> tuple[Path, Path]:
    """Writes the page and the plot of the evaluation in a directory; returns both files.

    Raises CheckpointError if the directory holds no finished evaluation.
    """
    result = load_result(out)
    page, plot = Path(out) / PAGE, Path(out) / PLOT
    try:
        text = make_page(result)
        tests = [Evaluation(**plan["test"]) for plan in result["plans"]]
        alone = alone_labels(result)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{Path(out) / RESULT} is damaged ({error!r}); make it anew with star-elastic eval"
        ) from None
    title = f"{name_of(result)}: plans on the test problems"
    plot_pareto(tests, plot, title=title, reference=alone)
    write_text(page, text)
    return page, plot


def load_result(out: str | Path) -> Data:
    """What `evaluation.json` of a directory holds. Raises CheckpointError."""
    file = Path(out) / RESULT
    if not is_file(file):
        raise CheckpointError(f"{out} holds no {RESULT}; make one with star-elastic eval")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        version = result["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error!r}); make it anew with star-elastic eval"
        ) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, this package reads {FORMAT_VERSION}; "
            "evaluate again"
        )
    return result


def make_page(result: Data) -> str:
    """The page as HTML text."""
    parts = (
        summary(result),
        sections.charts(result),
        sections.comparisons(result),
        sections.who_answers(result),
        sections.difficulty(result),
        sections.reuse(result),
        sections.replies(result),
        sections.bandwidth(result),
        sections.all_plans(result),
        sections.method(result),
    )
    title = f"Elastic budget control: {name_of(result)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
