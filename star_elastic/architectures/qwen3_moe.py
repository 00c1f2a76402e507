"""Qwen3-MoE: Qwen3's attention, and experts in place of the MLP of most layers."""

from __future__ import annotations

from types import MappingProxyType

from star_elastic.architectures.config_file import (
    Config,
    get_bool,
    get_int,
    one_name,
    require_at_most,
    told,
)
from star_elastic.architectures.parts import Experts, Part
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.windows import Windows, alike_windows, get_window
from star_elastic.axes import TOP_K
from star_elastic.errors import ConfigError


class Qwen3Moe(PreNorm):
    """The `qwen3_moe` architecture. Defaults are those of transformers' Qwen3MoeConfig."""

    model_type = "qwen3_moe"
    fields = MappingProxyType({
        **PreNorm.fields, "experts": "num_experts", "expert_ffn": "moe_intermediate_size",
        TOP_K: "num_experts_per_tok",
    })  # fmt: skip
    attention_keys = ("sliding_window",)
    vocab_size = 151936
    hidden_size = 2048
    intermediate_size = 6144
    num_hidden_layers = 24
    num_key_value_heads = 4
    head_norms = ("q_norm", "k_norm")

    def normalise(self, config: Config) -> Config:
        """See `Architecture.normalise`. transformers writes the number of experts by another name.
        Raises ConfigError for a config with both names and two values."""
        return one_name(config, "num_local_experts", "num_experts")

    def windows(self, config: Config) -> Windows:
        """See `PreNorm.windows`: all layers have the same one, or none."""
        is_on = get_bool(config, "use_sliding_window", False)
        window = get_window(config, 4096) if is_on else None
        return alike_windows(config, self.num_layers(config), window)

    def is_dense(self, config: Config, layer: int) -> bool:
        """Whether a layer has an MLP. Raises ConfigError."""
        every, plain = get_int(config, "decoder_sparse_step", 1), config.get("mlp_only_layers")
        plain = [] if plain is None else plain
        if not isinstance(plain, list) or any(type(layer) is not int for layer in plain):
            raise ConfigError(
                f"{told('mlp_only_layers', plain)} is not a list of layers; correct config.json"
            )
        return layer in plain or (layer + 1) % every != 0

    def feed_forward(self, config: Config, layer: int) -> Part:
        """See `PreNorm.feed_forward`."""
        if self.is_dense(config, layer):
            return super().feed_forward(config, layer)
        experts = get_int(config, "num_experts", 128)
        top_k = get_int(config, "num_experts_per_tok", 8)
        require_at_most("num_experts_per_tok", top_k, "num_experts", experts)
        neurons = get_int(config, "moe_intermediate_size", 768)
        return Experts(path="mlp", experts=experts, neurons=neurons, top_k=top_k)

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`: which layers are dense goes by their numbers."""
        dense = [place for place, layer in enumerate(layers) if self.is_dense(config, layer)]
        named = {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return super().written_out(config, layers) | named
