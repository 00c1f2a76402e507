"""When an answer counts as right, by every rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.errors import ConfigError
from star_elastic.evaluate.matching import BY_TASK, RULES, is_number, parse_match
from star_elastic.evaluate.tasks import Problem


def judge(rule: str, answer: str, reply: str):
    """What a rule takes out of a reply, and whether it is right."""
    verdict = parse_match(rule).judge(Problem("t", "q", (), answer), reply)
    return verdict.extracted, verdict.is_right


@pytest.mark.parametrize(
    ("answer", "reply", "extracted", "is_right"),
    [
        ("42", "42", "42", True),
        ("42", " The answer is 42.\n", "42", True),
        ("42", "42 is not 41", "41", False),
        ("42", "42.0", "42.0", True),
        ("42", "It costs $1,042", "1,042", False),
        ("1042", "It costs $1,042.00", "1,042.00", True),
        ("-3", "5-8=-3", "-3", True),
        ("5", "8-5", "5", True),
        ("-5", "8-5", "5", False),
        ("-3", "minus: \u22123", "-3", True),
        ("0.5", ".5", ".5", True),
        ("1000", "1e3", "1e3", True),
        ("7", "seven", None, False),
        ("7", "", None, False),
        ("12", "1,2", "2", False),
    ],
)
def test_the_last_number_in_value(answer, reply, extracted, is_right):
    assert judge("last-number", answer, reply) == (extracted, is_right)
    assert judge("auto", answer, reply) == (extracted, is_right)


@pytest.mark.parametrize(
    ("answer", "reply", "is_right"),
    [
        ("Paris", " Paris\n", True),
        ("Paris", "It is Paris", False),
        ("Paris", "paris", False),
        ("two words", "two  words", False),
    ],
)
def test_the_whole_reply(answer, reply, is_right):
    for rule in ("exact", "auto"):
        assert judge(rule, answer, reply) == (reply.strip(), is_right)
    assert judge("exact", answer, " \n") == (None, False)


def test_auto_goes_by_each_row():
    """A text that holds a number is a text; exact takes numbers as they are written."""
    assert judge("auto", "4 apples", "There are 4 apples") == ("There are 4 apples", False)
    assert judge("auto", "4", "There are 4 apples") == ("4", True)
    assert judge("exact", "4", "4.0") == ("4.0", False)
    assert is_number("-1,234.5") and not is_number("1,23") and not is_number("4 apples")


@pytest.mark.parametrize(
    ("answer", "reply", "extracted"),
    [
        ("Paris", "It is PARIS, of course", "PARIS"),
        ("4", "14", None),
        ("4", "it is 4.", "4"),
        ("New York", "in New\nYork", "New\nYork"),
        ("a+b", "so a+b is", "a+b"),
        ("cat", "concatenate", None),
    ],
)
def test_whole_words_anywhere(answer, reply, extracted):
    assert judge("contains", answer, reply) == (extracted, extracted is not None)


def test_a_regular_expression():
    rule = r"regex:####\s*(\S+)"
    assert judge(rule, "18", "first #### 17\nthen #### 18.0") == ("18.0", True)
    assert judge(rule, "18", "18") == (None, False)
    assert judge("regex:[A-D]", "C", "A or C") == ("C", True)
    assert judge("regex:x(y)?", "y", "x") == ("", False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fuzzy", "match='fuzzy' is unknown; use auto, exact, last-number, contains or regex:"),
        ("", "is unknown"),
        ("regex:(", "is no regular expression"),
        ("regex:(a)(b)", "has 2 groups; keep one"),
        ("task", "is unknown"),
    ],
)
def test_a_rule_that_is_none(text, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse_match(text)


@given(st.text(max_size=20), st.text(min_size=1, max_size=8).filter(str.strip))
def test_every_rule_judges_any_text(reply, answer):
    problem = Problem("t", "q", (), answer.strip())
    for match in (BY_TASK, *RULES.values(), parse_match(r"regex:\d(\d*)")):
        verdict = match.judge(problem, reply)
        assert not verdict.is_right or verdict.extracted is not None
    # What is right as a whole is right however it is looked for.
    assert RULES["exact"].judge(problem, problem.answer).is_right
    assert RULES["contains"].judge(problem, problem.answer).is_right
    assert RULES["auto"].judge(problem, problem.answer).is_right
