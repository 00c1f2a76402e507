"""What a size remembers of sequences: caches of transformers taken apart and put together by rows.

A batch is padded on the left: row b of length n fills the last n columns of every attention layer;
the Mamba states of a row have no columns. B rows, T tokens, KV heads, D channels, N heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedConfig

from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.errors import ConfigError

ATTENTION, MAMBA = "attention", "mamba"


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer's states of one sequence: keys and values (KV, T, D), or the convolution's last
    inputs (D, kernel) and the recurrent state (N, D, S)."""

    kind: str
    first: torch.Tensor
    second: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        return self.first.nbytes + self.second.nbytes


@dataclass(frozen=True, slots=True)
class RowCache:
    """A cache of one sequence, by layer; None where a layer remembers nothing."""

    layers: tuple[LayerState | None, ...]

    @property
    def num_bytes(self) -> int:
        """Memory of the states."""
        return sum(layer.num_bytes for layer in self.layers if layer)


def take_row(cache: DynamicCache, row: int, length: int) -> RowCache:
    """A copy of a row that has read `length` tokens."""
    return RowCache(tuple(_take(layer, row, length) for layer in cache.layers))


def _take(layer: Any, row: int, length: int) -> LayerState | None:
    states = states_of(layer)
    if states is None:
        return None
    if states.kind == MAMBA:
        return LayerState(MAMBA, states.first[row].clone(), states.second[row].clone())
    keys, values = (s[row, :, s.shape[2] - length :].clone() for s in (states.first, states.second))
    return LayerState(ATTENTION, keys, values)


def states_of(layer: Any) -> LayerState | None:
    """The states of a cache's layer, all rows; None if it has read nothing or remembers nothing."""
    if hasattr(layer, "recurrent_states"):
        kind, states = MAMBA, (layer.conv_states[0], layer.recurrent_states[0])
    else:
        kind, states = ATTENTION, (layer.keys, layer.values)
    return None if states[0] is None else LayerState(kind, *states)


def stack_rows(rows: Sequence[RowCache], config: PreTrainedConfig) -> DynamicCache:
    """Rows as the cache of one batch, padded to the longest."""
    batches = [[_one_row(layer) if layer else None for layer in row.layers] for row in rows]
    return _join(batches, config)


def _one_row(layer: LayerState) -> LayerState:
    return LayerState(layer.kind, layer.first[None], layer.second[None])


def join_caches(caches: Sequence[DynamicCache], config: PreTrainedConfig) -> DynamicCache:
    """The rows of several batches as the cache of one, padded to the longest."""
    return _join([[states_of(layer) for layer in cache.layers] for cache in caches], config)


def cache_of(layers: Sequence[LayerState | None], config: PreTrainedConfig) -> DynamicCache:
    """States (all rows) by layer as a cache of their own, copied."""
    return _join([layers], config)


def _join(batches: Sequence[Sequence[LayerState | None]], config: PreTrainedConfig) -> DynamicCache:
    joined = DynamicCache(config=config)
    for number, layers in enumerate(zip(*batches, strict=True)):
        known = [layer for layer in layers if layer is not None]
        if not known:
            continue
        firsts, seconds = ([getattr(k, which) for k in known] for which in ("first", "second"))
        if known[0].kind == MAMBA:
            joined.update_conv_state(torch.cat(firsts), number)
            joined.update_recurrent_state(torch.cat(seconds), number)
        else:
            joined.update(_cat_padded(firsts), _cat_padded(seconds), number)
    return joined


def _cat_padded(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """States (B, KV, T, D) of several batches as one, padded on the left to the longest T."""
    longest = max(state.shape[2] for state in states)
    return torch.cat([F.pad(s, (0, 0, longest - s.shape[2], 0)) for s in states])


def select_rows(cache: DynamicCache, rows: Sequence[int], columns: int) -> None:
    """Drops all rows of a cache but these, and all columns but the last ones."""
    index = torch.tensor(rows)
    for layer in cache.layers:
        states = states_of(layer)
        if states is not None:
            # The one selection over the batch that every kind of layer implements.
            layer.reorder_cache(cast(torch.LongTensor, index.to(states.first.device)))
            if states.kind == ATTENTION:
                attention: Any = layer
                attention.keys = attention.keys[:, :, -columns:]
                attention.values = attention.values[:, :, -columns:]


def count_bytes(cache: DynamicCache) -> int:
    """Memory of all rows of a cache, padding included."""
    return sum(states.num_bytes for states in map(states_of, cache.layers) if states)


class HandOver:
    """Gives what one size remembers to another as it is: approximate, and free.

    Keys, values and states are taken as those that the other size would have made. Mamba heads that
    it lacks are left out; those that only it has begin with empty states. KV heads are the same in
    all sizes of a family. Raises ConfigError if it has a layer with states that the giver lacks.
    """

    def __init__(self, axis_map: AxisMap, giver: Widths, taker: Widths):
        self._axis_map, self._giver, self._taker = axis_map, giver, taker
        self._from, self._to = axis_map.kept_layers(giver), axis_map.kept_layers(taker)
        self._specs = {(state.layer, state.name): state for state in axis_map.states}
        lacking = (set(self._to) - set(self._from)) & {layer for layer, _ in self._specs}
        if lacking:
            raise ConfigError(
                f"caches cannot be handed over: layer {min(lacking)} remembers something in one of "
                "the sizes only; switch by catch-up or reprefill"
            )

    def __call__(self, row: RowCache) -> RowCache:
        """The cache as the other size takes it."""
        given = dict(zip(self._from, row.layers, strict=True))
        return RowCache(tuple(self._layer(layer, given.get(layer)) for layer in self._to))

    def _layer(self, layer: int, given: LayerState | None) -> LayerState | None:
        if given is None or given.kind == ATTENTION:
            return given
        head_dim = given.second.shape[1]
        recurrent = self._move("ssm", layer, given.second.flatten(0, 1))
        return LayerState(
            MAMBA, self._move("conv", layer, given.first), recurrent.unflatten(0, (-1, head_dim))
        )

    def _move(self, name: str, layer: int, state: torch.Tensor) -> torch.Tensor:
        """A state (channels, columns) at the other size's widths."""
        spec, axis_map = self._specs[layer, name], self._axis_map
        whole = state.new_zeros(axis_map.shape(spec, axis_map.full)[0], state.shape[1])
        start = 0
        for low, high in axis_map.runs(spec, 0, self._giver):
            whole[low:high] = state[start : start + high - low]
            start += high - low
        return torch.cat([whole[low:high] for low, high in axis_map.runs(spec, 0, self._taker)])
