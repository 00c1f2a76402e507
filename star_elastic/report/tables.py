"""The tables of an evaluation as rows of text, for a terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

from star_elastic.evaluate.budgets import NO_BUDGET
from star_elastic.report.findings import (
    COST_NAMES,
    Data,
    counted,
    judge,
    percent,
    points,
    with_interval,
)
from star_elastic.tables import Table

NO_VALUE = "–"
TITLES = {
    "equal accuracy": "Equal accuracy: the cheapest plan that is as accurate",
    "equal cost": "Equal cost: the most accurate plan that costs no more",
    "equal tokens": "Equal tokens: the most accurate plan with the same budget",
}
KIND_NAMES = {
    "any": "any",
    "smaller": "smaller alone",
    "pair": "two sizes",
    "policy": "by difficulty",
}


def _table(
    title: str, items: Iterable[Any], cells: Mapping[str, Callable[[Any], str]], **options: Any
) -> Table:
    """A row for each item; `cells` are the columns with what each makes of an item."""
    rows = [[make(item) for make in cells.values()] for item in items]
    return Table(title, list(cells), rows, **options)


def evaluation_tables(result: Data) -> list[Table]:
    """What a terminal shows: the comparisons by counted operations, and every plan."""
    return [
        comparison_table(result, "equal accuracy", "flops"),
        comparison_table(result, "equal cost", "flops"),
        comparison_table(result, "equal tokens", ""),
        plans_table(result),
    ]


def comparison_table(result: Data, question: str, cost: str) -> Table:
    """The answers to one question, for every budget of the largest size and every kind of plan."""
    tests = {plan["label"]: plan["test"] for plan in result["plans"]}
    columns = ["compared with", "plans", "chosen", "accuracy", "difference (95%)"]
    columns += ["operations", "time", "bytes", "verdict"]
    rows, tones, shown = [], [], ""
    for own in result["comparisons"]:
        if (own["question"], own["cost"]) != (question, cost):
            continue
        verdict, test = judge(own), own["test"]
        label = own["reference"]
        reference = f"{label}: {percent(tests[label]['accuracy'])}"
        seen = [NO_VALUE] * 5
        if test:
            ratios = (f"{test['cost_ratios'][name]:.2f}×" for name in COST_NAMES)
            seen = [percent(test["accuracy"]), points(own["difference"]), *ratios]
        rows.append([
            "" if reference == shown else reference, KIND_NAMES[own["group"]],
            own["chosen"] or NO_VALUE, *seen, verdict.short,
        ])  # fmt: skip
        tones.append(verdict.tone)
        shown = reference
    by = f", by {COST_NAMES[cost]}" if cost else ""
    return Table(f"{TITLES[question]}{by}", columns, rows, tones, num_text=3)


def plans_table(result: Data) -> Table:
    """Every plan, the cheapest first."""
    plans = sorted(result["plans"], key=lambda plan: plan["test"]["flops"])
    return _table("Every plan, per problem, the cheapest first", plans, {
        "plan": lambda plan: plan["label"],
        "accuracy (95%)": lambda plan: with_interval(plan["test"]),
        "difference (95%)": lambda plan: points(plan["difference"]),
        "on validation": lambda plan: percent(plan["validation"]["accuracy"]),
        "MFLOP": lambda plan: f"{plan['test']['flops'] / 1e6:,.1f}",
        "ms": lambda plan: f"{1e3 * plan['test']['seconds']:,.1f}",
        "MB": lambda plan: f"{plan['test']['weight_bytes'] / 1e6:,.1f}",
        "thinking tokens": lambda plan: f"{plan['test']['thinking_tokens']:.0f}",
        "by the second size": _share_of_second,
        "cut short": lambda plan: f"{plan['test']['cut_share']:.0%}",
    })  # fmt: skip


def _share_of_second(plan: Data) -> str:
    """How much the second of two sizes wrote."""
    written = list(plan["tokens_by_size"].values())
    return f"{written[1] / (sum(written) or 1):.0%}" if len(written) > 1 else ""


def answers_table(result: Data) -> Table:
    """Who answers: for every thinking size and budget, the accuracy by answering size, of all
    problems (the mean over tasks) and of those whose trace a budget cut (all together)."""
    found: dict[tuple[str, int | None], dict[str, Data]] = {}
    for plan in result["plans"]:
        if plan["kind"] != "policy" and plan["budget"] != 0:
            tests = found.setdefault((plan["sizes"][0], plan["budget"]), {})
            tests[plan["sizes"][-1]] = plan["test"]
    rows = []
    for (think, budget), tests in found.items():
        own = [tests.get(answer, {}) for answer in result["sizes"]]
        # Without a budget, a trace that is cut has no answer.
        after = [test.get("cut_accuracy") if budget is not None else None for test in own]
        rows.append([
            think,
            _budget(budget),
            *(_number(test.get("accuracy"), "{:.1%}") for test in own),
            percent(next(test["cut_share"] for test in own if test)),
            *(_number(share, "{:.1%}") for share in after),
        ])  # fmt: skip
    columns = [
        "thinks", "budget", *(f"{size} answers" for size in result["sizes"]), "traces cut",
        *(f"of cut: {size}" for size in result["sizes"]),
    ]  # fmt: skip
    return Table("Accuracy by who answers", columns, rows)


def _budget(budget: int | None) -> str:
    return NO_BUDGET if budget is None else str(budget)


def _number(value: float | None, form: str = "{:.2g}", absent: str = NO_VALUE) -> str:
    return absent if value is None else form.format(value)


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
    dials = [
        {**dial, "sizes": f"{policy['small']} ~ {policy['large']}"}
        for policy in result["calibration"]["policies"]
        for dial in policy["dials"]
    ]
    return _table("Positions of the dial, on the validation traces", dials, {
        "sizes": lambda dial: dial["sizes"],
        "looks before": lambda dial: f"every {dial['look']}",
        "dial": lambda dial: percent(dial["position"]),
        "threshold, nats": lambda dial: _number(dial["threshold"], "{:.3g}", NO_BUDGET),
        "tokens by the larger": lambda dial: percent(dial["token_share"]),
        "lines with its help": lambda dial: percent(dial["line_share"]),
        "differing tokens it writes": lambda dial: _number(dial["recall"], "{:.1%}"),
    }, num_text=2)  # fmt: skip


def reuse_table(result: Data) -> Table:
    """Caches handed over against reading anew; no numbers where that is refused."""
    rows = []
    for study in result["reuse"]:
        seen = [NO_VALUE] * 6
        if "refused" not in study:
            seen = [
                percent(study["exact_accuracy"]), percent(study["handed_accuracy"]),
                points(study["difference"]), percent(study["same_answers"]),
                _number(study["median_divergence"]), _number(study["worst_divergence"]),
            ]  # fmt: skip
        rows.append([pair_of(study), _budget(study["budget"]), *seen])
    columns = ["thinks > answers", "budget", "reads anew", "handed over",
               "difference (95%)", "same answer", "median KL", "worst KL"]  # fmt: skip
    return Table("Caches handed over", columns, rows)


def pair_of(study: Data) -> str:
    """The two sizes of a study of caches: `large > small`."""
    return f"{study['think']} > {study['answer']}"


def likeness_table(result: Data) -> Table:
    """Cosine of every kind of state that is handed over, over the layers that have it and over
    budgets."""
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for study in result["reuse"]:
        for like in study.get("likeness", ()):
            own = found.setdefault((pair_of(study), like["state"]), [])
            own.append((like["cosine"], like["layer"]))
    rows = [
        [pair, state, f"{fmean(cosine for cosine, _ in own):.3f}", f"{min(own)[0]:.3f}",
         str(min(own)[1])]
        for (pair, state), own in found.items()
    ]  # fmt: skip
    columns = ["thinks > answers", "state", "mean cosine", "least", "in layer"]
    title = "Cosine of the states, handed over and made by the answering size"
    return Table(title, columns, rows, num_text=2)


def evaluation_notes(result: Data) -> list[str]:
    """What has to be said beside the tables: the matching rule, and where the answers are."""
    largest = next(iter(result["sizes"]))
    alone = [plan for plan in result["plans"] if plan["sizes"] == [largest]]
    label, test = alone[-1]["label"], alone[-1]["test"]  # with the largest of its budgets
    notes = []
    if not result["thinks"]:
        notes.append("The prompts open no trace, so every plan answers at once.")
    rule = f"Answers are matched {result['match']['words']}."
    if test["no_answer_share"]:
        rule += f" In {percent(test['no_answer_share'])} of the replies of {label} it found none."
    notes.append(rule)
    if not (test["accuracy"] or alone[-1]["validation"]["accuracy"]):
        notes.append(
            f"{label} has not one problem right, so savings at equal accuracy mean nothing; see "
            "from its answers whether the matching rule suits them."
        )
    kept = result["answers"]
    problems = counted(kept["of_problems"], "test problem")
    if kept["num_problems"] < kept["of_problems"]:
        problems = f"{kept['num_problems']:,} of {problems}"
    rows = counted(kept["num_rows"], "row")
    notes.append(
        f"{kept['file']} has what every plan wrote on {problems} ({rows}; "
        f"{kept['max_characters']:,} characters of longer texts)."
    )
    return notes
