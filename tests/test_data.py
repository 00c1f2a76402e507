"""The training data: rows as documents, documents as packed windows."""

from __future__ import annotations

import collections
import json
import math
import sys
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from star_elastic import bundled
from star_elastic.data import sources
from star_elastic.data.rendering import Document
from star_elastic.data.row_files import open_rows
from star_elastic.data.sources import Source, calibration_batches
from star_elastic.demo import write_rows
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.evaluate.tasks import messages, sample_problems
from star_elastic.train.packing import PackedStream, merge_states
from tests.laws.parents import examples

PAD = 99


@dataclass
class Lengths:
    """Documents that feed so many tokens (and have one more id) and count from `first` on; ids tell
    source and row."""

    lengths: list[int]
    number: int = 0
    first: int = 0
    pad_id: int = PAD
    name: str = field(default="lengths")
    held_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def is_held_out(self, row: int) -> bool:
        return row in self.held_out

    def document(self, row: int) -> Document:
        start = 1000 * (1000 * self.number + row + 1)
        count = self.lengths[row] + 1 if self.lengths[row] else 0
        return Document(list(range(start, start + count)), self.first)


def stream(sources, weights=None, *, context=16, batch_size=4, seed=0, stage=0, **kwargs):
    return PackedStream(
        sources, weights or [1.0] * len(sources),
        context=context, batch_size=batch_size, seed=seed, stage=stage, **kwargs,
    )  # fmt: skip


def same(a, b) -> bool:
    tensors = ("input_ids", "position_ids", "seq_idx", "predicts", "targets")
    return a.documents == b.documents and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in tensors
    )


def placed(batches) -> list:
    return [document for batch in batches for row in batch.documents for document in row]


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(lambda ls: max(ls) > 1)
packings = st.fixed_dictionaries(
    {
        "context": st.integers(2, 24),
        "batch_size": st.integers(1, 5),
        "seed": st.integers(-3, 2**40),
        "stage": st.integers(0, 3),
        "lookahead": st.integers(1, 8),
    }
)


# Packed windows


@given(lengths, lengths, st.integers(0, 1), packings)
@examples(40)
def test_windows_hold_whole_documents_and_predict_inside_them(first, second, start, packing):
    sources = [Lengths(first, 0, start), Lengths(second, 1)]
    if max(first) <= start + 1:
        first.append(start + 2)
    if packing["context"] <= start + 1:
        packing["context"] = start + 2
    packed = stream(sources, [2.0, 1.0], **packing)
    for step in range(4):
        batch = packed.batch(step)
        assert batch.input_ids.shape == (packing["batch_size"], packing["context"])
        for row, documents in enumerate(batch.documents):
            expected = torch.full((packing["context"],), PAD)
            predicts = torch.zeros(packing["context"], dtype=torch.bool)
            position, used = [], 0
            for number, (source, index, begin, length) in enumerate(documents):
                document = sources[source].document(index)
                assert begin == used and length == min(len(document.fed), packing["context"])
                used += length
                expected[begin:used] = torch.tensor(document.ids[:length])
                predicts[begin + document.first : used] = True
                # Every position that is fed knows its next id, the last one and a cut one, too.
                assert batch.targets[row, begin:used].tolist() == document.ids[1 : length + 1]
                position += range(length)
                assert batch.seq_idx[row, begin:used].eq(number).all()
            position += range(packing["context"] - used)
            assert torch.equal(batch.input_ids[row], expected)
            assert torch.equal(batch.predicts[row], predicts)
            assert batch.position_ids[row].tolist() == position
            assert batch.seq_idx[row, used:].eq(len(documents)).all()
        assert batch.num_tokens == int((batch.input_ids != PAD).sum())
        assert batch.num_predicted == int(batch.predicts.sum()) > 0


@given(lengths, lengths, packings, st.integers(0, 3), st.data())
@examples(30)
def test_a_restored_stream_goes_on_as_the_uninterrupted_one(first, second, packing, stop, data):
    """The state passes through JSON and names rows, not tokens; lanes may be asked for in parts,
    other ones after the stop than before."""

    def new():
        return stream([Lengths(first), Lengths(second, 1)], [1.0, 3.0], **packing)

    def parts(ranks):
        cut = data.draw(st.integers(0, packing["batch_size"]))
        lanes = [range(cut), range(cut, packing["batch_size"])]
        return [(rank, part) for rank, part in zip(ranks, lanes, strict=True) if part]

    straight = new()
    expected = [straight.batch(step) for step in range(stop + 3)]
    before = parts([new(), new()])
    for step in range(stop):
        for rank, part in before:
            assert same(rank.batch(step, part), expected[step].rows(part.start, part.stop))
    state = json.loads(json.dumps(merge_states([rank.state() for rank, _ in before])))
    after = parts([new(), new()])
    for rank, _ in after:
        rank.load(state)
    for step in range(stop, stop + 3):
        for rank, part in after:
            assert same(rank.batch(step, part), expected[step].rows(part.start, part.stop))
    assert merge_states([rank.state() for rank, _ in after]) == straight.state()


