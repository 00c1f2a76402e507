"""Mistral: Llama's layers without biases, all with a window or all without."""

from __future__ import annotations

from star_elastic.architectures.config_file import Config
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.windows import Windows, alike_windows, get_window


class Mistral(PreNorm):
    """The `mistral` architecture. Defaults are those of transformers' MistralConfig."""

    model_type = "mistral"
    attention_keys = ("sliding_window",)
    vocab_size = 32000
    intermediate_size = 14336
    num_key_value_heads = 8
    head_may_be_null = True

    def biases(self, config: Config) -> tuple[bool, bool]:
        """See `PreNorm.biases`."""
        return False, False

    def windows(self, config: Config) -> Windows:
        """See `PreNorm.windows`. Without the field there is one."""
        return alike_windows(config, self.num_layers(config), get_window(config, 4096))
