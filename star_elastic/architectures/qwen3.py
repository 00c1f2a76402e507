"""Qwen3: a norm over each query and key head, whose width is not tied to the hidden size.

These norms have `head_dim` channels, which no axis cuts: nothing has to be corrected.
"""

from __future__ import annotations

from star_elastic.architectures.config_file import (
    Config,
    get_bool,
    get_int,
    get_optional_int,
    require_multiple,
    told,
)
from star_elastic.architectures.parts import Attention
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.errors import ConfigError


class Qwen3(PreNorm):
    """The `qwen3` architecture. Defaults are those of transformers' Qwen3Config."""

    model_type = "qwen3"
    vocab_size = 151936
    intermediate_size = 22016

    def normalise(self, config: Config) -> Config:
        """See `Architecture.normalise`. A window that is switched off says nothing. Raises
        ConfigError for one that is on."""
        window = config.get("sliding_window", 4096)
        if get_bool(config, "use_sliding_window", False) and window is not None:
            raise ConfigError(
                f"use_sliding_window=true with {told('sliding_window', window)}: layers that see a "
                "part of the text are not served; use a parent whose layers all see the whole text"
            )
        return {key: value for key, value in config.items() if key != "sliding_window"}

    def attention(self, config: Config, hidden: int) -> Attention:
        """See `PreNorm.attention`."""
        heads = get_int(config, "num_attention_heads", 32)
        # Null follows the query heads; what is left out does not.
        absent = heads if "num_key_value_heads" in config else 32
        kv_heads = get_optional_int(config, "num_key_value_heads") or absent
        require_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
        return Attention(
            path="self_attn", heads=heads, kv_heads=kv_heads, head_norms=("q_norm", "k_norm"),
            head_dim=get_int(config, "head_dim", 128),
            bias=get_bool(config, "attention_bias", False),
        )  # fmt: skip

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`: null would follow the number of query heads."""
        return {"num_key_value_heads": self.attention(config, self.hidden(config)).kv_heads}
