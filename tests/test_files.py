"""The files people really have: what stands beside the weights, what the weights' file holds beyond
or against its config, and what is written from them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.companions import LATENCY, copy_companions
from star_elastic.checkpoints.elastic import CARRIED, ElasticCheckpoint, rewrite_family_files
from star_elastic.checkpoints.manifest import Manifest
from star_elastic.checkpoints.stored import StoredModel
from star_elastic.checkpoints.tensors import INDEX_NAME, SINGLE_NAME, CheckpointReader, save_tensors
from star_elastic.cost.latency import save_table
from star_elastic.errors import CheckpointError, ConfigError, StarElasticError
from star_elastic.files.writing import new_directory, replaced, write_json
from star_elastic.models.load import load_parent
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.rewrite.family import quantise_family
from star_elastic.rewrite.stream import slice_checkpoint, sort_checkpoint
from star_elastic.train.config import RunConfig, parse
from star_elastic.train.run import train
from tests.architectures import ROWS, fixed_config
from tests.checkpoints import (
    EMBEDDING,
    HEAD,
    edit_json,
    everything_under,
    file_size_limit,
    make_elastic,
    nothing_changes_in,
    plain_checkpoint,
    rewrite,
    write_rows,
)
from tests.latencies import made_up
from tests.laws.parents import make_parent
from tests.processes import answer, refusal

OF_THE_PARENT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "tokenizer.model.v3", "qwen.tiktoken", "tekken.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "LICENSE", "LICENSE.txt", "Notice.txt",
    "USE_POLICY.md",
)  # fmt: skip
LEFT_BEHIND = (
    "adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "training_args.bin",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin.index.json", "model.onnx",
    "modeling_custom.py", "tokenization_custom.py", "preprocessor_config.json", "quant_config.json",
    "hf_quant_config_old.json", ".gitattributes", "model.gguf", "eval_results.json", "log.txt",
    "consolidated.safetensors", "params.json",
)  # fmt: skip


# What travels


def test_of_a_parent_travels_what_loaders_read(copied, tmp_path):
    for name in (*OF_THE_PARENT, *LEFT_BEHIND):
        if not (copied / name).exists():
            (copied / name).write_text("{}")
    (copied / "runs").mkdir()
    (copied / "runs" / "tokenizer.json").write_text("{}")
    slice_checkpoint(copied, {"ffn": 16}, tmp_path / "slice")
    expected = {*OF_THE_PARENT, "config.json", SINGLE_NAME}
    assert everything_under(tmp_path / "slice") == expected
    again = tmp_path / "again"
    slice_checkpoint(tmp_path / "slice", {}, again)
    assert everything_under(again) == expected


def test_the_parents_card_is_not_the_slices_own(copied, tmp_path):
    (copied / "README.md").write_text("the parent's")
    slice_checkpoint(copied, {}, tmp_path / "a")
    assert (tmp_path / "a/PARENT_README.md").read_text() == "the parent's"
    assert not (tmp_path / "a/README.md").exists()
    (tmp_path / "a/README.md").write_text("of the slice")
    slice_checkpoint(tmp_path / "a", {}, tmp_path / "b")
    assert (tmp_path / "b/PARENT_README.md").read_text() == "the parent's"
    assert not (tmp_path / "b/README.md").exists()


def test_templates_travel_wherever_they_lie(copied, tmp_path):
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages }}")
    (copied / "additional_chat_templates" / "notes.txt").write_text("no template")
    slice_checkpoint(copied, {}, tmp_path / "slice")
    parents, its = (load_tokenizer(path).chat_template for path in (copied, tmp_path / "slice"))
    assert isinstance(parents, dict) and parents["rag"] == "rag {{ messages }}"
    assert its == parents
    assert not (tmp_path / "slice/additional_chat_templates/notes.txt").exists()


def test_configs_point_to_nothing_that_is_absent(copied, tmp_path):
    code = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    edit_json(
        copied / "config.json", auto_map=code, custom_pipelines={"x": {"impl": "pipe.P"}},
        _name_or_path="/somewhere/else",
    )  # fmt: skip
    edit_json(
        copied / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.T", None]},
        processor_class="XProcessor", special_tokens_map_file="/home/me/.cache/special_tokens.json",
    )  # fmt: skip
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (copied / name).write_text("raise RuntimeError('the code of others')")
    out = tmp_path / "slice"
    slice_checkpoint(copied, {"ffn": 16}, out)
    config, tokenizer = (json.loads((out / n).read_text()) for n in
                         ("config.json", "tokenizer_config.json"))  # fmt: skip
    assert not {"auto_map", "custom_pipelines", "_name_or_path"} & config.keys()
    assert not {"auto_map", "processor_class", "special_tokens_map_file"} & tokenizer.keys()
    for trust in (False, True):
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=trust)
        assert model.config.intermediate_size == 16
        assert AutoTokenizer.from_pretrained(out, trust_remote_code=trust).encode("1+2")
    assert load_tokenizer(copied).encode("1+2")  # without running what lies beside it


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "LICENSE"])
def test_what_is_missing_from_a_pruned_cache_is_told(copied, tmp_path, name):
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to("../../blobs/gone")
    with nothing_changes_in(tmp_path), pytest.raises(CheckpointError, match=f"{name} is a link to"):
        slice_checkpoint(copied, {}, tmp_path / "slice")


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_missing_of_a_family_is_told(copied, tmp_path, name):
    (copied / name).symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"{name} is a link to gone"):
        rewrite_family_files(ElasticCheckpoint(copied), tmp_path, Manifest("llama", {}, {}))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", SINGLE_NAME])
def test_pointers_of_git_lfs_are_no_files(copied, tmp_path, name):
    (copied / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused = pytest.raises(StarElasticError, match=f"{name} is a pointer of Git LFS")
    with nothing_changes_in(tmp_path), refused:
        slice_checkpoint(copied, {}, tmp_path / "slice")
    with pytest.raises(StarElasticError, match="pointer of Git LFS"):
        load_tokenizer(copied) if name != SINGLE_NAME else load_parent(copied)


def test_a_snapshot_of_the_hub_cache_is_a_checkpoint(plain, tmp_path):
    """Its files are links to blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    model, _ = load_parent(snapshot)
    assert load_tokenizer(snapshot).encode("1+2")
    slice_checkpoint(snapshot, {}, tmp_path / "slice")
    assert not any(path.is_symlink() for path in (tmp_path / "slice").iterdir())
    again, _ = load_parent(tmp_path / "slice")
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_companion_that_cannot_be_read_is_named(copied, tmp_path):
    (copied / "tokenizer_config.json").write_text("{")
    with nothing_changes_in(tmp_path), pytest.raises(CheckpointError) as refused:
        slice_checkpoint(copied, {}, tmp_path / "slice")
    assert "tokenizer_config.json cannot be read" in str(refused.value)
    with pytest.raises(CheckpointError, match="nowhere cannot be read"):
        copy_companions(tmp_path / "nowhere", tmp_path)


