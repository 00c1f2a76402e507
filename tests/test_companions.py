"""What stands beside the weights either loads or is refused, by every command that copies it; and
error lines around files and configs say one thing, once."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from star_elastic.checkpoints.companions import GENERATION, TOKENIZER_CONFIG
from star_elastic.data.chat import open_turn
from star_elastic.errors import CheckpointError, ConfigError, StarElasticError
from star_elastic.models.load import load_parent
from star_elastic.models.model_config import attempt_at_config
from star_elastic.models.tokenizer import load_tokenizer, stop_tokens
from star_elastic.strict import read_value
from star_elastic.train.check import check
from star_elastic.train.config import RunConfig, parse
from tests.checkpoints import (
    edit_json,
    everything_under,
    make_elastic,
    nothing_changes_in,
    write_rows,
)
from tests.processes import refusal, require_well_formed
from tests.tiny_family import make_tokenizer

TEMPLATE, NAMED = "chat_template.jinja", "additional_chat_templates/rag.jinja"
BROKEN = "{% for m in messages %}"
DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "tokenizer, half": ("tokenizer.json", b'{"version": "1.0", "trunc', "cannot be read"),
    "tokenizer, no text": ("tokenizer.json", b"\xff\xfe{}", "cannot be read"),
    "tokenizer, empty object": ("tokenizer.json", b"{}", "holds no usable tokenizer"),
    "tokenizer, list": ("tokenizer.json", b"[]", "is not a JSON object"),
    "tokenizer, folder": ("tokenizer.json", None, "is not a file"),
    "settings, half": (GENERATION, b'{"eos', "cannot be read"),
    "settings, list": (GENERATION, b"[]", "is not a JSON object"),
    "settings, wrong": (GENERATION, b'{"max_new_tokens": "x"}', "cannot be read"),
    "settings, folder": (GENERATION, None, "is not a file"),
    "tokenizer's config, half": (TOKENIZER_CONFIG, b"{", "cannot be read"),
    "tokenizer's config, list": (TOKENIZER_CONFIG, b"[]", "is not a JSON object"),
    "longest, wrong": (TOKENIZER_CONFIG, b'{"model_max_length": "x"}', "model_max_length='x' is"),
    "template in it": (
        TOKENIZER_CONFIG, json.dumps({"chat_template": BROKEN}).encode(), "no valid Jinja",
    ),
    "templates in it": (
        TOKENIZER_CONFIG,
        json.dumps({"chat_template": [{"name": "rag", "template": BROKEN}]}).encode(),
        "no valid Jinja",
    ),
    "template in it, number": (TOKENIZER_CONFIG, b'{"chat_template": 5}', "that is no text"),
    "template, half": (TEMPLATE, BROKEN.encode(), "no valid Jinja .*, line 1"),
    "template, no filter": (TEMPLATE, b"{{ messages | nothing }}", "no valid Jinja"),
    "template, no text": (TEMPLATE, b"\xff\xfe", "is no text in UTF-8"),
    "template, folder": (TEMPLATE, None, "is not a file"),
    "another template": (NAMED, BROKEN.encode(), "rag.jinja holds a chat template that is no v"),
    "template of a processor": ("chat_template.json", b"{", "cannot be read"),
    "special tokens": ("special_tokens_map.json", b"{", "cannot be read"),
    "added tokens": ("added_tokens.json", b"[1]", "is not a JSON object"),
    "vocabulary": ("vocab.json", b"{", "cannot be read"),
    "merges": ("merges.txt", b"\xff", "is no text in UTF-8"),
}  # fmt: skip


def damage(folder: Path, name: str, content: bytes | None) -> None:
    """Puts content in a file's place, or a folder."""
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    if content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content)


def copiers(parent: Path, elastic: Path, rows: Path, out: Path) -> dict[str, Any]:
    """Everything that copies what stands beside weights; training tells before it begins."""
    from star_elastic.rewrite.family import quantise_family
    from star_elastic.rewrite.stream import slice_checkpoint, sort_checkpoint

    run = {
        "parent": str(parent), "out": str(out), "sizes": {"large": {"active": 1.0}},
        "data": [{"files": [str(rows)]}],
        "stages": [{"tokens": 64, "context": 16, "batch_size": 1}],
    }  # fmt: skip
    return {
        "slice": lambda: slice_checkpoint(elastic, {}, out),
        "sort": lambda: sort_checkpoint(parent, {}, out),
        "quantize": lambda: quantise_family(elastic, out, "fp8-channel"),
        "train": lambda: check(parse(RunConfig, run, "")),
    }


@pytest.mark.parametrize("name", DAMAGE)
def test_whatever_copies_a_file_that_does_not_load_refuses_it(copied, tmp_path, name):
    file, content, said = DAMAGE[name]
    damage(copied, file, content)
    elastic = make_elastic(copied, tmp_path / "elastic")
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    for copy in copiers(copied, elastic, rows, out).values():
        with nothing_changes_in(tmp_path), pytest.raises(StarElasticError, match=said) as refused:
            copy()
        require_well_formed(f"error: {refused.value}")
        assert "usable" in said or Path(file).name in str(refused.value)
    with pytest.raises(StarElasticError, match=said):  # as whatever reads the tokenizer says it
        load_tokenizer(copied) and load_parent(copied)


