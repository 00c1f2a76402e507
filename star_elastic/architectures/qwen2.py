"""Qwen2: biases of queries, keys and values; windows, if they are on, from some layer upwards."""

from __future__ import annotations

from star_elastic.architectures.config_file import Config, get_bool, get_int
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.windows import Windows, get_window, layer_windows


class Qwen2(PreNorm):
    """The `qwen2` architecture. Defaults are those of transformers' Qwen2Config."""

    model_type = "qwen2"
    attention_keys = ("sliding_window",)
    vocab_size = 151936
    intermediate_size = 22016
    num_key_value_heads = 32
    windows_by_layer = True

    def biases(self, config: Config) -> tuple[bool, bool]:
        """See `PreNorm.biases`."""
        return True, False

    def windows(self, config: Config) -> Windows:
        """See `PreNorm.windows`."""
        num_layers, is_on = self.num_layers(config), get_bool(config, "use_sliding_window", False)
        window = get_window(config, 4096) if is_on else None
        first = get_int(config, "max_window_layers", 28, least=0)
        slides = [window is not None and layer >= first for layer in range(num_layers)]
        return layer_windows(config, num_layers, window, slides)
