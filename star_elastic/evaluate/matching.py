"""When an answer counts as right: the rule in code, and in the words that every output states.

A reply is what a model writes after its trace (all of it, where it does not think). A rule takes an
answer out of the reply and compares it with the one that is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from star_elastic.errors import ConfigError
from star_elastic.evaluate.tasks import Problem, is_correct

REGEX = "regex:"
_NUMBER = re.compile(
    r"(?:(?<![\w).])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
    r"|(?:(?<![\w).])[-+])?\.\d+"
)
"""Digits, with commas between thousands, a fraction, an exponent; a sign that is no minus between
two terms."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule took for the answer (None: it found none), and whether that is right."""

    extracted: str | None
    is_right: bool


@dataclass(frozen=True, slots=True)
class Match:
    """One rule: its `name` as a user writes it, and what it does in words."""

    name: str
    words: str
    judge: Callable[[Problem, str], Verdict]
    """Takes a problem and the reply to it."""


def _by_task(problem: Problem, reply: str) -> Verdict:
    return Verdict(reply.strip() or None, is_correct(problem, reply))


def _exact(problem: Problem, reply: str) -> Verdict:
    found = reply.strip() or None
    return Verdict(found, found == problem.answer)


def _last_number(problem: Problem, reply: str) -> Verdict:
    found = [match[0] for match in _NUMBER.finditer(_plain(reply))]
    if not found:
        return Verdict(None, False)
    return Verdict(found[-1], _are_equal_numbers(found[-1], problem.answer))


def _contains(problem: Problem, reply: str) -> Verdict:
    words = r"\s+".join(map(re.escape, problem.answer.split()))
    found = re.search(rf"(?<!\w){words}(?!\w)", reply, re.IGNORECASE)
    return Verdict(found[0] if found else None, found is not None)


def _auto(problem: Problem, reply: str) -> Verdict:
    return (_last_number if is_number(problem.answer) else _exact)(problem, reply)


def is_number(text: str) -> bool:
    """Whether a known answer is a number, such as `-1,234.5`."""
    return _NUMBER.fullmatch(_plain(text).strip()) is not None


def _plain(text: str) -> str:
    """With the minus of typesetters as that of keyboards."""
    return text.replace("\u2212", "-")


def _are_equal_numbers(one: str, other: str) -> bool:
    if not (is_number(one) and is_number(other)):
        return False
    first, second = (Decimal(_plain(text).strip().replace(",", "")) for text in (one, other))
    return first == second


BY_TASK = Match(
    "task",
    "by the bundled tasks' own check: the reply must be exactly the answer, white space around it "
    "aside",
    _by_task,
)
"""The rule of the bundled tasks."""
RULES: Mapping[str, Match] = {
    match.name: match
    for match in (
        Match(
            "auto",
            "automatically: an answer that is a number must equal the last number of the reply; "
            "any other answer must be the whole reply, white space around it aside",
            _auto,
        ),
        Match("exact", "exactly: it must be the whole reply, white space around it aside", _exact),
        Match(
            "last-number",
            "by its last number, which must equal the answer in value (1,234.50 is 1234.5)",
            _last_number,
        ),
        Match(
            "contains",
            "by what it contains: the answer must stand anywhere in the reply, as whole words, in "
            "upper or lower case",
            _contains,
        ),
    )
}
"""The rules for data of one's own, but for regular expressions."""


def parse_match(text: str) -> Match:
    """A rule as a user writes it: one of `RULES`, or `regex:PATTERN`.

    Of the pattern's last place in the reply, its group (or all, if it has none) must be the answer,
    as text or as a number. Raises ConfigError for anything else.
    """
    if text in RULES:
        return RULES[text]
    if not text.startswith(REGEX):
        raise ConfigError(f"match={text!r} is unknown; use {', '.join(RULES)} or {REGEX}PATTERN")
    try:
        pattern = re.compile(text.removeprefix(REGEX))
    except re.error as error:
        raise ConfigError(
            f"match={text!r} is no regular expression ({error}); correct it, for example "
            rf"{REGEX}####\s*(\S+)"
        ) from None
    if pattern.groups > 1:
        raise ConfigError(
            f"match={text!r} has {pattern.groups} groups; keep one, and write the others as (?:...)"
        )
    words = (
        f"by the regular expression {pattern.pattern}: what it finds last in the reply must be the "
        "answer, as text or as a number"
    )

    def judge(problem: Problem, reply: str) -> Verdict:
        found = None
        for place in pattern.finditer(reply):
            found = (place[pattern.groups] or "").strip()
        is_right = found == problem.answer or _are_equal_numbers(found or "", problem.answer)
        return Verdict(found, is_right)

    return Match(text, words, judge)
