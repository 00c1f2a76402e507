"""An evaluation as one page that stands alone: words, charts and tables; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from star_elastic.checkpoint import write_text
from star_elastic.errors import CheckpointError
from star_elastic.evaluate.accuracy import Evaluation
from star_elastic.evaluate.chart import Point, curves, legend_marker, scatter
from star_elastic.evaluate.findings import (
    COST_NAMES,
    GROUP_NAMES,
    Data,
    Finding,
    headline,
    judge,
)
from star_elastic.evaluate.pareto import KINDS, plot_pareto
from star_elastic.evaluate.run import FORMAT_VERSION, RESULT
from star_elastic.evaluate.style import STYLE
from star_elastic.evaluate.tables import (
    Table,
    answers_table,
    calibration_table,
    comparison_table,
    likeness_table,
    plans_table,
    reuse_table,
    sizes_table,
)

PAGE, PLOT = "report.html", "pareto.png"
PUBLISHED = (
    "Beside it, what the authors of the method publish for models of 12 to 30 billion parameters on"
    " "
    "problems of the AIME kind (Star Elastic, arXiv 2605.07182): up to 16% more accuracy and 1.9 "
    "times less latency than budget control of the parent alone; with caches handed over, cosines "
    "of 0.89 to 0.96 between sizes, and 90.2% instead of 90.9% on GSM8K. Other models, other "
    "problems, other machines: context, not a comparison."
)


def write_report(out: str | Path) -> tuple[Path, Path]:
    """Writes the page and the plot of the evaluation in a directory; returns both files.

    Raises CheckpointError if the directory holds no finished evaluation.
    """
    result = load_result(out)
    page, plot = Path(out) / PAGE, Path(out) / PLOT
    try:
        text = make_page(result)
        tests = [Evaluation(**plan["test"]) for plan in result["plans"]]
        alone = _alone(result)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{Path(out) / RESULT} is damaged ({error!r}); make it anew with star-elastic eval"
        ) from None
    plot_pareto(tests, plot, title=f"{_name(result)}: plans on the test problems", reference=alone)
    write_text(page, text)
    return page, plot


def load_result(out: str | Path) -> Data:
    """What `evaluation.json` of a directory holds. Raises CheckpointError."""
    file = Path(out) / RESULT
    if not file.is_file():
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
    sections = (
        _summary(result),
        _charts(result),
        _comparisons(result),
        _answers(result),
        _difficulty(result),
        _reuse(result),
        _bandwidth(result),
        _plans(result),
        _method(result),
    )
    title = f"Elastic budget control: {_name(result)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _name(result: Data) -> str:
    """A family by its directory; runs keep it in `run/elastic`."""
    parts = [part for part in Path(result["elastic"]).parts if part not in ("elastic", "run", "/")]
    return parts[-1] if parts else result["elastic"]


def _largest(result: Data) -> str:
    return next(iter(result["sizes"]))


def _alone(result: Data) -> list[str]:
    """Labels of the largest size alone."""
    largest = [_largest(result)]
    return [plan["label"] for plan in result["plans"] if plan["sizes"] == largest]


# --- sections --------------------------------------------------------------------------------


def _summary(result: Data) -> str:
    counts = {split: sum(result["problems"][split].values()) for split in ("validation", "test")}
    largest = _largest(result)
    lead = (
        f"{len(result['plans'])} ways to think and answer with the sizes "
        f"{_listed(result['sizes'])} were tried on problems of {result['problems']['source']}. "
        f"They are compared with {largest} alone, its thinking cut at the same budgets. Each plan "
        f"named here was chosen on {counts['validation']:,} validation problems; its numbers are "
        f"from {counts['test']:,} test problems that the choice did not see. In brackets: the "
        f"{result['intervals']['level']:.0%} interval of a difference."
    )
    cards = "".join(_card(*card) for card in _cards(result))
    return (
        f"<header><h1>Elastic budget control</h1><p class='name'>{escape(_name(result))}</p>"
        f"</header><p>{escape(lead)}</p><div class='cards'>{cards}</div>{_by_group(result)}"
        f"{_names(largest)}"
    )


def _cards(result: Data) -> Iterable[tuple[str, Finding]]:
    """The answers that come first."""
    for title, question, groups, cost in (
        ("Operations, at equal accuracy", "equal accuracy", ["any"], "flops"),
        ("Measured time, at equal accuracy", "equal accuracy", ["any"], "seconds"),
        ("Accuracy, at equal operations", "equal cost", ["any"], "flops"),
        ("Accuracy of two sizes, at equal tokens", "equal tokens", ["pair", "policy"], ""),
    ):
        found = [headline(result, question, group, cost) for group in groups]
        there = [comparison for comparison in found if comparison is not None]
        if there:
            yield title, judge(max(there, key=_validation_gain))


def _validation_gain(comparison: Data) -> float:
    seen = comparison["validation"]
    return seen["accuracy"] - seen["reference_accuracy"] if seen else -1.0


def _card(title: str, finding: Finding) -> str:
    return (
        f"<section class='card {finding.tone}'><h3>{escape(title)}</h3>"
        f"<p class='big'>{escape(finding.short)}</p><p>{escape(finding.text)}</p></section>"
    )


def _by_group(result: Data) -> str:
    """What each kind of plan gives, in sentences."""
    parts = []
    for group in ("smaller", "pair", "policy"):
        said = []
        for opening, question, cost in (
            ("At equal accuracy", "equal accuracy", "flops"),
            ("In measured time", "equal accuracy", "seconds"),
            ("At equal cost", "equal cost", "flops"),
            ("At equal tokens", "equal tokens", ""),
        ):
            comparison = headline(result, question, group, cost)
            if comparison is not None:
                finding = judge(comparison)
                text = f"<strong>{opening}:</strong> {escape(finding.text)}"
                said.append(f"<li class='{finding.tone}'>{text}</li>")
        if said:
            name = GROUP_NAMES[group]
            parts.append(f"<h3>{escape(name[0].upper() + name[1:])}</h3><ul>{''.join(said)}</ul>")
    return f"<h2>By kind of plan</h2>{''.join(parts)}"


def _names(largest: str) -> str:
    rows = (
        (largest, "one size thinks and answers"),
        ("a>b", "a thinks, b answers"),
        ("a~b 25%", "a writes, b takes over to the end of the line where a is unsure: "
         "about 25% of the tokens"),
        ("a~b 25% lines", "the same, but a looks only before each line: about 25% of the lines"),
        ("…@32", "thinking is cut at the first line end from 32 tokens on"),
    )  # fmt: skip
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f"<details><summary>How plans are named</summary><dl>{items}</dl></details>"


def _charts(result: Data) -> str:
    chosen = [
        comparison["chosen"]
        for question, cost in (("equal accuracy", "flops"), ("equal cost", "flops"))
        for group in GROUP_NAMES
        if (comparison := headline(result, question, group, cost)) and comparison["chosen"]
    ]
    batch = result["plans"][0]["test"]["batch_size"]
    panels = []
    for scale, cost, title in (
        (1e6, "flops", "counted operations per problem (MFLOP)"),
        (1e-3, "seconds", f"measured time per problem (ms, batches of {batch})"),
    ):
        points = [
            Point(
                plan["test"][cost] / scale,
                plan["test"]["accuracy"],
                plan["test"]["standard_error"],
                plan["kind"],
                plan["label"],
            )
            for plan in result["plans"]
        ]
        panels.append(f"<figure>{scatter(points, _alone(result), chosen, x_title=title)}</figure>")
    kinds = {plan["kind"] for plan in result["plans"]}
    keys = [f"{legend_marker(k)} {escape(KINDS[k][2])}" for k in KINDS if k in kinds]
    keys.append(
        f"<span class='line alone'></span> {escape(_largest(result))} alone, its best budgets"
    )
    keys.append("<span class='line front'></span> best of all plans")
    legend = "".join(f"<span>{key}</span>" for key in keys)
    return (
        f"<h2>Every plan at a glance</h2><div class='charts'>{''.join(panels)}</div>"
        f"<p class='legend'>{legend}</p>"
        "<p class='note'>Test problems; bars are one standard error. Point at a mark to see which "
        "plan it is.</p>"
    )


def _comparisons(result: Data) -> str:
    parts = ["<h2>The comparisons</h2>"]
    parts.append(_details(comparison_table(result, "equal accuracy", "flops"), is_open=True))
    parts.append(_details(comparison_table(result, "equal cost", "flops"), is_open=True))
    parts.append(_details(comparison_table(result, "equal tokens", ""), is_open=True))
    for question in ("equal accuracy", "equal cost"):
        for cost in COST_NAMES:
            if cost != "flops":
                parts.append(_details(comparison_table(result, question, cost)))
    parts.append(
        "<p class='note'>On the test problems: the reference's own accuracy, the accuracy of what "
        "was chosen, their difference in points with its interval, and the ratios of costs, which "
        "may differ a little from those on validation. A chosen plan may be the reference itself, "
        "where nothing is better.</p>"
    )
    return "".join(parts)


def _answers(result: Data) -> str:
    table = answers_table(result)
    if len(result["sizes"]) == 1 or not table.rows:
        return ""
    text = (
        "The trace of a size is the same whoever answers, so along a row only the answer differs. "
        "Where a row's numbers agree, a larger size that answers has nothing to win on these "
        "problems. The last columns look at traces that the budget cut, whose answer still takes "
        "work: all such problems together, whatever their task."
    )
    return f"<h2>Who answers</h2><p>{text}</p>{_details(table, is_open=True)}"


def _difficulty(result: Data) -> str:
    policies = result["calibration"]["policies"]
    if not policies:
        return ""
    figures = []
    for policy in policies:
        lines = []
        for look in ("token", "line"):
            curve = [dial for dial in policy["curve"] if dial["look"] == look]
            known = [(d["token_share"], d["recall"]) for d in curve if d["recall"] is not None]
            lines.append((look, known))
        told = (
            f"{policy['small']} ~ {policy['large']}: the two would write different tokens at "
            f"{policy['differing_share']:.1%} of {policy['num_tokens']:,}"
        )
        chart = curves(lines, x_title="tokens that the larger writes")
        figures.append(f"<figure>{chart}<figcaption>{escape(told)}</figcaption></figure>")
    legend = (
        "<span><span class='line token'></span> looks before every token</span>"
        "<span><span class='line by-line'></span> looks before every line</span>"
        "<span><span class='line chance'></span> choosing tokens by chance</span>"
    )
    text = (
        "The smaller size leaves a line to the larger where the entropy of its next token is above "
        "a threshold. Both sizes have read the larger one's validation traces; the charts show "
        "which share of the tokens at which they differ the larger one gets to write."
    )
    return (
        f"<h2>Choice by difficulty</h2><p>{text}</p><div class='small charts'>{''.join(figures)}"
        f"</div><p class='legend'>{legend}</p>{_details(calibration_table(result))}"
    )


def _reuse(result: Data) -> str:
    if not result["reuse"]:
        return ""
    refused = {
        f"{study['think']} > {study['answer']}: {study['refused']}"
        for study in result["reuse"]
        if "refused" in study
    }
    notes = "".join(f"<p class='note'>{escape(line)}</p>" for line in sorted(refused))
    text = (
        "When one size takes over from another it reads prompt and trace anew, which is exact. It "
        "can also take the other's cache as it is, which costs nothing and is an approximation. "
        "KL, in nats, is that of the first token it writes, from what it would say after reading "
        "everything itself; after a trace that its writer has closed, that token is mostly a mere "
        "line end. Differences are in points of accuracy."
    )
    likeness = likeness_table(result)
    return (
        f"<h2>Caches handed over</h2><p>{text}</p>{_details(reuse_table(result), is_open=True)}"
        f"{notes}{_details(likeness) if likeness.rows else ''}"
    )


def _bandwidth(result: Data) -> str:
    sizes = result["sizes"]
    smallest = min(sizes, key=lambda name: sizes[name]["bytes_per_token"])
    text = (
        "A sequence that is decoded alone fetches all active weights for every token. Where memory "
        f"is the narrow part of a machine, {smallest} can therefore be at most "
        f"{sizes[smallest]['bandwidth_bound']:.2f} times as fast per token as {_largest(result)}, "
        "and a pair lies between its two sizes. The columns “bytes” above count these weights for "
        "whole problems, reading the sequence again included."
    )
    return (
        f"<h2>What memory bandwidth allows</h2><p>{escape(text)}</p>{_table(sizes_table(result))}"
        f"<p>{escape(PUBLISHED)}</p>"
    )


def _plans(result: Data) -> str:
    note = (
        "<p class='note'>Differences, in points, are to the largest size alone with the same "
        "budget. MB: weights that a batch of one must fetch at the least.</p>"
    )
    return f"<h2>All that was tried</h2>{_details(plans_table(result))}{note}"


def _method(result: Data) -> str:
    counts = sum(result["problems"]["test"].values())
    intervals = result["intervals"]
    notes = (
        "Plans are chosen on the validation problems by rules that see nothing else, and looked at "
        "on the test problems once.",
        f"Intervals hold {intervals['level']:.0%}, each by itself, from {intervals['resamples']:,} "
        "resamples of the problems within each task; both plans of a difference solve the same "
        "problems. Of many comparisons one in twenty will exclude zero by chance.",
        "Where not one problem came out differently the interval has no width, but with "
        f"{counts:,} problems a difference of {3 / counts:.1%} cannot be excluded.",
        "Operations are counted exactly, over every token that a size has read; time was measured "
        "once per plan and split, on this machine, other work on it included.",
    )
    machine = result["machine"]
    facts = {
        "Family": result["elastic"],
        "Machine": f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        "Command": result["command"],
        "Version": f"star-elastic {result['package_version']}",
        "Settings": json.dumps(result["settings"], ensure_ascii=False),
    }
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    told = "".join(f"<dt>{name}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<h2>How it was done</h2><ul>{listed}</ul><dl class='facts'>{told}</dl>"


# --- pieces ----------------------------------------------------------------------------------


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _details(table: Table, *, is_open: bool = False) -> str:
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(table.title)}</summary>{_table(table)}</details>"


def _table(table: Table) -> str:
    text = " class='text'"
    styles = [text] * table.num_text + [""] * (len(table.columns) - table.num_text)
    head = "".join(
        f"<th{style}>{escape(column)}</th>"
        for column, style in zip(table.columns, styles, strict=True)
    )
    tones: Sequence[str] = table.tones or [""] * len(table.rows)
    rows = []
    for row, tone in zip(table.rows, tones, strict=True):
        own = [*styles[:-1], f" class='{tone}'"] if tone else styles
        cells = (f"<td{style}>{escape(cell)}</td>" for cell, style in zip(row, own, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div class='table'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
