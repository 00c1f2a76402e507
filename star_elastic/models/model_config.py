"""config.json as transformers' own class: what is passed on of it, and which field is at fault if
transformers does not take it.

A parent may come with dropout, which its own training used. Distillation asks a size to be its
parent, so nothing may be left to chance: configs for training are `deterministic`.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from star_elastic.architectures import ModelConfig, architecture_of
from star_elastic.architectures.config_file import Config, told
from star_elastic.checkpoints.layouts import CONFIG_KEY
from star_elastic.checkpoints.written_config import EAGER, GROUPED_MULTIPLE, grouped_products_fit
from star_elastic.errors import ConfigError, StarElasticError, library_boundary

logger = logging.getLogger(__name__)

NOT_PASSED = (
    "model_type", "transformers_version", "dtype", "torch_dtype", CONFIG_KEY,
    "num_labels", "id2label", "label2id", "is_encoder_decoder",
    "return_dict", "output_hidden_states", "output_attentions",
)  # fmt: skip
"""Keys of config.json that say nothing of a causal language model, or what it should return."""
LARGEST_NUMBER = 2**63
"""What tensors of integers cannot hold."""
CHANCE = re.compile(r"dropout|pdrop|layer_?drop|drop_path|drop_rate|jitter")
"""In names of numbers, of configs and modules, above which a forward in training mode is random."""


def model_config(config: Config, file: str | Path = "config.json") -> PreTrainedConfig:
    """The config as transformers' own class, unquantised and without a dtype, which the weights
    themselves have. `file` names it in messages.

    Raises ConfigError if transformers does not take it, naming the field that it stumbles over.
    """
    for key, value in config.items():
        if not all(abs(number) < LARGEST_NUMBER for number in _integers(value)):
            raise ConfigError(f"{told(key, value)} is too large; correct {file}")
    with library_boundary(
        f"{file} cannot be used by transformers", lambda: advice(config, _construct), ConfigError
    ):
        return _construct(config)


def longest_context(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that a model has positions for, and reads alike whatever is read
    beside it or before it; None: there is no bound."""
    bounds = [getattr(config, "max_position_embeddings", None)]
    for scaling in _scalings(config):
        if scaling.get("rope_type") == "longrope":
            bounds.append(scaling.get("original_max_position_embeddings"))
    return min((bound for bound in bounds if bound), default=None)


def depends_on_neighbours(config: PreTrainedConfig) -> bool:
    """Whether a text beyond that context changes what others are read as: its length decides the
    frequencies of the whole batch, and with `dynamic` of later ones, too. Caches keep keys as they
    were, so its own tokens would not be those of the whole text either."""
    kinds = [str(scaling.get("rope_type")) for scaling in _scalings(config)]
    return any(kind == "longrope" or "dynamic" in kind for kind in kinds)


def require_context(config: PreTrainedConfig, **lengths: int) -> None:
    """Raises ConfigError for lengths of text, by the name of their setting, that would change what
    other texts are read as."""
    most = longest_context(config)
    for name, length in lengths.items():
        if most is not None and length > most and depends_on_neighbours(config):
            raise ConfigError(
                f"{name}={length:,} is beyond the {most:,} tokens up to which the model's scaled "
                f"positions do not depend on the texts read beside; use {most} or less"
            )


def _scalings(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """How positions are scaled: once for all layers, or by kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    yield from (own for own in (given, *given.values()) if isinstance(own, dict))


def _integers(value: Any) -> Iterator[int]:
    """Every integer in a value of a config."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)


@contextmanager
def attempt_at_config() -> Iterator[None]:
    """An attempt at what a config may not allow, such as its class or its model. transformers
    writes nothing of its own meanwhile, in whatever way: it logs the whole config for some keys,
    and of what fails our one line tells."""
    here = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != here

    handlers = list(logging.getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(of_others)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(of_others)


def _construct(config: Config) -> PreTrainedConfig:
    fields = {key: value for key, value in config.items() if key not in NOT_PASSED}
    with attempt_at_config():
        return AutoConfig.for_model(config["model_type"], **fields)


def advice(config: Config, attempt: Callable[[Config], object]) -> str:
    """What to correct of a config that fails in an attempt: the field without which it does not.

    Fields that no shape depends on are tried first: the file's shapes speak for the others.
    """
    if _works(attempt, config):
        return "check memory and installation; the config itself is in order"
    axis_map = architecture_of(config).axis_map
    table = axis_map(config)

    def matters(key: str) -> bool:
        try:
            return axis_map({k: v for k, v in config.items() if k != key}) != table
        except StarElasticError:
            return True

    for key in sorted(config.keys() - {"model_type"}, key=lambda key: (matters(key), key)):
        if _works(attempt, {k: v for k, v in config.items() if k != key}):
            return f"correct {told(key, config[key])} in config.json, or remove it"
    return "correct config.json"


def _works(attempt: Callable[[Config], object], config: Config) -> bool:
    try:
        with attempt_at_config():
            attempt(config)
    except Exception:
        return False
    return True


def buildable_config(
    config: Config,
    like: PreTrainedModel | None = None,
    file: str | Path = "config.json",
    *,
    deterministic: bool = False,
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config as transformers' own class with the kernels (attention, experts) of `like`, or
    those that run on any device; also the kernels as options of whatever builds the model.

    `deterministic`: with no dropout of any kind, whatever the config says.
    """
    made: Any = model_config(config, file)
    if like is not None:
        made._attn_implementation = like.config._attn_implementation
        made._experts_implementation = like.config._experts_implementation
    if made._experts_implementation != EAGER and not grouped_products_fit(
        ModelConfig.of(config).axis_map
    ):
        made._experts_implementation = EAGER
        _warn_of_slow_experts()
    if deterministic:
        for name in left_to_chance(made):
            setattr(made, name, 0.0)
    return made, {
        "attn_implementation": made._attn_implementation,
        "experts_implementation": made._experts_implementation,
    }


def left_to_chance(owner: Any) -> list[str]:
    """Attributes of a config or a module that make a forward in training mode random."""
    return [
        name
        for name, value in vars(owner).items()
        if CHANCE.search(name) and type(value) in (int, float) and value
    ]


@cache
def _warn_of_slow_experts() -> None:
    """Once in a process, however many models are built."""
    logger.warning(
        "expert widths are not multiples of %d, which grouped matrix products need; "
        "the experts run one by one (slower, same result)",
        GROUPED_MULTIPLE,
    )