# What a file holds beyond or against its config


def commands(parent: Path, elastic: Path, tmp_path: Path) -> dict[str, tuple]:
    """Every command that reads weights, on a parent or its family."""
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    (tmp_path / "run.toml").write_text(
        f'parent = "{parent}"\nout = "{out}"\n[sizes.large]\nactive = 1.0\n'
        f'[[data]]\nfiles = ["{rows}"]\n[[stages]]\ntokens = 64\ncontext = 16\nbatch_size = 1\n'
    )
    return {
        "rank": ("rank", parent, "--data", rows, "--out", tmp_path / "scores.safetensors"),
        "train": ("train", tmp_path / "run.toml"),
        "adopt": ("adopt", parent, "--size", "small:ffn=16", "--out", out),
        "slice": ("slice", elastic, "--size", "small", "--out", out),
        "quantize": ("quantize", elastic, "--format", "fp8-channel", "--out", out),
        "generate": ("generate", elastic, "1+2"),
        "eval": ("eval", elastic, "--data", rows, "--out", out),
        "latency": ("latency", elastic, "--sizes", "--out", tmp_path / "sizes.json"),
    }


@pytest.mark.parametrize("stranger", ["own head", "unknown"])
def test_what_would_be_lost_is_refused_in_every_command_alike(copied, tmp_path, stranger):
    if stranger == "own head":  # transformers would load it, tied or not
        edit_json(copied / "config.json", tie_word_embeddings=True)
        said = "holds a lm_head.weight of its own, but its config.json ties it to model.embed_tok"
    else:
        rewrite(copied, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
        said = "holds the tensor model.extra.weight (1 such), which the llama table does not know"
    elastic = make_elastic(copied, tmp_path / "elastic")
    asked = commands(copied, elastic, tmp_path)
    for name, command in asked.items():
        with nothing_changes_in(tmp_path):
            assert said in refusal(*command), name
    with pytest.raises(CheckpointError, match="of its own|does not know"):
        sort_checkpoint(copied, {}, tmp_path / "sorted")
    if stranger == "own head":
        edit_json(copied / "config.json", tie_word_embeddings=False)  # as the advice has it
        edit_json(elastic / "config.json", tie_word_embeddings=False)
        answer(*asked["slice"])
        assert HEAD in load_file(tmp_path / "out" / SINGLE_NAME)


def test_a_tied_head_that_is_the_embedding_is_no_other(tmp_path):
    plain = plain_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    assert HEAD not in load_file(plain / SINGLE_NAME)
    model, _ = load_parent(plain)
    rewrite(plain, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    again, _ = load_parent(plain)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    slice_checkpoint(plain, {"hidden": 16, "heads": 2}, tmp_path / "slice")
    assert HEAD not in load_file(tmp_path / "slice" / SINGLE_NAME)
    rewrite(plain, lambda tensors: tensors[HEAD][-1, -1].add_(1e-3))
    with pytest.raises(CheckpointError, match="set tie_word_embeddings=false"):
        load_parent(plain)


def test_a_head_that_is_missing_may_be_tied(copied):
    rewrite(copied, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(CheckpointError, match="lacks the tensor lm_head.weight; set tie_word_emb"):
        load_parent(copied)
    edit_json(copied / "config.json", tie_word_embeddings=True)
    load_parent(copied)


def test_weights_that_are_no_numbers_of_a_model_are_refused(copied, tmp_path):
    rewrite(copied, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].to(torch.int32)}))
    for refused in (load_parent, lambda path: slice_checkpoint(path, {}, tmp_path / "slice")):
        with pytest.raises(CheckpointError, match="is stored as torch.int32, which no unquantised"):
            refused(copied)


