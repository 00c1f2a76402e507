"""Rows of a run: bad ones are found, stop it or are left out; what counts is as configured."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from star_elastic.architectures import read_config
from star_elastic.checkpoints.tensors import load_tensors
from star_elastic.data.sources import ShuffledEpochs, Source, first_documents, open_sources
from star_elastic.demo import write_rows
from star_elastic.errors import CheckpointError, ConfigError, Interrupted, RowError
from star_elastic.models.load import load_parent
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.progress import Silent
from star_elastic.train.calibrate import Calibration
from star_elastic.train.check import beyond_positions, ranking_context
from star_elastic.train.directory import MAY_CHANGE
from star_elastic.train.distributed import World
from star_elastic.train.packing import PackedStream
from star_elastic.train.row_check import check_rows, require_lessons, warn_of_rows
from star_elastic.train.run import train
from star_elastic.train.stages import Position
from tests import ranks
from tests.chat_templates import CHATML, byte_tokenizer
from tests.processes import on_ranks, require_well_formed, run_command
from tests.tiny_run import SHORT, StopAt, build_trainer, config_in, metrics

NUM_ROWS = 400
LANE, PLACE = 3, 22
"""The bad row is the 22nd that lane 3 reads, which of two ranks the second one trains."""
BAD = ShuffledEpochs(NUM_ROWS, "0/0/0").row(LANE + 4 * PLACE)
FIXED = {
    **SHORT,
    "active = 0.7": "active = 0.6356",
    "[router]": '[router.fixed]\nlarge = "hidden=48"\nsmall = "hidden=32,top_k=1"\n[router]',
}


STOPS = range(1000)
"""Generation stops at every token: where it would not is told in a test of its own."""


class Watcher(StopAt):
    """Keeps what a run says."""

    def __init__(self, step: int = -1):
        super().__init__(step)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Rows as JSON lines, all good."""
    file = tmp_path_factory.mktemp("many") / "rows.jsonl"
    write_rows(file, NUM_ROWS, seed=1)
    return file.read_text().splitlines()


@pytest.fixture(scope="module")
def good(run_folder, lines):
    """A run on the good rows."""
    return train(make(run_folder, "good", lines))


