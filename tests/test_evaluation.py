"""A whole evaluation of a tiny family: kept and gone on with, compared, and told on a page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import star_elastic
from star_elastic import bundled
from star_elastic.architectures import architecture_of, read_config
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.cli import main
from star_elastic.errors import ConfigError, Interrupted
from star_elastic.evaluate import run as evaluation_run
from star_elastic.evaluate import tasks
from star_elastic.evaluate.accuracy import evaluate_plan
from star_elastic.evaluate.budgets import natural_budgets
from star_elastic.evaluate.matching import parse_match
from star_elastic.evaluate.problems import bundled_problems, read_problems
from star_elastic.evaluate.reuse import _compare, study_reuse
from star_elastic.evaluate.run import Settings, evaluate_family
from star_elastic.evaluate.tasks import TASKS, Problem
from star_elastic.generate.caches import LayerState, RowCache
from star_elastic.generate.phases import think_and_answer
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.progress import Silent
from star_elastic.report.page import load_result, make_page, write_report
from star_elastic.report.tables import NO_VALUE, answers_table
from tests.processes import answer
from tests.tiny_family import PROMPTS, WIDTHS, make_config, make_model, make_tokenizer

LARGE, SMALL = "<b>", "s & co"
"""Names that a page has to escape."""
SETTINGS = Settings(budgets=(4, None), dials=(0.3,), max_new_tokens=50)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """A llama family of two sizes with names of HTML."""
    path = tmp_path_factory.mktemp("family") / "<i>"
    tokenizer = make_tokenizer()
    make_model(make_config("llama", len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    axis_map = architecture_of(read_config(path)).axis_map(read_config(path))
    small = axis_map.complete(Widths(WIDTHS["llama"]))
    save_manifest(Manifest("llama", {}, {LARGE: Size(axis_map.full), SMALL: Size(small)}), path)
    return path


@pytest.fixture(scope="module")
def data(elastic, tmp_path_factory):
    """Questions to which one of the sizes or none has the answer, in two tasks."""
    family = star_elastic.load(elastic)
    questions = [f"{a}+{b}" for a in range(1, 10) for b in range(1, 10)]
    answers = [
        [g.answer.strip() for g in family.generate(questions, think=size, max_new_tokens=50)]
        for size in family
    ]
    rows = []
    for question, *both in zip(questions, *answers, strict=True):
        known = [text for text in both if text and "</think>" not in text]
        if known and len(rows) < 30:
            text = [*known, "none"][len(rows) % (len(known) + 1)]
            rows.append({"prompt": question, "answer": text, "task": f"task {len(rows) % 2}"})
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def settings(data):
    return replace(SETTINGS, data=data)


@pytest.fixture(scope="module")
def evaluated(elastic, settings, tmp_path_factory):
    """The directory of a finished evaluation."""
    out = tmp_path_factory.mktemp("runs") / "out"
    evaluate_family(elastic, settings, out, command="star-elastic eval '<i>'")
    return out


class Recorder(Silent):
    """Counts what is done, and stops it like a user at a moment of choice."""

    def __init__(self, stop_at: tuple[str, int] | None = None):
        self.stop_at, self.stages, self.now = stop_at, {}, ""

    def stage(self, name: str, total: int) -> None:
        self.now = name
        self.stages[name] = total

    def advance(self, done: int, note: str = "") -> None:
        if (self.now, done) == self.stop_at:
            raise KeyboardInterrupt


def without_time(content):
    """All but what a clock has measured and what was chosen by it."""
    if isinstance(content, dict):
        kept = {k: v for k, v in content.items() if k != "seconds"}
        return {k: without_time(v) for k, v in kept.items()}
    if isinstance(content, list):
        return [
            without_time(c) for c in content
            if not (isinstance(c, dict) and c.get("cost") == "seconds")
        ]  # fmt: skip
    return content


# --- running ---------------------------------------------------------------------------------


def test_everything_is_there_and_agrees(elastic, evaluated, settings, data):
    result = load_result(evaluated)
    plans = {plan["label"]: plan for plan in result["plans"]}
    assert len(plans) == len(result["plans"]) == 2 * 2 + 2 * 2 + 2 * 2
    splits = read_problems(data)
    family = star_elastic.load(elastic)
    for label, plan in (
        (LARGE, think_and_answer(LARGE, LARGE, max_new_tokens=50)),
        (f"{SMALL}>{LARGE}@4", think_and_answer(
            SMALL, LARGE, thinking_budget=4, max_new_tokens=50, switch="catch-up"
        )),
    ):  # fmt: skip
        for split in ("validation", "test"):
            match = parse_match("auto")
            alone = evaluate_plan(family.generator, splits[split], plan, match=match).to_json()
            found = {**plans[label][split], "label": alone["label"]}
            assert without_time(found) == without_time(alone)
    assert 0 < plans[LARGE]["test"]["accuracy"] < 1
    bound = 3 / len(splits["test"])  # the rule of three: no problem tells a plan from itself
    assert plans[LARGE]["difference"] == {"difference": 0, "low": -bound, "high": bound}
    policies = [plan for plan in result["plans"] if plan["kind"] == "policy"]
    assert {plan["dial"]["look"] for plan in policies} == {"token", "line"}
    assert any(min(plan["tokens_by_size"].values()) > 0 for plan in policies)
    for comparison in result["comparisons"]:
        if comparison["chosen"]:
            seen, reference = (plans[comparison[k]]["test"] for k in ("chosen", "reference"))
            assert comparison["test"]["accuracy"] == seen["accuracy"]
            assert comparison["test"]["cost_ratios"]["flops"] == seen["flops"] / reference["flops"]
    bound = result["sizes"][SMALL]["bandwidth_bound"]
    lighter = plans[LARGE]["test"]["bytes_per_token"] / plans[SMALL]["test"]["bytes_per_token"]
    assert bound == pytest.approx(lighter) and bound > 1.5


def test_a_stopped_evaluation_goes_on_where_it_was(elastic, evaluated, settings, monkeypatch):
    out = evaluated.parent / "stopped"
    for moment in (("evaluate", 3), ("reuse", 2)):
        with pytest.raises(Interrupted, match="the same command goes on"):
            evaluate_family(elastic, settings, out, progress=Recorder(moment))
        assert not (out / "evaluation.json").exists()
    # A file that a killed process left is no result.
    broken = next(iter((out / "kept").glob("plan-*")))
    broken.write_text(broken.read_text()[:50])
    solved = []
    solve = evaluation_run.solve
    monkeypatch.setattr(
        evaluation_run, "solve", lambda *a, **k: solved.append(a[2]) or solve(*a, **k)
    )
    recorder = Recorder()
    evaluate_family(elastic, settings, out, command="star-elastic eval '<i>'", progress=recorder)
    assert "calibrate" not in recorder.stages
    assert len(solved) == 2  # both splits of the one broken plan
    assert without_time(load_result(out)) == without_time(load_result(evaluated))


def test_other_settings_do_not_mix(elastic, evaluated, settings, data, tmp_path):
    before = {file: file.read_bytes() for file in evaluated.rglob("*.json")}
    for changed, name in (
        (replace(settings, budgets=(None,)), "budgets"),
        (replace(settings, sizes=(LARGE,)), "sizes"),
        (replace(settings, batch_size=3), "batch_size"),
        (replace(settings, num_test=3), "problems, num_test"),
    ):
        with pytest.raises(ConfigError, match=f"^{name} differ from the evaluation in"):
            evaluate_family(elastic, changed, evaluated)
    other = tmp_path / "other"
    shutil.copytree(elastic, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ConfigError, match="^checkpoint differ"):
        evaluate_family(other, settings, evaluated)
    assert {file: file.read_bytes() for file in evaluated.rglob("*.json")} == before


def test_natural_traces_give_budgets(elastic, data, tmp_path):
    """Some traces are longer than each of them, and they leave room for an answer."""
    family = star_elastic.load(elastic)
    settings = replace(SETTINGS, data=data, budgets=None, dials=(), max_new_tokens=100)
    splits = read_problems(data)
    run = evaluation_run._Run(elastic, settings, tmp_path / "out", Silent())
    found = run.calibrate()
    lengths = sorted(
        generation.phases[0].tokens
        for generation in family.generate(
            [problem.question for problem in splits.validation], max_new_tokens=100
        )
    )
    assert found["budgets"][-1] is None and found["policies"] == []
    assert found["trace_tokens"]["longest"] == lengths[-1]
    cuts = found["budgets"][:-1]
    assert cuts and all(lengths[0] <= cut <= lengths[-1] for cut in cuts)
    run.grid(found["budgets"], {}, alike=found["alike"])
    assert natural_budgets([0, 0, 5000], 100) == [75 - 32, None]
    assert natural_budgets([0, 0, 0], 100) == [None]


def test_a_family_that_knows_the_bundled_tasks_needs_no_data(tmp_path):
    path = tmp_path / "family"
    tokenizer = load_tokenizer(bundled.PARENT)
    make_model(make_config("llama", len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    axis_map = architecture_of(read_config(path)).axis_map(read_config(path))
    save_manifest(Manifest("llama", {}, {"only": Size(axis_map.full)}), path)
    settings = Settings(num_validation=1, num_test=2, budgets=(0, None), max_new_tokens=20)
    result = evaluate_family(path, settings, tmp_path / "out")
    assert result["problems"]["test"] == dict.fromkeys(TASKS, 2)
    assert [plan["label"] for plan in result["plans"]] == ["only@0", "only"]
    assert result["reuse"] == result["calibration"]["policies"] == []
    assert {(c["group"], c["chosen"]) for c in result["comparisons"]} <= {
        ("any", "only@0"), ("any", "only")
    }  # fmt: skip
    assert "One size" not in Page(make_page(result)).text


# --- problems --------------------------------------------------------------------------------


def test_rows_fall_into_a_split_by_their_prompt(tmp_path, monkeypatch):
    rows = [
        {"prompt": f"question {i}", "answer": f" {i} ", "task": "ab"[i % 2]} for i in range(200)
    ]
    file, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text("".join(json.dumps(row) + "\n" for row in [*rows[::-3], *rows[::-3]]))
    whole, part = read_problems(file), read_problems(other)
    assert len(whole.validation) + len(whole.test) == 200
    assert not {p.question for p in whole.validation} & {p.question for p in whole.test}
    assert 0.3 < len(whole.validation) / 200 < 0.5
    assert set(part.test) <= set(whole.test) and set(part.validation) <= set(whole.validation)
    assert whole.test[0].answer.strip() == whole.test[0].answer
    few = read_problems(file, 5, 7)
    assert (len(few.validation), len(few.test)) == (10, 14)
    assert few.test == tuple(p for p in whole.test if p in few.test)
    bundled = bundled_problems(1, 2, seed=0)
    assert (len(bundled.validation), len(bundled.test)) == (len(TASKS), 2 * len(TASKS))
    monkeypatch.setattr(tasks, "MAX_DRAWS_PER_PROBLEM", 3)
    with pytest.raises(ConfigError, match="use at most"):
        bundled_problems(1, 200, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"prompt": "2+2"}\n', "line 1 has no answer"),
        (
            '{"prompt": "2+2", "answer": "4"}\n{"prompt": " ", "answer": "4"}\n',
            "line 2 has no prompt",
        ),
        ('{"prompt": "2+2", "answer": true}\n', "line 1 has no answer"),
        ('{"prompt": 4, "answer": 4}\n', "line 1 has no prompt"),
        ('{"prompt": "2+2", "answer": NaN}\n', "line 1 has no answer"),
        ('{"prompt": "2+2", "answer": "4", "task": 3}\n', "line 1 has a task that is no text"),
        ('{"prompt": "2", "answer": "4"}\n{"prompt": "2", "answer": "5"}', "line 2 has another"),
        ('{"prompt": "2+2", "answer": "4"}\n', "none falls into the"),
        (
            '{"prompt": "a \\ud83d", "answer": "4"}\n',
            r"line 1 has half of a character, '\ud83d', in",
        ),
        ('{"prompt": "a", "answer": "\\udfff"}\n', "in its answer, which no tokenizer encodes"),
        ('{"prompt": "a", "answer": "b", "task": "\\ud83d"}\n', "in its task, which no tokenizer"),
        ("[1]\n", "not a JSON object"),
        ("{\n", "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_bad_data_is_one_line(text, message, elastic, tmp_path, capsys):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_bytes(text.encode("latin-1"))
    said = mistake(capsys, "eval", elastic, "--out", out, "--data", file)
    assert message in said and not out.exists()


# --- caches handed over ----------------------------------------------------------------------


def test_what_a_size_hands_to_itself_is_exact(elastic, data):
    """With the same widths nothing is lost; with others the states are alike but not the same."""
    family = star_elastic.load(elastic)
    problems = read_problems(data).test
    twin = star_elastic.load(elastic)
    sizes = {**family.manifest.sizes, "twin": family.manifest.sizes[LARGE]}
    twin.manifest = replace(family.manifest, sizes=sizes)
    same = study_reuse(twin, problems, LARGE, "twin", budget=4, max_new_tokens=50)
    assert 5 < same.num_handed <= same.num_problems == len(problems)
    assert same.same_answers == 1 and same.worst_divergence < 1e-6
    assert same.exact_accuracy == same.handed_accuracy
    assert {(like.layer, like.state) for like in same.likeness} == {
        (layer, state) for layer in (0, 1) for state in ("keys", "values")
    }
    assert all(like.least > 1 - 1e-6 for like in same.likeness)
    other = study_reuse(family, problems, SMALL, LARGE, budget=4, max_new_tokens=50)
    assert other.mean_divergence > 1e-3
    assert all(-1 <= like.least < like.cosine < 0.999 for like in other.likeness)


def test_likeness_is_that_of_states_after_the_same_tokens(family):
    """By layer and kind of state, of hybrids too: recurrent and conv states beside keys, values."""
    problems = [Problem("sums", prompt, (), "1") for prompt in PROMPTS[:3]]
    found = study_reuse(family, problems, "small", "large", budget=4, max_new_tokens=50)
    states = {(like.layer, like.state) for like in found.likeness}
    names = {"conv": ["conv"], "ssm": ["recurrent"], "key_value": ["keys", "values"]}
    assert states == {(s.layer, name) for s in family.axis_map.states for name in names[s.name]}


def test_cosines_by_hand():
    def cache(*values):
        state = torch.tensor(values).reshape(1, 1, 2)
        return RowCache((LayerState("attention", state, -state), None))

    found = list(_compare(cache(3.0, 4.0), cache(4.0, 3.0), [7, 8]))
    assert found == [(7, "keys", pytest.approx(0.96)), (7, "values", pytest.approx(0.96))]


def test_a_refused_hand_over_is_one_line(elastic, evaluated, settings, monkeypatch, tmp_path):
    """As of families whose sizes have other layers with states."""

    def refuse(*_):
        raise ConfigError("caches cannot be handed over: layer 0 remembers something in one only")

    monkeypatch.setattr("star_elastic.evaluate.reuse.HandOver", refuse)
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    for file in (out / "kept").glob("reuse-*"):
        file.unlink()
    result = evaluate_family(elastic, settings, out)
    assert {study["refused"] for study in result["reuse"]} == {
        "caches cannot be handed over: layer 0 remembers something in one only"
    }
    assert "layer 0 remembers something in one only" in make_page(result)


# --- the page --------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that open and close in order, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def test_the_page_stands_alone_and_escapes_everything(evaluated):
    page_file, plot = write_report(evaluated)
    text = page_file.read_text(encoding="utf-8")
    page = Page(text)
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = " ".join(page.text)
    for name in (LARGE, SMALL, f"{SMALL}>{LARGE}@4", "star-elastic eval '<i>'"):
        assert name in shown
    assert not {"b", "i", "script", "link", "img", "iframe"} & page.tags
    assert not {"src", "href", "onclick", "onload"} & page.attributes
    assert not re.search(r"http|@import|url\(|javascript:", text)
    assert {"svg", "table", "details", "title"} <= page.tags
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert shown.lower().count("operations at equal accuracy") == 2  # a card and a column
    for plan in load_result(evaluated)["plans"]:
        assert plan["label"] in page.text


def test_a_page_tells_gains_and_their_absence_from_the_same_numbers(evaluated):
    result = load_result(evaluated)
    shown = " ".join(Page(make_page(result)).text)
    assert f"{len(result['plans'])} ways to think and answer" in shown
    (found,) = [
        c for c in result["comparisons"]
        if (c["question"], c["group"], c["cost"], c["budget"]) == ("equal cost", "any", "flops", 4)
    ]  # fmt: skip
    assert f"{100 * found['difference']['difference']:+.1f} (" in shown
    for comparison in result["comparisons"]:
        comparison["chosen"] = comparison["test"] = comparison["validation"] = None
    hopeless = Page(make_page(result)).text
    assert "no gain" in hopeless and not any("less accurate" in text for text in hopeless)
    alone = [plan for plan in result["plans"] if plan["sizes"] == [LARGE]]
    lonely = {**result, "plans": alone, "comparisons": [], "reuse": [],
              "calibration": {**result["calibration"], "policies": []},
              "sizes": {LARGE: result["sizes"][LARGE]}}  # fmt: skip
    assert "Choice by difficulty" not in Page(make_page(lonely)).text


def test_who_answers_is_told_of_all_and_of_cut_traces(evaluated):
    result = load_result(evaluated)
    tests = {plan["label"]: plan["test"] for plan in result["plans"]}
    pair = tests[f"{SMALL}>{LARGE}@4"]
    pair |= {"accuracy": 0.75, "cut_share": 0.5, "cut_accuracy": 0.25}
    tests[f"{SMALL}@4"] |= {"cut_share": 0, "cut_accuracy": None}
    rows = {tuple(row[:2]): row[2:] for row in answers_table(result).rows}
    assert list(rows) == [(size, budget) for size in (LARGE, SMALL) for budget in ("4", "none")]
    alone = f"{tests[f'{SMALL}@4']['accuracy']:.1%}"
    assert rows[SMALL, "4"] == ["75.0%", alone, "50.0%", "25.0%", NO_VALUE]
    assert "Who answers" in Page(make_page(result)).text


def test_damaged_results_are_one_line(evaluated, tmp_path, capsys):
    assert "holds no evaluation.json" in mistake(capsys, "report", tmp_path)
    good = json.loads((evaluated / "evaluation.json").read_text())
    for content, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({**good, "format_version": 99}), "format version 99"),
        (json.dumps({**good, "plans": [{}]}), "is damaged"),
        (json.dumps({k: v for k, v in good.items() if k != "sizes"}), "is damaged"),
    ):
        (tmp_path / "evaluation.json").write_text(content)
        assert message in mistake(capsys, "report", tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


# --- the command line ------------------------------------------------------------------------


def mistake(capsys, *arguments) -> str:
    """The one line of a command that ends with exit code 2, in this process."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "") and printed.err.count("\n") == 1, printed.err
    return printed.err


