"""What libraries raise over a user's files is one line that names the file or the field, whatever
its type; absurd sizes are refused before they fill the memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache

from star_elastic.architectures import ModelConfig, architecture_of, read_config
from star_elastic.checkpoints.tensors import SINGLE_NAME, CheckpointReader
from star_elastic.cli import main
from star_elastic.cost.count import CostModel
from star_elastic.errors import CheckpointError, ConfigError, StarElasticError, library_boundary
from star_elastic.measure.latency_bench import Bench, Setting
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.train.config import load_run_config
from tests.architectures import DISTINCT, fixed_config
from tests.checkpoints import (
    edit_json,
    make_elastic,
    nothing_changes_in,
    rewrite,
    write_rows,
)
from tests.laws.parents import examples, make_parent

# Every field of a config


NEVER_WRITTEN = ("model_type", "transformers_version")
FOUND_IN_FILES = (
    "dtype", "torch_dtype", "attn_implementation", "experts_implementation", "rope_scaling",
    "rope_theta", "num_labels", "id2label", "pruned_heads", "auto_map", "per_layer_config",
    "quantization_config", "is_encoder_decoder", "return_dict", "output_hidden_states",
)  # fmt: skip
NONSENSE = st.sampled_from(
    ["abc", "", -1, 0, 3, None, [], [1], {}, {"a": 1}, True, 0.5, 1e300, -1e300, 10**18, -(10**18),
     10**400, [[]], float("inf"), float("nan"), "M" * 2000, [0.0] * 7]
)  # fmt: skip


@pytest.fixture(scope="module", params=DISTINCT)
def fuzzed(request, tmp_path_factory) -> tuple[Path, dict[str, Any], list[str]]:
    """A checkpoint, its config, and every field that such a config may have."""
    config = fixed_config(request.param)
    path = make_parent(config, 0, torch.float32).save(tmp_path_factory.mktemp(request.param))
    written = json.loads((path / "config.json").read_text())
    named = {k: v for k, v in written.items() if k not in (*NEVER_WRITTEN, "dtype")}
    made = AutoConfig.for_model(config["model_type"], **named).to_dict()
    return path, written, sorted({*written, *made, *FOUND_IN_FILES})


def use(path: Path) -> None:
    """What commands do with a checkpoint: count, load, run, decode, cut in memory and on disk."""
    config = read_config(path)
    axis_map = architecture_of(config).axis_map(config)
    assert CostModel(axis_map).full.total > 0
    model, _ = load_parent(path)
    ids = torch.arange(6).view(2, 3)
    narrow = {name: axis_map.axes[name].minimum for name in ("ffn", "expert_ffn", "heads")
              if name in axis_map.axes}  # fmt: skip
    with torch.no_grad():
        past: Any = model(input_ids=ids, use_cache=True)
        model(input_ids=ids[:, :1], cache=past.cache, use_cache=True)
        build_submodel(model, config, narrow)(input_ids=ids, use_cache=False)
    out = path.parent / "slice"
    shutil.rmtree(out, ignore_errors=True)
    slice_checkpoint(path, narrow, out)


@examples(60)
@given(data=st.data())
def test_any_field_of_a_config_works_or_is_one_line(fuzzed, data):
    path, written, fields = fuzzed
    changed = {data.draw(st.sampled_from(fields)): data.draw(NONSENSE)}
    (path / "config.json").write_text(json.dumps({**written, **changed}))
    try:
        use(path)
    except StarElasticError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500


ROPES = [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
     "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "short_factor": [1.0] * 3,
     "long_factor": [1.0] * 3, "original_max_position_embeddings": 64},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"type": "linear", "factor": 2.0},
]  # fmt: skip


@examples(40)
@given(data=st.data())
def test_rope_scalings_work_or_are_one_line(data):
    config = {**fixed_config("llama"), "max_position_embeddings": 256}
    rope = dict(data.draw(st.sampled_from(ROPES)))
    key = data.draw(st.sampled_from(sorted(rope)))
    if data.draw(st.booleans()):
        rope[key] = data.draw(NONSENSE)
    else:
        del rope[key]
    config[data.draw(st.sampled_from(["rope_parameters", "rope_scaling"]))] = rope
    try:
        bench = Bench(config, Setting(context=200, phase="prefill", seconds=0))
        model = bench.model(bench.axis_map.full, clocked=False).model
        with torch.no_grad():
            for ids in (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 200, dtype=torch.long)):
                model(input_ids=ids)
    except ConfigError as error:
        assert "rope" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pad_token_id": 33}, "correct pad_token_id=33"),
        ({"hidden_act": "swiglu"}, "correct hidden_act='swiglu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "correct rope_param"),
        ({"rope_scaling": {"type": "none such"}, "rope_parameters": ...}, "correct rope_scaling"),
        ({"attn_implementation": "flash_attention_2"}, "correct attn_implementation='flash_att"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings='4k' is not a positive"),
        ({"pad_token_id": 2**70}, "pad_token_id=1180591620717411303424 is too large"),
        ({"attention_bias": "yes"}, "attention_bias='yes' is neither true nor false"),
    ],
)
def test_the_field_at_fault_is_named(copied, change, said):
    edit_json(copied / "config.json", **change)
    for refused in (load_parent, load_tokenizer if "max_pos" in said else load_parent):
        with pytest.raises(ConfigError) as caught:
            refused(copied)
        assert said in str(caught.value) and "config.json" in str(caught.value)


def test_harmless_oddities_of_a_config_work(copied):
    edit_json(
        copied / "config.json", pad_token_id=-1, eos_token_id=[2, 10**6], num_labels=10**18,
        is_encoder_decoder=True, return_dict=False, use_cache=False, auto_map={"x": "y"},
        architectures=["SomethingElse"], unknown={"deep": [1, 2]},
    )  # fmt: skip
    model, _ = load_parent(copied)
    assert model(torch.arange(5)[None]).logits.isfinite().all()


# Absurd sizes


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("dense", {"ssm_state_size": 10**18}, "ssm_state_size=1000000000000000000 is more than"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than the"),
        ("dense", {"hybrid_override_pattern": "M" * 5000}, "the config names 5,000 layers"),
        ("moe", {"n_routed_experts": 2**20}, "n_routed_experts=1048576 in 2 layers are more than"),
        ("moe", {"topk_group": 3}, "topk_group=3 exceeds n_group=2"),
        ("moe", {"n_group": 8}, "n_routed_experts=8 leaves fewer than 2 experts in each of n_gr"),
        ("llama", {"hidden_size": 2**24, "vocab_size": 2**24}, "parameters, more than the 1e+14"),
        ("dense", {"chunk_size": 10**6}, "chunk_size=1000000 is more than the 1,024"),
        ("dense", {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon=1"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf is not a positive number"),
    ],
)
def test_absurd_sizes_are_refused_before_they_are_made(kind, change, said):
    config = {**fixed_config(kind), **change}
    with bounded_memory(), pytest.raises(ConfigError) as caught:
        architecture_of(config).axis_map(config)
    assert said in str(caught.value) and len(str(caught.value)) < 300


@contextmanager
def bounded_memory(most: int = 2**23) -> Iterator[None]:
    """No more than so many bytes of Python's objects are made inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_tables_are_cut_without_listing_rows():
    """A vocabulary of millions is one segment."""
    config = {**fixed_config("llama"), "vocab_size": 2**24, "intermediate_size": 2**22}
    axis_map = architecture_of(config).axis_map(config)
    with bounded_memory():
        smaller = axis_map.at({"ffn": 2**21})
    assert smaller.axes["ffn"].size == 2**21
    rows = axis_map.tensors["model.embed_tokens.weight"].dims[0]
    assert smaller.tensors["model.embed_tokens.weight"].dims[0] == rows


