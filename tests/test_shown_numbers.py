"""Numbers for people are the numbers that were measured: right column, right unit, right row.

The data are written by hand, every number another, so that none can stand in for its neighbour.
"""

from __future__ import annotations

import json
import re
from html import escape, unescape

import pytest

from star_elastic.cli import main
from star_elastic.cli.demo import report_parts
from star_elastic.cli.terminal import print_table, show
from star_elastic.evaluate.budgets import listed
from star_elastic.evaluate.run import FORMAT_VERSION, RESULT
from star_elastic.report.findings import counted, with_interval
from star_elastic.report.page import make_page
from star_elastic.report.tables import (
    answers_table,
    calibration_table,
    comparison_table,
    likeness_table,
    plans_table,
    reuse_table,
    sizes_table,
)


def seen(accuracy: float, interval: tuple[float, float], seconds: float, flops: float, **changes):
    """What a plan reached on a split, as plain data."""
    return {
        "label": "", "think": "large", "answer": "large", "thinking_budget": None,
        "num_problems": 200, "accuracy": accuracy, "interval": list(interval),
        "per_task": {"t": accuracy}, "thinking_tokens": 62.4, "answer_tokens": 5.1,
        "cut_share": 0.125, "batch_size": 64, "seconds": seconds, "flops": flops,
        "bytes_per_token": 6.4e6, "weight_bytes": 4.35e8, "cut_accuracy": None,
        "no_answer_share": 0.015, "by_difficulty": False, **changes,
    }  # fmt: skip


def plan(label, kind, sizes, tokens, test, validation=0.5):
    return {
        "label": label, "kind": kind, "sizes": sizes, "budget": None, "budgets": [None],
        "dial": None,
        "test": {**test, "label": label}, "tokens_by_size": tokens,
        "validation": seen(validation, (0.1, 0.9), 1, 1),
        "difference": {"difference": -0.015, "low": -0.034, "high": 0.002},
    }  # fmt: skip


def comparison(question, cost, group, chosen, ratios):
    return {
        "question": question, "group": group, "cost": cost, "budget": None, "reference": "large",
        "chosen": chosen, "validation": {
            "accuracy": 0.5, "reference_accuracy": 0.5, "cost_ratios": ratios,
        } if chosen else None,
        "test": {
            "accuracy": 0.98, "reference_accuracy": 0.995, "cost_ratios": ratios,
        } if chosen else None,
        "difference": {"difference": -0.015, "low": -0.034, "high": 0.002} if chosen else None,
    }  # fmt: skip


RATIOS = {"flops": 0.53, "seconds": 0.92, "weight_bytes": 0.501}


