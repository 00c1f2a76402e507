"""The sections of an evaluation's page below its verdicts: charts, comparisons, replies, method."""

from __future__ import annotations

import json
from html import escape

from star_elastic.evaluate.budgets import listed
from star_elastic.evaluate.pareto import KINDS
from star_elastic.report.chart import Point, curves, legend_marker, scatter
from star_elastic.report.findings import COST_NAMES, GROUP_NAMES, Data, counted, headline
from star_elastic.report.page import alone_labels, details, largest_of, table_html
from star_elastic.report.tables import (
    answers_table,
    calibration_table,
    comparison_table,
    likeness_table,
    plans_table,
    reuse_table,
    sizes_table,
)

PUBLISHED = (
    "Beside it, what the authors of the method publish for models of 12 to 30 billion parameters "
    "on problems of the AIME kind (Star Elastic, arXiv 2605.07182): up to 16% more accuracy and "
    "1.9 times less latency than budget control of the parent alone; with caches handed over, "
    "cosines of 0.89 to 0.96 between sizes, and 90.2% instead of 90.9% on GSM8K. Other models, "
    "other problems, other machines: context, not a comparison."
)


MAX_TAKEN = 80
"""Characters of an answer that are shown before its text is opened."""


def charts(result: Data) -> str:
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
                plan["test"]["interval"][0],
                plan["test"]["interval"][1],
                plan["kind"],
                plan["label"],
            )
            for plan in result["plans"]
        ]
        panels.append(
            f"<figure>{scatter(points, alone_labels(result), chosen, x_title=title)}</figure>"
        )
    kinds = {plan["kind"] for plan in result["plans"]}
    keys = [f"{legend_marker(k)} {escape(KINDS[k][2])}" for k in KINDS if k in kinds]
    keys.append(
        f"<span class='line alone'></span> {escape(largest_of(result))} alone, its best budgets"
    )
    keys.append("<span class='line front'></span> best of all plans")
    legend = "".join(f"<span>{key}</span>" for key in keys)
    return (
        f"<h2>Every plan at a glance</h2><div class='charts'>{''.join(panels)}</div>"
        f"<p class='legend'>{legend}</p>"
        "<p class='note'>Test problems, 95% intervals. Point at a mark to see its plan.</p>"
    )


def comparisons(result: Data) -> str:
    if not result["comparisons"]:
        return ""
    parts = ["<h2>The comparisons</h2>"]
    parts.append(details(comparison_table(result, "equal accuracy", "flops"), is_open=True))
    parts.append(details(comparison_table(result, "equal cost", "flops"), is_open=True))
    parts.append(details(comparison_table(result, "equal tokens", ""), is_open=True))
    for question in ("equal accuracy", "equal cost"):
        for cost in COST_NAMES:
            if cost != "flops":
                parts.append(details(comparison_table(result, question, cost)))
    parts.append(
        "<p class='note'>On the test problems: the reference's own accuracy, the accuracy of what "
        "was chosen, their difference in points with its interval, and the ratios of costs, which "
        "may differ a little from those on validation. A chosen plan may be the reference itself, "
        "where nothing is better.</p>"
    )
    return "".join(parts)


def who_answers(result: Data) -> str:
    table = answers_table(result)
    if len(result["sizes"]) == 1 or not result["thinks"] or not table.rows:
        return ""
    text = (
        "The trace of a size is the same whoever answers, so along a row only the answer differs. "
        "Where a row's numbers agree, a larger size that answers has nothing to win on these "
        "problems. The last columns look at traces that the budget cut, whose answer still takes "
        "work: all such problems together, whatever their task."
    )
    return f"<h2>Who answers</h2><p>{text}</p>{details(table, is_open=True)}"


def difficulty(result: Data) -> str:
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
        "a threshold. Both sizes have read what the larger one wrote on validation; the charts "
        "show which share of the tokens at which they differ the larger one gets to write."
    )
    return (
        f"<h2>Choice by difficulty</h2><p>{text}</p><div class='small charts'>{''.join(figures)}"
        f"</div><p class='legend'>{legend}</p>{details(calibration_table(result))}"
    )


