"""What a run tells: lines where there is no terminal, what it will do, how long it takes."""

from __future__ import annotations

import json
import re
import time

import pytest

from star_elastic.amounts import show_amount
from star_elastic.bars import Bars, Lines
from star_elastic.cli import main
from star_elastic.errors import ConfigError
from star_elastic.families import family_of, read_config
from star_elastic.latency import load_table, save_table
from star_elastic.progress import duration
from star_elastic.router.grid import make_grid
from star_elastic.train.check import check, require_covered
from star_elastic.train.run import train
from tests.latencies import made_up
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


# Messages


def test_a_table_that_does_not_cover_the_choices_is_refused(run_folder):
    """Before work: its times would go on beyond what was measured, or stand still."""
    parent = read_config(run_folder / "parent")
    axis_map = family_of(parent).axis_map(parent)
    ms = {"active = 0.7": "ms = 0.9", "[sizes.large]": 'latency = "of-parent.json"\n[sizes.large]'}
    save_table(made_up(axis_map), run_folder / "of-parent.json")
    config = config_in(run_folder, "uncovered", **ms)
    with pytest.raises(
        ConfigError,
        match="covers shared_ffn from 32 to 64, and the choices reach from 24 to 64; measure one "
        "for this run: star-elastic latency --for RUN.toml",
    ):
        train(config)
    assert not (run_folder / "uncovered").exists()
    narrow = {"hidden = [48, 40, 32, 24]": "hidden = [48]"}  # nothing to choose, nothing to cover
    flat = made_up(axis_map, choices={"shared_ffn": config.choices["shared_ffn"]})
    save_table(flat, run_folder / "of-parent.json")
    with pytest.raises(ConfigError, match="covers expert_ffn from 32 to 32, and the choices reach"):
        check(config_in(run_folder, "uncovered", **ms, **narrow))


def test_a_table_for_a_run_covers_it(run_folder, capfd):
    file, table = run_folder / "for-run.toml", run_folder / "for-run.json"
    load = {"[engine]": "[workload]\ncontext = 24\nbatch = 2\n[engine]"}
    config = config_in(run_folder, "for-run", **load)
    main(["latency", "--for", str(file), "--out", str(table), "--seconds", "0", "--json"])
    assert json.loads(capfd.readouterr().out)["ms_per_token"] > 0
    parent = read_config(config.parent)
    axis_map = family_of(parent).axis_map(parent)
    measured = load_table(table, axis_map)
    assert (measured.context, measured.batch) == (24, 2)
    require_covered(measured, make_grid(config.choices, axis_map))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name a checkpoint to measure, or a run config with --for"),
        (["{parent}", "--for", "{run}"], "name a checkpoint to measure, or a run config"),
        (["--for", "{run}", "--sizes"], "--sizes measures an elastic checkpoint"),
        (["--for", "{folder}"], "is a directory; name a run config, which is a TOML file, for ex"),
    ],
)
def test_what_to_measure_is_named_once(run_folder, tmp_path, capfd, options, said):
    names = {"parent": run_folder / "parent", "run": run_folder / "run.toml", "folder": run_folder}
    with pytest.raises(SystemExit) as ended:
        main(["latency", "--out", str(tmp_path / "t.json"), *(o.format(**names) for o in options)])
    assert ended.value.code == 2 and said in capfd.readouterr().err


def test_shares_may_be_percentages(run_folder):
    config = config_in(run_folder, "percent", **{"active = 0.7": 'active = "70%"'})
    assert check(config).budgets["small"] == {"active": pytest.approx(0.7)}
    for wrong, said in (("170%", "is more than the parent"), ("x%", "is not a percentage; write")):
        with pytest.raises(ConfigError, match=said):
            config_in(run_folder, "percent", **{"active = 0.7": f'active = "{wrong}"'})


@pytest.mark.parametrize(
    ("count", "metric", "said"),
    [
        (134_515_008, "active", "134.5M"), (1.6e9, "bytes", "1.6 GB"), (0.02, "ms", "20 us"),
        (8.514, "ms", "8.514 ms"), (3e9, "flops", "3 GFLOP"), (500, "total", "0.5K"),
    ],
)  # fmt: skip
def test_amounts_in_words(count, metric, said):
    assert show_amount(count, metric) == said
