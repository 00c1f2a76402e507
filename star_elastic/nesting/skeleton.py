"""Skeletons: transformers models, and single blocks of them, without memory for their parameters.

They are built on the meta device from a config, and get their parameters assigned (submodels) or
passed in a functional call (training). Layers whose widths differ from their neighbours' are built
one by one, each from the config of its own widths.

A parent may come with dropout, which its own training used. Distillation asks a size to be its
parent, so nothing may be left to chance: skeletons for training are `deterministic`.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from star_elastic.families import family_of
from star_elastic.families.base import Config, nearest_homogeneous
from star_elastic.quant.layout import CONFIG_KEY
from star_elastic.widths import Width

logger = logging.getLogger(__name__)

_BUILDING = threading.RLock()
"""Building a model sets the default dtype and device of the whole process for a moment."""
GROUPED_MM_MULTIPLE = 8
"""PyTorch's grouped product wants strides of whole 16 bytes: 8 elements of bf16."""
CHANCE = re.compile(r"dropout|pdrop|layer_?drop|drop_path|drop_rate|jitter")
"""Numbers of configs and modules with such names, unless 0, make a forward in training random."""


def grouped_mm_fits(config: Config) -> bool:
    """Whether the experts of a model (if it has any) can run as grouped matrix products."""
    axis_map = family_of(config).axis_map(config)
    shapes = [axis_map.shape(s, axis_map.full) for s in axis_map.tensors.values() if s.routed]
    return all(size % GROUPED_MM_MULTIPLE == 0 for shape in shapes for size in shape[1:])


def _model_config(
    config: Config, like: PreTrainedModel | None, *, deterministic: bool = False
) -> PreTrainedConfig:
    """The config as transformers' own class, with the kernel choices of `like`."""
    left = ("model_type", "transformers_version", CONFIG_KEY)
    fields = {k: v for k, v in config.items() if k not in left}
    model_config: Any = AutoConfig.for_model(config["model_type"], **fields)
    if like is not None:
        model_config._attn_implementation = like.config._attn_implementation
        model_config._experts_implementation = like.config._experts_implementation
    if not grouped_mm_fits(config) and model_config._experts_implementation != "eager":
        model_config._experts_implementation = "eager"
        logger.warning(
            "expert widths are not multiples of %d, which grouped matrix products need; "
            "the experts run one by one (slower, same result)",
            GROUPED_MM_MULTIPLE,
        )
    if deterministic:
        for name in _left_to_chance(model_config):
            setattr(model_config, name, 0.0)
    return model_config


def _left_to_chance(owner: Any) -> list[str]:
    """Attributes of a config or a module that make a forward in training mode random."""
    return [
        name
        for name, value in vars(owner).items()
        if CHANCE.search(name) and type(value) in (int, float) and value
    ]


def require_deterministic(skeleton: nn.Module) -> None:
    """Asserts that no module of a skeleton draws anything in training mode."""
    for path, module in skeleton.named_modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p
        random = ["p"] if is_dropout else _left_to_chance(module)
        assert not random, (
            f"{path} ({type(module).__name__}) draws at random by its {random}; name the config's "
            "field in CHANCE"
        )


def build_skeleton(
    config: Config, like: PreTrainedModel | None = None, *, deterministic: bool = False
) -> PreTrainedModel:
    """The model of a config without memory for its parameters (on the meta device).

    Buffers that no checkpoint holds (rotary frequencies) are real. Kernel choices (attention,
    experts) follow `like`. `deterministic`: with no dropout of any kind, whatever the config says.
    """
    model_config = _model_config(config, like, deterministic=deterministic)
    kinds: dict[str, Any] = {
        "attn_implementation": model_config._attn_implementation,
        "experts_implementation": model_config._experts_implementation,
    }
    if like is not None:
        kinds["dtype"] = like.dtype
    with _BUILDING, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, **kinds)
    for name, module in list(model.named_modules()):
        if any(module._buffers[b].is_meta for b in module._non_persistent_buffers_set):
            model.set_submodule(name, type(module)(config=model_config))
    if deterministic:
        require_deterministic(model)
    return model


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
    with _BUILDING, torch.device("meta"):
        block = construct(_model_config(config, like, deterministic=deterministic), layer)
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
    family = family_of(config)
    axis_map = family.axis_map(config)
    complete = axis_map.complete(widths)
    uniform = axis_map.complete(nearest_homogeneous(complete, axis_map))
    target = family.config_at(config, uniform)
    skeleton = build_skeleton(target, like)
    here = axis_map.at(uniform)
    blocks: Any = skeleton.get_submodule(here.blocks)
    for place, layer in enumerate(axis_map.kept_layers(complete)):
        own = {n: axis_map.width(complete, n, layer) for n in axis_map.own_axes(layer)}
        if any(uniform[name] != width for name, width in own.items()):
            its_config = family.config_at(config, {**uniform, **own})
            blocks[place] = build_block(type(blocks[place]), its_config, place, like)
    return skeleton