def test_a_model_larger_than_the_machine_is_not_timed(tmp_path):
    config = {**fixed_config("llama"), "vocab_size": 2**23, "hidden_size": 2**20}
    with pytest.raises(ConfigError, match=r"take [\d,]+ bytes, but there are [\d,]+ here"):
        Bench(config, Setting())


# Files that cannot be read


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("file", TOKENIZER_FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"12", "half"])
def test_unreadable_tokenizers_are_one_line(copied, file, content):
    text = (copied / file).read_bytes()
    (copied / file).write_bytes(text[: len(text) // 2] if content == "half" else content)
    try:
        load_tokenizer(copied)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(error).startswith(str(copied / file))
    else:
        pytest.fail("was read")


@examples(40)
@given(data=st.data())
def test_tokenizers_that_are_damaged_inside_work_or_are_one_line(plain, tmp_path_factory, data):
    copied = shutil.copytree(plain, tmp_path_factory.mktemp("damaged") / "parent")
    file = copied / data.draw(st.sampled_from(TOKENIZER_FILES))
    content = json.loads(file.read_text())
    where = content
    while isinstance(where, dict) and where:
        key = data.draw(st.sampled_from(sorted(where)))
        if not isinstance(where[key], dict) or data.draw(st.booleans()):
            where[key] = data.draw(NONSENSE)
            break
        where = where[key]
    file.write_text(json.dumps(content))
    try:
        load_tokenizer(copied)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_an_unknown_tokenizer_class_is_one_line_or_read_all_the_same(copied):
    edit_json(copied / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer")
    assert load_tokenizer(copied).encode("1")  # tokenizer.json says it all
    (copied / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds no usable tokenizer"):
        load_tokenizer(copied)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        '{"max_new_tokens": "many"}',
        '{"eos_token_id": {"a": 1}}',
        '{"top_p": -1}',
    ],
)
def test_generation_settings_work_or_are_one_line(copied, content):
    (copied / "generation_config.json").write_text(content)
    try:
        load_parent(copied)
    except CheckpointError as error:
        assert "\n" not in str(error) and "generation_config.json cannot be read" in str(error)


def test_settings_that_do_not_parse_are_named(copied):
    (copied / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json cannot be read .*remove it"):
        load_parent(copied)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything: tests of permissions run as a user who may not."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def test_what_may_not_be_read_is_one_line(copied, tmp_path):
    for load in (load_parent, load_tokenizer):  # whatever is imported late is imported now
        load(copied)
    for name in ("config.json", SINGLE_NAME, "tokenizer.json", "generation_config.json"):
        (copied / name).chmod(0)
    copied.chmod(0)
    with as_nobody():
        for refused in (load_parent, load_tokenizer, read_config, read_whole_slice):
            with pytest.raises(StarElasticError, match="cannot be read|holds no|no directory"):
                refused(copied)
    copied.chmod(0o755)
    (copied / "config.json").chmod(0o644)
    with (
        as_nobody(),
        pytest.raises(StarElasticError, match="cannot be read"),
    ):
        load_parent(copied)


def test_what_cannot_be_looked_at_is_one_line():
    for look in (read_config, load_parent, load_tokenizer, CheckpointReader, load_run_config):
        for path in ("a" * 300, "a\0b"):
            with pytest.raises(StarElasticError, match=r"cannot be read \(.+\); allow it, or name"):
                look(Path(path) / "x.toml")


def read_whole_slice(path: Path) -> None:
    slice_checkpoint(path, {}, path.parent / "slice")


# Keys that only caches and masks read


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4}, {"sliding_window": "4"}, {"attention_chunk_size": 4},
        {"layer_types": ["sliding_attention", "full_attention"]}, {"layer_types": 3},
        {"layer_types": ["full_attention"] * 3}, {"is_causal": False},
        {"per_layer_config": [{}, {"sliding_window": 4}]}, {"kv_sharing_modes": ["reuse", None]},
    ],
)  # fmt: skip
def test_keys_that_only_caches_obey_are_refused_everywhere(copied, change):
    edit_json(copied / "config.json", **change)
    (key,) = change
    for refused in (load_parent, read_whole_slice, count_of):
        with pytest.raises(ConfigError, match=f"{key}.*config.json"):
            refused(copied)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 2}, "does not go with sliding_window=3"),
        ("mistral", {"sliding_window": 1}, "sliding_window=1 is not an integer of 2 or more"),
        ("mistral", {"sliding_window": "3"}, "sliding_window='3' is not an integer"),
        ("qwen2", {"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers=2"),
        ("qwen2", {"layer_types": ["attention", 3]}, "is not a list of full_attention and slid"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "no window"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers=-1 is not an integer of 0 or"),
        ("qwen3_moe", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2,
                       "sliding_window": 4}, "does not go with sliding_window=4"),
        ("smollm3", {"no_rope_layers": [1]}, "is not a list with 1 .* for each of num_hidden_la"),
    ],
)  # fmt: skip
def test_windows_that_contradict_the_layers_are_refused(kind, change, reason):
    with pytest.raises(ConfigError, match=reason):
        _ = ModelConfig({**fixed_config(kind), **change}).axis_map