def test_eval_and_report_at_the_command_line(elastic, data, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["eval", elastic, "--out", out, "--data", data, "--problems", 2, "--validation", 2,
              "--budgets", "none,4", "--dials", "0.3", "--max-new-tokens", 50]  # fmt: skip
    result = answer(*common)
    assert result["problems"]["test"] == {"task 0": 2, "task 1": 2}
    assert result == json.loads((out / "evaluation.json").read_text())
    assert f"--out {out}" in result["command"]
    assert len(list((out / "kept").iterdir())) == 1 + len(result["plans"]) + len(result["reuse"])
    assert "max_new_tokens differ from" in mistake(capsys, *common[:-1], 51)
    main(["report", str(out), "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made == {"page": str(out / "report.html"), "plot": str(out / "pareto.png")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "tiny"], "size 'tiny' is not in this family; it has <b>, s & co"),
        (["--budgets", "-4"], "holds '-4'"),
        (["--budgets", "4,many"], "holds 'many'"),
        (["--budgets", "4,none", "--max-new-tokens", "20"], "use max_new_tokens=41 or more"),
        (["--max-new-tokens", "4000"], "exceed the model's context"),
        (["--dials", "0.5,7"], "holds '7'"),
        (["--switch", "guess"], "switch='guess' is unknown"),
        (["--switch", "hand-over"], "use --dials none"),
        (["--dtype", "int8"], "dtype='int8' is not supported"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["--data", ""], "--data is empty; give it a value"),
    ],
)
def test_nonsense_is_one_line(options, message, elastic, data, tmp_path, capsys):
    out = tmp_path / "out"
    said = mistake(capsys, "eval", elastic, "--out", out, "--data", data, *options)
    assert message in said and not out.exists()


def test_directories_that_are_something_else(elastic, data, tmp_path, capsys):
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    file.touch()
    options = ["--data", data, "--budgets", "none"]
    assert "holds something else" in mistake(capsys, "eval", elastic, "--out", taken, *options)
    assert [f.name for f in taken.iterdir()] == ["thesis.tex"]
    for out in (file, file / "out"):
        said = mistake(capsys, "eval", elastic, "--out", out, *options).lower()
        assert "not a directory" in said and str(file) in said
    said = mistake(capsys, "eval", elastic, "--out", tmp_path / "new")
    assert "name your own problems with --data" in said and not (tmp_path / "new").exists()
    assert "no elastic.json" in mistake(capsys, "eval", bundled.PARENT, "--out", tmp_path / "new")
