"""What a run tells: lines where there is no terminal, what it will do, how long it takes."""

from __future__ import annotations

import json
import re
import time
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.tensors import SINGLE_NAME, load_tensors
from star_elastic.cli import main
from star_elastic.cli.bars import Lines, OnTerminal, progress_bars
from star_elastic.cost.amounts import show_amount
from star_elastic.cost.latency import save_table
from star_elastic.errors import ConfigError, Interrupted
from star_elastic.models.load import load_parent
from star_elastic.progress import duration
from star_elastic.router.commit import LEARNED
from star_elastic.train import outlook
from star_elastic.train.check import check
from star_elastic.train.config import RouterConfig, StageConfig
from star_elastic.train.inputs import open_inputs
from star_elastic.train.outlook import Outlook, look_ahead
from star_elastic.train.pace import Pace
from star_elastic.train.run import train
from star_elastic.train.stages import Curriculum
from tests.latencies import made_up
from tests.tiny_run import JUDGED, config_in
from tests.watchers import KillIn

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
    with progress_bars() as bars:
        bars.stage("rank", 2)
        bars.advance(2)
        bars.say("a fact")
    shown = capfd.readouterr()
    assert not shown.out and shown.err.splitlines() == [
        "Rank units  2/2, 100%, 0 s in all", "a fact",
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "said"), [(ConfigError, ""), (Interrupted, "Rank units  1/3")])
def test_an_error_is_the_last_line_of_long_work(capfd, error, said):
    """Where the user stops it, it is said how far it came."""
    with pytest.raises(error), progress_bars() as bars:
        bars.stage("rank", 3)
        bars.advance(1)
        raise error("as it is")
    shown = capfd.readouterr().err
    assert shown.startswith(said) and bool(shown) == bool(said)


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
    axis_map = architecture_of(parent).axis_map(parent)
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
    more = config_in(run_folder, "percent", **{"active = 0.7": 'active = "90K"'})
    said = "sizes.small.active='90K' is more than the parent's 59.9K; lower it"
    with pytest.raises(ConfigError, match=said):
        check(more)


@pytest.mark.parametrize(
    ("count", "metric", "said"),
    [
        (134_515_008, "active", "134.5M"), (1.6e9, "bytes", "1.6 GB"), (0.02, "ms", "20 us"),
        (8.514, "ms", "8.514 ms"), (3e9, "flops", "3 GFLOP"), (500, "total", "0.5K"),
    ],
)  # fmt: skip
def test_amounts_in_words(count, metric, said):
    assert show_amount(count, metric) == said


def test_names_of_the_user_are_no_markup_in_bars(capsys):
    """Sizes and files may have brackets in their names."""
    bars = OnTerminal()
    bars.stage("evaluate", 3)
    bars.advance(1, "m[/x] [bold]b")
    bars.bars.refresh()
    bars.bars.stop()
    assert "m[/x] [bold]b" in capsys.readouterr().err


# Before work


def outlook_of(config) -> Outlook:
    return look_ahead(open_inputs(config), torch.device("cpu"))


def test_a_run_says_what_it_will_do(run_folder):
    """On one screen, every number counted."""
    name = "outlook"
    changes = {
        **JUDGED,
        "[engine]": "[[stages]]\ntokens = 1024\ncontext = 64\nbatch_size = 2\n[engine]",
        "active = 0.7": 'total = "70%"',
    }
    config = config_in(run_folder, name, **changes)
    facts = "\n".join(outlook_of(config).facts)
    assert facts.count("\n") < 20
    total = sum(p.numel() for p in load_parent(config.parent)[0].parameters())
    for said in (
        f"{run_folder / name}: 48 steps, 16,384 tokens",
        "stages[0]: 40 steps of 4 windows of 96 tokens, 15,360 tokens",
        "stages[1]: 8 steps of 2 windows of 64 tokens, 1,024 tokens",
        "the router learns for 29 steps (11,136 tokens), then widths are fixed for the other 19",
        "58 of rows.jsonl; 6 others held out",
        "ranking: forward passes over 16 rows of at most 96 tokens",
        "hidden 48 to 24 in 4 widths",
        f"size large: active {show_amount(count_active(config), 'active')} (100.0%)",
        f"size small: total {show_amount(0.7 * total, 'total')} (70.0%)",
        f"elastic/ {show_amount(4 * total, 'bytes')}, state/ {show_amount(12 * total, 'bytes')}",
        f"memory: {show_amount(20 * total, 'bytes')}",
    ):
        assert said in facts, said
    with pytest.raises(Interrupted):
        train(config, progress=(told := KillIn("rank")))
    assert "\n".join(told.lines).startswith(facts)


