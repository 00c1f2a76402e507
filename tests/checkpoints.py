"""Checkpoints as people have them: made small, changed and damaged by hand."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.checkpoints.tensors import SINGLE_NAME
from tests.tiny_family import WIDTHS, make_config, make_model, make_tokenizer

ROWS = [{"prompt": f"{a}+{b}", "completion": f"={a + b}"} for a in range(1, 7) for b in (2, 5)]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def plain_checkpoint(
    path: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A checkpoint as transformers saves it, with a tokenizer."""
    tokenizer = make_tokenizer()
    config = make_config(model_type, len(tokenizer))
    for name, value in changes.items():
        setattr(config, name, value)
    make_model(config).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A llama with a tokenizer and a head of its own. Not to be changed."""
    return plain_checkpoint(tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture
def copied(plain, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(plain, tmp_path / "parent")


def make_elastic(plain: Path, out: Path, widths: Mapping[str, int] | None = None) -> Path:
    """The family of sizes large and small that a plain checkpoint becomes without training."""
    shutil.copytree(plain, out)
    config = read_config(out)
    axis_map = architecture_of(config).axis_map(config)
    small = axis_map.complete(widths or WIDTHS[config["model_type"]])
    sizes = {"large": Size(axis_map.full), "small": Size(small)}
    save_manifest(Manifest(config["model_type"], {}, sizes), out)
    return out


def write_rows(file: Path) -> Path:
    """Rows that the tiny tokenizer knows every character of."""
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; those set to `...` are removed."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the tensors of a single-file checkpoint."""
    tensors = load_file(directory / SINGLE_NAME)
    change(tensors)
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})


def everything_under(folder: Path) -> set[str]:
    """Every file and folder, by its path from `folder`."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextmanager
def nothing_changes_in(folder: Path) -> Iterator[None]:
    """No file or directory may appear, disappear or be left over."""
    before = everything_under(folder)
    yield
    assert everything_under(folder) == before


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Makes every write beyond `num_bytes` of a file a genuine error of the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