@pytest.mark.parametrize(
    ("kind", "change", "windows"),
    [
        ("mistral", {}, (4096, 4096)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, (None, 4096)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, (None, None)),
        ("qwen2", {"use_sliding_window": True}, (None, None)),  # from layer 28 on
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
    ],
)
def test_windows_are_those_that_transformers_reads(kind, change, windows, tmp_path):
    """Absent is not null; in a file, in a dictionary, and as transformers writes it once more."""
    own = ("use_sliding_window", "sliding_window", "max_window_layers")
    config = {k: v for k, v in fixed_config(kind).items() if k not in own} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    fields = {name: value for name, value in config.items() if name != "model_type"}
    made = AutoConfig.for_model(kind, **fields)
    layers = DynamicCache(config=made).layers
    assert tuple(getattr(layer, "sliding_window", None) for layer in layers) == windows
    made.save_pretrained(tmp_path / "theirs")
    for read in (config, read_config(tmp_path), read_config(tmp_path / "theirs")):
        work = ModelConfig.of(read).axis_map.work
        assert tuple(own.most for own in work) == windows
        whole = ModelConfig.of(ModelConfig.of(read).at({}))
        assert tuple(own.most for own in whole.axis_map.work) == windows


def count_of(path: Path) -> int:
    config = read_config(path)
    axis_map = architecture_of(config).axis_map(config)
    return CostModel(axis_map).full.total