def count_active(config) -> float:
    checked = check(config)
    return checked.cost.full.active


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"warmup_steps = 2": "warmup_steps = 40"},
            r"stages\[0\].warmup_steps=40 of 40 steps: .* never reaches its peak; leave it out",
        ),
        (
            {"tokens = 15360": "tokens = 100"},
            r"stages\[0\].tokens=100 is less than the 384 tokens of one step, .*; lower batch_size",
        ),
        (
            {},
            f"the router learns for 24 steps, and below {LEARNED} the budgets decide .*; raise sta",
        ),
        ({"batch_size = 4": "batch_size = 65"}, "batch_size=65 windows a step from 58 rows.*lower"),
        (
            {"num_samples = 16": "num_samples = 64", "tokens = 15360": "tokens = 1536"},
            "ranking reads up to 5,568 tokens and training 1,536; lower calibration.num_samples",
        ),
        ({"active = 1.0": "active = 0.9"}, "the largest size, large, has 90.0% .*; add one with"),
        ({"autocast = false": "autocast = true"}, "this CPU has no units .*; leave it out"),
    ],
)
def test_what_looks_wrong_is_told_with_what_to_do(run_folder, changes, said, monkeypatch):
    monkeypatch.setattr(outlook, "multiplies_bf16", lambda device: False)
    warnings = outlook_of(config_in(run_folder, "wrong", **JUDGED, **changes)).warnings
    assert any(re.search(said, line) for line in warnings), warnings
    calm = {"tokens = 15360": "tokens = 384000", "commit_at = 0.6": "commit_at = 0.2"}
    assert not outlook_of(config_in(run_folder, "calm", **calm)).warnings


def test_a_disk_and_a_device_that_are_too_small_are_told(run_folder, monkeypatch):
    config = config_in(run_folder, "small-disk")
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("os.sysconf", lambda name: 1000 if "SIZE" in name else 10)
    warnings = "\n".join(outlook_of(config).warnings)
    assert re.search(r"5 kB are free at .*writes up to .*; make room or name another out", warnings)
    assert re.search(r"training takes .* and there are 10 kB; train on more GPUs", warnings)


def test_room_is_asked_for_the_state_and_for_the_one_that_replaces_it(run_folder, monkeypatch):
    config = config_in(run_folder, "twice")
    parameters = sum(
        tensor.numel() for tensor in load_tensors(run_folder / "parent" / SINGLE_NAME).values()
    )
    weights, state = 4 * parameters, 3 * 4 * parameters  # weights and both moments, in fp32
    for share in (0.98, 1.02):  # the estimate leaves small tensors out
        free = round(share * (weights + 2 * state))
        usage = namedtuple("usage", "total used free")(10**9, 10**9 - free, free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        warned = any("make room" in line for line in outlook_of(config).warnings)
        assert warned == (share < 1)


def test_given_widths_and_a_family_need_no_router(run_folder, trained):
    config = config_in(run_folder, "outlook-family")
    config = replace(config, family=str(trained.elastic), choices={}, router=RouterConfig())
    look = outlook_of(config)
    assert any("widths are given, every size trains as a plain slice" in f for f in look.facts)
    assert not any("router" in line for line in look.warnings)


# While it works


def test_the_pace_is_told_for_each_part():
    stages = (
        StageConfig(tokens=1000, context=10, batch_size=10, size_weights=(1.0,)),
        StageConfig(tokens=4000, context=20, batch_size=10, size_weights=(1.0,)),
    )
    pace = Pace(Curriculum(stages), 5)  # 10 steps of 100 tokens, 20 of 200
    said = {step: pace.after(step, 60.0 if step in (0, 5) else 10.0) for step in range(30)}
    assert {step for step, line in said.items() if line} == {3, 8}
    # 1 step of 100 tokens to learn; 6 of 100 and 20 of 200 in all, at 0.1 s a token
    assert said[3] == (
        "about 10 s until the router has learned (10 s a step), at most 8 min of training in all: "
        "plain slices cost less"
    )
    assert said[8] == "about 7 min of training left (10 s a step)"
    quick = Pace(Curriculum(stages), 0)
    assert not any(quick.after(step, 0.01) for step in range(30))