@given(st.integers(1, 40), packings)
@examples(30)
def test_every_row_comes_once_per_epoch(num_rows, packing):
    """Documents as long as the context: what is placed is what is read, in order."""
    packing["lookahead"] = 1
    packed = stream([Lengths([30] * num_rows)], **packing)
    steps = 2 * math.ceil(num_rows / packing["batch_size"]) + 1
    rows = [document.row for document in placed(packed.batch(step) for step in range(steps))]
    epochs = [rows[n : n + num_rows] for n in range(0, len(rows) - num_rows + 1, num_rows)]
    assert len(epochs) >= 2 and all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    if num_rows > 10:
        assert epochs[0] != epochs[1] != list(range(num_rows))


def test_shuffles_are_keyed_by_seed_and_stage():
    def rows(**key):
        packed = stream([Lengths([5] * 50)], **key)
        return [document.row for document in placed([packed.batch(0), packed.batch(1)])]

    assert rows() == rows(seed=0, stage=0)
    assert rows() != rows(seed=1) and rows() != rows(stage=1) and rows(seed=1) != rows(stage=1)


@pytest.mark.parametrize("kind", ["short", "uneven", "whole windows"])
def test_sources_mix_by_weight_in_tokens(kind):
    lengths = {"short": ([3] * 9, [11] * 7, [5]), "uneven": ([64] * 3, [2] * 5, [9] * 8)}
    both = lengths.get(kind, ([80] * 4, [90] * 4, [70] * 4))
    weights = (0.5, 0.3, 0.2)
    sources = [Lengths(each, number) for number, each in enumerate(both)]
    packed = stream(sources, [5, 3, 2], context=64, batch_size=10)
    batches = [packed.batch(step) for step in range(10)]
    tokens = collections.Counter()
    for document in placed(batches):
        tokens[document.source] += document.length
    shares = [tokens[number] / tokens.total() for number in range(3)]
    assert shares == pytest.approx(weights, abs=0.03)
    lanes = packed.state()["lanes"].values()
    read = [sum(lane["tokens"][number] for lane in lanes) for number in range(3)]  # and in hand
    assert [tokens / sum(read) for tokens in read] == pytest.approx(weights, abs=0.06)
    # Lanes do not march in step: even single batches are mixed.
    for batch in batches:
        counts = collections.Counter()
        for document in placed([batch]):
            counts[document.source] += document.length
        assert counts[0] / counts.total() == pytest.approx(0.5, abs=0.25)


def test_documents_that_teach_nothing_are_left_out_and_counted():
    source = Lengths([0, 1, 7, 7, 40], first=5)
    packed = stream([source])
    rows = [document.row for document in placed(packed.batch(step) for step in range(8))]
    assert set(rows) == {2, 3, 4}
    assert packed.counts()["dropped"] > 0 and packed.counts()["cut"] > 0
    again = stream([source])
    again.load(packed.state())
    again.batch(8)
    assert again.counts()["dropped"] >= packed.counts()["dropped"]


def test_split_and_rows_keep_the_documents():
    batch = stream([Lengths([4, 6, 9])], batch_size=5).batch(0)
    parts = batch.split(2)
    assert [len(part.input_ids) for part in parts] == [2, 3]
    assert [row for part in parts for row in part.documents] == list(batch.documents)
    assert sum(part.num_tokens for part in parts) == batch.num_tokens
    assert len(batch.split(9)) == 5
    assert same(batch.to("cpu"), batch) and list(batch.inputs)[2] == "seq_idx"


