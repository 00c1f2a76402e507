"""`eval` of every family: with thinking or without, what coincides once, answers kept and told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import star_elastic
from star_elastic.architectures import architecture_of, read_config
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.cli import main
from star_elastic.evaluate import answers, run
from star_elastic.evaluate.accuracy import LEFT_OUT, MAX_TEXT, _shorten
from star_elastic.evaluate.budgets import Thought, alike_budgets, common_groups, cut_place
from star_elastic.evaluate.compare import COSTS, compare
from star_elastic.evaluate.difficulty import ALWAYS_SMALL, Dial, Look, write_texts
from star_elastic.evaluate.grid import make_grid
from star_elastic.evaluate.intervals import PairedBootstrap
from star_elastic.evaluate.matching import parse_match
from star_elastic.evaluate.reuse import study_reuse
from star_elastic.evaluate.run import Settings, evaluate_family
from star_elastic.evaluate.tasks import Problem
from star_elastic.generate.phases import TAG, THINKING, think_and_answer
from star_elastic.progress import Silent
from star_elastic.report.page import load_result, make_page
from tests.tiny_family import (
    ALWAYS_THINKS,
    LEAVES_TAG_TO_MODEL,
    NEVER_THINKS,
    WIDTHS,
    make_config,
    make_model,
    make_tokenizer,
)

QUESTIONS = [f"{a}+{b}" for a in range(1, 5) for b in range(1, 4)]
SETTINGS = Settings(dials=(), max_new_tokens=40)


def make_family(path, template, sizes=("large", "small")):
    """A llama family on disk whose tokenizer has a chat template of choice.

    Its random writer ends traces and does not open others: a tag that opens is always less likely
    than the one that closes.
    """
    tokenizer = make_tokenizer(template)
    model = make_model(make_config("llama", len(tokenizer)))
    opening, closing = map(tokenizer.convert_tokens_to_ids, ("<think>", "</think>"))
    with torch.no_grad():
        model.lm_head.weight[opening] = 0.9 * model.lm_head.weight[closing]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    axis_map = architecture_of(read_config(path)).axis_map(read_config(path))
    widths = {"large": axis_map.full, "small": axis_map.complete(Widths(WIDTHS["llama"]))}
    known = {name: Size(widths[name.split()[0]]) for name in sizes}
    save_manifest(Manifest("llama", {}, known), path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A family whose template opens no trace."""
    return make_family(tmp_path_factory.mktemp("plain") / "family", NEVER_THINKS)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("thinking") / "family", LEAVES_TAG_TO_MODEL)


@pytest.fixture(scope="module")
def data(plain, tmp_path_factory):
    """Answers that are numbers, and that are texts: every other one is what the large size says."""
    family = star_elastic.load(plain)
    asked = [*QUESTIONS, *(f"{question}=?" for question in QUESTIONS)]
    prompts: list = asked
    replies = family.generate(prompts, think="large", thinking_budget=0, max_new_tokens=40)
    rows = []
    for number, (question, reply) in enumerate(zip(asked, replies, strict=True)):
        is_sum = number < len(QUESTIONS)
        numbers = [int(found) for found in re.findall(r"\d+", reply.answer)]
        said = numbers[-1:] if is_sum else [reply.answer.strip()]
        answer = said[0] if number % 2 and any(said) else 70707 if is_sum else "a9"
        task = "sum" if is_sum else "text"
        rows.append({"prompt": question, "answer": answer, "task": task})
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def evaluated(plain, data, tmp_path_factory):
    """The directory of an evaluation with every option left as it is."""
    out = tmp_path_factory.mktemp("out") / "plain"
    main(["eval", str(plain), "--out", str(out), "--data", str(data), "--max-new-tokens", "40"])
    return out


class Listener(Silent):
    """Keeps the lines that the user is told."""

    def __init__(self):
        self.lines, self.totals = [], {}

    def stage(self, name, total):
        self.totals[name] = total

    def say(self, line):
        self.lines.append(line)


