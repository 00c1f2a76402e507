"""Skeletons: transformers models, and single blocks of them, without memory for their parameters.

They are built on the meta device from a config, and get their parameters assigned (submodels) or
passed in a functional call (training). Layers whose widths differ from their neighbours' are built
one by one, each from the config of its own widths.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import init
from transformers import AutoModelForCausalLM, PreTrainedModel

from star_elastic.architectures import ModelConfig
from star_elastic.architectures.config_file import Config
from star_elastic.axes.widths import Width
from star_elastic.errors import ConfigError, library_boundary
from star_elastic.models.model_config import (
    advice,
    attempt_at_config,
    buildable_config,
    left_to_chance,
)

_BUILDING = threading.RLock()
"""Building a model sets the default dtype and device of the whole process for a moment."""


INITIAL = (
    "uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "kaiming_uniform_",
    "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
)  # fmt: skip
"""Functions of torch.nn.init that layers fill their parameters with."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are built inside have no memory for their parameters, and no time is spent on
    filling it, which takes a quarter of building them. As where transformers loads a model, no
    other thread may build one meanwhile."""
    with _BUILDING, torch.device("meta"):
        filling = {name: getattr(init, name) for name in INITIAL}
        try:
            for name in INITIAL:
                setattr(init, name, lambda tensor, *_, **__: tensor)
            yield
        finally:
            for name, function in filling.items():
                setattr(init, name, function)


def require_deterministic(skeleton: nn.Module) -> None:
    """Asserts that no module of a skeleton draws anything in training mode."""
    for path, module in skeleton.named_modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p
        random = ["p"] if is_dropout else left_to_chance(module)
        assert not random, (
            f"{path} ({type(module).__name__}) draws at random by its {random}; name the config's "
            "field in CHANCE"
        )


def build_skeleton(
    config: Config,
    like: PreTrainedModel | None = None,
    *,
    deterministic: bool = False,
    file: str | Path = "config.json",
) -> PreTrainedModel:
    """The model of a config without memory for its parameters (on the meta device).

    Buffers that no checkpoint holds (rotary frequencies) are real. Kernel choices (attention,
    experts) follow `like`. `deterministic`: with no dropout of any kind, whatever the config says.
    Raises ConfigError for a config that transformers cannot build; `file` names it there.
    """
    with building_of(config, file), attempt_at_config():
        model = _build(config, like, deterministic=deterministic, file=file)
    if deterministic:
        require_deterministic(model)
    return model


@contextmanager
def building_of(config: Config, file: str | Path = "config.json") -> Iterator[None]:
    """Whatever transformers raises while it builds the model of a config becomes a ConfigError that
    names the field at fault, if removing one mends it."""
    with library_boundary(
        f"transformers cannot build the model of {file}",
        lambda: advice(config, _build),
        ConfigError,
    ):
        yield


def _build(
    config: Config,
    like: PreTrainedModel | None = None,
    *,
    deterministic: bool = False,
    file: str | Path = "config.json",
) -> PreTrainedModel:
    made, kernels = buildable_config(config, like, file, deterministic=deterministic)
    dtype: dict[str, Any] = {} if like is None else {"dtype": like.dtype}
    with without_memory():
        model = AutoModelForCausalLM.from_config(made, **kernels, **dtype)
    for name, module in list(model.named_modules()):
        unknown = [b for b in module._non_persistent_buffers_set if module._buffers[b].is_meta]
        if unknown and hasattr(module, "config"):  # tables of positions
            model.set_submodule(name, type(module)(config=made))
        elif unknown:
            for buffer in unknown:
                module._buffers[buffer] = torch.empty_like(module._buffers[buffer], device="cpu")
            model._init_weights(module)
    probe_positions(model)
    return model


def probe_positions(model: PreTrainedModel) -> None:
    """Asks rotary embeddings like those of a model for the first and the last position: some
    scalings look at a part of their parameters only there, long after work has begun."""
    config: Any = model.config
    positions = torch.tensor([[0, max(config.max_position_embeddings - 1, 0)]])
    for module in model.modules():
        if module._non_persistent_buffers_set and hasattr(module, "config"):
            alike: Any = type(module)(config=config)
            for kind in getattr(alike, "layer_types", [None]):
                given = {} if kind is None else {"layer_type": kind}
                alike(torch.zeros(1, 1, 1), positions, **given)


def build_block(
    kind: type[nn.Module],
    config: Config,
    layer: int,
    like: PreTrainedModel,
    *,
    deterministic: bool = False,
) -> nn.Module:
    """Layer `layer` of the model of a config, alone, on the meta device.

    `kind` is its class: the decoder layers of transformers are built from a config and a number.
    `deterministic` as in `build_skeleton`.
    """
    construct: Any = kind
    with without_memory():
        made, _ = buildable_config(config, like, deterministic=deterministic)
        block = construct(made, layer)
    left = [name for name, m in block.named_modules() if m._non_persistent_buffers_set]
    assert not left, f"layer {layer} holds buffers that no checkpoint holds: {left}"
    if deterministic:
        require_deterministic(block)
    return block


def build_skeleton_at(
    config: Config, widths: Mapping[str, Width], like: PreTrainedModel
) -> PreTrainedModel:
    """The memory-less model at any widths, those that differ between layers included.

    `config` is the parent's. The config of such a model is that of the nearest homogeneous widths,
    which no saved checkpoint could honour.
    """
    config = ModelConfig.of(config)
    axis_map = config.axis_map
    complete = axis_map.complete(widths)
    uniform = axis_map.complete(axis_map.nearest_homogeneous(complete))
    skeleton = build_skeleton(config.at(uniform), like)
    blocks: Any = skeleton.get_submodule(axis_map.path)
    for place, layer in enumerate(axis_map.kept_layers(complete)):
        own = {n: axis_map.width(complete, n, layer) for n in axis_map.own_axes(layer)}
        if any(uniform[name] != width for name, width in own.items()):
            its_config = config.at({**uniform, **own})
            blocks[place] = build_block(type(blocks[place]), its_config, place, like)
    return skeleton