def test_padding_of_the_demo_is_small(rows_file, tokenizer):
    """Measured over 100 steps of 16 windows: 1.4 % of the tokens are padding at context 256; 69 %
    would be if each row had a window of its own."""
    source = Source([rows_file], tokenizer, "answers")
    packed = stream([source], context=256, batch_size=8)
    batches = [packed.batch(step) for step in range(6)]
    size = 6 * 8 * 256
    waste = 1 - sum(batch.num_tokens for batch in batches) / size
    print(f"padding {waste:.1%}")
    assert waste < 0.03
    assert 0.3 < sum(batch.num_predicted for batch in batches) / size < 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context=1 is less than 2"),
        ({"batch_size": 0}, "batch_size=0 is less than 1"),
        ({"weights": [1.0, 0.0]}, "lengths has weight 0.0, which is not > 0; leave the source out"),
        ({"weights": [1.0, math.nan]}, "lengths has weight nan"),
        ({"weights": [1.0]}, "1 weights for 2 sources; give one weight to each source"),
        ({"sources": [Lengths([3]), Lengths([])]}, "lengths has no rows"),
        ({"sources": [], "weights": []}, "the stage has no data; name at least one source"),
    ],
)
def test_what_cannot_be_packed_is_refused_at_once(changes, message):
    with pytest.raises(ConfigError, match=message):
        stream(**{"sources": [Lengths([3]), Lengths([4])], "weights": [1.0, 1.0]} | changes)


def test_a_source_with_nothing_to_learn_ends_the_stage():
    packed = stream([Lengths([3, 4]), Lengths([9, 1, 5], first=9, name="prompts.jsonl")])
    with pytest.raises(CheckpointError, match="prompts.jsonl has no row with a token to learn"):
        packed.batch(0)


def test_steps_come_in_order():
    packed = stream([Lengths([3])])
    with pytest.raises(AssertionError, match="lane 0 is at step 0, not at 1"):
        packed.batch(1)
    packed.batch(0, range(1))
    with pytest.raises(AssertionError, match="lane 0 is at step 1, not at 0"):
        packed.batch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state["made_with"].update(context=8),
            "has context=8 and this run 16; resume",
        ),
        (lambda state: state["lanes"]["0"].pop("skipped"), "position in the data is damaged"),
        (lambda state: state["made_with"].update(rows=[4]), r"has rows=\[4\] and this run \[3\]"),
        (lambda state: state.update(format=1), "has format 1, not 2, of a version that read rows"),
        (lambda state: state["made_with"].pop("seed"), "position in the data is damaged"),
        (lambda state: state["lanes"]["0"].pop("rows"), "position in the data is damaged"),
        (lambda state: state["lanes"]["0"]["held"].append([0, 7]), "in the data is damaged"),
        (lambda state: state["lanes"]["0"].update(step="1"), "position in the data is damaged"),
        (lambda state: state.update(lanes=None), "position in the data is damaged"),
    ],
)
def test_a_wrong_position_is_refused(change, message):
    packed = stream([Lengths([3, 5, 1])])
    packed.batch(0)
    state = json.loads(json.dumps(packed.state()))
    change(state)
    with pytest.raises(CheckpointError, match=message):
        stream([Lengths([3, 5, 1])]).load(state)


def test_a_row_in_hand_that_was_corrected_is_read_anew():
    """Into another, or into one that teaches nothing."""
    packed = stream([Lengths([3, 5])])
    packed.batch(0)
    other = stream([Lengths([3, 0])])
    other.load(packed.state())
    assert {d.row for d in placed([other.batch(1)])} == {0}
    assert other.counts()["dropped"] > 0
    longer = stream([Lengths([3, 6])])
    longer.load(packed.state())
    assert {d.length for d in placed([longer.batch(1)])} == {3, 6}


# Sources


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled.PARENT)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(file, 300, seed=0)
    return file


