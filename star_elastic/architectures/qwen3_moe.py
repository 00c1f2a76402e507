"""Qwen3-MoE: Qwen3's attention, and experts in place of the MLP of most layers."""

from __future__ import annotations

from types import MappingProxyType

from star_elastic.architectures.config_file import Config, get_bool, get_int, one_name, told
from star_elastic.architectures.parts import Experts, Part
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.windows import Windows, get_window, layer_windows, require_alike
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

    def head_dim(self, config: Config) -> int:
        """See `PreNorm.head_dim`. Null would be taken as it is."""
        return get_int(config, "head_dim", self.hidden(config) // self.heads(config))

    def windows(self, config: Config) -> Windows:
        """See `PreNorm.windows`: all layers have the same one, or none."""
        is_on, num_layers = get_bool(config, "use_sliding_window", False), self.num_layers(config)
        window = get_window(config, 4096) if is_on else None
        windows = layer_windows(config, num_layers, window, [window is not None] * num_layers)
        return require_alike(config, windows, window)

    def dense(self, config: Config) -> list[int]:
        """The layers with an MLP. Raises ConfigError."""
        every, plain = get_int(config, "decoder_sparse_step", 1), config.get("mlp_only_layers")
        plain = [] if plain is None else plain
        if not isinstance(plain, list) or any(type(layer) is not int for layer in plain):
            raise ConfigError(
                f"{told('mlp_only_layers', plain)} is not a list of layers; correct config.json"
            )
        layers = range(self.num_layers(config))
        return [layer for layer in layers if layer in plain or (layer + 1) % every]

    def feed_forward(self, config: Config, layer: int) -> Part:
        """See `PreNorm.feed_forward`."""
        if layer in self.dense(config):
            return super().feed_forward(config, layer)
        experts = get_int(config, "num_experts", 128)
        top_k = get_int(config, "num_experts_per_tok", 8)
        if top_k > experts:
            raise ConfigError(
                f"num_experts_per_tok={top_k} exceeds num_experts={experts}; correct config.json"
            )
        neurons = get_int(config, "moe_intermediate_size", 768)
        return Experts(path="mlp", experts=experts, neurons=neurons, top_k=top_k)

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`: which layers are dense goes by their numbers."""
        dense = [place for place, layer in enumerate(layers) if layer in self.dense(config)]
        named = {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return super().written_out(config, layers) | named
