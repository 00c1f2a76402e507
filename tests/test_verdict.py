"""The verdict: what became of the sizes, on rows that training never saw."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import star_elastic.train.run as run_module
from star_elastic import bundled
from star_elastic.cli import main
from star_elastic.data.sources import (
    MAX_CONTEXT,
    Document,
    ShuffledEpochs,
    Source,
    epochs_key,
    first_documents,
    held_out_documents,
)
from star_elastic.demo import write_rows
from star_elastic.errors import CheckpointError, ConfigError, Interrupted
from star_elastic.generate.family import load
from star_elastic.measure.divergence import Divergence, Reading, compare, continue_greedily, read
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.rewrite.family import InputCalibration, held_out_of
from star_elastic.train.config import load_run_config
from star_elastic.train.packing import PackedStream
from star_elastic.train.run import train
from star_elastic.train.verdict import LEFT, Sample, SizeVerdict, Verdict, free_name
from tests.tiny_run import JUDGED, RUN, config_in
from tests.tiny_trainer import LLAMA, MOE, make_model
from tests.watchers import KillIn, Said, Stages

STILL = {
    "tokens = 15360": "tokens = 384",
    "learning_rate = 2e-3": "learning_rate = 1e-12\nfinal_learning_rate = 0",
}
"""One step that changes nothing: what leaves is the sorted parent and its slices."""


# Rows that are held out


@pytest.mark.parametrize(
    ("rows", "held_out", "kept"), [(64, 64, 6), (1000, 64, 64), (1000, 0, 0), (9, 5, 0), (10, 5, 1)]
)
def test_rows_are_held_out_and_no_other_row_is_lost(tmp_path, rows, held_out, kept):
    """From training and calibration; the first epoch begins as if there were none."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} {n}"}) + "\n" for n in range(rows)))
    tokenizer = load_tokenizer(bundled.PARENT)
    whole = Source([file], tokenizer)
    source = whole.hold_out(held_out, epochs_key(7, 0, 0))
    assert len(source) == rows and source.num_used == rows - kept
    assert len(set(source.held_out)) == kept and whole.held_out == ()
    order = ShuffledEpochs(rows, epochs_key(7, 0, 0))
    assert source.held_out == tuple(order.row(place) for place in range(rows - kept, rows))
    options = {"context": 32, "batch_size": 2, "seed": 7, "stage": 0}
    with_all, without = (PackedStream([s], [1.0], **options) for s in (whole, source))
    read = Counter()
    for step in range(rows):
        batch = without.batch(step)
        if step * 14 < rows - kept - 80:  # what lanes have in hand comes on top
            assert batch.documents == with_all.batch(step).documents
        read.update(placed.row for window in batch.documents for placed in window)
    assert set(read) == set(range(rows)) - set(source.held_out) and min(read.values()) >= 2
    ranked = [tuple(d.ids) for d in first_documents([source], [1.0], rows)]
    left = [row for row in range(rows) if not source.is_held_out(row)]
    assert ranked == [tuple(whole.document(row).ids) for row in left]


