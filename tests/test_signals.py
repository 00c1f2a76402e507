"""Ctrl-C and SIGTERM: answered at once, nothing half written, and a run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from star_elastic.checkpoints.tensors import load_tensors
from star_elastic.cli import main
from star_elastic.data import sources
from star_elastic.demo import write_rows
from star_elastic.errors import CheckpointError, ConfigError, Interrupted
from star_elastic.progress import Silent
from star_elastic.signals import STOPPING, Stoppable, end_quietly, stop_on_signals
from star_elastic.train.run import train
from star_elastic.train.state import has_state
from tests import ranks
from tests.processes import on_ranks, run_code
from tests.tiny_run import config_in
from tests.watchers import KillIn, Stages

ROOT = Path(__file__).parent.parent
BRIEF = {"tokens = 15360": "tokens = 1536", "num_samples = 16": "num_samples = 16\nbatch_size = 4"}
"""4 steps, after 4 of ranking."""


def test_the_first_signal_is_answered_and_asks_for_a_stop():
    said, before = [], [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with stop_on_signals(lambda line: pytest.fail("the inner block has the signals")) as outer:
            with stop_on_signals(said.append) as stop:
                progress = Stoppable(Silent(), stop, lambda: "the end")
                progress.stage("any", 2)
                assert not stop.is_asked
                os.kill(os.getpid(), number)
                with pytest.raises(Interrupted, match="the end"):
                    progress.advance(1)
                progress.advance(2)  # all of the stage is done
                with pytest.raises(Interrupted, match="the end"):
                    progress.stage("next", 2)
            assert not outer.is_asked
    assert said == [STOPPING, STOPPING]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


BUSY = """
import hashlib, sys
from star_elastic.signals import stop_on_signals
with stop_on_signals(lambda line: print(line, flush=True)):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one call that lasts many minutes
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_busy_process_answers_and_ends_on_the_second_signal(number):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.stdout.readline() == STOPPING + "\n"
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=20) == -number
    process.stdout.close()


# Runs


