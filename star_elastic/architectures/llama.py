"""Llama-type decoders: heads share the hidden size unless the config says otherwise."""

from __future__ import annotations

from star_elastic.architectures.config_file import (
    Config,
    get_bool,
    get_int,
    get_optional_int,
    require_multiple,
)
from star_elastic.architectures.parts import Attention
from star_elastic.architectures.pre_norm import PreNorm


class Llama(PreNorm):
    """The `llama` architecture. Defaults are those of transformers' LlamaConfig."""

    model_type = "llama"
    ignored = ("rotary_emb.inv_freq",)
    multiples = (("hidden", "heads"),)
    vocab_size = 32000
    intermediate_size = 11008

    def attention(self, config: Config, hidden: int) -> Attention:
        """See `PreNorm.attention`."""
        heads = get_int(config, "num_attention_heads", 32)
        kv_heads = get_optional_int(config, "num_key_value_heads") or heads
        head_dim = get_optional_int(config, "head_dim") or hidden // heads
        require_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
        require_multiple("hidden_size", hidden, "num_attention_heads", heads)
        bias = get_bool(config, "attention_bias", False)
        return Attention(
            path="self_attn", heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias
        )

    def mlp_bias(self, config: Config) -> bool:
        """See `PreNorm.mlp_bias`."""
        return get_bool(config, "mlp_bias", False)

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`: both would follow other fields."""
        own = self.attention(config, self.hidden(config))
        return {"num_key_value_heads": own.kv_heads, "head_dim": own.head_dim}