def test_documents_come_from_all_sources_and_are_few(tmp_path):
    tokenizer = load_tokenizer(bundled.PARENT)
    sources = []
    for name, count in (("a", 3), ("b", 2000)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(
            "".join(json.dumps({"text": name * 4 + str(n)}) + "\n" for n in range(count))
        )
        sources.append(all_held_out(Source([file], tokenizer)))
    documents = held_out_documents(sources, 4096)
    texts = [tokenizer.decode(document.ids) for document in documents]
    begin = [text.removeprefix(tokenizer.bos_token or "")[0] for text in texts[:7]]
    assert begin == [*"abababb"]
    assert 8000 < sum(len(document.ids) for document in documents) <= 8192
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x1" * 40_000}) + "\n")
    long = [all_held_out(Source([tmp_path / "long.jsonl"], tokenizer))]
    assert len(held_out_documents(long, 10**6)[0].ids) == MAX_CONTEXT + 1
    assert len(held_out_documents(long, 64)[0].ids) == 65
    assert held_out_documents([], 64) == []


def all_held_out(source: Source) -> Source:
    source.held_out = tuple(range(len(source)))
    return source


# What is measured


MODELS = {
    "nemotron_h": MOE,
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", MODELS)
def test_divergence_is_that_of_whole_logits(kind):
    """Against logits of the whole model, row by row; in chunks of any size."""
    parent, model = (make_model(MODELS[kind], seed=seed) for seed in (0, 1))
    draw = torch.Generator().manual_seed(0)
    documents = [
        Document(torch.randint(0, 320, (length,), generator=draw).tolist(), first)
        for length, first in ((20, 0), (31, 12), (9, 7))
    ]
    found = compare(read(parent, documents), read(model, documents), documents)
    sums, counts = [], []
    for document in documents:
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            p, q = (
                m(input_ids=ids[:, :-1]).logits[0, document.first :].double().log_softmax(-1)
                for m in (parent, model)
            )
        target = ids[0, document.first + 1 :]
        picked = [-log[range(len(target)), target] for log in (p, q)]
        kl = (p.exp() * (p - q)).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).double()
        sums.append(torch.stack([kl, same, *picked]).sum(1))
        counts.append(len(target))
    total = torch.stack(sums).sum(0) / sum(counts)
    measured = (found.kl, found.equal_top1, found.reference_nats, found.nats)
    assert measured == pytest.approx(total.tolist(), rel=1e-5)
    assert found.tokens == sum(counts) == 19 + 18 + 1
    assert found.perplexity == pytest.approx(math.exp(total[3]), rel=1e-4)
    assert found.worse_by == pytest.approx(float(total[3] - total[2]), rel=1e-4)
    rest = [float(s[3] - s[2] - found.worse_by * n) for s, n in zip(sums, counts, strict=True)]
    error = math.sqrt(3 / 2 * sum(r * r for r in rest)) / sum(counts)
    assert found.standard_error == pytest.approx(error, rel=1e-4)
    chunked = compare(
        read(parent, documents), read(model, documents), documents, chunk_bytes=7 * 16 * 320
    )
    assert chunked.kl == pytest.approx(found.kl, rel=1e-6)
    itself = compare(read(model, documents), read(model, documents), documents)
    assert (itself.kl, itself.equal_top1, itself.worse_by) == (0, 1, 0)


def test_a_single_row_has_no_noise_to_compare_with():
    model, document = make_model(LLAMA), [Document([1, 2, 3, 4], 0)]
    found = compare(read(model, document), read(make_model(LLAMA, seed=1), document), document)
    assert found.standard_error == math.inf and not found.is_worse
    assert found.to_json()["standard_error"] is None
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["kl"] == found.kl


def test_a_reading_set_apart_outlives_its_model():
    model, documents = make_model(MODELS["tied"]), [Document([5, 6, 7, 8], 0)]
    apart, kept = read(model, documents).apart(), read(model, documents)
    before = apart.log_probs(slice(0, 3)).clone()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert torch.equal(apart.log_probs(slice(0, 3)), before)
    assert not torch.equal(kept.log_probs(slice(0, 3)), before)
    assert isinstance(kept, Reading)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_continuations_are_those_of_transformers(kind):
    model = make_model(MODELS[kind])
    ids = torch.tensor([[5, 9, 31]])
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert continue_greedily(model, [5, 9, 31], [], 6) == plain
    assert continue_greedily(model, [5, 9, 31], [plain[3]], 6) == plain[: plain.index(plain[3])]


# Whole runs


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """Random llamas, tied and not, with the bundled tokenizer, rows and a run config."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(bundled.PARENT)
    for kind in ("llama", "tied"):
        make_model(MODELS[kind]).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    write_rows(folder / "rows.jsonl", 64, seed=0)
    return folder


def llama_config(folder, kind, name, **changes):
    text = RUN.replace('"parent"', f'"{kind}"').replace('out = "run"', f'out = "{name}"')
    a, b = text.index("[choices]"), text.index("[[data]]")
    text = text[:a] + "[choices]\nhidden = [48, 40, 32]\nffn = [64, 48, 32, 16]\n" + text[b:]
    for old, new in {**STILL, **JUDGED, **changes}.items():
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.toml").write_text(text)
    return load_run_config(folder / f"{name}.toml")


BASIS = {"num_samples = 16": 'num_samples = 16\nbasis = "principal"'}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("nemotron_h", {}), ("nemotron_h", BASIS), ("llama", BASIS), ("llama", {}), ("tied", {})],
    ids=["hybrid", "hybrid-basis", "llama-basis", "llama", "tied"],
)
def test_a_run_that_changed_nothing_leaves_the_parent_and_its_cuts(
    run_folder, llama_folder, kind, changes
):
    name = f"still-{kind}-{len(changes)}"
    if kind == "nemotron_h":
        config = config_in(run_folder, name, **{**STILL, **JUDGED, **changes})
    else:
        config = llama_config(llama_folder, kind, name, **changes)
    verdict = train(config).verdict
    large, small = verdict.sizes["large"], verdict.sizes["small"]
    assert large.is_full and large.untrained is None and not small.is_full
    assert large.trained.kl == pytest.approx(0, abs=1e-6) and large.trained.equal_top1 == 1
    assert large.trained.nats == pytest.approx(large.trained.reference_nats, abs=1e-5)
    assert small.trained.kl > 0.05 and small.untrained is not None
    for field in ("kl", "nats", "reference_nats", "equal_top1"):
        ours, theirs = (getattr(d, field) for d in (small.trained, small.untrained))
        assert ours == pytest.approx(theirs, abs=1e-4), field
    assert verdict.sample.sizes["large"] == verdict.sample.reference != ""
    assert verdict.rows == 6
    assert [line for line in verdict.remarks() if "large costs" in line] == []


def test_training_is_judged_kept_and_shown(run_folder, capfd):
    """The trained size is nearer to the parent than its cut; printed, stored, and as JSON."""
    torch.set_num_threads(1)
    config_in(run_folder, "judged", **JUDGED)
    main(["train", str(run_folder / "judged.toml")])
    shown = capfd.readouterr().out
    kept = json.loads((run_folder / "judged" / "verdict.json").read_text())
    small, large = kept["sizes"]["small"], kept["sizes"]["large"]
    assert small["kl"] < 0.8 * small["untrained"]["kl"] and large["untrained"] is None
    assert kept["reference"] == "its parent" and kept["held_out_rows"] == 6
    assert kept["tokens"] == small["tokens"] == large["tokens"] > 100
    for said in (
        "6 held-out rows", "of its parent", "same cut, untrained", f"{small['kl']:.4f}",
        f"{small['equal_top1']:.1%}", f"{small['untrained']['perplexity']:,.4g}",
        'prompt: "<|im_start|>user',
        "its parent: ", "small: ", "note: large costs what its parent does and",
        f"next: star-elastic slice {run_folder / 'judged' / 'elastic'} --size small",
    ):  # fmt: skip
        assert said in shown, said
    assert kept["sample"]["prompt"].endswith("assistant\n<think>\n")
    assert kept["remarks"] and kept["next"] in shown


def test_rows_that_are_held_out_are_not_learned(run_folder, tmp_path):
    """Other rows there, and everything but the verdict is the same."""
    lines = (run_folder / "rows.jsonl").read_text().splitlines(keepends=True)
    results, brief = [], {**JUDGED, "tokens = 15360": "tokens = 1536"}
    for name, rows in (("as-they-are", lines), ("others", [*lines])):
        if name == "others":
            order = ShuffledEpochs(64, epochs_key(0, 0, 0))
            for row in map(order.row, range(58, 64)):
                rows[row] = lines[row].replace("1", "2")
        (tmp_path / "rows.jsonl").write_text("".join(rows))
        config = config_in(run_folder, f"held-{name}", **brief)
        source = replace(config.data[0], files=(str(tmp_path / "rows.jsonl"),))
        results.append(train(replace(config, data=(source,))))
    one, other = ((r.elastic / "model.safetensors").read_bytes() for r in results)
    assert one == other
    assert results[0].verdict.sizes["small"].trained != results[1].verdict.sizes["small"].trained


def test_rows_whose_prompts_are_too_long_are_no_verdict_either(run_folder, monkeypatch):
    """And are said to be the reason: some rows are held out."""
    monkeypatch.setattr(run_module, "held_out_documents", lambda sources, context: [])
    told = Said()
    assert (
        train(config_in(run_folder, "too-long", **STILL, **JUDGED), progress=told).verdict is None
    )
    (line,) = [line for line in told.lines if line.startswith("no verdict")]
    assert re.match(r"no verdict: none of the 6 rows held out has a token that counts among", line)


def test_no_row_no_verdict(run_folder):
    config = config_in(run_folder, "unjudged", **STILL)
    told = Said()
    result = train(config, progress=told)
    assert result.verdict is None and not (run_folder / "unjudged" / "verdict.json").exists()
    assert any(line.startswith("no verdict: no row is held out") for line in told.lines)
    assert any("64 of rows.jsonl; 0 others held out" in line for line in told.lines)
    with pytest.raises(CheckpointError, match="is complete already"):
        train(config, resume=True)
    with pytest.raises(ConfigError, match=r"data\[0\].held_out=-1 is negative"):
        config_in(run_folder, "unjudged", **{"held_out = 0": "held_out = -1"})


def test_a_verdict_that_was_stopped_is_all_that_is_left_to_do(run_folder):
    config = config_in(run_folder, "stopped-judging", **STILL, **JUDGED)
    with pytest.raises(Interrupted, match="go on with --resume"):
        train(config, progress=KillIn("judge"))
    assert (run_folder / "stopped-judging" / "elastic").is_dir()
    stages = Stages()
    result = train(config, resume=True, progress=stages)
    assert stages.names == ["judge"] and result.verdict is not None
    assert (result.steps, result.tokens > 0) == (1, True)
    with pytest.raises(CheckpointError, match="is complete already"):
        train(config, resume=True)


def test_quantised_sizes_are_held_against_themselves(trained, run_folder, tmp_path, capfd):
    out, data = tmp_path / "q", str(run_folder / "rows.jsonl")
    command = ["quantize", str(trained.elastic), "--format", "fp8", "--data", data]
    main([*command, "--out", str(out), "--json"])
    verdict = json.loads(capfd.readouterr().out)["verdict"]
    assert verdict == json.loads((out / "verdict.json").read_text())
    assert verdict["reference"] == "itself unquantised" and verdict["held_out_rows"] == 6
    documents = held_out_of(
        trained.elastic, InputCalibration(files=(run_folder / "rows.jsonl",), held_out=64)
    )
    before, after = load(trained.elastic), load(out)
    large, small = (read(before[name], documents) for name in ("large", "small"))
    gap = compare(large, small, documents).kl
    for name, size in verdict["sizes"].items():
        same = compare(read(before[name], documents), read(after[name], documents), documents)
        assert size["kl"] == pytest.approx(same.kl, rel=1e-3), name
        assert 0 < size["kl"] < 0.2 * gap, name
        assert size["reference_perplexity"] != size["perplexity"] and size["untrained"] is None
    main(
        ["quantize", str(trained.elastic), "--format", "fp8-channel", "--out", str(tmp_path / "c")]
    )
    shown = capfd.readouterr()
    assert "no verdict: it needs 10 rows" in shown.err and "held-out" not in shown.out


def test_rows_that_are_held_out_calibrate_nothing(trained, run_folder, tmp_path, capfd):
    lines = (run_folder / "rows.jsonl").read_text().splitlines(keepends=True)
    first = min(map(ShuffledEpochs(64, epochs_key(0, 0, 0)).row, range(58, 64)))
    lines[first] = json.dumps({"text": "!" * 90}) + "\n"
    (tmp_path / "others.jsonl").write_text("".join(lines))
    for name, data in (("one", run_folder / "rows.jsonl"), ("other", tmp_path / "others.jsonl")):
        main([
            "quantize", str(trained.elastic), "--format", "fp8", "--samples", str(first + 2),
            "--data", str(data), "--out", str(tmp_path / name),
        ])  # fmt: skip
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


# What is remarked


def size(kl=0.001, worse_by=-0.01, error=0.001, untrained=None, **kinds):
    def divergence(kl):
        return Divergence(
            tokens=100, kl=kl, equal_top1=0.9, nats=2.0 + worse_by, reference_nats=2.0,
            worse_by=worse_by, standard_error=error,
        )  # fmt: skip

    cut = None if untrained is None else divergence(untrained)
    return SizeVerdict(trained=divergence(kl), untrained=cut, **kinds)


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        (size(is_full=True), ""),
        (size(is_full=True, kl=1.1 * LEFT), "large costs what its parent does and has left it"),
        (size(is_full=True, worse_by=0.01), "large costs .* reads worse than its parent .perp"),
        (size(is_full=True, worse_by=0.0019), ""),  # within twice the noise
        (size(kl=0.5, worse_by=0.3, untrained=0.9), ""),  # a small size may be worse
        (size(kl=0.9, untrained=0.5), "training has brought large no nearer .* raise stages.t"),
        (size(widths_from="budget"), "widths of large come from its budget, not from the data"),
        (size(widths_from="data"), ""),
    ],
)  # fmt: skip
def test_trouble_is_remarked_with_what_to_do(judged, said, tmp_path):
    verdict = Verdict(
        elastic=tmp_path, reference="its parent", rows=3, sizes={"large": judged},
        sample=Sample(prompt="", reference="", sizes={}), next_command="",
    )  # fmt: skip
    lines = list(verdict.remarks())
    if not said:
        assert lines == []
        return
    (line,) = lines
    assert re.search(said, line), line


# The next command


def test_the_next_command_names_a_place_that_is_free(tmp_path):
    (tmp_path / "elastic").mkdir()
    (tmp_path / "elastic-2").symlink_to("nowhere")
    assert free_name(tmp_path, "small") == tmp_path / "small"
    assert free_name(tmp_path, "elastic") == tmp_path / "elastic-3"
