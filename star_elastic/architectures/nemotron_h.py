"""NemotronH: hybrids of Mamba-2, attention, MoE and dense MLP layers (Nemotron Nano 2 and 3).

Letters of the layer pattern: M Mamba-2, * attention, E mixture of experts, - dense MLP.
"""

from __future__ import annotations

import reprlib
from types import MappingProxyType

from star_elastic.architectures.config_file import (
    MOST_EXPERTS,
    MOST_LAYERS,
    Config,
    get_bool,
    get_float,
    get_int,
    get_optional_int,
    one_name,
    require_at_most,
    require_multiple,
    told,
)
from star_elastic.architectures.decoder import Architecture, Decoder
from star_elastic.architectures.parts import Attention, Experts, Mamba2, Mlp, Norm, Part
from star_elastic.axes import RMS_FP32, SIGMOID_GROUPS, TOP_K
from star_elastic.errors import ConfigError

LETTERS = {
    "M": "M", "mamba": "M", "linear_attention": "M",
    "*": "*", "attention": "*", "full_attention": "*",
    "E": "E", "moe": "E",
    "-": "-", "mlp": "-",
}  # fmt: skip
LEGACY_NAMES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
PATTERN = "hybrid_override_pattern"
OTHER_NAMES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit", "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias", "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts",
}  # fmt: skip
"""Names that transformers' NemotronHConfig reads as others."""
LARGEST_CHUNK = 1024
"""Tokens of a chunk of the SSM scan, whose memory grows with their square."""


