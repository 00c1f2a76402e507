"""Qwen3: Llama's layer with a norm over each query and key head, whose width is not tied to hidden.

The norms over heads have `head_dim` channels, which no axis cuts: nothing has to be corrected.
"""

from __future__ import annotations

from types import MappingProxyType

from star_elastic.architectures.config_file import (
    MOST_LAYERS,
    Config,
    get_bool,
    get_float,
    get_int,
    get_optional_int,
    require_full_layers,
    require_multiple,
)
from star_elastic.architectures.decoder import Architecture, Decoder
from star_elastic.architectures.parts import Attention, Mlp, Norm


class Qwen3(Architecture):
    """The `qwen3` architecture. Defaults are those of transformers' Qwen3Config."""

    model_type = "qwen3"
    fields = MappingProxyType(
        {"hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads"}
    )
    copies = MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})

    def normalise(self, config: Config) -> Config:
        """See `Architecture.normalise`. A window that is switched off says nothing."""
        if get_bool(config, "use_sliding_window", False):
            return config
        return {key: value for key, value in config.items() if key != "sliding_window"}

    def decoder(self, config: Config) -> Decoder:
        """See `Architecture.decoder`."""
        num_layers = get_int(config, "num_hidden_layers", 32, most=MOST_LAYERS)
        require_full_layers(config, num_layers)
        heads, kv_heads = _heads(config)
        eps = get_float(config, "rms_norm_eps", 1e-6)
        tied = get_bool(config, "tie_word_embeddings", False)
        parts = (
            Attention(
                path="self_attn", heads=heads, kv_heads=kv_heads,
                head_dim=get_int(config, "head_dim", 128),
                bias=get_bool(config, "attention_bias", False), head_norms=("q_norm", "k_norm"),
            ),
            Mlp(path="mlp", neurons=get_int(config, "intermediate_size", 22016), gated=True),
            Norm(path="input_layernorm", eps=eps, reader="self_attn"),
            Norm(path="post_attention_layernorm", eps=eps, reader="mlp"),
        )  # fmt: skip
        return Decoder(
            hidden=get_int(config, "hidden_size", 4096),
            vocab=get_int(config, "vocab_size", 151936),
            layers=(parts,) * num_layers,
            final_norm=Norm(path="model.norm", eps=eps, reader="" if tied else "lm_head"),
            tied=tied,
        )

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`: null would follow the number of query heads."""
        return {"num_key_value_heads": _heads(config)[1]}


def _heads(config: Config) -> tuple[int, int]:
    """Query heads and key-value heads."""
    heads = get_int(config, "num_attention_heads", 32)
    kv_heads = 32 if "num_key_value_heads" not in config else heads
    kv_heads = get_optional_int(config, "num_key_value_heads") or kv_heads
    require_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    return heads, kv_heads
