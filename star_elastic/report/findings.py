"""What comparisons say in plain words, from the plain data of an evaluation.

A gain is called one only where the test problems show it. A plan counts as more accurate if the
95 % interval of the difference excludes zero, and as equally accurate if that interval excludes a
loss of more than `TOLERANCE`.
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
    question, chosen, test = (comparison[key] for key in ("question", "chosen", "test"))
    reference, saves = comparison["reference"], question == "equal accuracy"
    if chosen is None:
        quality = "as accurate" if saves else "as cheap"
        text = f"None was {quality} as {reference} on the validation problems: no gain."
        return Finding("none", "no gain", text)
    if chosen == reference:
        text = f"Nothing was better than {chosen} itself on the validation problems: no gain."
        return Finding("none", "no gain", text)
    if test["reference_accuracy"] == 0 and (saves or test["accuracy"] == 0):
        text = f"{reference} has not one test problem right, and to be as accurate costs nothing."
        if test["accuracy"] == 0:
            text = (
                f"Neither {chosen} nor {reference} has one test problem right: nothing to compare."
            )
        return Finding("none", "none right", text)
    return (_judge_saving if saves else _judge_accuracy)(comparison)


def _judge_saving(comparison: Data) -> Finding:
    """A cost at equal accuracy."""
    cost, test, interval = (comparison[key] for key in ("cost", "test", "difference"))
    ratio = test["cost_ratios"][cost]
    takes = (
        f"{comparison['chosen']} takes {ratio:.2f} times the {COST_NAMES[cost]} of "
        f"{comparison['reference']}; its accuracy is {percent(test['accuracy'])} against "
        f"{percent(test['reference_accuracy'])}, a difference of {points(interval)} points"
    )
    if interval["high"] < 0:
        return Finding("loss", "less accurate", f"{takes}: less accurate, so no gain.")
    if ratio > 1 - LEAST_SAVING[cost]:
        return Finding("none", "no gain", f"{takes}: no gain.")
    saving = f"{1 - ratio:.0%} less"
    if interval["low"] < -TOLERANCE:
        loss = f"{-100 * interval['low']:.1f} points"
        text = f"{takes}: the problems are too few to exclude a loss of up to {loss}."
        return Finding("none", f"{saving}, unsure", text)
    return Finding("gain", saving, f"{takes}.")


def _judge_accuracy(comparison: Data) -> Finding:
    """An accuracy at equal cost or equal tokens."""
    test, interval = comparison["test"], comparison["difference"]
    cost = comparison["cost"] or "flops"
    says = (
        f"{comparison['chosen']} is right in {percent(test['accuracy'])} against "
        f"{percent(test['reference_accuracy'])} of {comparison['reference']}, a difference of "
        f"{points(interval)} points, at {test['cost_ratios'][cost]:.2f} times its "
        f"{COST_NAMES[cost]}"
    )
    short = f"{100 * interval['difference']:+.1f} points"
    if interval["low"] > 0:
        return Finding("gain", short, f"{says}.")
    if interval["high"] < 0:
        return Finding("loss", short, f"{says}: less accurate.")
    return Finding("none", "no gain", f"{says}; that could be chance: no gain.")


def headline(result: Data, question: str, group: str, cost: str) -> Data | None:
    """The comparison that stands for a question: at the budget at which the reference is most
    accurate, or else where the plan gains most accuracy, both on the validation split. None where
    there is no such plan."""
    accuracies = {plan["label"]: plan["validation"]["accuracy"] for plan in result["plans"]}

    def rank(comparison: Data) -> tuple[float, float]:
        reference = accuracies[comparison["reference"]]
        if question == "equal accuracy":
            return reference, 0.0
        gain = accuracies.get(comparison["chosen"], -1.0) - reference
        return round(gain, 9), reference

    found = [
        own
        for own in result["comparisons"]
        if (own["question"], own["group"], own["cost"]) == (question, group, cost)
    ]
    return max(found, key=rank, default=None)


def percent(share: float) -> str:
    """`99.5%`."""
    return f"{share:.1%}"


def with_interval(measured: Data) -> str:
    """`99.4% (98.3 to 99.8)`: an `accuracy` with its `interval`."""
    low, high = measured["interval"]
    return f"{percent(measured['accuracy'])} ({100 * low:.1f} to {100 * high:.1f})"


def points(interval: Data) -> str:
    """`+0.5 (-0.5 to +1.5)`, in percentage points."""
    middle, low, high = (100 * interval[key] for key in ("difference", "low", "high"))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def counted(number: int, noun: str) -> str:
    """`1 way`, `1,200 ways`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