# Dtypes


SPELLINGS = [
    {"dtype": ...},
    {"dtype": ..., "torch_dtype": "auto"},
    {"dtype": "auto"},
    {"dtype": ..., "torch_dtype": "torch.bfloat16"},
    {"dtype": "float32"},
    {"dtype": "bfloat16", "torch_dtype": "float32"},
    {"dtype": None},
]


@pytest.mark.parametrize("named", SPELLINGS, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_dtype_is_that_of_the_file_whatever_the_config_says(plain, tmp_path, named, stored):
    parent = shutil.copytree(plain, tmp_path / "parent")
    rewrite(parent, lambda tensors: tensors.update({n: t.to(stored) for n, t in tensors.items()}))
    edit_json(parent / "config.json", **named)
    model, config = load_parent(parent)
    assert model.dtype == torch.float32  # as asked for
    axis_map = architecture_of(config).axis_map(config)
    assert StoredModel(parent, axis_map, architecture_of(config)).dtype == stored
    elastic = make_elastic(parent, tmp_path / "elastic")
    slice_checkpoint(elastic, {"ffn": 16}, tmp_path / "slice")
    sort_checkpoint(parent, {}, tmp_path / "sorted")
    quantise_family(elastic, tmp_path / "quantised", "fp8-channel")
    for out in (tmp_path / "slice", tmp_path / "sorted", tmp_path / "quantised"):
        assert CheckpointReader(out).dtype(EMBEDDING) == stored
        written = json.loads((out / "config.json").read_text())
        spelled = {written["dtype"], written.get("torch_dtype", written["dtype"])}
        assert spelled == {str(stored).removeprefix("torch.")}
        assert AutoConfig.from_pretrained(out).dtype == stored
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "slice").dtype == stored


