"""Plans beside each other: the grid, the choice on validation, the intervals on the test."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.errors import BudgetError, ConfigError
from star_elastic.evaluate.compare import COSTS, choose, compare
from star_elastic.evaluate.difficulty import Dial
from star_elastic.evaluate.grid import make_grid, parse_budgets, parse_dials
from star_elastic.evaluate.intervals import LEAST_STRATUM, PairedBootstrap
from star_elastic.generate.phases import ByDifficulty
from star_elastic.report.findings import TOLERANCE, judge


def dial(position: float, look: str) -> Dial:
    return Dial(
        position=position, look=look, threshold=1 - position, token_share=0.2, line_share=0.2,
        recall=None,
    )  # fmt: skip


DIALS = [dial(position, look) for position in (0.1, 0.5) for look in ("token", "line")]


def grid(sizes=("large", "medium", "small"), budgets=(0, 8, None)):
    pairs = itertools.combinations(sizes, 2)
    dials = {(small, large): DIALS for large, small in pairs}
    return make_grid(sizes, budgets, dials, max_new_tokens=100)


# --- the grid --------------------------------------------------------------------------------


def test_the_grid_is_whole():
    entries = grid()
    by_kind = {
        kind: [e for e in entries if e.kind == kind] for kind in ("single", "pair", "policy")
    }
    assert [len(found) for found in by_kind.values()] == [3 * 3, 6 * 2, 3 * 4 * 3]
    assert entries[0].sizes == ("large",)
    for entry in entries:
        assert set(entry.plan.sizes) <= set(entry.sizes)
        assert entry.plan.thinking_budget == entry.budget
    for entry in by_kind["policy"]:
        policy = entry.plan.phases[0].size
        assert isinstance(policy, ByDifficulty) and entry.dial is not None
        assert policy == entry.plan.phases[-1].size
        assert (policy.threshold, policy.look) == (entry.dial.threshold, entry.dial.look)
        assert entry.sizes == (policy.small, policy.large)
    assert [e.label for e in by_kind["pair"]][:2] == ["large>medium@8", "large>medium"]
    assert by_kind["policy"][0].label == "medium~large 10%@0"
    assert by_kind["policy"][5].label == "medium~large 10% lines"


NAMES = ["a", "b", "a>b", "a@8", "a~b 10%", "b>a@8", "<b>", "a (2)"]


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
def test_labels_are_unique_whatever_sizes_are_called(sizes):
    labels = [entry.label for entry in grid(tuple(sizes), (8, None))]
    assert len(set(labels)) == len(labels)


def test_lists_of_budgets_and_dials():
    assert parse_budgets("32, none,16,16") == (16, 32, None)
    assert parse_budgets("0") == (0,)
    assert parse_dials(" 0.5,0.1,.1 ") == (0.1, 0.5)
    assert parse_dials("none") == ()
    for text in ("-16", "16,x", "1.5", "1e3", "None", "²"):
        with pytest.raises(BudgetError, match="is no number of tokens"):
            parse_budgets(text)
    for text in ("2", "-0.1", "nan", "x", "0.1;0.2"):
        with pytest.raises(ConfigError, match="does not lie between 0 and 1"):
            parse_dials(text)
    for parse in (parse_budgets, parse_dials):
        with pytest.raises(ConfigError, match="names none"):
            parse(" ,")


# --- intervals -------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_binomial():
    """One task of 40 problems, half of which only we solve: resampled means are binomial."""
    bootstrap = PairedBootstrap(["task"] * 40)
    found = bootstrap.interval([1] * 20 + [0] * 20, [0] * 40)
    shares = np.array([math.comb(40, k) for k in range(41)]) / 2.0**40
    low, high = (int(np.searchsorted(shares.cumsum(), level)) / 40 for level in (0.025, 0.975))
    assert (found.difference, found.low, found.high) == (0.5, low, high)


def test_the_interval_is_stratified_by_task():
    """Of many problems it is that of a normal mean over tasks of unequal numbers of problems."""
    rng = np.random.default_rng(1)
    counts = {"a": 400, "b": 100, "c": 250}
    shares = {"a": [0.1, 0.3, 0.6], "b": [0.4, 0.4, 0.2], "c": [0.0, 0.9, 0.1]}
    tasks = [task for task, count in counts.items() for _ in range(count)]
    differences = np.concatenate(
        [rng.choice([-1, 0, 1], size=count, p=shares[task]) for task, count in counts.items()]
    )
    order = rng.permutation(len(tasks))
    found = PairedBootstrap([tasks[i] for i in order], seed=3).interval(
        np.maximum(differences, 0)[order], -np.minimum(differences, 0)[order]
    )
    split = np.split(differences, np.cumsum(list(counts.values()))[:-1])
    mean = np.mean([own.mean() for own in split])
    error = math.sqrt(sum(own.var() / len(own) for own in split)) / len(split)
    assert found.difference == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.12 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.12 * error)


def test_only_pairs_that_differ_make_an_interval_wide():
    rng = np.random.default_rng(0)
    ours = rng.random(300) < 0.5
    bootstrap = PairedBootstrap(["a"] * 150 + ["b"] * 150)
    same = bootstrap.interval(ours, ours)
    assert (same.difference, same.low, same.high) == (0, -0.01, 0.01)  # the rule of three
    few = PairedBootstrap(["t"] * 2).interval([1, 0], [1, 0])
    assert (few.low, few.high) == (-1, 1)  # no accuracies are further apart
    one_better = bootstrap.interval(ours | (np.arange(300) == np.flatnonzero(~ours)[0]), ours)
    assert 0 == one_better.low < one_better.difference < one_better.high < 0.02


def test_rounding_is_no_difference():
    """Thirds and sevenths that cancel out are zero, and so are bounds where they do."""
    tasks = ["a"] * 21 + ["b"] * 9 + ["c"] * 7
    for seed in range(20):
        rng = random.Random(seed)
        ours, theirs = ([rng.random() < 0.5 for _ in tasks] for _ in range(2))
        found = PairedBootstrap(tasks, seed).interval(ours, theirs)
        for value in (found.difference, found.low, found.high):
            assert value == 0 or abs(value) > 1e-9
            assert str(value) != "-0.0"


def test_tasks_of_few_problems_do_not_look_sure():
    tasks = [f"task {i // 2}" for i in range(20)]
    found = PairedBootstrap(tasks).interval([i < 8 for i in range(20)], [0] * 20)
    assert max(map(tasks.count, tasks)) < LEAST_STRATUM
    assert found.low < found.difference - 0.1 < found.difference + 0.1 < found.high


# --- the choice ------------------------------------------------------------------------------


def draw_scores(entries, tasks, rng: random.Random) -> tuple[dict, dict]:
    """Made-up accuracies and costs of every plan, which often tie, and the outcomes behind them."""
    found, outcomes = {}, {}
    for entry in entries:
        ease = rng.random()
        outcomes[entry.label] = [rng.random() < ease for _ in tasks]
        costs = {name: float(rng.randint(1, 9)) for name in COSTS}
        accuracy = PairedBootstrap(tasks, resamples=1).mean(outcomes[entry.label])
        found[entry.label] = SimpleNamespace(accuracy=accuracy, **costs)
    return found, outcomes


TASKS = ["a"] * 6 + ["b"] * 9


@given(st.integers(0, 2**32))
def test_the_test_split_changes_no_choice(seed):
    """Whatever the test outcomes are, the same plans are chosen; what is seen of them differs."""
    rng = random.Random(seed)
    entries = grid()
    validation, _ = draw_scores(entries, TASKS[::2], rng)
    bootstrap = PairedBootstrap(TASKS, resamples=50)
    first = compare(entries, validation, *draw_scores(entries, TASKS, rng), bootstrap)
    second = compare(entries, validation, *draw_scores(entries, TASKS, rng), bootstrap)

    def choice(c):
        return c.question, c.group, c.cost, c.budget, c.reference, c.chosen, c.validation

    assert [choice(c) for c in first] == [choice(c) for c in second]
    assert [c.test for c in first] != [c.test for c in second]


@given(st.integers(0, 2**32))
def test_choices_are_the_best_that_qualify(seed):
    rng = random.Random(seed)
    entries = grid()
    validation, _ = draw_scores(entries, TASKS[::2], rng)
    test, right = draw_scores(entries, TASKS, rng)
    by_label = {entry.label: entry for entry in entries}
    found = compare(entries, validation, test, right, PairedBootstrap(TASKS, resamples=50))
    groups = {
        "any": lambda e: True,
        "smaller": lambda e: e.kind == "single" and e.sizes != ("large",),
        "pair": lambda e: e.kind == "pair",
        "policy": lambda e: e.kind == "policy",
    }
    assert len(found) == 3 * (4 * 3 * 2 + 3) - 1  # no pair has a budget of 0
    for comparison in found:
        reference, cost = validation[comparison.reference], comparison.cost
        members = [e for e in entries if groups[comparison.group](e)]
        if comparison.question == "equal accuracy":
            fit = [e for e in members if validation[e.label].accuracy >= reference.accuracy - 1e-9]
            best = min((getattr(validation[e.label], cost) for e in fit), default=None)
            got = comparison.chosen and getattr(validation[comparison.chosen], cost)
        else:
            if comparison.question == "equal cost":
                most = getattr(reference, cost)
                fit = [e for e in members if getattr(validation[e.label], cost) <= most]
            else:
                fit = [e for e in members if e.budget == by_label[comparison.reference].budget]
            best = max((validation[e.label].accuracy for e in fit), default=None)
            got = comparison.chosen and validation[comparison.chosen].accuracy
        assert got == (None if best is None else pytest.approx(best))
        if comparison.chosen is None:
            assert comparison.test is None and comparison.difference is None
            continue
        assert by_label[comparison.chosen] in fit
        ours, theirs = test[comparison.chosen], test[comparison.reference]
        assert comparison.difference.difference == pytest.approx(ours.accuracy - theirs.accuracy)
        assert comparison.test.accuracy == ours.accuracy
        for name in COSTS:
            assert comparison.test.cost_ratios[name] == getattr(ours, name) / getattr(theirs, name)


def test_equals_are_settled_by_the_other_criterion():
    def scores(accuracy, flops):
        return SimpleNamespace(accuracy=accuracy, flops=flops)

    reference = scores(0.5, 4.0)
    alike = {"dear": scores(0.7, 3.0), "cheap": scores(0.7, 2.0), "wrong": scores(0.4, 1.0)}
    assert choose("equal accuracy", alike, reference, "flops") == "cheap"
    assert choose("equal cost", alike, reference, "flops") == "cheap"
    assert choose("equal tokens", alike, reference, "flops") == "cheap"
    same_cost = {"worse": scores(0.6, 2.0), "better": scores(0.8, 2.0)}
    assert choose("equal accuracy", same_cost, reference, "flops") == "better"
    assert choose("equal accuracy", alike, scores(0.9, 4.0), "flops") is None
    assert choose("equal cost", alike, scores(0.9, 0.5), "flops") is None


# --- what is said of it ----------------------------------------------------------------------


def comparison(question, ratio, low, difference, high, chosen="small", cost="flops"):
    return {
        "question": question, "cost": "" if question == "equal tokens" else cost,
        "group": "any", "budget": None, "reference": "large", "chosen": chosen,
        "test": {
            "accuracy": 0.9 + difference, "reference_accuracy": 0.9,
            "cost_ratios": dict.fromkeys(COSTS, ratio),
        },
        "difference": {"difference": difference, "low": low, "high": high},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "tone", "short", "words"),
    [
        (comparison("equal accuracy", 0.5, -0.01, 0.0, 0.01), "gain", "50% less", "0.50 times"),
        (comparison("equal accuracy", 1.3, 0.01, 0.02, 0.03), "none", "no gain", "no gain"),
        (comparison("equal accuracy", 0.998, 0.0, 0.0, 0.0), "none", "no gain", "no gain"),
        (comparison("equal accuracy", 0.98, 0, 0, 0), "gain", "2% less", "0.98 times"),
        (
            comparison("equal accuracy", 0.98, 0, 0, 0, cost="seconds"),
            "none",
            "no gain",
            "0.98 times the measured time",
        ),
        (comparison("equal accuracy", 0.5, -0.3, 0.0, 0.3), "none", "50% less, unsure", "30.0"),
        (comparison("equal accuracy", 0.5, -0.9, -0.5, -0.1), "loss", "less accurate", "no gain"),
        (
            comparison("equal accuracy", 0.5, -TOLERANCE - 0.01, 0.0, 0.04),
            "none",
            "50% less, unsure",
            "too few to exclude a loss of up to 3.0 points",
        ),
        (comparison("equal cost", 0.9, 0.01, 0.04, 0.07), "gain", "+4.0 points", "+4.0 (+1.0 to"),
        (comparison("equal cost", 0.9, -0.01, 0.04, 0.07), "none", "no gain", "could be chance"),
        (comparison("equal tokens", 1.4, -0.07, -0.04, -0.01), "loss", "-4.0 points", "1.40 times"),
        (comparison("equal cost", 1, 0, 0, 0, chosen="large"), "none", "no gain", "large itself"),
        (comparison("equal cost", 1, 0, 0, 0, chosen=None), "none", "no gain", "None was as cheap"),
    ],
)  # fmt: skip
def test_findings_claim_no_more_than_the_test_shows(found, tone, short, words):
    finding = judge(found)
    assert (finding.tone, finding.short) == (tone, short)
    assert words in finding.text
