"""What comparisons say in plain words, from the plain data of an evaluation.

A gain is called one only where the test split shows it: an accuracy is higher if the interval of
the difference excludes zero, equal if it excludes a loss of more than `TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Tone = Literal["gain", "none", "loss"]
Data = Mapping[str, Any]

COST_NAMES = {
    "flops": "counted operations",
    "seconds": "measured time",
    "weight_bytes": "weight bytes at batch 1",
}
GROUP_NAMES = {
    "any": "any plan",
    "smaller": "one smaller size alone",
    "pair": "one size thinks, another answers",
    "policy": "choice by difficulty",
}
SHORT_NAMES = {"any": "any", "smaller": "smaller", "pair": "pair", "policy": "by difficulty"}
LEAST_SAVING = {"flops": 0.005, "weight_bytes": 0.005, "seconds": 0.05}
"""Of each cost; less is not told from nothing. Times are measured once, on a machine that may have
other work: the same slice timed twice differs by up to 5 %."""
TOLERANCE = 0.02
"""A loss of accuracy that equal accuracy may hide."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`short` is for a card or a cell, `text` one or two sentences."""

    tone: Tone
    short: str
    text: str


def judge(comparison: Data) -> Finding:
    """What one comparison says."""
    question, chosen = comparison["question"], comparison["chosen"]
    if chosen is None:
        quality = "as accurate" if question == "equal accuracy" else "as cheap"
        reference = comparison["reference"]
        text = f"None was {quality} as {reference} on the validation problems: no gain."
        return Finding("none", "no gain", text)
    if chosen == comparison["reference"]:
        text = f"Nothing was better than {chosen} itself on the validation problems: no gain."
        return Finding("none", "no gain", text)
    reference, test = comparison["reference"], comparison["test"]
    if test["accuracy"] == test["reference_accuracy"] == 0:
        text = f"Neither {chosen} nor {reference} has one test problem right: nothing to compare."
        return Finding("none", "none right", text)
    if question == "equal accuracy" and test["reference_accuracy"] == 0:
        text = f"{reference} has not one test problem right, and to be as accurate costs nothing."
        return Finding("none", "none right", text)
    if question == "equal accuracy":
        return _judge_saving(comparison)
    return _judge_accuracy(comparison)


def _judge_saving(comparison: Data) -> Finding:
    """A cost at equal accuracy."""
    cost, chosen = comparison["cost"], comparison["chosen"]
    ratio = comparison["test"]["cost_ratios"][cost]
    takes = (
        f"{chosen} takes {times(ratio)} the {COST_NAMES[cost]} of {comparison['reference']}; its "
        f"accuracy is {percent(comparison['test']['accuracy'])} against "
        f"{percent(comparison['test']['reference_accuracy'])}, a difference of "
        f"{points(comparison['difference'])} points"
    )
    if comparison["difference"]["high"] < 0:
        return Finding("loss", "less accurate", f"{takes}: less accurate, so no gain.")
    if ratio > 1 - LEAST_SAVING[cost]:
        return Finding("none", "no gain", f"{takes}: no gain.")
    if comparison["difference"]["low"] < -TOLERANCE:
        loss = f"{-100 * comparison['difference']['low']:.1f} points"
        text = f"{takes}: the problems are too few to exclude a loss of up to {loss}."
        return Finding("none", f"{saving(ratio)}, unsure", text)
    return Finding("gain", saving(ratio), f"{takes}.")


def _judge_accuracy(comparison: Data) -> Finding:
    """An accuracy at equal cost or equal tokens."""
    test, interval = comparison["test"], comparison["difference"]
    ratios = test["cost_ratios"]
    cost = comparison["cost"] or "flops"
    says = (
        f"{comparison['chosen']} is right in {percent(test['accuracy'])} against "
        f"{percent(test['reference_accuracy'])} of {comparison['reference']}, a difference of "
        f"{points(interval)} points, at {times(ratios[cost])} its {COST_NAMES[cost]}"
    )
    if interval["low"] > 0:
        return Finding("gain", f"{100 * interval['difference']:+.1f} points", f"{says}.")
    if interval["high"] < 0:
        short = f"{100 * interval['difference']:+.1f} points"
        return Finding("loss", short, f"{says}: less accurate.")
    return Finding("none", "no gain", f"{says}; that could be chance: no gain.")


def headline(result: Data, question: str, group: str, cost: str) -> Data | None:
    """The comparison that stands for a question: at the budget at which the reference is most
    accurate, or else where the plan gains most accuracy, both on the validation split. None where
    there is no such plan."""
    found = [
        comparison
        for comparison in result["comparisons"]
        if (comparison["question"], comparison["group"]) == (question, group)
        and comparison["cost"] == cost
    ]
    if not found:
        return None
    accuracies = {plan["label"]: plan["validation"]["accuracy"] for plan in result["plans"]}

    def rank(comparison: Data) -> tuple[float, float]:
        reference = accuracies[comparison["reference"]]
        if question == "equal accuracy":
            return reference, 0.0
        gain = accuracies.get(comparison["chosen"], -1.0) - reference
        return round(gain, 9), reference

    return max(found, key=rank)


def percent(share: float) -> str:
    """`99.5%`."""
    return f"{share:.1%}"


def with_interval(measured: Data) -> str:
    """`99.4% (98.3 to 99.8)`: an `accuracy` with its `interval`."""
    low, high = measured["interval"]
    return f"{percent(measured['accuracy'])} ({100 * low:.1f} to {100 * high:.1f})"


def counted(number: int, noun: str) -> str:
    """`1 way`, `1,200 ways`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def times(ratio: float) -> str:
    """`0.52 times`."""
    return f"{ratio:.2f} times"


def saving(ratio: float) -> str:
    """`48% less`, or more."""
    return f"{abs(1 - ratio):.0%} {'less' if ratio <= 1 else 'more'}"


def points(interval: Data) -> str:
    """`+0.5 (-0.5 to +1.5)`, in percentage points."""
    low, high = 100 * interval["low"], 100 * interval["high"]
    return f"{100 * interval['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
