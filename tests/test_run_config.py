"""The run config explains itself: its reference, its defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from star_elastic.cli import main
from star_elastic.train.config import RunConfig, parse
from star_elastic.train.curriculum import Curriculum
from star_elastic.train.reference import keys, reference, sections

ROOT = Path(__file__).parent.parent
SECTIONS = dict(sections(RunConfig))


def test_the_page_is_made_from_the_config(capsys):
    page = (ROOT / "docs" / "run_config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: star-elastic config > docs/run_config.md"
    main(["config"])
    assert capsys.readouterr().out == page


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_says_what_it_does(title):
    kind = SECTIONS[title]
    told = keys(kind)
    assert [key.name for key in told] == [field.name for field in dataclasses.fields(kind)]
    for key in told:
        assert key.note.endswith("."), f"{title} {key.name}: say below it what it does"
        if key.default == "must be given":
            assert key.start, f"{title} {key.name}: say what to start with"


def test_every_table_has_its_section():
    assert {"At the top", "`[[data]]`", "`[[stages]]`", "`[router.annealing]`"} <= set(SECTIONS)
    assert len(SECTIONS) == len(set(SECTIONS.values())) == 10


def run(**stage):
    content = {
        "parent": "p", "out": "o", "sizes": {"large": {"active": 1.0}},
        "data": [{"files": ["rows.jsonl"]}], "stages": [{"context": 64, "batch_size": 2, **stage}],
    }  # fmt: skip
    return parse(RunConfig, content, "")


@pytest.mark.parametrize(("steps", "warm"), [(4, 0), (28, 3), (150, 15), (600, 60), (5000, 60)])
def test_the_learning_rate_reaches_its_peak_in_short_runs(steps, warm):
    """By default; what is asked for is done."""
    (stage,) = run(tokens=128 * steps, learning_rate=1e-3).stages
    assert (stage.num_steps, stage.warmup_steps) == (steps, warm)
    rates = [Curriculum([stage]).learning_rate(step) for step in range(steps)]
    assert max(rates) > 0.97e-3
    assert run(tokens=128 * steps, warmup_steps=7).stages[0].warmup_steps == 7