@pytest.fixture
def result():
    """Two sizes alone, a pair and a choice by difficulty, as `evaluation.json` has them."""
    large = seen(0.995, (0.972, 0.999), 0.0317, 318.2e6)
    small = seen(0.98, (0.95, 0.992), 0.0292, 168.6e6, weight_bytes=2.18e8, thinking_tokens=61.0)
    mixed = seen(0.99, (0.964, 0.997), 0.0581, 262.5e6, by_difficulty=True, answer="small")
    pair = seen(0.97, (0.936, 0.986), 0.0444, 477.0e6, answer="small", cut_share=0.25,
                cut_accuracy=0.6)  # fmt: skip
    comparisons = [
        comparison(question, cost, group, chosen, RATIOS)
        for group, chosen in (("any", "small"), ("smaller", "small"), ("pair", None))
        for question, costs in (("equal accuracy", RATIOS), ("equal cost", RATIOS),
                                ("equal tokens", [""]))
        for cost in costs
    ]  # fmt: skip
    dial = {"position": 0.05, "look": "token", "threshold": 0.1928, "token_share": 0.049,
            "line_share": 0.043, "recall": 0.8}  # fmt: skip
    study = {
        "think": "large", "answer": "small", "budget": None, "num_problems": 200,
        "num_handed": 199, "exact_accuracy": 0.97, "handed_accuracy": 0.965,
        "difference": {"difference": -0.005, "low": -0.017, "high": 0.007}, "same_answers": 0.918,
        "mean_divergence": 0.03, "median_divergence": 4.0e-5, "worst_divergence": 3.42,
        "likeness": [
            {"layer": 0, "state": "keys", "cosine": 0.99, "least": 0.9},
            {"layer": 3, "state": "keys", "cosine": 0.93, "least": 0.8},
        ],
    }  # fmt: skip
    return {
        "format_version": FORMAT_VERSION, "package_version": "0", "elastic": "runs/x/run/elastic",
        "command": "star-elastic eval", "settings": {},
        "machine": {"device": "d", "threads": 2, "torch": "t"},
        "problems": {"source": "the bundled tasks", "validation": {"t": 100}, "test": {"t": 200}},
        "thinks": True, "match": {"name": "task", "words": "by a rule"},
        "sizes": {
            "large": {"active": 1_657_792, "total": 2_837_440, "bytes_per_token": 6_385_408,
                      "bandwidth_bound": 1.0},
            "small": {"active": 827_392, "total": 1_085_440, "bytes_per_token": 3_166_208,
                      "bandwidth_bound": 2.0167},
        },
        "calibration": {
            "trace_tokens": {"mean": 63.0, "longest": 116}, "budgets": [None],
            "alike": {"large": [[None]], "small": [[None]]},
            "policies": [{"small": "small", "large": "large", "num_tokens": 100, "num_lines": 10,
                          "differing_share": 0.072, "dials": [dial], "curve": [dial]}],
        },
        "intervals": {"level": 0.95, "resamples": 2000},
        "plans": [
            plan("large", "single", ["large"], {"large": 67.5}, large),
            plan("small", "single", ["small"], {"small": 66.0}, small),
            plan("large>small", "pair", ["large", "small"], {"large": 62.0, "small": 6.0}, pair),
            plan("small~large 5%", "policy", ["small", "large"], {"small": 64.0, "large": 4.0},
                 mixed, validation=0.965),
        ],
        "comparisons": comparisons,
        "reuse": [study, {**study, "answer": "medium", "refused": "other layers"},
                  {**study, "think": "medium", "refused": "other layers"}],
        "answers": {"file": "answers.jsonl", "num_rows": 800, "num_problems": 200,
                    "of_problems": 200, "max_characters": 1000},
        "samples": [{
            "task": "add", "problem": "add 1 2", "expected": "3", "replies": [
                {"plan": "large", "text": "1+2\n</think>\n3", "extracted": "3", "correct": True},
                {"plan": "small", "text": "1+2\n</think>\n", "extracted": None, "correct": False},
            ],
        }],
    }  # fmt: skip


def row_of(table, first: str) -> dict[str, str]:
    """The cells of the row that begins with a text, by column."""
    (row,) = [row for row in table.rows if row[0] == first]
    return dict(zip(table.columns, row, strict=True))


# --- the evaluation's tables -----------------------------------------------------------------


def test_every_plan_in_its_units(result):
    table = plans_table(result)
    assert [row[0] for row in table.rows] == ["small", "small~large 5%", "large", "large>small"]
    assert row_of(table, "small~large 5%") == {
        "plan": "small~large 5%", "accuracy (95%)": "99.0% (96.4 to 99.7)",
        "difference (95%)": "-1.5 (-3.4 to +0.2)", "on validation": "96.5%", "MFLOP": "262.5",
        "ms": "58.1", "MB": "435.0", "thinking tokens": "62", "by the second size": "6%",
        "cut short": "12%",
    }  # fmt: skip
    assert row_of(table, "small")["MB"] == "218.0" and row_of(table, "small")["ms"] == "29.2"
    assert row_of(table, "large>small")["by the second size"] == "9%"
    assert row_of(table, "large")["by the second size"] == ""


def test_a_comparison_has_the_ratios_of_its_costs(result):
    table = comparison_table(result, "equal accuracy", "flops")
    assert table.title.endswith("by counted operations")
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells == {
        "compared with": "large: 99.5%", "plans": "any", "chosen": "small", "accuracy": "98.0%",
        "difference (95%)": "-1.5 (-3.4 to +0.2)", "operations": "0.53×", "time": "0.92×",
        "bytes": "0.50×", "verdict": "47% less, unsure",
    }  # fmt: skip
    assert [row[1] for row in table.rows] == ["any", "smaller alone", "two sizes"]
    assert table.rows[2][2:] == ["–"] * 6 + ["no gain"]
    by_time = comparison_table(result, "equal accuracy", "seconds")
    assert by_time.title.endswith("by measured time")
    assert by_time.rows[0][-1] == "8% less, unsure"


