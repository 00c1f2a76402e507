"""Sliding windows: layers in which a token sees the last tokens only, itself among them."""

from __future__ import annotations

from collections.abc import Sequence

from star_elastic.architectures.config_file import Config, get_int, told
from star_elastic.errors import ConfigError

Windows = tuple[int | None, ...]
"""The window of every layer in tokens; None: it sees all that came before."""
FULL, SLIDING = "full_attention", "sliding_attention"


def get_window(config: Config, default: int | None) -> int | None:
    """`sliding_window`; None where it is null. Raises ConfigError."""
    if config.get("sliding_window", default) is None:
        return None
    return get_int(config, "sliding_window", default, least=2)  # of 1, caches would hold nothing


def layer_windows(
    config: Config, num_layers: int, window: int | None, slides: Sequence[bool]
) -> Windows:
    """The window of every layer, by `layer_types`, or where the config has none by `slides`.

    Raises ConfigError for a list that does not name the layers, or names windows that there are
    not.
    """
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds):
            raise ConfigError(
                f"{told('layer_types', kinds)} is not a list of {FULL} and {SLIDING}, which are "
                f"the layers of {config.get('model_type')}; correct config.json"
            )
        if len(kinds) != num_layers:
            raise ConfigError(
                f"layer_types names {len(kinds)} layers, num_hidden_layers={num_layers}; correct "
                "config.json"
            )
        slides = [kind == SLIDING for kind in kinds]
    if any(slides) and window is None:
        raise ConfigError(
            f"layer_types names layers of {SLIDING}, but no window is on; set sliding_window (and "
            "use_sliding_window, where the model has it) in config.json"
        )
    return tuple(window if own else None for own in slides)


def alike_windows(config: Config, num_layers: int, window: int | None) -> Windows:
    """The windows of a model type whose layers all have this one or none. Raises ConfigError for
    `layer_types` that say something else, which caches would obey and layers would not."""
    windows = layer_windows(config, num_layers, window, [window is not None] * num_layers)
    if any(own != window for own in windows):
        kinds = told("layer_types", config.get("layer_types"))
        raise ConfigError(
            f"{kinds} does not go with {told('sliding_window', window)}, which all layers of "
            f"{config.get('model_type')} follow; remove it from config.json"
        )
    return windows


def written_windows(windows: Windows, layers: Sequence[int]) -> Config:
    """What a config of the kept `layers` must say of their windows: defaults go by the layers'
    numbers. Empty if the parent has none."""
    if not any(windows):
        return {}
    kept = [windows[layer] for layer in layers]
    named = {"layer_types": [SLIDING if window else FULL for window in kept]}
    return named | {"sliding_window": next(window for window in windows if window)}
