"""An architecture: how the config of one model type becomes an axis map, and a smaller config.

An architecture reads a config into a `Decoder`, which is a list of layers, each a list of parts
(`parts.py`). Everything else follows here: the map, and the config.json of a submodel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from star_elastic.architectures.config_file import (
    MOST_PARAMETERS,
    Config,
    cut_by_layer,
    get_optional_int,
    require_known_attention,
)
from star_elastic.architectures.parts import Norm, Part, tensor
from star_elastic.axes import (
    LAYERS,
    TOP_K,
    Axis,
    AxisMap,
    Block,
    ConstantSpec,
    Follow,
    Widths,
    along,
    fixed,
    size_of,
)
from star_elastic.errors import ConfigError, ShapeError

ORDER = (
    "hidden", "ffn", "experts", "expert_ffn", "shared_ffn", "ssm_heads", "heads", LAYERS, TOP_K,
)  # fmt: skip
"""Every axis that a part may bring, in the order in which axes are told and routed."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What the model of one config is composed of.

    `layers` are the parts of every layer. `final_norm` is read by the head. With `tied` embeddings
    there is no head of its own. `rotary` are the channels of a head that each of the model's rotary
    embeddings turns. `embed_scale` is the buffer that multiplies the embeddings by the square root
    of the width, if the model does.
    """

    hidden: int
    vocab: int
    layers: tuple[tuple[Part, ...], ...]
    final_norm: Norm
    tied: bool = False
    rotary: tuple[int, ...] = ()
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"
    embed_scale: str = ""


class Architecture(ABC):
    """One model type. Configs are dictionaries as in config.json."""

    model_type: str
    """`model_type` in config.json."""
    end_of_thinking = "\n</think>\n\n"
    """Text that ends the thinking phase when the budget is used up."""
    fields: Mapping[str, str]
    """Axis -> the config's field that holds its width."""
    disk_prefix = "model."
    """How names on disk begin that begin with `model.` in memory."""
    other_prefixes: tuple[str, ...] = ()
    """What other writers put in place of `disk_prefix`."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Parts of the names of on-disk tensors that the model in memory does not have: by default
    frequencies that old files hold, which follow from the config."""
    copies: Mapping[str, str] = MappingProxyType({})
    """On-disk tensors that a file may hold beside the one that they must equal (tied heads)."""
    attention_keys: tuple[str, ...] = ()
    """Keys of `ATTENTION_KEYS` that the model's own layers know."""
    multiples: tuple[tuple[str, str], ...] = ()
    """Pairs of axes of which the first must be a multiple of the second."""

    @abstractmethod
    def decoder(self, config: Config) -> Decoder:
        """What a (normalised) config describes. Raises ConfigError on an invalid one."""

    def normalise(self, config: Config) -> Config:
        """A config in which every field has one name."""
        return config

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """Fields that a submodel's config must hold whatever the parent's does: defaults that
        would follow a width, and what the kept `layers` are."""
        return {}

    def axis_map(self, config: Config) -> AxisMap:
        """The axis map of the model of a config. Raises ConfigError on an invalid config."""
        config = self.normalise(config)
        decoder = self.decoder(config)
        require_known_attention(config, self.attention_keys)
        get_optional_int(config, "max_position_embeddings")
        hidden = along("hidden", decoder.hidden)
        vocab = fixed(decoder.vocab)
        # A smaller model multiplies by a smaller root, so its embeddings are stored larger.
        follows = Follow("hidden") if decoder.embed_scale else None
        lookup = tensor(
            "embeddings", f"{decoder.embeddings}.weight", vocab, hidden, lookup=not decoder.tied,
            follows=follows,
        )  # fmt: skip
        head = () if decoder.tied else (tensor("head", f"{decoder.head}.weight", vocab, hidden),)
        # transformers keeps one frequency for two channels, and what it was before any scaling.
        constants = [ConstantSpec("rotary", 2 * -(-channels // 2)) for channels in decoder.rotary]
        if decoder.embed_scale:
            constants.append(ConstantSpec("embed scale", 1, fp32=False))
        blocks = {parts: Block.sum(part.rows(hidden) for part in parts) for parts in decoder.layers}
        path = "model.layers"
        axis_map = AxisMap(
            model_type=self.model_type,
            axes=_axes(decoder),
            before=self._on_disk(Block(tensors=(lookup,), constants=tuple(constants))),
            blocks=tuple(blocks[parts] for parts in decoder.layers),
            after=self._on_disk(decoder.final_norm.rows(hidden) + Block(tensors=head)),
            path=path,
            disk_path=self._disk_name(path),
            multiples=self.multiples,
            width_buffers=(decoder.embed_scale,) if decoder.embed_scale else (),
        )
        return require_size(axis_map)

    def config_at(
        self, config: Config, widths: Mapping[str, Any], axis_map: AxisMap | None = None
    ) -> Config:
        """The config.json of the submodel; `axis_map` is that of the config, if it is known. Raises
        ShapeError if the format cannot express it."""
        axis_map = axis_map or self.axis_map(config)
        config = self.normalise(config)
        complete = axis_map.complete(widths)
        kept = homogeneous(complete, axis_map)
        layers = axis_map.kept_layers(complete)
        return {
            **cut_by_layer(config, len(axis_map.blocks), layers),
            **{self.fields[axis]: width for axis, width in kept.items()},
            "num_hidden_layers": len(layers),
            **self.written_out(config, layers),
        }

    def _disk_name(self, name: str) -> str:
        start = "model."
        return self.disk_prefix + name.removeprefix(start) if name.startswith(start) else name

    def _on_disk(self, block: Block) -> Block:
        """A block outside the layers with its names on disk."""
        tensors = (
            replace(
                spec,
                pieces=tuple(replace(p, name=self._disk_name(p.name)) for p in spec.pieces),
            )
            for spec in block.tensors
        )
        return replace(block, tensors=tuple(tensors))


def homogeneous(widths: Mapping[str, Any], axis_map: AxisMap) -> dict[str, Any]:
    """Widths as scalars, `layers` apart. Raises ShapeError for per-layer widths that a config
    cannot hold, with the nearest widths that it can."""
    nearest = axis_map.nearest_homogeneous(widths)
    for axis, width in widths.items():
        if axis != LAYERS and width != nearest[axis] and set(width) != {nearest[axis]}:
            kept = {name: value for name, value in nearest.items() if name != LAYERS}
            raise ShapeError(
                f"{axis} differs between layers, which {axis_map.model_type}'s config.json cannot "
                f"express; the nearest widths that it can: {Widths(kept)}"
            )
    return {axis: width for axis, width in nearest.items() if axis != LAYERS}


def _axes(decoder: Decoder) -> dict[str, Axis]:
    """The axes of all parts, each with the layers that have it."""
    found = {"hidden": Axis("hidden", decoder.hidden)}
    for layer, parts in enumerate(decoder.layers):
        for part in parts:
            for axis in part.axes():
                before = found.get(axis.name, axis)
                found[axis.name] = replace(axis, layers=(*before.layers, layer))
    numbers = tuple(range(len(decoder.layers)))
    found[LAYERS] = Axis(LAYERS, 1, layers=numbers, minimum=0, ranked=False)
    return {name: found[name] for name in ORDER if name in found}


def require_size(axis_map: AxisMap) -> AxisMap:
    """The table itself. Raises ConfigError if the model is larger than any that can be handled:
    what follows could fill the memory before it fails."""
    count = sum(math.prod(map(size_of, spec.dims)) for spec in axis_map.tensors.values())
    if count > MOST_PARAMETERS:
        largest = max(axis_map.axes.values(), key=lambda axis: axis.size)
        raise ConfigError(
            f"the config describes {count:.1e} parameters, more than the {MOST_PARAMETERS:.0e} "
            f"that a model may have here ({largest.name}={largest.size:,}); correct config.json"
        )
    return axis_map