def test_sizes_dials_and_caches(result):
    assert row_of(sizes_table(result), "small") == {
        "size": "small", "active parameters": "827,392", "total parameters": "1,085,440",
        "MB of weights per token": "3.17", "at most as fast": "2.02 times",
    }  # fmt: skip
    (dial,) = calibration_table(result).rows
    assert dial == ["small ~ large", "every token", "5.0%", "0.193", "4.9%", "4.3%", "80.0%"]
    handed, refused, _ = reuse_table(result).rows
    assert handed == [
        "large > small", "none", "97.0%", "96.5%", "-0.5 (-1.7 to +0.7)", "91.8%", "4e-05", "3.4",
    ]  # fmt: skip
    assert refused == ["large > medium", "none", *["–"] * 6]
    assert likeness_table({"reuse": result["reuse"][:1]}).rows == [
        ["large > small", "keys", "0.960", "0.930", "3"]
    ]
    (alone, other) = answers_table(result).rows
    assert alone == ["large", "none", "99.5%", "97.0%", "12.5%", "–", "–"]
    assert other == ["small", "none", "–", "98.0%", "12.5%", "–", "–"]


def test_numbers_in_words():
    assert with_interval({"accuracy": 1.0, "interval": [0.98116, 1.0]}) == "100.0% (98.1 to 100.0)"
    said = [counted(number, "way") for number in (0, 1, 2, 1200)]
    assert said == ["0 ways", "1 way", "2 ways", "1,200 ways"]
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a", "a and b", "a, b and c",
    ]  # fmt: skip


# --- the page --------------------------------------------------------------------------------


def text_of(page: str) -> str:
    """The words of a page."""
    body = page[page.index("<body>") :]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_page_has_the_tables_cell_by_cell(result):
    page = make_page(result)
    for table in (plans_table(result), sizes_table(result), reuse_table(result),
                  comparison_table(result, "equal cost", "weight_bytes")):  # fmt: skip
        for row in table.rows:
            cells = "".join(
                rf'<td[^>]*data-label="{re.escape(escape(column))}">{re.escape(escape(cell))}</td>'
                for column, cell in zip(table.columns, row, strict=True)
            )
            assert re.search(f"<tr>{cells}</tr>", page), row


def test_the_page_says_what_was_done_and_shows_answers(result):
    said = text_of(make_page(result))
    assert said.startswith(
        "Elastic budget control x One checkpoint holds a model in several sizes. A plan says which "
        "size thinks, which one answers, and how many tokens thinking may take (its budget). "
        "4 ways to think and answer with the sizes large and small were tried on problems of the "
        "bundled tasks. The others are compared with large alone. Each plan named here was chosen "
        "on 100 validation problems; its numbers are from 200 test "
        "problems that the choice did not see. In brackets: 95% intervals. Answers are matched by "
        "a rule. In 1.5% of the replies of large it found none. answers.jsonl has what every plan "
        "wrote on 200 test problems (800 rows; 1,000 characters of longer texts)."
    )
    assert "add 1 2 add; the answer is 3 large: right 3 1+2 </think> 3" in said
    assert "small: wrong no answer found" in said
    assert "large > medium and medium > small: other layers" in said
    assert said.count("other layers") == 1
    assert "a difference reaches 1.5 points to both sides: with 200 problems" in said
    assert "small can therefore be at most 2.02 times as fast per token as large" in said


def test_no_sentence_is_said_twice(result):
    """Where nothing was gained, that is said once for all questions alike."""
    for found in result["comparisons"]:
        found["chosen"] = found["test"] = found["validation"] = found["difference"] = None
    said = text_of(re.sub(r"(?s)<table>.*?</table>", "", make_page(result)))
    sentences = [s for s in re.split(r"(?<=[.:;]) ", said) if len(s.split()) > 5]
    assert len(sentences) > 20
    assert {s for s in sentences if sentences.count(s) > 1} == set()


