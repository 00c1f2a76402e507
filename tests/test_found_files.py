"""Every kind of checkpoint that people have is read by every command, or refused in one line."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import star_elastic
from star_elastic.architectures import read_config
from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.checkpoints.tensors import SINGLE_NAME
from star_elastic.errors import StarElasticError
from star_elastic.models.load import load_parent
from star_elastic.rewrite.family import quantise_family
from star_elastic.rewrite.stream import slice_checkpoint, sort_checkpoint
from tests.checkpoints import everything_under, nothing_changes_in
from tests.found_files import NAMED, ONLY, READ, REFUSED
from tests.processes import require_well_formed
from tests.tiny_family import make_checkpoint

TYPES = ("llama", "nemotron_h")
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A family of each type. Not to be changed."""
    return {kind: make_checkpoint(tmp_path_factory.mktemp(kind), kind) for kind in TYPES}


def cases(kinds) -> list[tuple[str, str]]:
    """Every kind with the model types that have it."""
    return [(name, own) for name in kinds for own in TYPES if ONLY.get(name, own) == own]


def changed(made: dict[str, Path], model_type: str, change, tmp_path: Path) -> Path:
    """A family to which something has been done."""
    folder = shutil.copytree(made[model_type], tmp_path / "found")
    change(folder)
    return folder


def logits(model) -> torch.Tensor:
    """Of some tokens, in fp32."""
    with torch.no_grad():
        return model.float()(IDS).logits


def plain(path: Path, *, trusts: bool = False):
    """The model as transformers loads it."""
    with warnings.catch_warnings():  # of the old spelling of scaled positions
        warnings.simplefilter("ignore", FutureWarning)
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=trusts
        ).eval()


@pytest.mark.parametrize(("name", "model_type"), cases(READ))
def test_what_is_found_is_read(made, tmp_path, name, model_type):
    """As transformers reads it; and its slice, which needs nothing that stayed behind."""
    found = changed(made, model_type, READ[name], tmp_path)
    assert read_config(found).axis_map.full
    parent, _ = load_parent(found)
    torch.testing.assert_close(logits(parent), logits(plain(found)), rtol=1e-4, atol=1e-4)
    family = star_elastic.load(found, dtype="float32")
    (said,) = family.generate(["1+2"], max_new_tokens=4)
    assert said.phases
    out = tmp_path / "slice"
    slice_checkpoint(found, ElasticCheckpoint(found).manifest.size("small").widths, out)
    expected = logits(family["small"])
    for trusts in (False, True):
        own = plain(out, trusts=trusts)
        torch.testing.assert_close(logits(own), expected, rtol=1e-4, atol=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=trusts)
        assert tokenizer.chat_template == family.tokenizer.chat_template
        assert tokenizer.get_vocab() == family.tokenizer.get_vocab()
    assert {path.split("/")[0] for path in everything_under(out)} <= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", SINGLE_NAME, NAMED,
    }  # fmt: skip
    quantise_family(found, tmp_path / "quantised", "fp8-channel")
    assert load_parent(tmp_path / "quantised")


@pytest.mark.parametrize(("name", "model_type"), cases(REFUSED))
def test_what_is_found_and_cannot_be_read_is_told(made, tmp_path, name, model_type):
    """By every reader in one line, which says what to do, with nothing written."""
    change, said = REFUSED[name]
    found = changed(made, model_type, change, tmp_path)
    out = tmp_path / "out"
    readers = (
        lambda: load_parent(found),
        lambda: star_elastic.load(found),
        lambda: slice_checkpoint(found, {}, out),
        lambda: sort_checkpoint(found, {}, out),
        lambda: quantise_family(found, out, "fp8-channel"),
    )
    for read in readers:
        with nothing_changes_in(tmp_path), pytest.raises(StarElasticError, match=said) as refused:
            read()
        require_well_formed(f"error: {refused.value}")
