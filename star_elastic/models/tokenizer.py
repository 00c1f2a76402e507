"""The tokenizer beside a checkpoint, and the token ids at which its settings end a turn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from star_elastic.architectures import read_config
from star_elastic.architectures.config_file import Config, told
from star_elastic.checkpoints.companions import (
    GENERATION,
    TOKENIZER_CONFIG,
    reading_files,
    require_companions,
)
from star_elastic.errors import CheckpointError, library_boundary
from star_elastic.files.paths import has_file, is_file
from star_elastic.models.model_config import model_config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. One that names no EOS has that of the model's settings, at
    which generation stops.

    Raises CheckpointError if it has none that can be read, ConfigError for a config.json that
    transformers does not take, which tells it the kind of tokenizer.
    """
    settings = read_config(path)
    config = model_config(settings, Path(path) / "config.json")
    if is_file(path):
        raise CheckpointError(f"{path} is a file; name the checkpoint directory that it lies in")
    require_companions(Path(path))
    if not reading_files(Path(path)):  # of which transformers makes an empty one for some types
        raise CheckpointError(
            f"{path} holds no usable tokenizer (no file of one); put the parent's tokenizer files "
            "beside the weights"
        )
    with library_boundary(
        f"{path} holds no usable tokenizer",
        "correct its files, or put the parent's tokenizer files beside the weights",
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=True, trust_remote_code=False
        )
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise CheckpointError(
            f"{told('model_max_length', tokenizer.model_max_length)} is not a number; correct "
            f"{Path(path) / TOKENIZER_CONFIG}"
        )
    if tokenizer.eos_token_id is None:
        known = set(tokenizer.get_vocab().values())
        named = (end for end in _ends_of(Path(path), settings) if end in known)
        if (end := next(named, None)) is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def require_beside(path: Path) -> None:
    """Raises CheckpointError for what stands beside the weights, goes wherever they go and does not
    load: settings of generation, a tokenizer, chat templates. There may be none. A tokenizer that
    only a package that is not installed here can load is not at fault."""
    require_companions(path)
    generation_config(path)
    if any("template" not in file.name.lower() for file in reading_files(path)):
        try:
            load_tokenizer(path)
        except CheckpointError as error:
            if not isinstance(error.__cause__, ImportError):
                raise


def _ends_of(path: Path, settings: Config) -> list[Any]:
    """The token ids at which the settings of a checkpoint let generation stop. Raises
    CheckpointError for what is none."""
    generation: Any = generation_config(path)
    ends = generation.eos_token_id if generation else settings.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if not all(end is None or isinstance(end, int) for end in listed):
        file = path / (GENERATION if generation else "config.json")
        raise CheckpointError(f"{told('eos_token_id', ends)} is no token id; correct {file}")
    return listed


def stop_tokens(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """As `end_of_turn`, of the files of a checkpoint."""
    return _token_ids([tokenizer.eos_token_id, *_ends_of(Path(path), read_config(path))])


def _token_ids(ends: Iterable[object]) -> frozenset[int]:
    return frozenset(i for i in ends if isinstance(i, int))


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, models: Iterable[PreTrainedModel]
) -> frozenset[int]:
    """Token ids that end a turn: the tokenizer's and those of the models' own settings."""
    ends: list[object] = [tokenizer.eos_token_id]
    for model in models:
        settings = model.generation_config
        ids = settings.eos_token_id if settings is not None else None
        ends += ids if isinstance(ids, list) else [ids]
    return _token_ids(ends)


def generation_config(path: Path) -> GenerationConfig | None:
    """The settings of generation beside a checkpoint, if there are any. Raises CheckpointError."""
    file = path / GENERATION_CONFIG_NAME
    if not has_file(file):
        return None
    with library_boundary(f"{file} cannot be read", "correct the file or remove it"):
        return GenerationConfig.from_pretrained(path, local_files_only=True)