class NemotronH(Architecture):
    """The `nemotron_h` architecture. Defaults are those of transformers' NemotronHConfig."""

    model_type = "nemotron_h"
    end_of_thinking = "\n</think>\n"
    fields = MappingProxyType({
        "hidden": "hidden_size", "ffn": "intermediate_size", "experts": "n_routed_experts",
        "expert_ffn": "moe_intermediate_size",
        "shared_ffn": "moe_shared_expert_intermediate_size", "ssm_heads": "mamba_num_heads",
        "heads": "num_attention_heads", TOP_K: "num_experts_per_tok",
    })  # fmt: skip
    disk_prefix = "backbone."
    other_prefixes = ("model.",)
    ignored = ("mtp.",)

    def normalise(self, config: Config) -> Config:
        """See `Architecture.normalise`. Layers are read by the pattern of letters. Raises
        ConfigError for a field that stands there twice with two values."""
        named = dict(config)
        for other, name in OTHER_NAMES.items():
            named = one_name(named, other, name)
        if named.get("num_key_value_heads", 0) is None:
            named["num_key_value_heads"] = named.get("num_attention_heads", 32)
        named.pop("layer_types", None)
        return named | {PATTERN: layer_pattern(config)}

    def decoder(self, config: Config) -> Decoder:
        """See `Architecture.decoder`."""
        pattern = config[PATTERN]
        eps = get_float(config, "layer_norm_epsilon", 1e-5)
        bias = get_bool(config, "mlp_bias", False)
        norm = Norm(path="norm", eps=eps, reader="mixer", kind=RMS_FP32)
        mixers: dict[str, Part] = {
            "M": _mamba(config, eps),
            "*": _attention(config),
            "E": _experts(config, bias, pattern.count("E")),
            "-": Mlp(
                path="mixer", neurons=get_int(config, "intermediate_size", 21504), gated=False,
                bias=bias,
            ),
        }  # fmt: skip
        if "M" in pattern:  # what the scan pads a sequence to, and clamps its steps at
            get_int(config, "chunk_size", 128, most=LARGEST_CHUNK)
            get_float(config, "time_step_min", 1e-3)
        if get_bool(config, "tie_word_embeddings", False):
            raise ConfigError(
                "tie_word_embeddings=true is not supported for nemotron_h, whose models in "
                "transformers have a head of their own; store it as lm_head.weight, and set "
                "tie_word_embeddings=false in config.json"
            )
        return Decoder(
            hidden=get_int(config, "hidden_size", 4096),
            vocab=get_int(config, "vocab_size", 131072),
            layers=tuple((norm, mixers[letter]) for letter in pattern),
            final_norm=Norm(path="model.norm_f", eps=eps, reader="lm_head", kind=RMS_FP32),
            embeddings="model.embeddings",
        )

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`. The pattern with the legacy names beside it is what every
        reader so far loads; newer names alone are rejected by older engines."""
        pattern = "".join(config[PATTERN][layer] for layer in layers)
        return {
            "head_dim": get_int(config, "head_dim", 128),
            PATTERN: pattern,
            "layers_block_type": [LEGACY_NAMES[letter] for letter in pattern],
            "num_nextn_predict_layers": 0,
        }


def layer_pattern(config: Config) -> str:
    """The layer pattern in letters, from either spelling. Raises ConfigError."""
    layers = config.get("layers_block_type") or config.get("layer_types")
    layers = layers or config.get("hybrid_override_pattern") or ""
    if not isinstance(layers, (str, list, tuple)):
        raise ConfigError(
            f"{told('layers_block_type', layers)} is not a list of layer types; correct config.json"
        )
    unknown = [name for name in layers if not isinstance(name, str) or name not in LETTERS]
    if unknown or not layers:
        raise ConfigError(
            f"layer type {reprlib.repr(unknown[0])} is unknown; use {', '.join(LETTERS)}"
            if layers
            else "the config names no layers; set hybrid_override_pattern"
        )
    if len(layers) > MOST_LAYERS:
        raise ConfigError(
            f"the config names {len(layers):,} layers, more than the {MOST_LAYERS:,} that a model "
            "may have here; correct hybrid_override_pattern"
        )
    return "".join(LETTERS[name] for name in layers)


def _mamba(config: Config, eps: float) -> Mamba2:
    heads, groups = get_int(config, "mamba_num_heads", 128), get_int(config, "n_groups", 8)
    require_multiple("mamba_num_heads", heads, "n_groups", groups)
    return Mamba2(
        path="mixer", heads=heads, groups=groups, eps=eps,
        head_dim=get_int(config, "mamba_head_dim", 64),
        state=get_int(config, "ssm_state_size", 128),
        kernel=get_int(config, "conv_kernel", 4),
        bias=get_bool(config, "use_bias", False),
        conv_bias=get_bool(config, "use_conv_bias", True),
    )  # fmt: skip


def _attention(config: Config) -> Attention:
    heads = get_int(config, "num_attention_heads", 32)
    kv_heads = get_int(config, "num_key_value_heads", 8)
    require_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = get_int(config, "head_dim", 128)
    return Attention(path="mixer", heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _experts(config: Config, bias: bool, num_layers: int) -> Experts:
    """The experts of each of `num_layers`. Raises ConfigError if there are such layers and no token
    could be routed in them."""
    shared = Mlp(
        path="mixer.shared_experts", axis="shared_ffn", part="shared experts", gated=False,
        neurons=get_int(config, "moe_shared_expert_intermediate_size", 7688), bias=bias,
    )  # fmt: skip
    part = Experts(
        path="mixer", kind=SIGMOID_GROUPS, gated=False, shared=shared, latent_bias=bias,
        experts=get_int(config, "n_routed_experts", 8),
        neurons=get_int(config, "moe_intermediate_size", 7688),
        top_k=get_int(config, "num_experts_per_tok", 2),
        groups=get_int(config, "n_group", 1),
        selected_groups=get_int(config, "topk_group", 1),
        latent=get_optional_int(config, "moe_latent_size"),
    )  # fmt: skip
    require_multiple("n_routed_experts", part.experts, "n_group", part.groups)
    if num_layers:
        _check_routing(part, num_layers)
    return part


def _check_routing(part: Experts, num_layers: int) -> None:
    """Raises ConfigError for experts that no token could be routed to."""
    require_at_most("num_experts_per_tok", part.top_k, "n_routed_experts", part.experts)
    require_at_most("topk_group", part.selected_groups, "n_group", part.groups)
    # A group's score is the sum of its two best.
    if part.experts < 2 * part.groups:
        raise ConfigError(
            f"n_routed_experts={part.experts} leaves fewer than 2 experts in each of "
            f"n_group={part.groups} groups; correct config.json"
        )
    stacked = part.experts * num_layers
    if stacked > MOST_EXPERTS:
        raise ConfigError(
            f"n_routed_experts={part.experts} in {num_layers} layers are more than "
            f"the {MOST_EXPERTS:,} experts that a model may have here; correct config.json"
        )