def jsonl(folder, *rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return file


def test_answers_only_marks_the_completion(tmp_path, tokenizer):
    (problem,) = sample_problems(["add"], "train", 1, seed=0)
    file = jsonl(
        tmp_path,
        {"messages": messages(problem)},
        {"messages": messages(problem, thinking=False)},
        {"prompt": "add 1 2", "completion": " 3"},
        {"text": "add 1 2"},
    )
    source = Source([file], tokenizer, "answers")
    for row, opening in ((0, "<think>\n"), (1, "<think></think>")):
        document = source.document(row)
        start = tokenizer.decode(document.ids[: document.first + 1])
        assert start.endswith(f"assistant\n{opening}")
        assert tokenizer.decode(document.ids).endswith(f"{problem.answer}<|im_end|>")
    whole, answer = tokenizer.encode("add 1 2"), tokenizer.encode(" 3")
    end = [tokenizer.eos_token_id]
    assert source.document(2) == Document(whole + answer + end, len(whole) - 1)
    assert source.document(3) == Document(whole + end, 0)
    assert Source([file], tokenizer, "all").document(2) == Document(whole + answer + end, 0)


def test_rows_of_several_files_are_numbered_on(tmp_path, tokenizer):
    first = jsonl(tmp_path, {"text": "1"}, "", {"text": "2"}, name="a.jsonl")
    empty = jsonl(tmp_path, name="b.jsonl")
    last = jsonl(tmp_path, {"text": "3"}, name="c.jsonl")
    source = Source([first, empty, last], tokenizer)
    texts = [tokenizer.decode(source.document(row).fed) for row in range(len(source))]
    assert texts == ["1", "2", "3"]
    assert source.where(1) == f"{first} line 3" and source.where(2) == f"{last} line 1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", r"rows.jsonl line 2 is not valid JSON \(Expecting .*\); correct the line"),
        ("\xff", "line 2 is not valid JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ("9" * 5000, "line 2 is not valid JSON"),
        ({"txt": "a"}, "line 2 has the keys txt; give text, prompt and completion, or messages"),
        ({}, "line 2 has no keys; give text"),
        ({"text": 3}, "line 2 has a text that is no text; write it as text"),
        ({"prompt": ["a"], "completion": "b"}, "line 2 has a prompt that is no text"),
        ({"text": "a", "messages": []}, "line 2 has text and also messages; keep one of them"),
        ({"messages": 5}, "line 2 has no list of messages; give messages such as"),
        ({"messages": [1, 2]}, "line 2 has no role in message 1; give each message role and"),
        ({"messages": "abc"}, "line 2 has no list of messages"),
        ({"messages": []}, "line 2 has no list of messages"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, row, message):
    file = jsonl(tmp_path, {"text": "fine"}, row)
    source = Source([file], tokenizer)
    with pytest.raises(CheckpointError, match=message):
        source.document(1)


def test_missing_and_empty_files_are_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="none.jsonl does not exist; name an existing JSONL file"):
        open_rows(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="rows.jsonl has no rows; name files that hold some"):
        Source([jsonl(tmp_path)], tokenizer)
    with pytest.raises(ConfigError, match="holds no dataset; name what save_to_disk wrote"):
        open_rows(tmp_path)


def test_calibration_batches_are_padded_on_the_right(tmp_path, tokenizer):
    a = Source([jsonl(tmp_path, *({"text": "1" * n} for n in (3, 40, 0)), name="a")], tokenizer)
    b = Source([jsonl(tmp_path, *({"text": "2" * n} for n in (1, 2)), name="b")], tokenizer)

    def batches(num_samples):
        return list(
            calibration_batches([a, b], [2, 1], num_samples=num_samples, batch_size=2, context=20)
        )

    first, second = batches(4)
    assert first.input_ids.shape == (2, 32) and first.num_tokens == 3 + 20
    assert first.attention_mask.sum(1).tolist() == [3, 20]
    # The empty row is no sample.
    assert second.input_ids.shape == (2, 16) and second.attention_mask.sum(1).tolist() == [1, 2]
    assert tokenizer.decode(first.input_ids[0, :3]) == "111"
    assert sum(len(batch.input_ids) for batch in batches(99)) == 4


def test_datasets_need_their_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"needs the package datasets; run pip install 'star-el"):
        open_rows(tmp_path)


def test_saved_datasets_and_parquet_files(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    turns = [{"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3"}]
    table = datasets.Dataset.from_list([{"text": "one", "messages": None},
                                        {"text": None, "messages": turns}])  # fmt: skip
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    lines = jsonl(tmp_path, {"text": "one"}, {"messages": turns})
    expected = Source([lines], tokenizer, "answers")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet", tmp_path / "splits" / "train"):
        source = Source([path], tokenizer, "answers")
        assert [source.document(row) for row in range(2)] == [
            expected.document(row) for row in range(2)
        ]
        assert source.where(1) == f"{path} row 1"
    with pytest.raises(ConfigError, match=r"holds the splits train; name one, as .*splits.train"):
        open_rows(tmp_path / "splits")
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(CheckpointError, match=r"rows.parquet cannot be read"):
        open_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("most", [sources.KEPT_TOKENS, 100, 0])
def test_a_small_source_is_rendered_once(tmp_path, tokenizer, monkeypatch, most):
    """A large one is not kept whole; what comes is the same."""
    monkeypatch.setattr(sources, "KEPT_TOKENS", most)
    file = tmp_path / "rows.jsonl"
    write_rows(file, 12, seed=0)
    source = Source([file], tokenizer, "answers")
    rendered: list[dict] = []
    render = source._renderer.document
    monkeypatch.setattr(
        source._renderer, "document", lambda row: rendered.append(row) or render(row)
    )
    first, *others = ([source.document(row) for row in range(12)] for _ in range(3))
    assert all(other == first for other in others)
    assert len(rendered) == (12 if most == sources.KEPT_TOKENS > 100 else 36)
    assert sum(len(document.ids) for document in source._kept.kept.values()) <= most
