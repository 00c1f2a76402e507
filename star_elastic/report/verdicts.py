"""The top of an evaluation's page: what was compared, what came out, by kind of plan."""

from __future__ import annotations

from html import escape

from star_elastic.evaluate.budgets import coinciding, listed
from star_elastic.evaluate.problems import TEST, VALIDATION
from star_elastic.report.findings import (
    GROUP_NAMES,
    Data,
    Finding,
    counted,
    headline,
    judge,
    percent,
)
from star_elastic.report.page import alone_labels, capital, largest_of, name_of
from star_elastic.report.tables import NO_VALUE, evaluation_notes


def summary(result: Data) -> str:
    """What comes first: the question, how it was asked, the answers in short."""
    cards = "".join(_card(title, finding) for finding, title in _cards(result).items())
    notes = " ".join(evaluation_notes(result))
    return (
        f"<header><h1>Elastic budget control</h1><p class='name'>{escape(name_of(result))}</p>"
        f"</header><p>{escape(_lead(result))}</p><p>{escape(notes)}</p>"
        f"<div class='cards'>{cards}</div>"
        f"{_by_group(result)}{_names(result)}"
    )


def _lead(result: Data) -> str:
    """What was compared with what, and on what."""
    plans, sizes = result["plans"], result["sizes"]
    num_validation, num_test = (sum(result["problems"][s].values()) for s in (VALIDATION, TEST))
    does = "think and answer" if result["thinks"] else "answer"
    lead = (
        f"{counted(len(plans), 'way')} to {does} with the size{'s' * (len(sizes) > 1)} "
        f"{listed(sizes)} {'was' if len(plans) == 1 else 'were'} tried on problems of "
        f"{result['problems']['source']}."
    )
    if len(plans) > 1:
        own = alone_labels(result)
        budgets = " with the same thinking budgets" if own != [largest_of(result)] else ""
        lead += (
            f" The others are compared with {largest_of(result)} alone{budgets}. Each plan named "
            f"here was chosen on {counted(num_validation, 'validation problem')}; its numbers are "
            f"from {counted(num_test, 'test problem')} that the choice did not see."
        )
    merged = "; ".join(coinciding(result["calibration"]["alike"]))
    if merged:
        lead += (
            " Thinking budgets that cut the same of every validation trace were tried once: "
            f"{merged}."
        )
    return lead + f" In brackets: {result['intervals']['level']:.0%} intervals."


def _cards(result: Data) -> dict[Finding, str]:
    """The answers that come first, each with the questions that it answers."""
    found: dict[Finding, list[str]] = {}
    for title, question, groups, cost in (
        ("operations at equal accuracy", "equal accuracy", ["any"], "flops"),
        ("measured time at equal accuracy", "equal accuracy", ["any"], "seconds"),
        ("accuracy at equal operations", "equal cost", ["any"], "flops"),
        ("accuracy of two sizes at equal tokens", "equal tokens", ["pair", "policy"], ""),
    ):
        headlines = [headline(result, question, group, cost) for group in groups]
        there = [comparison for comparison in headlines if comparison is not None]
        if there:
            finding = judge(max(there, key=_validation_gain))
            found.setdefault(finding, []).append(title)
    return {finding: capital("; ".join(titles)) for finding, titles in found.items()}


def _validation_gain(comparison: Data) -> float:
    seen = comparison["validation"]
    return seen["accuracy"] - seen["reference_accuracy"] if seen else -1.0


def _card(title: str, finding: Finding) -> str:
    return (
        f"<section class='card {finding.tone}'><h3>{escape(title)}</h3>"
        f"<p class='big'>{escape(finding.short)}</p><p>{escape(finding.text)}</p></section>"
    )


QUESTIONS = (
    ("operations at equal accuracy", "equal accuracy", "flops"),
    ("time at equal accuracy", "equal accuracy", "seconds"),
    ("accuracy at equal operations", "equal cost", "flops"),
    ("accuracy at equal tokens", "equal tokens", ""),
)


def _by_group(result: Data) -> str:
    """What each kind of plan gives, in one table: verdicts, with the plans that they are of."""
    rows = []
    for group in ("smaller", "pair", "policy"):
        found = [headline(result, question, group, cost) for _, question, cost in QUESTIONS]
        if any(found):
            rows.append((GROUP_NAMES[group], found))
    if not rows:
        return ""
    names = [name for name, _, _ in QUESTIONS]
    head = "".join(f"<th class='text'>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td class='text' data-label='plans'>{escape(capital(name))}</td>"
        + "".join(
            _verdict(comparison, label) for comparison, label in zip(found, names, strict=True)
        )
        + "</tr>"
        for name, found in rows
    )
    return (
        "<h2>By kind of plan</h2><div class='table'><table><thead><tr><th class='text'>plans</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _verdict(comparison: Data | None, label: str) -> str:
    """A cell of a verdict: in short, and the plan with its accuracy beside the reference's."""
    if comparison is None:
        return f"<td class='text' data-label='{escape(label)}'>{NO_VALUE}</td>"
    finding = judge(comparison)
    quality = "accurate" if comparison["question"] == "equal accuracy" else "cheap"
    told = f"none as {quality} as {comparison['reference']}"
    if comparison["chosen"] and comparison["test"]:
        seen = comparison["test"]
        told = (
            f"{comparison['chosen']}: {percent(seen['accuracy'])} against "
            f"{percent(seen['reference_accuracy'])} of {comparison['reference']}"
        )
    return (
        f"<td class='text {finding.tone}' data-label='{escape(label)}'>{escape(finding.short)}"
        f"<small>{escape(told)}</small></td>"
    )


def _names(result: Data) -> str:
    thinks = result["thinks"]
    rows = (
        (largest_of(result), "one size thinks and answers" if thinks else "one size answers"),
        *([("a>b", "a thinks, b answers")] if thinks else []),
        ("a~b 25%", "a writes, b takes over to the end of the line where a is unsure: "
         "about 25% of the tokens"),
        ("a~b 25% lines", "the same, but a looks only before each line: about 25% of the lines"),
        *([("…@32", "thinking is cut at the first line end from 32 tokens on")] if thinks else []),
    )  # fmt: skip
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f"<details><summary>How plans are named</summary><dl>{items}</dl></details>"