def test_keys_that_only_caches_obey_are_dropped_where_they_say_nothing(copied, tmp_path):
    """A null is no default to transformers: `is_causal: null` lets tokens see those after them."""
    ids = torch.arange(12)[None]
    expected = load_parent(copied)[0](ids).logits
    nothing = dict.fromkeys(("sliding_window", "attention_chunk_size", "is_causal"))
    edit_json(copied / "config.json", layer_types=["full_attention"] * 2, **nothing)
    model, _ = load_parent(copied)
    assert torch.equal(model(ids).logits, expected)
    read_whole_slice(copied)
    assert not nothing.keys() & read_config(tmp_path / "slice").keys()
    assert not nothing.keys() & json.loads((tmp_path / "slice/config.json").read_text()).keys()


# Paths that are no checkpoints


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("org/model-1B", "hf download org/model-1B --local-dir model-1B"),
        ("nowhere", "nowhere is no directory here; name a Hugging Face checkpoint directory"),
        ("../no/where", "is no directory here"),
        ("parent/model.safetensors", "is a file; name the checkpoint directory that it lies in"),
    ],
)
def test_paths_that_are_no_checkpoints_are_explained(copied, monkeypatch, path, said):
    monkeypatch.chdir(copied.parent)
    for refused in (read_config, load_parent, load_tokenizer):
        with pytest.raises(ConfigError, match=said):
            refused(path)


def test_a_config_is_enough_to_count_but_not_to_load(copied):
    assert read_config(copied / "config.json")["model_type"] == "llama"
    for refused in (load_parent, load_tokenizer):
        with pytest.raises(CheckpointError, match="is a file; name the checkpoint directory"):
            refused(copied / "config.json")


