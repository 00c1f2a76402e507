"""Every plan worth comparing: single sizes, pairs and choices by difficulty, at every budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from star_elastic.errors import BudgetError, ConfigError
from star_elastic.evaluate.accuracy import Kind
from star_elastic.evaluate.budgets import NO_BUDGET, Budget, common_groups
from star_elastic.evaluate.difficulty import ALWAYS_SMALL, Dial
from star_elastic.generate.phases import (
    ByDifficulty,
    Plan,
    Switch,
    think_and_answer,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One plan: the `sizes` at work in it, and the `dial` where they share the tokens.

    Its `budget` stands for all `budgets` that cut the traces of the sizes that think alike.
    """

    label: str
    kind: Kind
    sizes: tuple[str, ...]
    budget: Budget
    budgets: tuple[Budget, ...]
    dial: Dial | None
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "label": self.label,
            "kind": self.kind,
            "sizes": list(self.sizes),
            "budget": self.budget,
            "budgets": list(self.budgets),
            "dial": self.dial.to_json() if self.dial else None,
        }


def make_grid(
    sizes: Sequence[str],
    budgets: Sequence[Budget],
    dials: Mapping[tuple[str, str], Sequence[Dial]],
    *,
    alike: Mapping[str, Sequence[Sequence[Budget]]] | None = None,
    max_new_tokens: int,
    switch: Switch = "catch-up",
    thinks: bool = True,
) -> list[Entry]:
    """All plans of `sizes` (from the largest), each under its own label, the largest alone first.

    `dials` holds the positions to try for each (small, large) pair, `alike` the budgets in groups
    that come to the same where a size thinks (`alike_budgets`). What would be another plan once
    more is left out: another budget of a group, a pair with a budget of 0 (its answering size
    alone), a dial at which the small size writes everything, one with the threshold of another.
    Where no trace is opened (`thinks`), `budgets` is (None,), every plan answers at once, and there
    are no pairs. Raises ConfigError and BudgetError for plans that cannot be.
    """
    assert thinks or tuple(budgets) == (None,), budgets
    entries: list[Entry] = []
    known = alike or {}

    def add(name: str, kind: Kind, own: tuple[str, ...], dial: Dial | None = None) -> None:
        """Adds one combination of sizes at every budget that makes another plan of it."""
        think: str | ByDifficulty = own[0]
        answer: str | ByDifficulty = own[-1]
        if dial:
            think = answer = ByDifficulty(
                small=own[0], large=own[1], threshold=dial.threshold, look=dial.look
            )
        thinking = own if dial else own[:1]
        groups = common_groups(budgets, [known[size] for size in thinking if size in known])
        for budget, group in groups.items():
            plan = think_and_answer(
                think, answer, thinking_budget=budget if thinks else 0,
                max_new_tokens=max_new_tokens, switch=switch,
            )  # fmt: skip
            if (kind == "pair" and budget == 0) or plan in [entry.plan for entry in entries]:
                continue
            label = name if budget is None else f"{name}@{budget}"
            # Names of sizes may hold anything, and so may look like a label of others.
            taken = {entry.label for entry in entries}
            variants = (f"{label} ({number})" for number in itertools.count(2))
            label = next(own for own in itertools.chain([label], variants) if own not in taken)
            entries.append(Entry(label, kind, own, budget, group, dial, plan))

    for size in sizes:
        add(size, "single", (size,))
    for pair in itertools.permutations(sizes, 2) if thinks else ():
        add(f"{pair[0]}>{pair[1]}", "pair", pair)
    for pair, positions in dials.items():
        for dial in positions:
            shown = f"{100 * dial.position:g}%" + (" lines" if dial.look == "line" else "")
            if dial.threshold != ALWAYS_SMALL:
                add(f"{pair[0]}~{pair[1]} {shown}", "policy", pair, dial)
    return entries


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Thinking budgets as a user lists them, for example `16,32,none`, each once, none last."""
    found: set[Budget] = set()
    for part in _parts("budgets", text, "16,32,none"):
        if part != NO_BUDGET and not part.isdecimal():
            raise BudgetError(
                f"budgets={text!r} holds {part!r}, which is no number of tokens; use whole numbers "
                f"from 0 up and {NO_BUDGET}, such as 16,32,none"
            )
        found.add(None if part == NO_BUDGET else int(part))
    return tuple(sorted(found, key=lambda budget: math.inf if budget is None else budget))


def parse_dials(text: str) -> tuple[float, ...]:
    """Positions of the dial as a user lists them, rising, each once; `none` for no policies."""
    if text.strip() == NO_BUDGET:
        return ()
    found: set[float] = set()
    for part in _parts("dials", text, "0.1,0.25,0.5"):
        try:
            position = float(part)
        except ValueError:
            position = math.nan
        if not 0 <= position <= 1:
            raise ConfigError(
                f"dials={text!r} holds {part!r}, which does not lie between 0 and 1; use shares of "
                f"tokens such as 0.1,0.25,0.5, or {NO_BUDGET}"
            )
        found.add(position)
    return tuple(sorted(found))


def _parts(name: str, text: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"{name}={text!r} names none; use {example}, for example")
    return parts
