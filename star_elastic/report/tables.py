"""The tables of an evaluation as rows of text, for a terminal and for the page alike."""

from __future__ import annotations

from statistics import fmean

from star_elastic.evaluate.budgets import NO_BUDGET
from star_elastic.report.findings import (
    COST_NAMES,
    SHORT_NAMES,
    Data,
    counted,
    judge,
    percent,
    points,
    with_interval,
)
from star_elastic.tables import Table

NO_VALUE = "–"


def evaluation_tables(result: Data) -> list[Table]:
    """What a terminal shows: the comparisons by counted operations, and every plan."""
    return [
        comparison_table(result, "equal accuracy", "flops"),
        comparison_table(result, "equal cost", "flops"),
        comparison_table(result, "equal tokens", ""),
        plans_table(result),
    ]


TITLES = {
    "equal accuracy": "Equal accuracy: the cheapest plan that is as accurate",
    "equal cost": "Equal cost: the most accurate plan that costs no more",
    "equal tokens": "Equal tokens: the most accurate plan with the same budget",
}


def comparison_table(result: Data, question: str, cost: str) -> Table:
    """The answers to one question, for every budget of the largest size and every group."""
    found = [
        comparison
        for comparison in result["comparisons"]
        if (comparison["question"], comparison["cost"]) == (question, cost)
    ]
    columns = [
        "reference", "plans", "chosen", "accuracy", "difference (95%)", "operations", "time",
        "bytes", "verdict",
    ]  # fmt: skip
    rows, tones, shown = [], [], None
    for comparison in found:
        verdict = judge(comparison)
        test = comparison["test"]
        reference = f"{comparison['reference']}: {_reference_accuracy(result, comparison)}"
        start = ["" if reference == shown else reference, SHORT_NAMES[comparison["group"]]]
        shown = reference
        seen = [NO_VALUE] * 5
        if test:
            ratios = (f"{test['cost_ratios'][name]:.2f}" for name in COST_NAMES)
            seen = [percent(test["accuracy"]), points(comparison["difference"]), *ratios]
        rows.append([*start, comparison["chosen"] or NO_VALUE, *seen, verdict.short])
        tones.append(verdict.tone)
    by = f", by {COST_NAMES[cost]}" if cost else ""
    return Table(f"{TITLES[question]}{by}", columns, rows, tones, num_text=3)


def _reference_accuracy(result: Data, comparison: Data) -> str:
    plans = {plan["label"]: plan for plan in result["plans"]}
    return percent(plans[comparison["reference"]]["test"]["accuracy"])


def plans_table(result: Data) -> Table:
    """Every plan, the cheapest first."""
    rows = [
        [
            plan["label"],
            with_interval(plan["test"]),
            points(plan["difference"]),
            percent(plan["validation"]["accuracy"]),
            f"{plan['test']['flops'] / 1e6:,.1f}",
            f"{1e3 * plan['test']['seconds']:,.1f}",
            f"{plan['test']['weight_bytes'] / 1e6:,.1f}",
            f"{plan['test']['thinking_tokens']:.0f}",
            _share(plan),
            f"{plan['test']['cut_share']:.0%}",
        ]
        for plan in sorted(result["plans"], key=lambda plan: plan["test"]["flops"])
    ]
    columns = [
        "plan", "accuracy (95%)", "difference (95%)", "on validation", "MFLOP", "ms", "MB",
        "thinking tokens", "by the second size", "cut short",
    ]  # fmt: skip
    return Table("Every plan, per problem, the cheapest first", columns, rows)


def answers_table(result: Data) -> Table:
    """Who answers: for every thinking size and budget, the accuracy by answering size, of all
    problems (the mean over tasks) and of those whose trace a budget cut (all together)."""
    sizes = list(result["sizes"])
    found = {
        (plan["sizes"][0], plan["budget"], plan["sizes"][-1]): plan["test"]
        for plan in result["plans"]
        if plan["kind"] != "policy" and plan["budget"] != 0
    }
    rows = []
    for think, budget in dict.fromkeys((think, budget) for think, budget, _ in found):
        own = [found.get((think, budget, answer)) for answer in sizes]
        cut = next(test["cut_share"] for test in own if test)
        # Without a budget, a trace that is cut has no answer.
        after = [test["cut_accuracy"] if test and budget is not None else None for test in own]
        rows.append([
            think,
            NO_BUDGET if budget is None else str(budget),
            *(percent(test["accuracy"]) if test else NO_VALUE for test in own),
            percent(cut),
            *(NO_VALUE if share is None else percent(share) for share in after),
        ])  # fmt: skip
    columns = [
        "thinks", "budget", *(f"{size} answers" for size in sizes), "traces cut",
        *(f"of cut: {size}" for size in sizes),
    ]  # fmt: skip
    return Table("Accuracy by who answers", columns, rows)