# Every command


def damaged(copied: Path) -> dict[str, Any]:
    """Ways to damage a checkpoint: what to do to it, and the commands that do not mind."""
    head = (copied / SINGLE_NAME).read_bytes()[:100]
    return {
        "act": (lambda p: edit_json(p / "config.json", hidden_act="swiglu"),
                {"count", "sizes"}),
        "pad": (lambda p: edit_json(p / "config.json", pad_token_id=999), {"count", "sizes"}),
        "type": (lambda p: edit_json(p / "config.json", use_cache="often"),
                 {"count", "sizes"}),
        "size": (lambda p: edit_json(p / "config.json", intermediate_size=10**12), set()),
        "json": (lambda p: (p / "config.json").write_text("{"), set()),
        "weights": (lambda p: (p / SINGLE_NAME).write_bytes(head), {"count", "sizes", "latency"}),
        # Training begins its directory first, and goes on there when the weights are restored.
        "numbers": (lambda p: rewrite(p, lambda t: t["model.norm.weight"].fill_(math.nan)),
                    {"count", "sizes", "check", "latency", "train"}),
        "tokenizer": (lambda p: (p / "tokenizer.json").write_text("{"),
                      {"count", "sizes", "slice", "quantize", "latency"}),
        "template": (lambda p: (p / "chat_template.jinja").write_text("{% if %}"),
                     {"count", "sizes", "slice", "quantize", "latency", "rank", "train"}),
        "settings": (lambda p: (p / "generation_config.json").write_text("{"),
                     {"count", "sizes", "slice", "quantize", "latency"}),
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        "act", "pad", "type", "size", "json", "weights", "numbers", "tokenizer", "template",
        "settings",
    ],
)  # fmt: skip
def test_every_command_says_in_one_line_what_is_wrong(copied, tmp_path, capsys, damage):
    change, unmoved = damaged(copied)[damage]
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    elastic = make_elastic(copied, tmp_path / "elastic")
    for path in (copied, elastic):
        change(path)
    (tmp_path / "run.toml").write_text(
        f'parent = "{copied}"\nout = "{out}"\n[sizes.large]\nactive = 1.0\n'
        f'[[data]]\nfiles = ["{rows}"]\n[[stages]]\ntokens = 64\ncontext = 16\nbatch_size = 1\n'
    )
    commands = {
        "count": ("count", copied),
        "sizes": ("sizes", elastic),
        "check": ("check", elastic),
        "rank": ("rank", copied, "--data", rows, "--out", tmp_path / "s.safetensors"),
        "train": ("train", tmp_path / "run.toml"),
        "latency": ("latency", copied, "--out", tmp_path / "t.json", "--seconds", 0),
        "adopt": ("adopt", copied, "--size", "small:ffn=16", "--out", out),
        "slice": ("slice", elastic, "--size", "small", "--out", out),
        "quantize": ("quantize", elastic, "--format", "fp8-channel", "--out", out),
        "generate": ("generate", elastic, "1+2"),
        "eval": ("eval", elastic, "--data", rows, "--out", out),
    }
    for name, command in commands.items():
        if name in unmoved:
            continue
        with nothing_changes_in(tmp_path), pytest.raises(SystemExit) as ended:
            main(list(map(str, command)))
        shown = capsys.readouterr()
        said = [line for line in shown.err.splitlines() if line.strip()]
        assert ended.value.code == 2 and not shown.out, (name, shown)
        assert said[-1].startswith("error: ") and "; " in said[-1], (name, said)


# The boundary itself


class PanicException(BaseException):
    """As Rust libraries raise it."""


def test_panics_of_rust_libraries_are_told_and_stops_are_not():
    refused = pytest.raises(CheckpointError, match=r"^file \(it broke\); mend it$")
    with refused, library_boundary("file", lambda: "mend it"):
        raise PanicException("it broke")
    with pytest.raises(KeyboardInterrupt), library_boundary("file", "mend it"):
        raise KeyboardInterrupt
