"""No figure of README.md and docs/results.md differs from the file that it is of."""

from __future__ import annotations

import re

import pytest

from tests import facts, figures

README = (figures.ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (figures.ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def plain(text: str) -> str:
    """In one line, without bold."""
    return " ".join(text.replace("**", "").split())


def tables(text: str) -> dict[str, list[list[list[str]]]]:
    """The rows of every table, without its head, by the heading it stands under."""
    found: dict[str, list[list[list[str]]]] = {}
    heading, rows = "", None
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            rows = None
            continue
        if rows is None:
            rows = []
            found.setdefault(heading, []).append(rows)
        rows.append([cell.strip().replace("**", "") for cell in line.strip("|").split("|")])
    return {heading: [rows[2:] for rows in own] for heading, own in found.items()}


EXPECTED = facts.results_tables()


@pytest.mark.parametrize("heading", EXPECTED)
def test_tables_are_those_of_their_files(heading):
    shown = tables(RESULTS)[heading]
    assert len(shown) == len(EXPECTED[heading])
    for rows, expected in zip(shown, EXPECTED[heading], strict=True):
        assert [row[: len(own)] for row, own in zip(rows, expected, strict=True)] == expected


def test_the_first_results_of_the_readme_are_those_of_the_hour():
    assert tables(README)["Results"][0] == figures.sizes_of_recipe("hour")


@pytest.mark.parametrize("fact", facts.readme_facts())
def test_the_readme_says_what_was_measured(fact):
    assert plain(fact) in plain(README)


@pytest.mark.parametrize("fact", facts.results_facts())
def test_the_results_say_what_was_measured(fact):
    assert plain(fact) in plain(RESULTS)


@pytest.mark.parametrize("command", facts.commands())
def test_every_file_has_its_command_beside_it(command):
    assert command.removesuffix(" --smoke") in plain(RESULTS)


def test_every_file_is_told_of():
    names = {file.name for file in (figures.ROOT / "results").iterdir()}
    told = set(re.findall(r"results/([\w.]+\.\w+)", RESULTS + README))
    assert told == names


def test_no_accuracy_is_without_width():
    """An accuracy of 100 % is not known to be 100 %."""
    for text in (README, RESULTS):
        assert "± 0.0 %" not in re.sub(r"^\| (FP8|BF16|NVFP4).*$", "", text, flags=re.M)


def test_the_readme_can_be_read_at_a_sitting():
    assert len(README.splitlines()) <= 130