def make(folder, name, rows, *, bad_rows="stop"):
    """A run config of its own rows."""
    (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    files = f'files = ["{name}.jsonl"]\nbad_rows = "{bad_rows}"'
    return config_in(folder, name, **FIXED, **{'files = ["rows.jsonl"]': files})


def broken(lines):
    return [*lines[:BAD], lines[BAD][:25], *lines[BAD + 1 :]]


def same_run(one, other):
    a, b = (load_tensors(run.elastic / "model.safetensors") for run in (one, other))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_bad_row_stops_a_run_which_goes_on_when_it_is_corrected(run_folder, lines, good):
    """With nothing lost: the weights are those of a run that never stopped."""
    config = make(run_folder, "stops", broken(lines))
    with pytest.raises(CheckpointError) as raised:
        train(config)
    assert f"stops.jsonl line {BAD + 1} is not valid JSON" in str(raised.value)
    advice = "correct the line, keeping one row a line, and go on with --resume, or set bad_rows ="
    assert advice in str(raised.value)
    steps = len((run_folder / "stops" / "metrics.jsonl").read_text().splitlines())
    saved = json.loads((run_folder / "stops" / "state" / "state.json").read_text())
    assert 0 < saved["step"] == steps < 12
    with pytest.raises(CheckpointError, match=f"line {BAD + 1}"):
        train(config, resume=True)
    make(run_folder, "stops", lines)
    same_run(train(config, resume=True), good)


@pytest.mark.parametrize("how", ["emptied", "joined"])
def test_a_run_goes_on_however_its_bad_row_was_corrected(run_folder, lines, how):
    """By emptying the line, or by joining two lines that were one row. A line that is gone is told,
    with what to do."""
    halves = [lines[BAD][:25], lines[BAD][25:]] if how == "joined" else [lines[BAD][:25]]
    before, after = lines[:BAD], lines[BAD + 1 : len(lines) + 1 - len(halves)]
    mended = [*before, *(["", lines[BAD]] if how == "joined" else [""]), *after]
    name = f"mended-{how}"
    with pytest.raises(CheckpointError, match=r"is not valid JSON .*leaves its line empty"):
        train(make(run_folder, name, [*before, *halves, *after]))
    assert (run_folder / name / "state").exists()
    if how != "spelled anew":
        config = make(run_folder, name, [line for line in mended if line])
        with pytest.raises(
            ConfigError, match=r"now\) differ .*that is taken out leaves its line em"
        ):
            train(config, resume=True)
    config = make(run_folder, name, mended)
    with pytest.raises(Interrupted):
        train(config, resume=True, progress=StopAt(11))
    result = train(config, resume=True)
    assert result.steps == 12 and metrics(result)[-1]["rows_skipped"] == 0


def test_a_bad_row_may_be_left_out_from_then_on(run_folder, lines):
    with pytest.raises(CheckpointError, match=f"line {BAD + 1}"):
        train(make(run_folder, "skips", broken(lines)))
    watcher = Watcher()
    config = make(run_folder, "skips", broken(lines), bad_rows="skip")
    result = train(config, resume=True, progress=watcher)
    skipped = [row["rows_skipped"] for row in metrics(result)]
    assert len(skipped) == 12 and skipped[0] == 0 and skipped[-1] == 1
    (line,) = [line for line in watcher.lines if "left out" in line]
    assert f"skips.jsonl line {BAD + 1} is not valid JSON" in line


def test_a_state_remembers_how_many_rows_were_left_out(run_folder, lines):
    config = make(run_folder, "skipped", broken(lines), bad_rows="skip")
    straight = train(config)
    again = make(run_folder, "skipped-again", broken(lines), bad_rows="skip")
    with pytest.raises(Interrupted):
        train(again, progress=StopAt(10))
    resumed = train(again, resume=True)
    same_run(straight, resumed)
    counts = [[row["rows_skipped"] for row in metrics(run)] for run in (straight, resumed)]
    assert counts[0] == counts[1] and counts[0][-1] == 1


def test_a_bad_row_of_one_rank_ends_all_of_them(run_folder, lines, good):
    """In one line, with their state saved, from which any number of ranks goes on."""
    config = make(run_folder, "on-ranks", broken(lines))
    first, second = on_ranks(2, ranks.refused, run_folder / "on-ranks.toml", timeout=120)
    assert first == second and f"on-ranks.jsonl line {BAD + 1} is not valid JSON" in first
    assert "go on with --resume" in first
    saved = json.loads((run_folder / "on-ranks" / "state" / "state.json").read_text())
    assert 0 < saved["step"] < 12
    # The second rank has left it out, the first one tells.
    shutil.copytree(run_folder / "on-ranks", run_folder / "skip-on-ranks")
    make(run_folder, "skip-on-ranks", broken(lines), bad_rows="skip")
    said, unsaid = on_ranks(2, ranks.told, run_folder / "skip-on-ranks.toml", timeout=120)
    assert any(f"skip-on-ranks.jsonl line {BAD + 1} is not valid JSON" in line for line in said)
    assert not unsaid
    make(run_folder, "on-ranks", lines)
    result = train(config, resume=True)
    for ours, theirs in zip(metrics(result), metrics(good), strict=True):
        assert ours["num_tokens"] == theirs["num_tokens"]
        assert ours["kd"] == pytest.approx(theirs["kd"], rel=1e-3)


def test_a_bad_row_is_met_before_training(run_folder, lines):
    """Ranking reads the first rows: nothing is measured, and the run begins anew when it is
    corrected."""
    rows = ["{", *lines[1:]]
    with pytest.raises(CheckpointError, match=r"line 1 is not valid .*; correct the line, keeping"):
        train(make(run_folder, "first", rows))
    assert {file.name for file in (run_folder / "first").iterdir()} == {"run.json"}
    with pytest.raises(Interrupted):
        train(make(run_folder, "first", lines[:-1]), progress=StopAt(1))
    config = make(run_folder, "first-left-out", rows, bad_rows="skip")
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(1))


def test_all_rows_bad_is_no_run(run_folder):
    for bad_rows, problem in (
        ("stop", "line 1 is not valid JSON"),
        ("skip", "has no row that can be read, bad ones left out .the first: .* line 1 is not v"),
    ):
        config = make(run_folder, f"all-bad-{bad_rows}", ["{"] * 9, bad_rows=bad_rows)
        with pytest.raises(CheckpointError, match=problem):
            train(config)


