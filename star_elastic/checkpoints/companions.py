"""What stands beside the weights of a checkpoint: the one place that knows every such file.

Of a parent only what loaders read travels along: tokenizer, chat templates, generation settings,
licences, its card. Whatever else lies there (adapters, trainer states, remote code) would send
loaders elsewhere or be of no use. An elastic checkpoint has files of its own beside that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from star_elastic.errors import CheckpointError, library_boundary, reason
from star_elastic.files.paths import has_file, is_file, is_folder, names_in, require_content
from star_elastic.files.writing import read_json, write_json

MANIFEST = "elastic.json"
"""The sizes of a family."""
ROUTER = "router.safetensors"
"""The trained router, which gives widths for budgets that no size was named for."""
ORDERS, BASIS = "orders.safetensors", "basis.safetensors"
"""How the parent's units were permuted, and the basis that its residual stream was rotated to."""
LATENCY = "latency.json"
"""The table that budgets in milliseconds were counted with, if there were any."""
INPUT_SCALES = "input_scales.safetensors"
"""Of a quantised family: the scales of every size's own inputs."""

CARD, PARENT_CARD = "readme.md", "PARENT_README.md"
"""A model card describes the parent, not what is made of it: it travels under another name."""
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATES, TEMPLATE_KEY = "additional_chat_templates", "chat_template"
CORRECT = "correct the file or remove it"
READING = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "tokenizer.model.v*", "*.tiktoken",
    "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Names, in lower case, of the files that decide how text is read, beside `TEMPLATES`."""
TRAVELS = (
    *READING, GENERATION, PARENT_CARD.lower(),
    "license*", "licence*", "notice*", "copying*", "*use_policy*",
)  # fmt: skip
"""Names, in lower case, of the files of a parent that loaders or lawyers read."""
POINTERS = ("auto_map", "custom_pipelines", "processor_class", "_name_or_path", "_commit_hash")
"""Keys of config files that point to code, processors or folders, which do not travel."""


def is_elastic(path: Path) -> bool:
    """Whether a folder holds a family. Raises CheckpointError for one that cannot be looked at."""
    return is_folder(path) and has_file(path / MANIFEST)


def reading_files(source: Path) -> list[Path]:
    """The files of a checkpoint that decide how it reads text: tokenizer and chat templates."""
    names = names_in(source) if is_folder(source) else []
    found = [source / name for name in names if _matches(name, READING)]
    return sorted([*found, *(source / TEMPLATES).glob("*.jinja")])


def require_companions(source: Path) -> None:
    """Raises CheckpointError for a file that decides how text is read or written and cannot: a link
    that leads nowhere, a pointer of Git LFS, a folder in its place, damaged JSON, what is no text,
    a chat template that does not compile. Loaders would take another tokenizer, or none, and so
    would those of whatever it is copied to."""
    for file in (*reading_files(source), source / GENERATION):
        if has_file(file):
            require_content(file)
            _require_sound(file)


def _require_sound(file: Path) -> None:
    """Raises CheckpointError unless a file holds what its name promises."""
    if file.suffix == ".json":
        content = read_json(file, CORRECT)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} is not a JSON object; {CORRECT}")
        for template in _templates_in(content.get(TEMPLATE_KEY)):
            _require_template(file, template)
    elif file.suffix in (".txt", ".jinja"):
        with library_boundary(f"{file} is no text in UTF-8", CORRECT):
            text = file.read_text(encoding="utf-8")
        if file.suffix == ".jinja":
            _require_template(file, text)


def _templates_in(value: Any) -> list[Any]:
    """The chat templates of a tokenizer's config: one, or several by name."""
    if isinstance(value, dict):
        return list(value.values())
    several = value if isinstance(value, list) else [value]
    return [own.get("template") if isinstance(own, dict) else own for own in several if own]


def _require_template(file: Path, template: Any) -> None:
    """Raises CheckpointError unless transformers compiles a chat template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if not isinstance(template, str):
        raise CheckpointError(f"{file} holds a chat template that is no text; {CORRECT}")
    problem = f"{file} holds a chat template that is no valid Jinja"
    with library_boundary(problem, CORRECT):
        try:
            render_jinja_template(conversations=[], chat_template=template)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{problem} ({reason(error)}, line {error.lineno}); {CORRECT}"
            ) from error


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def copy_companions(source: Path, target: Path) -> None:
    """Copies what stands beside the weights of a parent and is of use beside others made of it.

    The card becomes `PARENT_README.md`. Keys of the tokenizer's config that point to files that do
    not come along are left out. Raises as `require_companions`, and for a file that cannot be read.
    """
    names = names_in(source)
    require_companions(source)
    for name in names:
        if _matches(name, TRAVELS) and is_file(source / name):
            copy_file(source / name, target / name)
    cards = [name for name in names if name.lower() == CARD]
    if cards and PARENT_CARD not in names:
        copy_file(source / cards[0], target / PARENT_CARD)
    if is_folder(source / TEMPLATES):
        (target / TEMPLATES).mkdir()
        for file in sorted((source / TEMPLATES).glob("*.jinja")):
            copy_file(file, target / TEMPLATES / file.name)
    if (target / TOKENIZER_CONFIG).is_file():
        _clean_tokenizer_config(target, source / TOKENIZER_CONFIG)


def without_pointers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that point to files which do not travel."""
    return {key: value for key, value in config.items() if key not in POINTERS}


def copy_file(source: Path, target: Path) -> None:
    """Copies what a file holds. Raises CheckpointError if it cannot be read or written."""
    with library_boundary(f"{source} cannot be copied", "make it readable and make room"):
        shutil.copyfile(source, target)


def _clean_tokenizer_config(target: Path, source: Path) -> None:
    file = target / TOKENIZER_CONFIG
    content = read_json(source, CORRECT)
    cleaned = {
        key: value
        for key, value in without_pointers(content).items()
        if not (key.endswith("_file") and isinstance(value, str)) or _stands(target, value)
    }
    if cleaned != content:
        write_json(file, cleaned)


def _stands(folder: Path, name: str) -> bool:
    """Whether a file of this name (and no path) is in a folder."""
    return name == os.path.basename(name) and os.path.isfile(folder / name)
