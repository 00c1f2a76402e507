"""Llama-type decoders: attention and a gated MLP in every layer, rotary positions."""

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


class Llama(Architecture):
    """The `llama` architecture. Defaults are those of transformers' LlamaConfig."""

    model_type = "llama"
    fields = MappingProxyType(
        {"hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads"}
    )
    ignored = ("rotary_emb.inv_freq",)
    copies = MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})
    multiples = (("hidden", "heads"),)

    def decoder(self, config: Config) -> Decoder:
        """See `Architecture.decoder`."""
        num_layers = get_int(config, "num_hidden_layers", 32, most=MOST_LAYERS)
        require_full_layers(config, num_layers)
        hidden = get_int(config, "hidden_size", 4096)
        heads, kv_heads, head_dim = _heads(config, hidden)
        eps = get_float(config, "rms_norm_eps", 1e-6)
        tied = get_bool(config, "tie_word_embeddings", False)
        parts = (
            Attention(
                path="self_attn", heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                bias=get_bool(config, "attention_bias", False),
            ),
            Mlp(
                path="mlp", neurons=get_int(config, "intermediate_size", 11008), gated=True,
                bias=get_bool(config, "mlp_bias", False),
            ),
            Norm(path="input_layernorm", eps=eps, reader="self_attn"),
            Norm(path="post_attention_layernorm", eps=eps, reader="mlp"),
        )  # fmt: skip
        return Decoder(
            hidden=hidden,
            vocab=get_int(config, "vocab_size", 32000),
            layers=(parts,) * num_layers,
            final_norm=Norm(path="model.norm", eps=eps, reader="" if tied else "lm_head"),
            tied=tied,
        )

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`: both would follow other fields."""
        _, kv_heads, head_dim = _heads(config, get_int(config, "hidden_size", 4096))
        return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def _heads(config: Config, hidden: int) -> tuple[int, int, int]:
    """Query heads, key-value heads, and elements of a head."""
    heads = get_int(config, "num_attention_heads", 32)
    kv_heads = get_optional_int(config, "num_key_value_heads") or heads
    require_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    require_multiple("hidden_size", hidden, "num_attention_heads", heads)
    return heads, kv_heads, get_optional_int(config, "head_dim") or hidden // heads