def test_one_plan_is_one_way(result):
    lonely = {
        **result, "plans": result["plans"][:1], "comparisons": [], "reuse": [], "samples": [],
        "sizes": {"large": result["sizes"]["large"]}, "thinks": False,
        "calibration": {**result["calibration"], "policies": []},
        "answers": {**result["answers"], "num_rows": 1, "num_problems": 1, "of_problems": 1},
        "problems": {**result["problems"], "test": {"t": 1}},
    }  # fmt: skip
    said = text_of(make_page(lonely))
    assert "1 way to answer with the size large was tried on problems of" in said
    assert "wrote on 1 test problem (1 row;" in said and "with 1 problem that much" in said
    assert not re.search(r"\b1 (ways|problems|rows|plans)\b", said)
    assert "compared with" not in said and "The comparisons" not in said


def test_nothing_right_is_no_saving(result):
    for own in result["plans"]:
        for split in ("test", "validation"):
            own[split] |= {"accuracy": 0.0, "interval": [0.0, 0.02]}
    for found in result["comparisons"]:
        if found["test"]:
            found["test"] |= {"accuracy": 0.0, "reference_accuracy": 0.0}
            found["difference"] = {"difference": 0.0, "low": -0.015, "high": 0.015}
    said = text_of(make_page(result))
    assert "large has not one problem right, so savings at equal accuracy mean nothing" in said
    assert "47% less" not in said and "none right" in said
    for found in result["comparisons"]:
        if found["test"]:
            found["test"]["accuracy"] = 0.1
    assert "47% less" not in text_of(make_page(result))


def test_report_prints_where_its_files_are(result, tmp_path, capsys):
    (tmp_path / RESULT).write_text(json.dumps(result))
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "report.html"), str(tmp_path / "pareto.png")
    ]  # fmt: skip
    assert (tmp_path / "report.html").read_text() == make_page(result)


# --- the demo's report -----------------------------------------------------------------------


def cells_of(shown: str, first: str) -> list[str]:
    """The cells of a printed row, which stand apart by two spaces at least."""
    (line,) = [line for line in shown.splitlines() if line.strip().startswith(f"{first}  ")]
    return re.split(r"\s{2,}", line.strip())


def test_a_recipe_reports_its_sizes_and_plans(capsys):
    size = {
        "active": 827_392, "active_share": 0.4991, "total": 1_085_440, "total_share": 0.3825,
        "budget_miss": 0.0018, "kl_to_parent": 0.00329, "accuracy": 0.98,
        "interval": [0.9497, 0.9922], "share_of_parent": 0.985, "untrained_accuracy": 0.03,
    }  # fmt: skip
    parent = {"accuracy": 0.995, "interval": [0.9722, 0.9991], "total": 2_837_440,
              "active": 1_657_792}  # fmt: skip
    evaluations = [
        seen(0.98, (0.95, 0.99), 0.0292, 168.6e6, label="small>large@32", thinking_tokens=36.4),
        seen(0.14, (0.1, 0.2), 0.0051, 50.4e6, label="small@0", bytes_per_token=3.166e6),
    ]
    sizes = {"small": size, "big": {**size, "untrained_accuracy": None}}
    report = {"parent": parent, "sizes": sizes, "evaluations": evaluations}
    show(False, report, *report_parts(report))
    shown = capsys.readouterr().out
    assert cells_of(shown, "parent") == ["parent", "1.66M", "2.84M", "99.5% (97.2 to 99.9)"]
    assert cells_of(shown, "small") == [
        "small", "0.83M 49.9%", "1.09M 38.2%", "0.18%", "0.0033", "98.0% (95.0 to 99.2)", "98.5%",
        "3.0%",
    ]  # fmt: skip
    assert cells_of(shown, "big")[-1] == "98.5%"
    assert cells_of(shown, "small@0") == ["small@0", "14.0%", "5.1", "50", "3.17", "62", "12%"]
    assert cells_of(shown, "small>large@32") == [
        "small>large@32", "98.0%", "29.2", "169", "6.40", "36", "12%",
    ]  # fmt: skip
    lines = shown.splitlines()
    assert lines.index(next(line for line in lines if "small@0 " in line)) < lines.index(
        next(line for line in lines if "small>large@32" in line)
    )
    assert "ms/problem" in shown and "MFLOP/problem" in shown and "MB/token" in shown


def test_a_printed_table_is_whole_however_narrow_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    columns = ["a column of text", *(f"number {n}" for n in range(12))]
    print_table("title", columns, [["text " * 6, *("123456789" for _ in range(12))]])
    shown = capsys.readouterr().out
    assert shown.count("123456789") == 12 and "…" not in shown
    assert all(column in shown for column in columns)