def run_on(parent: Path, tmp_path: Path, **changed: Any) -> Path:
    """The elastic checkpoint of a run of four steps; some keys of its config may be others."""
    content = {
        "parent": str(parent), "out": str(tmp_path / "run"),
        "sizes": {"large": {"active": 1.0}, "small": {"active": 0.9}},
        "router": {"fixed": {"large": "", "small": "ffn=24"}},
        "data": [{"files": [str(write_rows(tmp_path / "rows.jsonl"))]}],
        "calibration": {"num_samples": 4, "context": 16},
        "stages": [{"tokens": 128, "context": 16, "batch_size": 2, "learning_rate": 1e-4}],
    }  # fmt: skip
    return train(parse(RunConfig, content | changed, "")).elastic


def test_training_stores_every_tensor_as_the_parent_does(copied, tmp_path):
    """BF16 without a word in the config, but norms in FP32."""
    rewrite(copied, lambda tensors: tensors.update(
        {n: t.bfloat16() for n, t in tensors.items() if "norm" not in n}
    ))  # fmt: skip
    edit_json(copied / "config.json", dtype=...)
    elastic = run_on(copied, tmp_path)
    reader = CheckpointReader(elastic)
    for name in reader.names:
        assert reader.dtype(name) == CheckpointReader(copied).dtype(name), name
    assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16, torch.float32}
    assert read_config(elastic)["dtype"] == "bfloat16"


# A family's own files


def test_what_belongs_to_a_family_survives_quantisation_and_no_slice(copied, tmp_path):
    elastic = make_elastic(copied, tmp_path / "elastic")
    for name in CARRIED:
        (elastic / name).write_bytes(name.encode())
    quantise_family(elastic, tmp_path / "quantised", "fp8-channel")
    for name in CARRIED:
        assert (tmp_path / "quantised" / name).read_bytes() == name.encode()
    assert (tmp_path / "quantised" / "elastic.json").is_file()
    for source in (elastic, tmp_path / "quantised"):
        slice_checkpoint(source, {"ffn": 16}, tmp_path / f"slice of {source.name}")
        left = everything_under(tmp_path / f"slice of {source.name}")
        assert not {*CARRIED, "elastic.json"} & left


def test_training_writes_what_a_family_has(copied, tmp_path):
    elastic = run_on(copied, tmp_path)
    assert {"elastic.json", "orders.safetensors", "tokenizer.json"} <= everything_under(elastic)


def test_a_family_that_is_trained_on_keeps_its_table(copied, tmp_path):
    """Its shapes, and so its times, are the same."""
    family = run_on(copied, tmp_path)
    (family / LATENCY).write_bytes(b"times")
    (tmp_path / "on").mkdir()
    on = run_on(copied, tmp_path / "on", family=str(family), router={})
    assert (on / LATENCY).read_bytes() == b"times"