def test_a_command_says_it_in_one_line(copied, tmp_path):
    damage(copied, TEMPLATE, BROKEN.encode())
    elastic = make_elastic(copied, tmp_path / "elastic")
    out = tmp_path / "out"
    for command in (
        ("slice", elastic, "--size", "small", "--out", out),
        ("quantize", elastic, "--format", "fp8-channel", "--out", out),
        ("generate", elastic, "1+2"),
        ("check", elastic),
    ):
        assert f"{TEMPLATE} holds a chat template that is no valid Jinja" in refusal(*command)
    assert not out.exists()


def test_templates_of_every_form_that_load_are_copied(copied, tmp_path):
    """Also those that mark what is generated, and several by name."""
    from star_elastic.rewrite.stream import slice_checkpoint

    text = "{% generation %}{{ messages[0].content }}{% endgeneration %}{% break %}"
    (copied / TEMPLATE).write_text("{% for m in messages %}" + text + "{% endfor %}")
    edit_json(copied / TOKENIZER_CONFIG, chat_template={"default": "a", "rag": "b"})
    slice_checkpoint(copied, {}, tmp_path / "slice")
    assert {TEMPLATE, TOKENIZER_CONFIG} <= everything_under(tmp_path / "slice")


def test_ends_that_are_no_tokens_are_refused(copied):
    tokenizer = load_tokenizer(copied)
    for file, ends in ((GENERATION, "x"), (GENERATION, [2, "x"])):
        edit_json(copied / file, eos_token_id=ends)
        with pytest.raises(CheckpointError, match=f"eos_token_id=.* is no token id; .*{file}"):
            stop_tokens(copied, tokenizer)


# What is at fault


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "leaves out message 1"), ("hello", "leaves out message 1"),
        ("{{ messages.x.y }}", "refuses these messages"),
    ],
)  # fmt: skip
def test_a_template_that_writes_no_message_is_at_fault_itself(template, said):
    tokenizer = make_tokenizer(template)
    messages = [{"role": "user", "content": "1+2"}]
    with pytest.raises(ConfigError, match=f"{said}.*; restore the template") as refused:
        open_turn(tokenizer, messages, thinking=True, tags=[])
    require_well_formed(f"error: {refused.value}")


def test_a_role_that_a_template_does_not_know_is_at_fault():
    known = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "1"}, {"role": "wizard", "content": "2"}]
    with pytest.raises(ConfigError, match="message 2 .*; use roles that it knows"):
        open_turn(make_tokenizer(known), messages, thinking=True, tags=[])


LOGGED = ("use_return_dict", "is_heterogeneous", "per_layer_attributes", "rope_parameters")


@pytest.mark.parametrize("key", LOGGED)
def test_a_config_that_fails_is_told_in_one_line(copied, tmp_path, key):
    """transformers logs the whole config for keys that it cannot set, again for every attempt."""
    edit_json(copied / "config.json", **{key: True})
    elastic = make_elastic(copied, tmp_path / "elastic")
    for command in (
        ("generate", elastic, "1+2"),
        ("slice", elastic, "--size", "small", "--out", tmp_path / "out"),
    ):
        assert f"correct {key}=True in config.json" in refusal(*command)


def test_an_attempt_hides_its_own_words_alone(capsys):
    logger = logging.getLogger("transformers.anything")
    level, logger.level = logger.level, logging.ERROR
    handler = logging.getLogger("transformers").handlers[0]
    before = list(handler.filters)
    with attempt_at_config():
        logger.error("hidden")
    logger.level = level
    assert "hidden" not in capsys.readouterr().err and handler.filters == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_act", "nope", "the slice's config.json made of "),
        ("max_position_embeddings", -1, "max_position_embeddings=-1 is not a positive integer"),
    ],
)
def test_a_config_that_cannot_be_built_is_told_well(copied, tmp_path, key, value, said):
    elastic = make_elastic(copied, tmp_path / "elastic")
    edit_json(elastic / "config.json", **{key: value})
    assert said in refusal("slice", elastic, "--size", "small", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data", ["x"], r"data\[0\]='x' is not a table; write \[\[data\]\] and its keys below"),
        ("engine", ["x"], r"engine=\['x'\] is not a table; write \[engine\] and its keys below"),
        ("engine", 3, r"engine=3 is not a table; write \[engine\]"),
        ("sizes", {"a": 3}, r"sizes.a=3 is not a table; write \[sizes.a\]"),
        ("stages", [[]], r"stages\[0\]=\[\] is not a table; write \[\[stages\]\]"),
    ],
)
def test_what_stands_in_the_place_of_a_table_is_told(key, value, said):
    import typing

    with pytest.raises(ConfigError, match=said) as refused:
        read_value(typing.get_type_hints(RunConfig)[key], value, key)
    require_well_formed(f"error: {refused.value}")


def test_nothing_of_this_is_needed(copied, tmp_path):
    """Weights may stand alone."""
    from star_elastic.rewrite.stream import slice_checkpoint

    bare = shutil.copytree(copied, tmp_path / "bare")
    for file in bare.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    slice_checkpoint(bare, {}, tmp_path / "slice")
    assert everything_under(tmp_path / "slice") == {"config.json", "model.safetensors"}
