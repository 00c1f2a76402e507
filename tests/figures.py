"""Tables of README.md and docs/results.md, made from the files in results/: families and plans.

What is computed here must stand there cell by cell, bold aside (test_figures.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from star_elastic.evaluate.intervals import effective_count, wilson_interval

ROOT = Path(__file__).parent.parent
Rows = list[list[str]]


@cache
def read(name: str) -> Any:
    """The content of a file in results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def pct(share: float, digits: int = 1) -> str:
    """`99.4 %`."""
    return f"{100 * share:.{digits}f} %"


def interval(accuracy: float, counts: Sequence[int]) -> str:
    """`99.4 % (98.3 to 99.8)` of an accuracy on so many problems of each task."""
    low, high = wilson_interval(accuracy, effective_count(counts))
    return f"{pct(accuracy)} ({100 * low:.1f} to {100 * high:.1f})"


def plus_minus(mean_and_std: Sequence[float], digits: int = 1) -> str:
    """`99.1 ± 0.4 %` of shares."""
    mean, std = mean_and_std
    return f"{100 * mean:.{digits}f} ± {100 * std:.{digits}f} %"


def millions(count: float) -> str:
    return f"{count / 1e6:.2f}M"


# --- recipes of the whole road ---------------------------------------------------------------


def sizes_of_recipe(name: str) -> Rows:
    """The sizes beside their parent."""
    report = read(name)
    per_task = [report["recipe"]["problems_per_task"]] * 10
    parent = report["parent"]
    rows = [
        ["parent", millions(parent["active"]), millions(parent["total"]), "",
         interval(parent["accuracy"], per_task), ""]
    ]  # fmt: skip
    for size, own in report["sizes"].items():
        untrained = own["untrained_accuracy"]
        rows.append([
            size,
            f"{millions(own['active'])} ({pct(own['active_share'])})",
            f"{millions(own['total'])} ({pct(own['total_share'])})",
            f"{own['kl_to_parent']:.4f}",
            interval(own["accuracy"], per_task),
            "" if untrained is None else pct(untrained),
        ])  # fmt: skip
    return rows


def widths_of_recipe(name: str) -> Rows:
    """What the router chose, and what had to be moved."""
    axes = ("hidden", "experts", "expert_ffn", "shared_ffn", "ssm_heads")
    return [
        [
            size,
            *(str(own["widths"][axis]) for axis in axes),
            ", ".join(f"{cost} {share}" for cost, share in own["budgets"].items()),
            pct(own["budget_miss"], 2),
            ", ".join(f"{axis} {step:+d}" for axis, step in own["repair"].items()) or "none",
        ]
        for size, own in read(name)["sizes"].items()
    ]  # fmt: skip


def plans_of_recipe(name: str) -> Rows:
    return [
        [
            own["label"], pct(own["accuracy"]), f"{own['flops'] / 1e6:.0f}",
            f"{own['bytes_per_token'] / 1e6:.2f}", f"{own['thinking_tokens']:.0f}",
            pct(own["cut_share"], 0),
        ]
        for own in sorted(read(name)["evaluations"], key=lambda own: own["flops"])
    ]  # fmt: skip


# --- budget control --------------------------------------------------------------------------


def tests_of_plans() -> dict[str, Any]:
    return {plan["label"]: plan["test"] for plan in read("budget_control")["plans"]}


