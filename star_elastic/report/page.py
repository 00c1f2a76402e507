"""An evaluation as one page that stands alone: words, charts and tables; nothing is loaded.

`page.html` is the page as a template (jinja2), which escapes all values; here is what it shows.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from star_elastic.errors import CheckpointError
from star_elastic.evaluate.accuracy import Evaluation
from star_elastic.evaluate.budgets import coinciding, listed
from star_elastic.evaluate.run import FORMAT_VERSION, RESULT
from star_elastic.files.paths import is_file
from star_elastic.files.writing import write_text
from star_elastic.report import tables
from star_elastic.report.charts import COLOURS, UNITS, PlansChart, curves_chart, plot_plans
from star_elastic.report.findings import (
    COST_NAMES,
    GROUP_NAMES,
    TOLERANCE,
    Data,
    Finding,
    counted,
    headline,
    judge,
    percent,
)

PAGE, PLOT = "report.html", "pareto.png"
QUESTIONS = {
    "operations at equal accuracy": ("equal accuracy", "flops"),
    "measured time at equal accuracy": ("equal accuracy", "seconds"),
    "accuracy at equal operations": ("equal cost", "flops"),
    "accuracy at equal tokens": ("equal tokens", ""),
}
"""What the page asks first: the question and the cost of comparisons."""


def write_report(out: str | Path) -> tuple[Path, Path]:
    """Writes the page and the plot of the evaluation in a directory; returns both files.

    Raises CheckpointError if the directory holds no finished evaluation.
    """
    result = load_result(out)
    page, plot = Path(out) / PAGE, Path(out) / PLOT
    try:
        text = make_page(result)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError) as error:
        raise _damaged(Path(out) / RESULT, error) from None
    title = f"{_name(result)}: plans on the test problems"
    plot_plans(_tests(result), plot, title=title, reference=_alone(result))
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
        raise _damaged(file, error) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, this package reads {FORMAT_VERSION}; "
            "evaluate again"
        )
    return result


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({error!r}); make it anew with star-elastic eval")


def make_page(result: Data) -> str:
    """The page as HTML text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = resources.files("star_elastic.report") / "page.html"
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        result,
        result=result,
        tables=tables,
        name=_name(result),
        alone=_alone(result),
        merged="; ".join(coinciding(result["calibration"]["alike"])),
        cards=_cards(result),
        questions=list(QUESTIONS),
        by_group=_by_group(result),
        charts=_charts(result),
        comparisons=_comparisons(result),
        curves=[(_curves(policy), policy) for policy in result["calibration"]["policies"]],
        refused=_refused(result),
        tolerance=100 * TOLERANCE,
        settings_text=json.dumps(result["settings"], ensure_ascii=False),
        colours=COLOURS,
        counted=counted,
        listed=listed,
        percent=percent,
    )


def _name(result: Data) -> str:
    """A family by its directory; runs keep it in `run/elastic`."""
    parts = [part for part in Path(result["elastic"]).parts if part not in ("elastic", "run", "/")]
    return parts[-1] if parts else result["elastic"]


def _alone(result: Data) -> list[str]:
    """Labels of the largest size alone."""
    largest = [next(iter(result["sizes"]))]
    return [plan["label"] for plan in result["plans"] if plan["sizes"] == largest]


def _tests(result: Data) -> list[Evaluation]:
    return [Evaluation(**plan["test"]) for plan in result["plans"]]


def _cards(result: Data) -> dict[Finding, str]:
    """The answers that come first, each with the questions that it answers: of any plan, and at
    equal tokens of two sizes."""
    found: dict[Finding, list[str]] = {}
    for title, (question, cost) in QUESTIONS.items():
        groups = ("any",) if cost else ("pair", "policy")
        headlines = [headline(result, question, group, cost) for group in groups]
        there = [comparison for comparison in headlines if comparison]
        if there:
            found.setdefault(judge(max(there, key=_validation_gain)), []).append(title)
    return {finding: "; ".join(titles).capitalize() for finding, titles in found.items()}


def _validation_gain(comparison: Data) -> float:
    seen = comparison["validation"]
    return seen["accuracy"] - seen["reference_accuracy"] if seen else -1.0


def _by_group(result: Data) -> dict[str, list[tuple[str, str, str]]]:
    """By kind of plan and question the verdict: its tone, in short, and which plan it is of."""
    found = {}
    for group in ("smaller", "pair", "policy"):
        cells = [headline(result, question, group, cost) for question, cost in QUESTIONS.values()]
        if any(cells):
            found[GROUP_NAMES[group]] = [_verdict(comparison) for comparison in cells]
    return found


def _verdict(comparison: Data | None) -> tuple[str, str, str]:
    if comparison is None:
        return "", tables.NO_VALUE, ""
    finding, test, reference = judge(comparison), comparison["test"], comparison["reference"]
    quality = "accurate" if comparison["question"] == "equal accuracy" else "cheap"
    told = f"none as {quality} as {reference}"
    if test:
        ours, theirs = percent(test["accuracy"]), percent(test["reference_accuracy"])
        told = f"{comparison['chosen']}: {ours} against {theirs} of {reference}"
    return finding.tone, finding.short, told


def _charts(result: Data) -> list[str]:
    """Accuracy against both costs; what stands out are the plans of the verdicts."""
    found = [
        headline(result, question, group, "flops")
        for question in ("equal accuracy", "equal cost")
        for group in GROUP_NAMES
    ]
    named = [comparison["chosen"] for comparison in found if comparison]
    tests, alone = _tests(result), _alone(result)
    return [PlansChart(tests, cost, alone, named).svg() for cost in UNITS]


def _comparisons(result: Data) -> list[tuple[tables.Table, bool]]:
    """A table for every question and cost, and whether it stands open."""
    if not result["comparisons"]:
        return []
    main = [("equal accuracy", "flops"), ("equal cost", "flops"), ("equal tokens", "")]
    more = [(q, cost) for q, _ in main[:2] for cost in COST_NAMES if cost != "flops"]
    asked = [(pair, pair in main) for pair in (*main, *more)]
    return [(tables.comparison_table(result, *pair), is_open) for pair, is_open in asked]


def _curves(policy: Data) -> str:
    known = [dial for dial in policy["curve"] if dial["recall"] is not None]
    points: dict[str, list[tuple[float, float]]] = {"token": [], "line": []}
    for dial in known:
        points[dial["look"]].append((dial["token_share"], dial["recall"]))
    return curves_chart(points, f"{policy['small']} ~ {policy['large']}")


def _refused(result: Data) -> dict[str, list[str]]:
    """Pairs whose caches cannot be handed over, by the reason, each once."""
    found: dict[str, dict[str, None]] = {}
    for study in result["reuse"]:
        if "refused" in study:
            found.setdefault(study["refused"], {})[tables.pair_of(study)] = None
    return {reason: [*pairs] for reason, pairs in found.items()}