def test_a_table_measured_before_quantisation_tells_shares_but_no_times(trained, tmp_path):
    """The router's shares of time are those of the table that it was trained with."""
    family = shutil.copytree(trained.elastic, tmp_path / "family")
    config = read_config(family)
    save_table(made_up(architecture_of(config).axis_map(config)), family / LATENCY)
    manifest = json.loads((family / "elastic.json").read_text())
    for size, share in (("large", 1.0), ("small", 0.1)):
        manifest["sizes"][size]["budgets"] = {"ms": share}
    write_json(family / "elastic.json", manifest)
    quantise_family(family, tmp_path / "q", "fp8-channel", keep=["routed experts"])
    for budget, out in (("ms=0.9", tmp_path / "a"), ("ms=1s", tmp_path / "b")):
        code = answer if out.name == "a" else refusal
        said = code("slice", tmp_path / "q", "--budget", budget, "--out", out)
        assert out.name == "a" or "was measured before the family was quantised" in said


# Full disks


def test_what_a_killed_process_left_is_told_and_stands_in_no_way(tmp_path, caplog, monkeypatch):
    """In a container, the next process has the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    out, file = tmp_path / "out[1]", tmp_path / "table.json"
    killed = [new_directory(out), replaced(file), new_directory(out), replaced(file)]
    for block in killed:  # which are never left
        block.__enter__().mkdir(exist_ok=True)
    left = {path for path in tmp_path.iterdir() if path.name.endswith(".partial")}
    assert len(left) == 2 and len(caplog.records) == 1
    caplog.clear()
    with new_directory(out) as temporary:
        (temporary / "whole").touch()
    write_json(file, {})
    assert {record.getMessage() for record in caplog.records} == {
        f"{path} is unfinished; remove it, unless it is being written now" for path in left
    }
    assert (out / "whole").is_file() and file.is_file()
    caplog.clear()
    for name in ("out[2]", "out"):  # of which none is unfinished
        with new_directory(tmp_path / name):
            pass
    assert not caplog.records


def test_a_full_disk_leaves_nothing_half_written(copied, tmp_path):
    elastic = make_elastic(copied, tmp_path / "elastic")
    tensors = load_file(copied / SINGLE_NAME)
    writers = {
        "slice": lambda out: slice_checkpoint(elastic, {}, out),
        "sort": lambda out: sort_checkpoint(copied, {}, out),
        "quantise": lambda out: quantise_family(elastic, out, "fp8-channel"),
        "tensors": lambda out: save_tensors(out, tensors),
        "json": lambda out: write_json(out, {"a": "b" * 10**5}),
    }
    for name, write in writers.items():
        for limit in (64, 5000):
            refused = pytest.raises(CheckpointError, match="^[^\n]*File too large[^\n]*$")
            with nothing_changes_in(tmp_path), refused, file_size_limit(limit):
                write(tmp_path / name)
        write(tmp_path / name)


# Law 10: our names and boxes are transformers' own


@pytest.mark.parametrize("kind", ROWS)
def test_names_and_boxes_are_those_that_transformers_saves(kind, tmp_path):
    """Every element of the model has a number of its own, so that no two pieces can be swapped."""
    parent = make_parent(fixed_config(kind), 0, torch.float32)
    start = 0
    with torch.no_grad():
        for name in parent.axis_map.tensors:
            value = parent.state[name]
            value.copy_(torch.arange(start, start + value.numel()).view(value.shape))
            start += value.numel()
    assert start < 2**24  # so far are integers exact in fp32
    parent.model.save_pretrained(tmp_path / "theirs")
    source = StoredModel(tmp_path / "theirs", parent.axis_map, parent.architecture)
    source.require_whole()
    for name, value in source.state(torch.float32).items():
        assert torch.equal(value, parent.state[name]), name
    ours = parent.save(tmp_path)
    for widths in ({}, narrow(parent.axis_map)):
        cut = [tmp_path / f"{owner}{len(widths)}" for owner in ("ours", "theirs")]
        slice_checkpoint(ours, widths, cut[0])
        slice_checkpoint(tmp_path / "theirs", widths, cut[1])
        # Of the slice, too: written here, and by transformers.
        model = AutoModelForCausalLM.from_pretrained(cut[0])
        model.save_pretrained(tmp_path / f"again{len(widths)}")
        stored = load_file(cut[0] / SINGLE_NAME)
        assert_equal(stored, load_file(cut[1] / SINGLE_NAME))
        assert_equal(stored, load_file(tmp_path / f"again{len(widths)}" / SINGLE_NAME))


def narrow(axis_map) -> dict[str, int]:
    """The narrowest legal widths."""
    widths = {n: a.minimum for n, a in axis_map.axes.items() if n not in ("layers", "hidden")}
    return widths | {"hidden": axis_map.axes["hidden"].size // 2}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_shards_are_read_as_one_file_is(plain, tmp_path):
    tensors = load_file(plain / SINGLE_NAME)
    sharded = shutil.copytree(plain, tmp_path / "sharded")
    (sharded / SINGLE_NAME).unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, sharded / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(sharded / INDEX_NAME, {"weight_map": weight_map})
    model, again = load_parent(plain)[0], load_parent(sharded)[0]
    assert_equal(dict(model.state_dict()), dict(again.state_dict()))
    file = sharded / "model-0.safetensors"
    save_file({**load_file(file), "model.extra.weight": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="holds the tensor model.extra.weight"):
        load_parent(sharded)  # which transformers would load, in the index or not
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-1.safetensors cannot be read"):
        load_parent(sharded)


def test_a_config_error_comes_before_any_weight_is_read(copied):
    edit_json(copied / "config.json", hidden_size=10**12)
    with pytest.raises(ConfigError, match="hidden_size=1000000000000 is more than"):
        load_parent(copied)
    edit_json(copied / "config.json", hidden_size=48)
    with pytest.raises(CheckpointError, match="but config.json says"):
        load_parent(copied)


# Lists by layer, and tensors in two files


def test_lists_by_layer_are_cut_with_the_layers(copied, tmp_path):
    other = {"eos_token_id": [2, 3], "architectures": ["LlamaForCausalLM"]}
    edit_json(
        copied / "config.json", layer_types=["full_attention"] * 2, no_rope_layers=[1, 0], **other
    )  # fmt: skip
    slice_checkpoint(copied, {"layers": (0, 1)}, tmp_path / "slice")
    config = read_config(tmp_path / "slice")
    assert config["layer_types"] == ["full_attention"] and config["no_rope_layers"] == [0]
    assert {key: config[key] for key in other} == other
    AutoModelForCausalLM.from_pretrained(tmp_path / "slice")


def test_a_slice_that_no_loader_opens_is_not_written(copied, tmp_path):
    edit_json(copied / "config.json", mlp_layer_types=["dense"] * 3, layer_types=None)
    edit_json(copied / "config.json", hidden_act=3)
    refused = pytest.raises(ConfigError, match="slice's config.json.*cannot be used.*hidden_act")
    with nothing_changes_in(tmp_path), refused:
        slice_checkpoint(copied, {"ffn": 16}, tmp_path / "slice")


@pytest.mark.parametrize("same", [True, False])
def test_a_tensor_in_two_files_must_be_the_same(copied, tmp_path, same):
    tensors = load_file(copied / SINGLE_NAME)
    (copied / SINGLE_NAME).unlink()
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[:9]}
    second = {name: tensors[name] for name in names[9:]}
    second[names[0]] = tensors[names[0]] + (0 if same else 1)
    for file, part in (("a.safetensors", first), ("b.safetensors", second)):
        save_file(part, copied / file, metadata={"format": "pt"})
    weight_map = dict.fromkeys(second, "b.safetensors") | dict.fromkeys(first, "a.safetensors")
    write_json(copied / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    if same:
        slice_checkpoint(copied, {}, tmp_path / "slice")
        assert torch.equal(load_file(tmp_path / "slice" / SINGLE_NAME)[names[0]], tensors[names[0]])
        return
    refused = pytest.raises(CheckpointError, match=f"{names[0]} is in .*a.safe.* and in .*b.safe")
    with nothing_changes_in(tmp_path), refused:
        slice_checkpoint(copied, {}, tmp_path / "slice")