def _share(plan: Data) -> str:
    """How much the second of two sizes wrote."""
    written = list(plan["tokens_by_size"].values())
    return f"{written[1] / (sum(written) or 1):.0%}" if len(written) > 1 else ""


def sizes_table(result: Data) -> Table:
    """What the sizes are, and what memory alone lets each gain at batch 1."""
    rows = [
        [name, f"{size['active']:,.0f}", f"{size['total']:,.0f}",
         f"{size['bytes_per_token'] / 1e6:,.2f}", f"{size['bandwidth_bound']:.2f} times"]
        for name, size in result["sizes"].items()
    ]  # fmt: skip
    columns = ["size", "active parameters", "total parameters", "MB of weights per token",
               "at most as fast"]  # fmt: skip
    return Table("The sizes", columns, rows)


def calibration_table(result: Data) -> Table:
    """What each tried position of the dial means."""
    rows = [
        [
            f"{policy['small']} ~ {policy['large']}",
            f"every {dial['look']}",
            percent(dial["position"]),
            NO_BUDGET if dial["threshold"] is None else f"{dial['threshold']:.3g}",
            percent(dial["token_share"]),
            percent(dial["line_share"]),
            NO_VALUE if dial["recall"] is None else percent(dial["recall"]),
        ]
        for policy in result["calibration"]["policies"]
        for dial in policy["dials"]
    ]
    columns = ["sizes", "looks before", "dial", "threshold, nats", "tokens by the larger",
               "lines with its help", "differing tokens it writes"]  # fmt: skip
    return Table("Positions of the dial, on the validation traces", columns, rows, num_text=2)


def reuse_table(result: Data) -> Table:
    """Caches handed over against reading anew."""
    rows = []
    for study in result["reuse"]:
        name = f"{study['think']} > {study['answer']}"
        budget = NO_BUDGET if study["budget"] is None else str(study["budget"])
        if "refused" in study:
            rows.append([name, budget, *[NO_VALUE] * 6])
            continue
        rows.append([
            name, budget, percent(study["exact_accuracy"]), percent(study["handed_accuracy"]),
            points(study["difference"]), percent(study["same_answers"]),
            *(_number(study[f"{kind}_divergence"]) for kind in ("median", "worst")),
        ])  # fmt: skip
    columns = ["thinks > answers", "budget", "reads anew", "handed over",
               "difference (95%)", "same answer", "median KL", "worst KL"]  # fmt: skip
    return Table("Caches handed over", columns, rows)


def _number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.2g}"


def likeness_table(result: Data) -> Table:
    """Cosine of every kind of state that is handed over, over the layers that have it and over
    budgets."""
    cosines: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for study in result["reuse"]:
        for like in study.get("likeness", ()):
            pair = f"{study['think']} > {study['answer']}"
            own = cosines.setdefault((pair, like["state"]), [])
            own.append((like["cosine"], like["layer"]))
    rows = [
        [pair, state, f"{fmean(cosine for cosine, _ in own):.3f}", f"{min(own)[0]:.3f}",
         str(min(own)[1])]
        for (pair, state), own in cosines.items()
    ]  # fmt: skip
    columns = ["thinks > answers", "state", "mean cosine", "least", "in layer"]
    title = "Cosine of the states, handed over and made by the answering size"
    return Table(title, columns, rows, num_text=2)


def evaluation_notes(result: Data) -> list[str]:
    """What has to be said beside the tables: the matching rule, and where the answers are."""
    return [note for note in (_thinking(result), _rule(result), _nothing_right(result),
                              _kept_answers(result)) if note]  # fmt: skip


def _thinking(result: Data) -> str:
    if result["thinks"]:
        return ""
    return "The prompts open no trace, so every plan answers at once."


def _rule(result: Data) -> str:
    told = f"Answers are matched {result['match']['words']}."
    plan = _reference(result)
    missing = plan["test"]["no_answer_share"]
    if missing:
        told += f" In {percent(missing)} of the replies of {plan['label']} it found none."
    return told


def _reference(result: Data) -> Data:
    """The largest size alone, with the largest of its thinking budgets."""
    largest = [next(iter(result["sizes"]))]
    return [plan for plan in result["plans"] if plan["sizes"] == largest][-1]


def _nothing_right(result: Data) -> str:
    plan = _reference(result)
    if plan["test"]["accuracy"] or plan["validation"]["accuracy"]:
        return ""
    return (
        f"{plan['label']} has not one problem right, so savings at equal accuracy mean nothing; "
        "see from its answers whether the matching rule suits them."
    )


def _kept_answers(result: Data) -> str:
    kept = result["answers"]
    problems = counted(kept["of_problems"], "test problem")
    if kept["num_problems"] < kept["of_problems"]:
        problems = f"{kept['num_problems']:,} of {problems}"
    rows = counted(kept["num_rows"], "row")
    return (
        f"{kept['file']} has what every plan wrote on {problems} ({rows}; "
        f"{kept['max_characters']:,} characters of longer texts)."
    )
