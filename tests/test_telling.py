"""What a run tells: lines where there is no terminal, what it will do, how long it takes."""

from __future__ import annotations

import json
import re
import time

import pytest

from star_elastic.bars import Bars, Lines
from star_elastic.cli import main
from star_elastic.progress import duration
from tests.tiny_run import config_in

# Lines where there is no terminal


def test_a_line_soon_then_now_and_then_and_one_at_the_end():
    written = []
    lines = Lines(written.append, first=0.1, every=0.4)
    lines.stage("train", 10)
    lines.advance(4)  # where a run goes on
    time.sleep(0.2)  # while a unit lasts, too
    assert len(written) == 1 and written[0] == "Train sizes  4/10, 40%"
    lines.advance(6, "KD 0.1")
    assert len(written) == 1
    time.sleep(0.5)
    assert len(written) == 2
    assert re.fullmatch(r"Train sizes  6/10, 60%, about \d s left, KD 0.1", written[1])
    lines.say("a fact")
    lines.stage("slice", 3)  # ends the one before
    assert written[2:] == ["a fact", "Train sizes  6/10, 60%, 1 s in all, KD 0.1"]
    lines.advance(3)
    assert written[4] == "Slice  3/3, 100%, 0 s in all"
    lines.close()
    time.sleep(0.15)
    assert len(written) == 5


def test_the_time_left_is_that_of_the_units_left():
    written = []
    lines = Lines(written.append, first=1.2, every=60)
    lines.stage("rank", 130)
    time.sleep(0.6)  # before the first unit: not counted
    lines.advance(120)
    time.sleep(0.5)
    lines.advance(125)
    time.sleep(0.3)
    (line,) = written
    assert 0 <= int(re.search(r"about (\d) s left", line)[1]) <= 1
    lines.close()


def test_bars_are_for_terminals_only(capfd):
    with Bars() as bars:
        bars.stage("rank", 2)
        bars.advance(2)
        bars.say("a fact")
    shown = capfd.readouterr()
    assert not shown.out and shown.err.splitlines() == [
        "Rank units  2/2, 100%, 0 s in all", "a fact",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (119, "119 s"), (130, "2 min"), (5400, "90 min"), (7500, "2 h 05 min")],
)
def test_times_in_words(seconds, said):
    assert duration(seconds) == said


def test_train_prints_one_object_and_lines(run_folder, capfd):
    config_in(run_folder, "lines", **{"tokens = 15360": "tokens = 1536"})
    main(["train", str(run_folder / "lines.toml"), "--json"])
    shown = capfd.readouterr()
    assert json.loads(shown.out)["steps"] == 4
    lines = shown.err.splitlines()
    assert any(line.startswith("Rank units  16/16") for line in lines)
    assert any(line.startswith("Train sizes  4/4, 100%") for line in lines)
    assert not re.search(r"[\x1b\r━]", shown.err)