def same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = (load_tensors(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("resume", [False, True], ids=["again", "resume"])
def test_a_run_stopped_while_it_ranked_begins_again(run_folder, resume):
    torch.set_num_threads(1)
    name = f"ranking-{resume}"
    config = config_in(run_folder, name, **BRIEF)
    with pytest.raises(Interrupted, match="stopped before training began; the same command goes"):
        train(config, progress=KillIn("rank"))
    assert files_of(run_folder / name) == {"run.json"}
    result = train(config, resume=resume)
    assert result.steps == 4 and (result.elastic / "elastic.json").is_file()


def test_what_was_ranked_to_the_end_is_kept_for_its_config(run_folder):
    torch.set_num_threads(1)
    config = config_in(run_folder, "ranked", **BRIEF)
    with pytest.raises(Interrupted, match="finished rankings are kept"):
        train(config, progress=KillIn("rank", done=16))
    assert files_of(run_folder / "ranked") == {"run.json", "scores.safetensors"}
    other = {
        "num_samples = 16": "num_samples = 8\nbatch_size = 4",
        "context = 96\n\n[r": "context = 64\n\n[r",
    }
    with pytest.raises(
        ConfigError,
        match=r"calibration.num_samples \(16 then, 8 now\), calibration.context \(96 then, 64 "
        r"now\) differ from the run in .*; put back what changed",
    ):
        train(config_in(run_folder, "ranked", **{**BRIEF, **other}))
    stages = Stages()
    assert train(config, progress=stages).steps == 4
    assert "rank" not in stages.names and "train" in stages.names


def test_a_config_may_change_before_anything_was_measured(run_folder):
    with pytest.raises(Interrupted):
        train(config_in(run_folder, "early", **BRIEF), progress=KillIn("rank"))
    other = config_in(run_folder, "early", **{**BRIEF, "num_samples = 16": "num_samples = 8"})
    with pytest.raises(Interrupted):
        train(other, progress=KillIn("rank", done=8))
    kept = json.loads((run_folder / "early" / "run.json").read_text())
    assert kept["calibration"]["num_samples"] == 8


def test_a_run_stopped_while_it_wrote_goes_on(run_folder):
    torch.set_num_threads(1)
    config = config_in(run_folder, "writing", **BRIEF)
    with pytest.raises(Interrupted, match="stopped; go on with --resume"):
        train(config, progress=KillIn("write"))
    assert not [file for file in files_of(run_folder / "writing") if "elastic" in file]
    result = train(config, resume=True)
    same_weights(result.elastic, train(config_in(run_folder, "whole", **BRIEF)).elastic)


def test_a_directory_that_never_began_is_not_resumed(run_folder):
    config = config_in(run_folder, "unbegun", **BRIEF)
    with pytest.raises(CheckpointError, match="holds no run to go on with; correct out"):
        train(config, resume=True)
    (run_folder / "unbegun").mkdir()
    (run_folder / "unbegun" / "notes").touch()
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="holds something else; name another out"):
            train(config, resume=resume)


# What ends a run saves its state first


class Spoil(Silent):
    """Makes a file of rows unreadable after some steps."""

    def __init__(self, file: Path, step: int):
        self.file, self.step = file, step

    def advance(self, done: int, note: str = "") -> None:
        if note and done == self.step:
            self.file.write_bytes(b"\n" * self.file.stat().st_size)


@pytest.mark.parametrize("committed", [False, True], ids=["router", "plain"])
def test_rows_that_cannot_be_read_lose_no_step(run_folder, tmp_path, committed, monkeypatch):
    """No save was due; restored rows give the run that never failed."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sources, "KEPT_TOKENS", 0)  # as of a source that is too large to be kept
    changes = {"save_every = 16": "save_every = 100", "tokens = 15360": "tokens = 4608"}
    config = config_in(run_folder, f"spoilt-{committed}", **changes)
    rows = tmp_path / "rows.jsonl"
    content = (run_folder / "rows.jsonl").read_bytes()
    rows.write_bytes(content)
    config = replace(config, data=(replace(config.data[0], files=(str(rows),)),))
    step = 9 if committed else 3
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        train(config, progress=Spoil(rows, step))
    saved = json.loads((Path(config.out) / "state" / "state.json").read_text())
    assert saved["step"] >= step and bool(saved["committed"]) == committed
    rows.write_bytes(content)
    result = train(config, resume=True)
    name = "unspoilt"
    if not (run_folder / name).exists():
        train(config_in(run_folder, name, **changes))
    same_weights(result.elastic, run_folder / name / "elastic")


def test_weights_that_are_not_finite_are_not_saved(run_folder):
    config = config_in(run_folder, "unsound", **{"learning_rate = 2e-3": "learning_rate = 1e20"})
    with pytest.raises(CheckpointError, match="lower learning_rate"):
        train(config)
    assert not (run_folder / "unsound" / "state").exists()


# Commands


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """More rows than any command reads within a second."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(file, 20_000, seed=1)
    return file


def kill_when_watched() -> None:
    """Sends this process SIGINT half a second after it began to watch for it."""
    while signal.getsignal(signal.SIGINT) in (signal.default_int_handler, end_quietly):
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("command", ["rank", "quantize", "latency", "sizes", "eval"])
def test_commands_end_with_one_message_and_write_nothing(
    trained, many_rows, tmp_path, capfd, command
):
    elastic, out = trained.elastic, tmp_path / "out"
    options = {
        "rank": ["rank", elastic, "--data", many_rows, "--samples", "20000"],
        "quantize": ["quantize", elastic, "--format", "fp8", "--data", many_rows,
                     "--samples", "20000"],
        "latency": ["latency", elastic, "--seconds", "600"],
        "sizes": ["latency", elastic, "--sizes", "--context", "32", "--seconds", "600"],
        "eval": ["eval", elastic, "--problems", "100", "--budgets", "8,16,none"],
    }[command]  # fmt: skip
    killer = threading.Thread(target=kill_when_watched, daemon=True)
    killer.start()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, options), "--out", str(out)])
    killer.join()
    shown = capfd.readouterr()
    assert ended.value.code == 1 and not shown.out
    lines = shown.err.splitlines()
    assert STOPPING in lines and lines[-1].startswith("stopped")
    assert not out.is_file() and not list(tmp_path.glob(".*"))
    if command != "eval":  # which keeps what it has solved
        assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_while_it_imports_says_so(number, tmp_path):
    """An import that takes long and swallows interrupts, as libraries do."""
    code = (
        "import builtins, os, signal, sys, time\n"
        "original = builtins.__import__\n"
        "def slow(name, *rest):\n"
        "    if name == 'star_elastic.cli.commands':\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        try:\n"
        "            time.sleep(5)\n"
        "        except BaseException:\n"
        "            pass\n"
        "    return original(name, *rest)\n"
        "builtins.__import__ = slow\n"
        "from star_elastic.cli import main\n"
        "main(['count', 'nowhere'])\n"
    )
    done = run_code(code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "stopped\n")


# Ranks


def test_ranks_stop_together_while_they_rank(run_folder):
    config_in(run_folder, "ranks-stop-rank", **BRIEF)
    said = on_ranks(2, ranks.stop_ranking, run_folder / "ranks-stop-rank.toml")
    assert said[0] == said[1] and "the same command goes on" in said[0]
    assert not has_state(run_folder / "ranks-stop-rank")


def test_ranks_stop_together(run_folder):
    """Under torchrun, which hands on the signal that it gets."""
    name = "ranks-stop"
    config_in(run_folder, name, **{"tokens = 15360": "tokens = 384000"})
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "star_elastic.cli", "train", str(run_folder / f"{name}.toml"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    run = run_folder / name
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert said.count(STOPPING) == 1
    assert said.count("go on with --resume") == 1 and has_state(run)
    assert not list(run.glob(".*"))