def test_rows_are_checked_before_a_run(run_folder, lines, tmp_path):
    """Every one of them; nothing is trained or written."""
    bad = [n for n in range(NUM_ROWS) if n % 16 == 7]
    rows = [line[:25] if n in bad else line for n, line in enumerate(lines)]
    make(run_folder, "checked", rows, bad_rows="skip")
    before = sorted(run_folder.iterdir())
    done = run_command("train", run_folder / "checked.toml", "--check")
    assert done.returncode == 2
    error = require_well_formed(done.stderr.splitlines()[-1])
    assert f"error: {len(bad)} of {NUM_ROWS} rows cannot be read (the first: " in error
    assert error.count("error: ") == 1 == done.stderr.count("error: ")
    told = done.stdout.splitlines()
    assert [line.split()[2] for line in told[:20]] == [str(n + 1) for n in bad[:20]]
    assert told[20] == f"... and {len(bad) - 20} more"
    assert told[21].startswith(f"{NUM_ROWS} rows, {len(bad)} of them bad; ")
    assert told[22] == "stages[0]: 86 rows are cut, 0 teach nothing"
    done = run_command("train", run_folder / "checked.toml", "--check", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 2 and found["bad"] == len(bad) and len(found["problems"]) == 20
    assert sorted(run_folder.iterdir()) == before and not (run_folder / "checked").exists()

    make(run_folder, "checked", [*lines[:2], json.dumps({"text": "1" * 150})])
    done = run_command("train", run_folder / "checked.toml", "--check")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()
    assert last[0].startswith("3 rows, 0 of them bad; ")
    assert last[1] == "stages[0]: 1 rows are cut, 0 teach nothing"


def test_a_prompt_that_fills_the_context_teaches_nothing(run_folder):
    """As training leaves it out, stage by stage; a token more of the context, and it counts."""
    rows = [json.dumps({"prompt": "1" * 100, "completion": "2"}), '{"text": ""}', '{"text": "3"}']
    config = make(run_folder, "full", rows)
    tokenizer = load_tokenizer(config.parent)
    source = Source(config.data[0].files, tokenizer, "answers")
    num_prompt = source.document(0).first + 1
    assert num_prompt == 100
    found = check_rows([source], [99, 100, 101], Silent(), STOPS)
    assert found.left_out == [2, 1, 1] and found.cut == [1, 1, 0]
    assert found.lines()[1] == "stages[0]: 1 rows are cut, 2 teach nothing"


def check_of(config):
    """What the rows of a run config are, and its sources."""
    tokenizer = load_tokenizer(config.parent)
    sources = open_sources(config.data, tokenizer, len(tokenizer), config.seed)
    contexts = [stage.context for stage in config.stages]
    return check_rows(sources, contexts, Silent(), STOPS), sources


@pytest.mark.parametrize("held_out", [False, True])
def test_a_source_that_teaches_nothing_is_told_before_work(run_folder, tmp_path, held_out):
    """By the check, and by a run before it ranks; also if only what is held out would teach."""
    long = json.dumps({"prompt": "1" * 200, "completion": "2"})
    rows = [long] * 20
    if held_out:
        rows[ShuffledEpochs(20, "0/0/1").row(19)] = '{"prompt": "1", "completion": "2"}'
    (tmp_path / "idle.jsonl").write_text("\n".join(rows))
    data = f'files = ["rows.jsonl"]\n[[data]]\nfiles = ["{tmp_path / "idle.jsonl"}"]'
    stage = "[[stages]]\ntokens = 4096\ncontext = 256\nbatch_size = 2\n[engine]"
    name = f"idle-{held_out}"
    config = config_in(
        run_folder, name,
        **{
            **FIXED, 'files = ["rows.jsonl"]': data, "[engine]": stage,
            "held_out = 0": "held_out = 1",
        },
    )  # fmt: skip
    found, sources = check_of(config)
    (line,) = found.idle
    assert "idle.jsonl has no row with a token to learn from within stages[0].context=96" in line
    assert not found.bad and not found.is_sound and line in found.lines()
    with pytest.raises(
        CheckpointError, match=r"idle.jsonl has no row .* within stages\[0\].contex"
    ):
        require_lessons(sources, {0: 96, 1: 256}, Silent())
    with pytest.raises(
        CheckpointError, match=r"idle.jsonl has no row .* within stages\[0\].contex"
    ):
        train(config, progress=(watcher := Watcher()))
    assert {file.name for file in (run_folder / name).iterdir()} == {"run.json"}
    assert not watcher.lines


def test_a_check_of_idle_rows_fails(run_folder):
    make(run_folder, "idle", [json.dumps({"prompt": "1" * 200, "completion": "2"})] * 20)
    done = run_command("train", run_folder / "idle.toml", "--check")
    assert done.returncode == 2 and "20 rows, 0 of them bad" in done.stdout
    assert "20 teach nothing" in done.stdout and "no row with a token to learn" in done.stdout
    last = require_well_formed(done.stderr.splitlines()[-1])
    assert "has no row with a token to learn" in last


QUOTED = {
    "half": (r'{"\ud83d": 1}', r"has the keys \ud83d; give text"),
    "line end": (r'{"a\nb": 1}', r"has the keys a\nb; give text"),
    "colour": (r'{"\u001b[31m\u2028\u202e": 1}', r"keys \x1b[31m\u2028\u202e; give text"),
    "long": (json.dumps({"k" * 200_000: 1}), "kkk ... kkk"),
    "role": (r'{"messages": [{"role": "\ud83d", "content": "b"}]}', r"of the role"),
}


@pytest.mark.parametrize("kind", QUOTED)
def test_what_is_quoted_of_a_row_is_one_line_that_can_be_printed(run_folder, kind):
    row, said = QUOTED[kind]
    config = make(run_folder, f"quoted-{kind.replace(' ', '-')}", [row] * 10)
    found, _ = check_of(config)
    (line, *_) = found.problems
    assert said in line and line.isprintable() and line.encode() and len(line) < 800
    assert ".jsonl line 1 " in line and ";" in line.rpartition(said)[2] + said  # with what to do


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_characters_that_tokens_do_not_say_are_told(tmp_path, unknown):
    """Once for a source; what normalisers may change is no loss."""
    letters = "abcdefghijklmnopqrstuvwxyz ?."
    vocab = {token: n for n, token in enumerate(["<s>", "</s>", "<unk>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unknown))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token=unknown
    )
    rows = [{"text": "Déjà  vu?\n"}, {"prompt": "Price? ", "completion": "It is € 5."}]
    rows += [{"text": "ﬁne"}, {"text": "5"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "2 of 4 rows looked at have characters that their tokens do not say (the first, '5€' in"
    (line,) = warn_of_rows(Source([tmp_path / "rows.jsonl"], tokenizer), STOPS)
    assert line.startswith(said) and "rows.jsonl line 2)" in line
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[2]))
    assert warn_of_rows(Source([tmp_path / "rows.jsonl"], tokenizer), STOPS) == []


def test_lost_characters_are_told_by_check_and_run(run_folder, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda source, document: "")
    config = config_in(run_folder, "lost", **FIXED)
    found, _ = check_of(config)
    (line,) = found.warnings
    assert line.startswith("64 of 64 rows looked at have characters") and found.is_sound
    assert f"warning: {line}" in found.lines()
    watcher = Watcher(1)
    with pytest.raises(Interrupted):
        train(config, progress=watcher)
    assert f"warning: {line}" in watcher.lines


# What counts, and of which source


@pytest.mark.parametrize("again", ["rows.jsonl", "r?ws.jsonl", "./rows.jsonl", "link.jsonl"])
def test_a_file_whose_rows_judge_is_named_once(run_folder, again):
    """By a pattern, another path or a link it would be named twice; and in another source."""
    link = run_folder / "link.jsonl"
    link.exists() or link.symlink_to("rows.jsonl")
    one, out = 'files = ["rows.jsonl"]\nloss_on = "answers"\nheld_out = 0', "held_out = 4"
    within = f'files = ["rows.jsonl", "{again}"]\n{out}'
    beside = f'files = ["rows.jsonl"]\nheld_out = 0\n[[data]]\nfiles = ["{again}"]\n{out}'
    for data in (within, beside, beside.replace("held_out = 0", "held_out = 9")):
        with pytest.raises(ConfigError, match="named twice .* name it once"):
            check_of(config_in(run_folder, "twice", **FIXED, **{one: data}))
    apart = beside.replace(out, "held_out = 0")
    found, _ = check_of(config_in(run_folder, "twice", **FIXED, **{one: apart}))
    assert found.rows == 128


def test_prompts_that_generation_writes_otherwise_are_told(run_folder, tmp_path):
    """With a chat template it puts every prompt into a turn; a row of plain text has none."""
    row = {"prompt": "add 12 34", "completion": " 46"}
    (tmp_path / "plain.jsonl").write_text((json.dumps(row) + "\n") * 3)
    tokenizer = load_tokenizer(run_folder / "parent")
    (line,) = warn_of_rows(Source([tmp_path / "plain.jsonl"], tokenizer), STOPS)
    assert line.startswith("3 of 3 rows looked at are a prompt and a completion in plain text (the")
    assert "plain.jsonl line 1)" in line and "write them as messages" in line
    assert warn_of_rows(Source([run_folder / "rows.jsonl"], tokenizer), STOPS) == []
    tokenizer.chat_template = None
    assert warn_of_rows(Source([tmp_path / "plain.jsonl"], tokenizer), STOPS) == []


def test_rows_that_end_where_generation_does_not_are_told(tmp_path):
    """As Llama 3's, whose EOS ends a text and <|eot_id|> a turn, where no file names that."""
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
    parts = {"role": "assistant", "content": [{"type": "text", "text": "b."}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 3)
    for template in (CHATML.replace("<|im_end|>", "<|eot|>"), CHATML):
        tokenizer = byte_tokenizer(template)
        ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot|>")]
        source = Source([tmp_path / "rows.jsonl"], tokenizer)
        assert warn_of_rows(source, ids) == []
        lines = warn_of_rows(source, ids[:1])
        assert len(lines) == (template != CHATML), lines
        for line in lines:
            assert line.startswith("3 of 3 rows looked at end their last turn with <|eot|> (the")
            assert "rows.jsonl line 1)" in line and "generation_config.json" in line
    # However a row writes its messages.
    rows = [{"messages": json.dumps(talk)}, {"messages": [*talk[:1], parts]}, {"text": "b."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    template = CHATML.replace("<|im_end|>", "<|eot|>")
    (line,) = warn_of_rows(Source([tmp_path / "rows.jsonl"], byte_tokenizer(template)), ())
    assert line.startswith("2 of 3 rows looked at end their last turn with <|eot|>")
    # Neither the end of another's turn nor a word of the row is an end of the assistant's.
    rows = [talk[:1], [*talk[:1], {"role": "assistant", "content": "b <tool>"}]]
    no_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'user' %}<|eot|>"
    no_end += "{% endif %}{% endfor %}"
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": r}) for r in rows))
    assert warn_of_rows(Source([tmp_path / "rows.jsonl"], byte_tokenizer(no_end)), ()) == []


def test_why_a_source_teaches_nothing_is_so(run_folder, tmp_path):
    """Neither a longer context nor shorter prompts would mend rows that are bad, or empty."""
    bad, empty = '{"conversations": []}', '{"text": ""}'
    for rows, problem in (
        ([bad] * 3, r"no row that can be read, bad ones left out \(the first: .* line 1 "),
        ([empty] * 3, "however long the context is: its texts or answers are empty"),
        ([bad, empty], "however long the context is"),
    ):
        (tmp_path / "idle.jsonl").write_text("\n".join(rows))
        data = f'files = ["{tmp_path / "idle.jsonl"}"]\nbad_rows = "skip"'
        config = config_in(run_folder, "why-idle", **{**FIXED, 'files = ["rows.jsonl"]': data})
        found, sources = check_of(config)
        assert re.search(problem, found.idle[0]), found.idle
        with pytest.raises(CheckpointError, match=problem):
            require_lessons(sources, {0: 96}, Silent())


def test_a_run_that_has_a_state_is_told_to_go_on(run_folder, lines):
    """Whatever row is bad, and when that is found: here one that is held out, before work."""
    name = "held-out-bad"
    config = make(run_folder, name, lines)
    config = replace(config, data=(replace(config.data[0], held_out=1),))
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(2))
    (row,) = open_sources(config.data, load_tokenizer(config.parent), 1000)[0].held_out
    damaged = [line if n != row else line[:25] for n, line in enumerate(lines)]
    Path(config.data[0].files[0]).write_text("\n".join(damaged) + "\n")
    with pytest.raises(CheckpointError, match=rf"line {row + 1} .* and go on with --resume"):
        train(config, resume=True)


def test_what_a_bad_row_is_told_to_change_may_change():
    """Its message goes on with: and go on with --resume."""
    files = (Path(__file__).parent.parent / "star_elastic/data").glob("*.py")
    texts = [file.read_text() for file in files]
    # Words of messages, not of imports.
    advised = {key for text in texts for key in re.findall(r"(?<!elastic\.)\bdata\.(\w+)", text)}
    assert advised >= {"notes"}
    assert all(MAY_CHANGE.fullmatch(f"data[0].{key}") for key in advised | {"bad_rows"})


def test_a_run_that_stopped_at_a_row_goes_on_with_notes(run_folder, lines):
    noted = json.dumps({**json.loads(lines[BAD]), "solution": "seven and two"})
    rows = [*lines[:BAD], noted, *lines[BAD + 1 :]]
    with pytest.raises(CheckpointError, match=r"name it in data.notes.*go on with --resume"):
        train(make(run_folder, "noted", rows))
    config = make(run_folder, "noted", rows)
    config = replace(config, data=(replace(config.data[0], notes=("solution",)),))
    assert train(config, resume=True).steps == 12


def test_loss_on_answers_counts_less(run_folder):
    """From the run config to the log of a run, in every source by itself."""
    counts = {}
    for first in ("answers", "all"):
        for second in ("answers", "all"):
            data = (
                f'files = ["rows.jsonl"]\nheld_out = 0\nloss_on = "{first}"\n'
                f'[[data]]\nfiles = ["rows.jsonl"]\nloss_on = "{second}"'
            )
            name = f"loss-{first}-{second}"
            given = 'files = ["rows.jsonl"]\nloss_on = "answers"'
            config = config_in(run_folder, name, **FIXED, **{given: data})
            trainer = build_trainer(config, run_folder / name, World())
            read = trainer.reader.read(Position(0, 0))
            batch = read.batch
            assert read.num_predicted == batch.num_predicted
            counts[first, second] = read.num_predicted / read.num_tokens
            own = [0, 0]
            for row, placed in enumerate(batch.documents):
                for d in placed:
                    own[d.source] += int((~batch.predicts[row, d.start : d.start + d.length]).sum())
            assert [n > 0 for n in own] == [first == "answers", second == "answers"]
    assert counts["all", "all"] == 1 > counts["all", "answers"] > counts["answers", "answers"] > 0.3
    config = config_in(run_folder, "loss-logged", **FIXED)
    (row, *_) = metrics(train(config))
    assert row["num_distilled"] < 2 * 0.9 * row["num_tokens"]


@pytest.mark.parametrize("weights", [(3, 1), (1, 3)])
def test_sources_have_their_weights_in_training_and_ranking(run_folder, weights):
    data = (
        f'files = ["rows.jsonl"]\nheld_out = 0\nweight = {weights[0]}\n'
        f'[[data]]\nfiles = ["rows.jsonl"]\nweight = {weights[1]}'
    )
    name = f"weights-{weights[0]}"
    given = 'files = ["rows.jsonl"]\nloss_on = "answers"'
    config = config_in(run_folder, name, **FIXED, **{given: data})
    trainer = build_trainer(config, run_folder / name, World())
    tokens = [0, 0]
    for step in range(8):
        batch = trainer.reader.read(Position(0, step)).batch
        for d in (d for row in batch.documents for d in row):
            tokens[d.source] += d.length
    share = weights[0] / sum(weights)
    assert tokens[0] / sum(tokens) == pytest.approx(share, abs=0.06)


def test_ranking_takes_rows_by_weight_and_as_generation_reads_them(run_folder, tmp_path):
    """In rows; empty ones and bad ones that are left out take nobody's turn."""
    for name, digit, extra in (("a", "1", ['{"text": ""}', "{"]), ("b", "2", [])):
        rows = [*extra, *(json.dumps({"text": digit * n}) for n in range(3, 20))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    tokenizer = load_tokenizer(run_folder / "parent")
    sources = [
        Source([tmp_path / "a.jsonl"], tokenizer, bad_rows="skip"),
        Source([tmp_path / "b.jsonl"], tokenizer),
    ]
    config = config_in(run_folder, "ranked")
    data = tuple(replace(config.data[0], weight=weight) for weight in (3.0, 1.0))
    config = replace(config, data=data)
    model_config = read_config(run_folder / "parent")
    unread: Any = None
    calibration = Calibration(config, tmp_path, unread, model_config, unread, sources, Silent())
    batches = list(calibration.batches(12))
    first = [tokenizer.decode(ids[0]) for batch in batches for ids in batch.input_ids]
    assert first.count("1") == 9 and first.count("2") == 3
    lengths = [int(mask.sum()) for batch in batches for mask in batch.attention_mask]
    # As a model reads them: without the end, which is only predicted.
    assert sorted(n for n, digit in zip(lengths, first, strict=True) if digit == "1") == [
        *range(3, 12)
    ]
    strict = Source([tmp_path / "a.jsonl"], tokenizer)
    with pytest.raises(RowError, match="a.jsonl line 2 is not valid JSON"):
        list(first_documents([strict], [1.0], 3))


def test_the_task_is_the_next_id_of_every_position(run_folder):
    """Against plain transformers on each document alone: the last position learns to stop, and one
    at which a document is cut knows what comes next."""
    changes = {"[router]": FIXED["[router]"], "active = 0.7": FIXED["active = 0.7"]}
    config = config_in(
        run_folder,
        "task",
        **{
            **changes,
            "[sizes.large]": 'objective = "task"\n[sizes.large]',
            "\ncontext = 96\nbatch_size": "\ncontext = 80\nbatch_size",
        },
    )
    trainer = build_trainer(config, run_folder / "task", World())
    report = trainer.train_step()
    assert report.rows_cut > 0
    batch = PackedStream(trainer.sources, [1.0], context=80, batch_size=4, seed=0, stage=0).batch(0)
    model, _ = load_parent(config.parent)
    total, count, stops = 0.0, 0, 0
    for placed in (d for row in batch.documents for d in row):
        document = trainer.sources[placed.source].document(placed.row)
        ids = torch.tensor([document.ids[: placed.length]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(document.first, placed.length):
            total -= float(log_p[place, document.ids[place + 1]])
            count += 1
        stops += document.ids[placed.length] == model.config.eos_token_id
    assert stops and count == batch.num_predicted
    assert report.kd["large"] == pytest.approx(total / count, rel=1e-4)


def test_lengths_beyond_the_positions_are_told(run_folder):
    """Whatever the order of tokens comes from: generation keeps to the same bound."""
    config = config_in(
        run_folder, "positions", **{"\ncontext = 96\nbatch": "\ncontext = 600\nbatch"}
    )
    llama = {"model_type": "llama", "max_position_embeddings": 512}
    (line,) = beyond_positions(config, llama)
    assert line.startswith("stages[0].context=600 is beyond the 512 positions of the parent")
    assert len(beyond_positions(config, {**llama, "max_position_embeddings": 64})) == 2
    assert len(beyond_positions(config, {**llama, "model_type": "nemotron_h"})) == 1
    assert beyond_positions(config, {"model_type": "nemotron_h"}) == []
    # The default follows the parent, of which nobody need be warned; what was asked for is told.
    config = config_in(
        run_folder, "positions", **{"num_samples = 16\ncontext = 96": "num_samples = 16"}
    )
    short = {**llama, "max_position_embeddings": 200}
    assert beyond_positions(config, short) == [] and ranking_context(config, short) == 200
    asked = config_in(
        run_folder,
        "positions",
        **{"num_samples = 16\ncontext = 96": "num_samples = 16\ncontext = 300"},
    )
    (line,) = beyond_positions(asked, short)
    assert line.startswith("calibration.context=300 is beyond the 200") and "lower it" in line
    assert ranking_context(asked, {**short, "max_position_embeddings": 4000}) == 300