def reuse(result: Data) -> str:
    if not result["reuse"]:
        return ""
    refused: dict[str, dict[str, None]] = {}
    for study in result["reuse"]:
        if "refused" in study:
            pairs = refused.setdefault(study["refused"], {})
            pairs[f"{study['think']} > {study['answer']}"] = None
    notes = "".join(
        f"<p class='note'>{escape(f'{listed(pairs)}: {reason}')}</p>"
        for reason, pairs in refused.items()
    )
    text = (
        "When one size takes over from another it reads prompt and trace anew, which is exact. It "
        "can also take the other's cache as it is, which costs nothing and is an approximation. "
        "KL, in nats, is that of the first token it writes, from what it would say after reading "
        "everything itself; after a trace that its writer has closed, that token is mostly a mere "
        "line end. Differences are in points of accuracy."
    )
    likeness = likeness_table(result)
    return (
        f"<h2>Caches handed over</h2><p>{text}</p>{details(reuse_table(result), is_open=True)}"
        f"{notes}{details(likeness) if likeness.rows else ''}"
    )


def replies(result: Data) -> str:
    """Some replies as they were written."""
    parts = []
    for sample in result["samples"]:
        rows = "".join(_reply(reply) for reply in sample["replies"])
        parts.append(
            f"<section class='sample'><p class='said'>{escape(sample['problem'])}</p>"
            f"<p class='note'>{escape(sample['task'])}; the answer is "
            f"<strong>{escape(sample['expected'])}</strong></p>{rows}</section>"
        )
    text = (
        "Test problems on which the sizes differ come first, then those that none has right. Under "
        "each: what the matching rule took for the answer, and all that was written."
    )
    return f"<h2>What they wrote</h2><p>{text}</p>{''.join(parts)}"


def _reply(reply: Data) -> str:
    taken = "no answer found" if reply["extracted"] is None else reply["extracted"]
    tone, mark = ("gain", "right") if reply["correct"] else ("loss", "wrong")
    if len(taken) > MAX_TAKEN:
        taken = f"{taken[:MAX_TAKEN]} ..."
    return (
        f"<details><summary>{escape(reply['plan'])}: <span class='{tone}'>{mark}</span> "
        f"<code>{escape(taken)}</code></summary>"
        f"<p class='said'>{escape(reply['text'])}</p></details>"
    )


def bandwidth(result: Data) -> str:
    sizes = result["sizes"]
    smallest = min(sizes, key=lambda name: sizes[name]["bytes_per_token"])
    text = "A sequence that is decoded alone fetches all active weights for every token."
    if len(sizes) > 1:
        text += (
            f" Where memory is the narrow part of a machine, {smallest} can therefore be at most "
            f"{sizes[smallest]['bandwidth_bound']:.2f} times as fast per token as "
            f"{largest_of(result)}, and a pair lies between its two sizes."
        )
    text += (
        " The columns “bytes” above count these weights for whole problems, reading the sequence "
        "again included."
    )
    return (
        f"<h2>What memory bandwidth allows</h2><p>{escape(text)}</p>"
        f"{table_html(sizes_table(result))}"
        f"<p>{escape(PUBLISHED)}</p>"
    )


def all_plans(result: Data) -> str:
    note = (
        "<p class='note'>Differences, in points, are to the largest size alone with the same "
        "budget. MB: weights that a batch of one must fetch at the least.</p>"
    )
    return f"<h2>All that was tried</h2>{details(plans_table(result))}{note}"


def method(result: Data) -> str:
    counts = sum(result["problems"]["test"].values())
    intervals = result["intervals"]
    notes = (
        "Plans are chosen on the validation problems by rules that see nothing else, and looked at "
        "on the test problems once.",
        f"Intervals hold {intervals['level']:.0%}, each by itself, from {intervals['resamples']:,} "
        "resamples of the problems within each task; both plans of a difference solve the same "
        "problems. Of many comparisons one in twenty will exclude zero by chance.",
        "Where not one problem came out differently, a difference reaches "
        f"{100 * 3 / counts:.1f} points to both sides: with {counted(counts, 'problem')} that much "
        "cannot be excluded. Intervals of accuracies are Wilson's.",
        "Operations are counted exactly: every token that a size has read, and the LM head where a "
        "token is predicted, so once for a text that is read at once. Time was measured once per "
        "plan and split, on this machine, other work on it included.",
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
