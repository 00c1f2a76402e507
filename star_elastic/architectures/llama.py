"""Llama: heads share the hidden size unless the config says otherwise."""

from __future__ import annotations

from star_elastic.architectures.config_file import Config, get_bool
from star_elastic.architectures.pre_norm import PreNorm


class Llama(PreNorm):
    """The `llama` architecture. Defaults are those of transformers' LlamaConfig."""

    model_type = "llama"
    multiples = (("hidden", "heads"),)
    vocab_size = 32000
    intermediate_size = 11008
    num_key_value_heads = None
    head_may_be_null = True

    def mlp_bias(self, config: Config) -> bool:
        """See `PreNorm.mlp_bias`."""
        return get_bool(config, "mlp_bias", False)
