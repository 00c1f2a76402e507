"""Gemma 3, the language model: norms before and behind every block, windows in most layers.

Embeddings are multiplied by the square root of the hidden size. In memory all sizes multiply by the
parent's; a slice stores its embeddings that much larger, and where they are the head, too, its
final norm that much smaller.
"""

from __future__ import annotations

from star_elastic.architectures.config_file import (
    Config,
    get_bool,
    get_int,
    told,
)
from star_elastic.architectures.decoder import Decoder
from star_elastic.architectures.parts import Norm
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.windows import (
    Windows,
    get_window,
    layer_windows,
)
from star_elastic.axes import RMS_PLUS_ONE
from star_elastic.errors import ConfigError


class Gemma3Text(PreNorm):
    """The `gemma3_text` architecture. Defaults are those of transformers' Gemma3TextConfig."""

    model_type = "gemma3_text"
    attention_keys = ("sliding_window",)
    multiples = (("hidden", "heads"),)
    vocab_size = 262208
    hidden_size = 2304
    intermediate_size = 9216
    num_hidden_layers = 26
    num_attention_heads = 8
    num_key_value_heads = 4
    tie_word_embeddings = True
    head_size = 256
    windows_by_layer = True
    head_norms = ("q_norm", "k_norm")
    norm_kind = RMS_PLUS_ONE
    embed_scale = "model.embed_tokens.embed_scale"

    def kv_heads(self, config: Config) -> int:
        """See `PreNorm.kv_heads`."""
        get_int(config, "num_key_value_heads", 4)
        return super().kv_heads(config)

    def rotary(self, config: Config) -> tuple[int, ...]:
        """See `PreNorm.rotary`: layers with windows turn otherwise."""
        return (self.head_dim(config),) * len({bool(own) for own in self.windows(config)})

    def norms(self, eps: float) -> tuple[Norm, ...]:
        """See `PreNorm.norms`."""
        kind = self.norm_kind
        return (
            Norm(path="input_layernorm", eps=eps, reader="self_attn", kind=kind),
            Norm(path="post_attention_layernorm", eps=eps, kind=kind, writes=True),
            Norm(path="pre_feedforward_layernorm", eps=eps, reader="mlp", kind=kind),
            Norm(path="post_feedforward_layernorm", eps=eps, kind=kind, writes=True),
        )

    def windows(self, config: Config) -> Windows:
        """See `PreNorm.windows`: every so many layers, one sees the whole text."""
        every = get_int(config, "sliding_window_pattern", 6)
        slides = [bool((layer + 1) % every) for layer in range(self.num_layers(config))]
        return layer_windows(config, len(slides), get_window(config, 4096), slides)

    def decoder(self, config: Config) -> Decoder:
        """See `Architecture.decoder`."""
        for key in ("final_logit_softcapping", "attn_logit_softcapping"):
            if config.get(key) is not None:
                raise ConfigError(
                    f"{told(key, config[key])} is not served: losses would be of other logits; "
                    "use a parent without"
                )
        if config.get("use_bidirectional_attention") is not None and get_bool(
            config, "use_bidirectional_attention", False
        ):
            raise ConfigError(
                "use_bidirectional_attention=true makes no model that writes text; use a parent "
                "whose tokens see what came before"
            )
        return super().decoder(config)
