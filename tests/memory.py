"""What models hold in memory, seen from their tensors alone."""

from __future__ import annotations

import torch


def cache_bytes(cache) -> int:
    """Bytes of every tensor of numbers that a cache holds, whatever it calls them."""
    seen: dict[int, torch.Tensor] = {}

    def walk(value) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            seen[id(value)] = value
        elif isinstance(value, (dict, list, tuple)):
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    for layer in cache.layers:
        walk(vars(layer))
    return sum(value.nbytes for value in seen.values())