def kept_rows(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


# --- plans without thinking ------------------------------------------------------------------


def test_a_family_that_opens_no_trace_is_evaluated_without_thinking(evaluated, plain):
    result = load_result(evaluated)
    assert result["thinks"] is False and result["reuse"] == []
    labels = [plan["label"] for plan in result["plans"]]
    assert labels[:2] == ["large", "small"] and not any("@" in label for label in labels)
    assert {plan["kind"] for plan in result["plans"]} == {"single", "policy"}
    assert all(plan["test"]["thinking_tokens"] == 0 for plan in result["plans"])
    family = star_elastic.load(plain)
    rows = kept_rows(evaluated)
    for size in ("large", "small"):
        own = [row for row in rows if row["plan"] == size]
        prompts = [row["problem"] for row in own]
        written = family.generate(prompts, think=size, thinking_budget=0, max_new_tokens=40)
        assert [row["text"] for row in own] == [generation.text for generation in written]
    page = make_page(result)
    assert "The prompts open no trace, so every plan answers at once." in page
    assert "think and answer" not in page and "Who answers" not in page


def test_it_is_said_in_one_line_and_budgets_of_thinking_are_refused(plain, data, tmp_path, capsys):
    common = ["eval", str(plain), "--data", str(data), "--dials", "none", "--max-new-tokens", "40",
              "--problems", "2", "--validation", "2"]  # fmt: skip
    for budgets in ("none", "0", "0,none"):
        out = tmp_path / budgets
        main([*common, "--out", str(out), "--budgets", budgets])
        said = capsys.readouterr().err
        assert said.count("do not open <think>, so every plan answers at once") == 1
        assert [plan["label"] for plan in load_result(out)["plans"]] == ["large", "small"]
    with pytest.raises(SystemExit) as stop:
        main([*common, "--out", str(tmp_path / "x"), "--budgets", "4,none"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "budgets=4 are of tokens of thinking" in said and "use --budgets none" in said
    assert not (tmp_path / "x").exists()


def test_choice_by_difficulty_works_without_thinking(evaluated):
    plans = {plan["label"]: plan for plan in load_result(evaluated)["plans"]}
    shared = [plan for plan in plans.values() if plan["kind"] == "policy"]
    assert any(min(plan["tokens_by_size"].values()) > 0 for plan in shared)


@pytest.mark.parametrize(
    ("template", "thinks"),
    [(None, False), (ALWAYS_THINKS, True), (LEAVES_TAG_TO_MODEL, True)],
    ids=["no template", "always thinks", "leaves the tag to the model"],
)
def test_every_template_can_be_evaluated(template, thinks, data, tmp_path):
    path = make_family(tmp_path / "family", template, ("large",))
    few = replace(SETTINGS, data=data, num_validation=2, num_test=2)
    result = evaluate_family(path, few, tmp_path / "out")
    assert result["thinks"] is thinks
    assert all((plan["test"]["thinking_tokens"] > 0) is thinks for plan in result["plans"])
    assert "1 ways" not in make_page(result)


# --- what coincides is tried once ------------------------------------------------------------


def test_where_a_budget_cuts_is_where_generation_cuts(thinking):
    """Of every trace and budget: as many tokens as are foreseen, or the trace's own end."""
    family = star_elastic.load(thinking)
    problems = [Problem("t", question, (), "1") for question in QUESTIONS[:8]]
    ends_line = family.generator.tags.ends_line
    ends = set()
    for size in family:
        texts = write_texts(family.generator, problems, size, max_new_tokens=60)
        for budget in (1, 2, 5, 9, 17):
            plan = think_and_answer(size, size, thinking_budget=budget, grace=2, max_new_tokens=60)
            generations = family.generator.generate(QUESTIONS[:8], plan)
            for text, generation in zip(texts, generations, strict=True):
                foreseen = cut_place(text.thought.trace, budget, ends_line, grace=2)
                parts, sizes = generation.token_parts, generation.token_sizes
                first = next((n for n, part in enumerate(parts) if part != THINKING), len(parts))
                was_cut = first < len(parts) and parts[first] == TAG and sizes[first] is None
                assert was_cut is (foreseen is not None)
                assert first == (len(text.thought.trace) if foreseen is None else foreseen)
                ends.add(generation.phases[0].ended)
    assert {"cut", "cut_at_newline"} <= ends and len(ends) > 2


def test_budgets_that_cut_alike_are_one():
    newline = 0
    texts = [Thought((*[5] * 6, newline, *[5] * 3)), Thought((5, 5))]

    def alike(*budgets, also=()):
        return alike_budgets(budgets, [*texts, *also], lambda token: token == newline)

    assert alike(3, 4, 7, 20, None) == [[3, 4, 7], [20, None]]
    assert alike(20, 30) == [[20, 30]]
    assert alike(0, 8, None) == [[0], [8, None]]
    assert alike(1, 2) == [[1, 2]]
    # A second stretch has what is left of the budget, unless the first was cut.
    again = Thought((5,) * 50, is_reopened=True)
    assert alike(3, 4, 20, 30, None, also=[again]) == [[3], [4], [20], [30], [None]]
    assert alike(51, 60, None, also=[again]) == [[51], [60], [None]]
    assert alike(3, 4, also=[Thought((newline,) * 9, is_reopened=True)]) == [[3], [4]]
    assert alike(1, 2, also=[Thought((5, 5, newline, 5), is_reopened=True)]) == [[1, 2]]
    budgets = (1, 2, 20, 30, None)
    assert common_groups(budgets, []) == {b: (b,) for b in budgets}
    one, other = [[1, 2], [20, 30, None]], [[1], [2, 20, 30, None]]
    assert common_groups(budgets, [one]) == {1: (1, 2), None: (20, 30, None)}
    assert common_groups(budgets, [one, other]) == {1: (1,), 2: (2,), None: (20, 30, None)}
    assert common_groups((20, 30), [[[20, 30]]]) == {20: (20, 30)}
    assert cut_place([5] * 50, 3, lambda token: False) == 35
    assert cut_place([5, newline, 5, 5], 1, lambda token: token == newline) == 2


def test_coinciding_budgets_make_no_plans(thinking, tmp_path, monkeypatch):
    """Budgets that no trace reaches are no budget at all: said, and tried once. What is matched
    how, is so in every section."""
    rules = []

    def study(*args, **options):
        rules.append(options.get("match"))
        return study_reuse(*args, **options)

    monkeypatch.setattr(run, "study_reuse", study)
    family = star_elastic.load(thinking)
    asked = [f"{a}+{b}" for a in range(1, 10) for b in range(1, 10)]
    problems = [Problem("t", question, (), "1") for question in asked]
    texts = [write_texts(family.generator, problems, s, max_new_tokens=70) for s in family]
    short = [
        question for question, *own in zip(asked, *texts, strict=True)
        if all(len(t.thought.trace) < 20 and not t.thought.is_reopened for t in own)
    ]  # fmt: skip
    assert len(short) > 5
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "{q}", "answer": 1}}\n' for q in short))
    listener = Listener()
    settings = replace(
        SETTINGS, data=file, budgets=(20, 30, None), dials=(0.3,), max_new_tokens=70,
        num_validation=3, num_test=2, match="contains",
    )  # fmt: skip
    result = evaluate_family(thinking, settings, tmp_path / "out", progress=listener)
    assert result["calibration"]["alike"] == {size: [[20, 30, None]] for size in family}
    plans = {plan["label"]: plan for plan in result["plans"]}
    alone = ["large", "small", "large>small", "small>large"]
    assert [label for label in plans if "~" not in label] == alone
    assert plans["small"]["budgets"] == [20, 30, None]
    assert listener.totals["evaluate"] == len(plans) <= len(alone) + 2
    assert listener.totals["reuse"] == 2 and rules == [parse_match("contains")] * 2
    told = "20, 30 and none (of large and small)"
    assert listener.lines == [
        f"thinking budgets that cut the same of every validation trace: {told}; tried once"
    ]
    page = make_page(result)
    assert f"cut the same of every validation trace were tried once: {told}." in page


def test_budgets_coincide_size_by_size():
    """What one size's traces reach is tried with it alone, and with plans in which it thinks."""
    alike = {"a": [[4], [8], [None]], "b": [[4], [8, None]], "c": [[4, 8, None]]}
    dial = Dial(position=0.1, look="token", threshold=1.0, token_share=0.1, line_share=0.1,
                recall=None)  # fmt: skip
    entries = make_grid(
        ("a", "b", "c"), (4, 8, None), {("c", "a"): [dial], ("c", "b"): [dial]}, alike=alike,
        max_new_tokens=100,
    )  # fmt: skip
    budgets = {}
    for entry in entries:
        budgets.setdefault((entry.kind, entry.sizes), []).append((entry.budget, entry.budgets))
    whole = [(4, (4,)), (8, (8,)), (None, (None,))]
    assert budgets["single", ("a",)] == budgets["pair", ("a", "c")] == whole
    assert budgets["single", ("b",)] == [(4, (4,)), (None, (8, None))]
    assert budgets["pair", ("c", "a")] == [(None, (4, 8, None))]
    assert budgets["policy", ("c", "a")] == whole
    assert budgets["policy", ("c", "b")] == [(4, (4,)), (None, (8, None))]
    # With a budget of 8, what is compared with the largest size is what stands for 8.
    same = SimpleNamespace(accuracy=1.0, **dict.fromkeys(COSTS, 1.0))
    scores: dict = {entry.label: same for entry in entries}
    right = {entry.label: [True] for entry in entries}
    found = compare(entries, scores, scores, right, PairedBootstrap(["t"]))
    equal = {(c.group, c.budget): c.chosen for c in found if c.question == "equal tokens"}
    assert equal["smaller", 8] in ("b", "c") and equal["pair", 4] in (
        "a>b@4", "a>c@4", "b>a@4", "b>c@4", "c>a", "c>b"
    )  # fmt: skip


def test_equal_plans_are_one_plan():
    def dial(position: float, threshold: float, look: Look = "token") -> Dial:
        return Dial(position=position, look=look, threshold=threshold, token_share=0.1,
                    line_share=0.1, recall=None)  # fmt: skip

    dials = [dial(0.0, ALWAYS_SMALL), dial(0.1, 1.5), dial(0.2, 1.5), dial(0.2, 1.5, "line")]
    entries = make_grid(("a", "b"), (8, None), {("b", "a"): dials}, max_new_tokens=100)
    labels = [entry.label for entry in entries if entry.kind == "policy"]
    assert labels == ["b~a 10%@8", "b~a 10%", "b~a 20% lines@8", "b~a 20% lines"]
    assert len({entry.plan for entry in entries}) == len(entries)


def test_sizes_of_equal_widths_are_one(data, tmp_path):
    path = make_family(tmp_path / "family", NEVER_THINKS, ("large", "large too", "small"))
    listener = Listener()
    few = replace(SETTINGS, data=data, num_validation=2, num_test=2)
    result = evaluate_family(path, few, tmp_path / "out", progress=listener)
    assert list(result["sizes"]) == ["large", "small"]
    assert "large too has the widths of large: what large does holds for both" in listener.lines


# --- answers and the matching rule -----------------------------------------------------------


def test_answers_are_kept_as_they_were_judged(evaluated, data):
    result = load_result(evaluated)
    rows = kept_rows(evaluated)
    assert len(rows) == result["answers"]["num_rows"]
    expected = {row["prompt"]: row for row in map(json.loads, data.read_text().splitlines())}
    for plan in result["plans"]:
        own = [row for row in rows if row["plan"] == plan["label"]]
        assert len(own) == plan["test"]["num_problems"] == sum(result["problems"]["test"].values())
        for task, accuracy in plan["test"]["per_task"].items():
            marks = [row["correct"] for row in own if row["task"] == task]
            assert sum(marks) / len(marks) == accuracy
        missing = sum(row["extracted"] is None for row in own) / len(own)
        assert missing == plan["test"]["no_answer_share"]
    for row in rows:
        assert row["expected"] == str(expected[row["problem"]]["answer"])
        assert row["task"] == expected[row["problem"]]["task"]
        if row["extracted"] is not None:
            assert row["extracted"] in row["text"]
    assert {row["task"] for row in rows if row["correct"]}  # else the test says nothing


def test_few_of_many_answers_are_kept(thinking, data, tmp_path, monkeypatch):
    """As many of every plan, spaced over the problems; it is said how many."""
    monkeypatch.setattr(answers, "MAX_ROWS", 11)
    settings = replace(SETTINGS, data=data, budgets=(None,), num_validation=2, num_test=6)
    out = tmp_path / "out"
    result = evaluate_family(thinking, settings, out)
    assert len(result["plans"]) == 4 and result["answers"]["num_problems"] == 2
    rows = kept_rows(out)
    assert len(rows) == 8 == result["answers"]["num_rows"]
    assert {row["task"] for row in rows} == {"sum", "text"}
    num_test = sum(result["problems"]["test"].values())
    assert num_test > 2 and f"on 2 of {num_test} test problems (8 rows" in make_page(result)


def test_long_texts_lose_their_middle():
    text = "".join(f"{number:05d} " for number in range(1000))
    short = _shorten(text)
    assert len(short) <= MAX_TEXT and LEFT_OUT in short
    begin, end = short.split(LEFT_OUT)
    assert text.startswith(begin) and text.endswith(end) and abs(len(begin) - len(end)) <= 1
    assert _shorten(text[:MAX_TEXT]) == text[:MAX_TEXT]


def test_the_rule_decides_and_is_told_everywhere(plain, data, tmp_path, capsys):
    common = ["eval", str(plain), "--data", str(data), "--dials", "none", "--max-new-tokens", "40"]
    right = {}
    for rule in ("auto", "exact", "last-number", "contains", r"regex:(\d)"):
        out = tmp_path / rule.partition(":")[0]
        main([*common, "--out", str(out), "--match", rule])
        result = load_result(out)
        shown = capsys.readouterr().out
        words = result["match"]["words"]
        assert result["match"]["name"] == rule
        assert f"Answers are matched {words}." in shown
        assert words.replace("'", "&#x27;") in make_page(result)
        right[rule] = []
        for row in kept_rows(out):
            problem = Problem("t", row["problem"], (), row["expected"])
            verdict = parse_match(rule).judge(problem, row["text"])
            assert (row["extracted"], row["correct"]) == (verdict.extracted, verdict.is_right)
            right[rule].append(row["correct"])
    assert len(set(map(tuple, right.values()))) >= 4
    with pytest.raises(SystemExit):
        main([*common, "--out", str(tmp_path / "exact"), "--match", "contains"])
    assert "match differ from the evaluation in" in capsys.readouterr().err
    main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for said in ("last-number", "contains (anywhere, as whole words", "regex:PATTERN", "auto (the"):
        assert said in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--match", "fuzzy"], "match='fuzzy' is unknown; use auto, exact, last-number, contains"),
        (["--match", "regex:["], "is no regular expression"),
        (["--device", "abacus"], "device='abacus' cannot be used here"),
    ],
)
def test_mistakes_are_one_line(options, said, plain, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(plain), "--out", str(tmp_path / "x"), "--data", str(data), *options])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and said in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_the_bundled_tasks_have_a_rule_of_their_own(plain, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(plain), "--out", str(tmp_path / "x"), "--match", "exact"])
    said = capsys.readouterr().err
    assert "match='exact' is for problems of your own" in said and said.count("\n") == 1
