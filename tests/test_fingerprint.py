"""What a run was begun with: which files count, how much of the data may be corrected."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from star_elastic.data.sources import Source
from star_elastic.errors import CheckpointError, ConfigError, Interrupted
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.train.fingerprint import (
    SAMPLED_ROWS,
    compare_data,
    digest_model,
    model_files,
    sample_data,
    spread,
)
from star_elastic.train.run import train
from tests.tiny_run import SHORT, StopAt, config_in


class Watcher(StopAt):
    """Asks a run to stop after some steps, and keeps what it says."""

    def __init__(self, step: int = -1):
        super().__init__(step)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


# Models


@pytest.mark.parametrize("limit", [1 << 20, 1000], ids=["whole", "both-ends"])
def test_a_digest_sees_the_content(run_folder, tmp_path, monkeypatch, limit):
    """Another byte first, in the middle (of files that are read whole) or last."""
    monkeypatch.setattr("star_elastic.files.writing.READ_WHOLE", limit)
    monkeypatch.setattr("star_elastic.files.writing.READ_ENDS", 100)
    parent = tmp_path / "parent"
    shutil.copytree(run_folder / "parent", parent)
    known = digest_model(run_folder / "parent")
    assert digest_model(parent) == known
    for name in ("tokenizer.json", "model.safetensors", "chat_template.jinja"):
        content = (parent / name).read_bytes()
        for at in (0, len(content) // 2, -1):
            other = bytearray(content)
            other[at] ^= 1
            (parent / name).write_bytes(other)
            seen = at in (0, -1) or len(content) <= limit
            assert (digest_model(parent) != known) == seen, (name, at)
        (parent / name).write_bytes(content)


def test_only_files_that_loaders_read_count(run_folder, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(run_folder / "parent", parent)
    known = digest_model(parent)
    for stray in (".DS_Store", "README.md", "notes.txt", "adapter_model.safetensors", "a.bin"):
        (parent / stray).write_text("stray")
    (parent / "checkpoint-100").mkdir()
    (parent / "checkpoint-100" / "model.safetensors").write_text("old")
    assert digest_model(parent) == known
    # The index is not read where there is a single file.
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (parent / "model.safetensors.index.json").write_text(json.dumps(index))
    (parent / "model-1.safetensors").write_text("shard")
    assert digest_model(parent) == known
    (parent / "model.safetensors").unlink()
    names = {file.name for file in model_files(parent)}
    assert {"model-1.safetensors", "model.safetensors.index.json", "config.json"} <= names
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    assert "tool_use.jinja" in {file.name for file in model_files(parent)}
    (parent / "model.safetensors.index.json").write_text("{")
    assert digest_model(parent) != known  # and loading it says what is wrong


# Data


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def tokenizer(run_folder):
    return load_tokenizer(run_folder / "parent")


def test_sampled_rows_are_spread_over_a_file():
    assert spread(3) == [0, 1, 2] and spread(SAMPLED_ROWS) == list(range(SAMPLED_ROWS))
    for count in (SAMPLED_ROWS + 1, 1000, 10**9):
        rows = spread(count)
        assert len(set(rows)) == SAMPLED_ROWS and (rows[0], rows[-1]) == (0, count - 1)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 300])
def test_a_corrected_row_is_no_other_data(tmp_path, tokenizer, count):
    """One of few rows, a quarter of many; rows that could not be read may all be corrected."""
    rows = [{"text": f"row {n}"} for n in range(count)]

    def sample(changed, name="rows.jsonl"):
        return sample_data([Source([write(tmp_path / name, changed)], tokenizer)])

    before = sample(rows)
    assert compare_data(before, sample(rows)) == ([], [])
    one = [{"text": "corrected"}, *rows[1:]]
    refused, allowed = compare_data(before, sample(one))
    assert not refused and f"1 of {min(count, 64)} rows looked at have been changed" in allowed[0]
    other = [{"text": f"other {n}"} for n in range(count)]
    if count > 1:
        (refused,), allowed = compare_data(before, sample(other))
        assert f"{min(count, 64)} of {min(count, 64)} looked at" in refused and not allowed
        (refused,), _ = compare_data(before, sample(rows[1:]))
        assert f"({count} then, {count - 1} now)" in refused
    bad = sample([{"text": 3}] * count)
    refused, allowed = compare_data(bad, sample(rows))
    assert not refused and allowed
    assert compare_data(before, before + before)[0] == ["the data's files (1 then, 2 now)"]


def test_a_run_goes_on_with_corrected_rows_and_not_with_others(run_folder, tmp_path):
    """Files may also move; what they hold counts."""
    file = tmp_path / "rows.jsonl"
    lines = (run_folder / "rows.jsonl").read_text().splitlines()
    config = config_in(run_folder, "corrected-rows", **SHORT)

    def with_rows(new: list[str], config=config, to=file):
        to.write_text("\n".join(new) + "\n")
        return replace(config, data=(replace(config.data[0], files=(str(to),)),))

    with pytest.raises(Interrupted):
        train(with_rows(lines), progress=StopAt(3))
    swapped = [line.replace("1", "2").replace("A", "B") for line in lines]
    for new, problem in (
        (swapped, r"the rows of .*rows.jsonl \(\d+ of 64 looked at\) differ from the run"),
        (lines[1:], r"the rows of .*rows.jsonl \(64 then, 63 now\) differ"),
    ):
        with pytest.raises(ConfigError, match=problem + ".*put back what changed, or start anoth"):
            train(with_rows(new), resume=True)
    with pytest.raises(ConfigError, match=r"\(64 then, 65 now\)") as caught:
        train(with_rows([*lines, lines[0]]), resume=True)
    assert "taken out" not in str(caught.value)
    fewer = {"\ncontext = 96\nbatch": "\ncontext = 64\nbatch"}
    with pytest.raises(ConfigError, match=r"context \(96 then, 64 now\)") as caught:
        train(
            with_rows(lines, config_in(run_folder, "corrected-rows", **SHORT, **fewer)), resume=True
        )
    assert "taken out" not in str(caught.value)
    corrected = [json.dumps({"text": "corrected"}), *lines[1:]]
    watcher = Watcher(6)
    with pytest.raises(Interrupted):
        train(with_rows(corrected), resume=True, progress=watcher)
    assert any("1 of 64 rows looked at have been changed" in line for line in watcher.lines)
    again = Watcher()
    moved = with_rows(corrected, to=tmp_path / "moved.jsonl")
    assert train(moved, resume=True, progress=again).steps == 12
    assert not any("looked at" in line for line in again.lines)


def test_rows_that_say_the_same_are_the_same(tmp_path, tokenizer):
    """However JSON spells them, and in whatever order their keys stand."""
    rows = [{"text": f"é {n}", "id": n} for n in range(9)]
    spelled = [
        json.dumps(
            {"id": row["id"], "text": row["text"]}, ensure_ascii=False, separators=(",", ":")
        )
        for row in rows
    ]
    (tmp_path / "other.jsonl").write_text("\n".join(spelled), encoding="utf-8")
    one = sample_data([Source([write(tmp_path / "rows.jsonl", rows)], tokenizer)])
    other = sample_data([Source([tmp_path / "other.jsonl"], tokenizer)])
    assert compare_data(one, other) == ([], [])
    rows[3]["text"] = "e 3"
    third = sample_data([Source([write(tmp_path / "rows.jsonl", rows)], tokenizer)])
    assert "1 of 9 rows" in compare_data(one, third)[1][0]


def test_a_directory_without_measurements_may_begin_anew(run_folder, tmp_path):
    """What stopped the run before anything was measured may be mended in any way."""
    file = tmp_path / "rows.jsonl"
    lines = (run_folder / "rows.jsonl").read_text().splitlines()
    config = config_in(run_folder, "begun", **SHORT)
    config = replace(config, data=(replace(config.data[0], files=(str(file),)),))
    file.write_text("\n".join([lines[0][:20], *lines[1:]]))
    with pytest.raises(CheckpointError, match=r"line 1 is not valid JSON .*; correct the line, ke"):
        train(config)
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(1))


def test_measurements_of_another_run_are_not_taken_over(run_folder):
    name = "measured"
    train(config_in(run_folder, name, **SHORT))
    for left in ("state", "elastic"):
        shutil.rmtree(run_folder / name / left)
    changed = config_in(run_folder, name, **SHORT, **{"context = 96": "context = 64"})
    with pytest.raises(ConfigError, match=r"calibration.context \(96 then, 64 now\) differ from"):
        train(changed)
    (run_folder / name / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="run.json cannot be read .*; start another run in"):
        train(changed)
    (run_folder / name / "run.json").unlink()
    with pytest.raises(CheckpointError, match="holds something else; name another out"):
        train(changed)
