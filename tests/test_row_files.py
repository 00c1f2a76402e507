"""Files of rows: what they are, which of them a name stands for, and where a row stands in one."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zipfile

import pytest

from star_elastic.data.row_files import JsonLines, open_rows
from star_elastic.data.row_kinds import find_files
from star_elastic.data.sources import Source
from star_elastic.errors import CheckpointError, ConfigError, RowError, StarElasticError
from star_elastic.evaluate.problems import read_problems
from tests.chat_templates import byte_tokenizer

ROWS = [{"prompt": f"add {n}", "answer": str(n), "completion": "é"} for n in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


# What a file is


def zipped(content: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return file.getvalue()


OTHER_KINDS = {
    "rows.jsonl.gz": (gzip.compress(LINES.encode()), r"is compressed \(gzip\); unpack it"),
    "rows.jsonl.bz2": (bz2.compress(LINES.encode()), r"is compressed \(bzip2\); unpack it"),
    "rows.jsonl.xz": (lzma.compress(LINES.encode()), r"is compressed \(xz\); unpack it"),
    "rows.zst": (b"\x28\xb5\x2f\xfd" + b"\0" * 9, r"is compressed \(zstd\); unpack it"),
    "rows.xlsx": (zipped(LINES), r"is compressed \(zip\); unpack it"),
    "lfs.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a pointer of Git LFS, not the file itself; fetch it",
    ),
    "rows.jsonl": (LINES.encode("utf-16"), "is UTF-16 text; write it as UTF-8: iconv"),
    "plain.jsonl": (LINES.encode("utf-16-le"), "is UTF-16 text; write it as UTF-8: iconv"),
    "one-line.json": (json.dumps(ROWS).encode(), r"is one JSON array; write .* jq -c '\.\[\]' one"),
    "pretty.json": (json.dumps(ROWS, indent=1).encode(), "is one JSON array; write one object a"),
    "object.json": (
        json.dumps(ROWS[0], indent=1).encode(),
        "JSON over several lines; .* jq -c '.'",
    ),
    "rows.csv": (b"prompt,completion\na,b\n", "rows.csv is no JSON; write one JSON object a line"),
    "ROWS.TXT": (b"some words\n", "ROWS.TXT is no JSON; write one JSON object a line"),
    "data.arrow": (b"\xff\xff\xff\xff\x10\0\0\0", "is an Arrow file; name the directory that"),
    "file.arrow": (b"ARROW1\0\0", "is an Arrow file; name the directory that"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_of_another_kind_is_told_as_what_it_is(tmp_path, name):
    """Not as thousands of lines that are to be corrected."""
    content, said = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(content)
    for read in (open_rows, read_problems):
        with pytest.raises(ConfigError, match=said):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + LINES, LINES.replace("\n", "\r\n\r\n"), "\n\n" + LINES, "[1]\n" + LINES,
        '[{"role": "user"}]\n' + LINES, "{\n" + LINES, "{\n" * 3, "[[1\n", "\xff\n", "words\n",
    ],
)  # fmt: skip
def test_json_lines_are_read_as_such(tmp_path, content):
    """With a mark in front, other line ends, or rows that are bad one by one."""
    (tmp_path / "rows.jsonl").write_bytes(content.encode("utf-8"))
    rows = open_rows(tmp_path / "rows.jsonl")
    assert len(rows) > 0
    if "add 39" in content:
        assert rows[len(rows) - 1] == ROWS[-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: good[:-20], "cannot be read (Parquet magic bytes not found in footer."),
        (lambda good: b"", "cannot be read (Parquet file size is 0 bytes)"),
        (lambda good: good[:4] + b"\xff" * 26 + good[30:], "cannot be read ("),
        (None, "has no rows; name files that hold some"),
    ],
    ids=["cut short", "empty", "a page", "no rows"],
)
def test_a_damaged_table_is_one_line(tmp_path, capfd, damage, message):
    """The libraries that read it tell nothing themselves, nor draw progress; their reason is told,
    not that there was one."""
    pytest.importorskip("datasets")
    parquet, pyarrow = (
        importlib.import_module("pyarrow.parquet"),
        importlib.import_module("pyarrow"),
    )
    file = tmp_path / "x.parquet"
    texts = pyarrow.array(["a", "b"] if damage else [], pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), file)
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StarElasticError) as raised:
        Source([file], byte_tokenizer())
    assert message in str(raised.value) and "error occurred while" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_parquet_is_told_by_its_content(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("ROWS.PARQUET", "rows"):
        (tmp_path / name).write_bytes((tmp_path / "rows.parquet").read_bytes())
        assert open_rows(tmp_path / name)[3] == ROWS[3]
    with pytest.raises(ConfigError, match="is a parquet file; write its rows as JSON lines"):
        read_problems(tmp_path / "rows")


# Which files a name stands for


def test_patterns_and_directories_name_files(tmp_path):
    for name in ("b-1.jsonl", "a-0.jsonl", "a-1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "a-9.jsonl").mkdir()
    tokenizer = byte_tokenizer()
    for name, files in (
        (tmp_path / "a-*.jsonl", ["a-0.jsonl", "a-1.jsonl"]),
        (tmp_path, ["a-0.jsonl", "a-1.jsonl", "b-1.jsonl"]),
        (tmp_path / "b-*", ["b-1.jsonl"]),
    ):
        source = Source([name], tokenizer)
        assert [source.content(row)["text"] for row in range(len(source))] == files
        number = f"{len(files)} files" if len(files) > 1 else "1 file"
        ends = " to ".join(dict.fromkeys((files[0], files[-1])))
        assert source.found == [f"{name}: {number}, {ends}"]
        assert source.where(0) == f"{tmp_path / files[0]} line 1"
    assert Source([tmp_path / "b-1.jsonl"], tokenizer).found == []
    (tmp_path / "odd[1].jsonl").write_text("{}")  # a file goes before a pattern
    assert find_files(tmp_path / "odd[1].jsonl") == [tmp_path / "odd[1].jsonl"]


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ([], "none-*.jsonl", r"none-\*.jsonl matches no file; correct the pattern"),
        ([], "none.jsonl", "none.jsonl does not exist; name an existing"),
        (["notes.md"], ".", "holds no dataset; name what save_to_disk wrote"),
        (["a.jsonl", "b.parquet"], ".", r"several kinds, .jsonl, .parquet; .* as .*/\*.jsonl"),
        (["train-0.jsonl", "test-0.jsonl"], ".", r"several splits, test, train; .*, as .*/test\*"),
    ],
)
def test_names_that_stand_for_no_data_are_refused(tmp_path, files, name, said):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=said):
        find_files(tmp_path / name)


def test_shards_of_one_split_belong_together(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "trainer.jsonl", "testimony.jsonl"):
        (tmp_path / name).write_text("{}")
    assert len(find_files(tmp_path)) == 4


# Where a row stands


def test_the_line_of_a_row_is_known_without_reading(tmp_path):
    """Bad rows by the thousand take no longer each than a few."""
    file = tmp_path / "rows.jsonl"
    blank = {1, 2, 5, 9, 10, 11, 30}
    lines = ["" if n in blank else str(n) for n in range(1, 40)]
    file.write_text("\n \n".join(["\n".join(lines), "40"]))
    rows = JsonLines(file)
    assert rows.blank_lines == (*sorted(blank), 40)
    file.unlink()  # nothing of it is read
    numbers = [n for n in range(1, 40) if n not in blank] + [41]
    assert [rows.where(row) for row in range(len(rows))] == [f"{file} line {n}" for n in numbers]


@pytest.mark.parametrize("change", ["emptied", "shortened", "shifted", "moved up", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_told_as_that(tmp_path, change):
    """It is no bad row, which might be left out; and there is no end to wait for."""
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES)
    source = Source([file], byte_tokenizer(), bad_rows="skip")
    last = len(source) - 1
    others = {
        "emptied": "", "shortened": LINES[:100], "shifted": '{"text": "new"}\n' + LINES,
        # What stands there now are rows as good as the old ones.
        "moved up": LINES[LINES.index("\n") + 1 :] + '{"text": "a last one"}\n',
        "rewritten": re.sub(r"[0-9]", "7", LINES),
    }  # fmt: skip
    before = file.stat()
    file.write_text(others[change])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.where(last) == f"{file} line {last + 1}"
    with pytest.raises(CheckpointError, match="rows.jsonl has changed while it was read") as raised:
        source.document(last)
    assert not isinstance(raised.value, RowError)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rows.jsonl cannot be read .*; restore the file"):
        source.document(last)


def test_a_file_that_is_only_touched_is_read_on(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES)
    rows = JsonLines(file)
    os.utime(file, ns=(1, 1))
    with open(file, "a") as stream:
        stream.write('{"text": "more"}\n')
    assert rows[39] == ROWS[39] and len(rows) == 40


def test_a_line_that_was_a_row_may_be_emptied(tmp_path):
    """The other rows keep their numbers; blank lines that were none are none."""
    file = tmp_path / "rows.jsonl"
    lines = ["", *LINES.splitlines(), ""]
    file.write_text("\n".join(lines))
    rows = JsonLines(file)
    begun = {"rows": len(rows), "blank_lines": list(rows.blank_lines)}
    lines[3] = lines[7] = " "
    for behind in ("", "\n\n"):
        file.write_text("\n".join(lines) + behind)
        now = open_rows(file, begun)
        assert len(now) == 40 and now[2] == now[6] == {"text": ""}
        assert [now[n] for n in (0, 3, 39)] == [ROWS[n] for n in (0, 3, 39)]
        assert now.where(39) == f"{file} line 41" and len(open_rows(file)) == 38
        again = {"rows": len(now), "blank_lines": list(now.blank_lines)}
        assert len(open_rows(file, again)) == 40
    del lines[3]
    file.write_text("\n".join(lines))
    assert len(open_rows(file, begun)) == 38  # a line that is gone is no emptied one