def points(difference: Mapping[str, float]) -> str:
    """`+0.2 (-0.4 to +0.8)`."""
    mean, low, high = (100 * difference[key] + 0.0 for key in ("difference", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


SHOWN_PLANS = (
    "large", "medium", "small", "large>medium", "large>small", "medium>large", "medium>small",
    "small>large", "small>medium", "medium~large 5%", "medium~large 5% lines", "small~large 5%",
    "small~large 5% lines", "small~medium 5%", "small~medium 5% lines", "large@72", "medium@72",
    "small@72", "small~medium 5%@72", "small~large 5%@72", "small>large@72", "large@56",
    "medium@56", "small@56", "small~medium 5%@56", "small~large 5%@56", "small>large@56",
)  # fmt: skip


def relative(label: str) -> dict[str, str]:
    """The costs of a plan over those of the large size alone without a budget."""
    tests, large = tests_of_plans(), tests_of_plans()["large"]
    replayed = {plan["label"]: plan["time_replayed"] for plan in read("replay")["plans"]}
    names = {"operations": "flops", "weight bytes": "weight_bytes", "in batches": "seconds"}
    found = {name: f"{tests[label][cost] / large[cost]:.2f}" for name, cost in names.items()}
    return {**found, "replayed": f"{replayed[label]:.2f}" if label in replayed else ""}


def budget_control() -> Rows:
    plans = {plan["label"]: plan for plan in read("budget_control")["plans"]}
    rows = []
    for label in SHOWN_PLANS:
        costs = relative(label)
        alone = label.partition("@")[0] == "large"
        rows.append([
            label, pct(plans[label]["test"]["accuracy"]),
            "" if alone else points(plans[label]["difference"]),
            costs["operations"], costs["weight bytes"], costs["replayed"], costs["in batches"],
        ])  # fmt: skip
    return rows


SIZES = ("large", "medium", "small")


def who_answers() -> Rows:
    tests = tests_of_plans()
    rows = []
    for think in SIZES:
        for budget in (56, 72, None):
            at = "" if budget is None else f"@{budget}"
            own = [
                tests[f"{think}{at}" if think == answer else f"{think}>{answer}{at}"]
                for answer in SIZES
            ]
            cut = [test["cut_accuracy"] if budget else None for test in own]
            rows.append([
                f"{think}, {budget or 'none'}", *(pct(test["accuracy"]) for test in own),
                pct(own[0]["cut_share"]), *("" if c is None else pct(c) for c in cut),
            ])  # fmt: skip
    return rows


def handed_over() -> Rows:
    rows = []
    for study in read("budget_control")["reuse"]:
        at = "" if study["budget"] is None else f"@{study['budget']}"
        cosines = [like["cosine"] for like in study["likeness"]]
        rows.append([
            f"{study['think']}>{study['answer']}{at}", pct(study["exact_accuracy"]),
            pct(study["handed_accuracy"]), pct(study["same_answers"]),
            f"{study['median_divergence']:.1e}", f"{study['mean_divergence']:.4f}",
            f"{min(cosines):.2f} to {max(cosines):.2f}",
        ])  # fmt: skip
    return rows


# --- nested against separate, ablations, axes ------------------------------------------------

NESTED_SIZES = ("medium", "small", "tiny")


def cells(name: str) -> dict[tuple[str, str], Any]:
    return {(row["arm"], row["size"]): row for row in read(name)["table"]}


def arms(name: str) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in read(name)["table"]))


def nested_accuracy() -> Rows:
    found = cells("nested_vs_separate")
    return [
        [
            arm, str(found[arm, "medium"]["runs"]), millions(found[arm, "medium"]["tokens"]),
            f"{found[arm, 'medium']['flops'] / 1e12:.1f}",
            *(plus_minus(found[arm, size]["accuracy"]) for size in NESTED_SIZES),
        ]
        for arm in arms("nested_vs_separate")
    ]  # fmt: skip


def nested_kl() -> Rows:
    found = cells("nested_vs_separate")
    return [
        [arm, *("{:.4f} ± {:.4f}".format(*found[arm, size]["kl"]) for size in NESTED_SIZES)]
        for arm in arms("nested_vs_separate")
    ]


def nested_minus() -> Rows:
    rows = []
    for arm, sizes in read("nested_vs_separate")["nested_minus"].items():
        spreads = [sizes[size]["accuracy"] for size in NESTED_SIZES]
        told = [f"{100 * mean:+.1f} ± {100 * std:.1f}" for mean, std in spreads]
        rows.append([arm, "accuracy, points", *told])
        spreads = [sizes[size]["kl"] for size in NESTED_SIZES]
        rows.append([arm, "KL", *(f"{mean:+.4f} ± {std:.4f}" for mean, std in spreads)])
    return rows


def ablations() -> Rows:
    found = cells("ablations")
    return [
        [
            arm,
            *(plus_minus(found[arm, size]["accuracy"]) for size in NESTED_SIZES),
            *(f"{found[arm, size]['kl'][0]:.4f}" for size in NESTED_SIZES),
        ]
        for arm in arms("ablations")
    ]  # fmt: skip


def axes_alone() -> Rows:
    return [
        [
            cut["name"], cut["metric"], pct(cut["saved"]), f"{cut['kl_untrained']:.4f}",
            f"{cut['kl_trained']:.4f}", pct(cut["accuracy_untrained"]),
            pct(cut["accuracy_trained"]),
        ]
        for cut in read("axes_alone")["cuts"]
    ]  # fmt: skip
