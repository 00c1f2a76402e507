"""What a size remembers of sequences: caches of transformers, taken apart and put together by rows.

A size can go on with a sequence that it has left, or with what another size has read, only if one
row of a batch's cache can be taken out and put beside other rows. A batch is padded on the left:
row b of length n fills the last n columns of every attention layer. A layer with a window of W
tokens holds the last W - 1 columns only: the next token is the window's last. Mamba states have no
columns.
B rows, KV heads, T tokens, D channels, N heads, S state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """One layer's states: keys and values (B, KV, T, D), or the convolution's last inputs
    (B, D, kernel) and the recurrent state (B, N, D, S)."""

    kind: str
    first: torch.Tensor
    second: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        return self.first.nbytes + self.second.nbytes

    def cut(self, rows: slice, columns: slice) -> LayerState:
        """Views of some rows, and of some columns where there are columns."""
        places = (rows,) if self.kind == MAMBA else (rows, slice(None), columns)
        return LayerState(self.kind, self.first[places], self.second[places])


Layers = tuple[LayerState | None, ...]
"""States by layer; None where a layer remembers nothing."""


@dataclass(frozen=True, slots=True)
class RowCache:
    """What one size remembers of one sequence: the states of a batch of one row."""

    layers: Layers

    @property
    def num_bytes(self) -> int:
        """Memory of the states."""
        return sum(layer.num_bytes for layer in self.layers if layer)


Convert = Callable[[RowCache], RowCache]
"""How the cache of one size becomes that of another."""


def layers_of(cache: Any) -> Layers:
    """The states of all rows of a cache, by layer; the tensors are the cache's own."""
    return tuple(map(_states, cache.layers))


def _states(layer: Any) -> LayerState | None:
    if hasattr(layer, "recurrent_states"):
        states = LayerState(MAMBA, layer.conv_states[0], layer.recurrent_states[0])
    else:
        states = LayerState(ATTENTION, layer.keys, layer.values)
    return None if states.first is None else states  # nothing is read yet


def take_row(cache: DynamicCache, row: int, length: int) -> RowCache:
    """A copy of a row that has read `length` tokens."""
    place = slice(row, row + 1), slice(-length, None)  # padding is on the left
    views = (states and states.cut(*place) for states in layers_of(cache))
    return RowCache(
        tuple(v and LayerState(v.kind, v.first.clone(), v.second.clone()) for v in views)
    )


def join(batches: Sequence[Layers], config: PreTrainedConfig, columns: int) -> DynamicCache:
    """The rows of several batches as the cache of one, copied, and padded to the longest, which has
    read `columns` tokens."""
    joined = DynamicCache(config=config)
    for number, layers in enumerate(zip(*batches, strict=True)):
        known = [layer for layer in layers if layer is not None]
        if not known:
            continue
        firsts, seconds = [k.first for k in known], [k.second for k in known]
        if known[0].kind == MAMBA:
            joined.update_conv_state(torch.cat(firsts), number)
            joined.update_recurrent_state(torch.cat(seconds), number)
        else:
            joined.update(_cat_padded(firsts), _cat_padded(seconds), number)
            _set_columns(joined.layers[number], columns)
    return joined


def _set_columns(layer: Any, columns: int) -> None:
    """Tells a layer with a window, which holds less, how many tokens have been read."""
    if layer.is_sliding:
        layer.cumulative_length = columns


def _cat_padded(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """States (B, KV, T, D) of several batches as one, padded on the left to the longest T."""
    longest = max(state.shape[2] for state in states)
    return torch.cat([F.pad(s, (0, 0, longest - s.shape[2], 0)) for s in states])


def select_rows(cache: DynamicCache, rows: Sequence[int], columns: int) -> None:
    """Drops all rows of a cache but these, and all columns but the last ones."""
    index = torch.tensor(rows)
    for layer, states in zip(cache.layers, layers_of(cache), strict=True):
        if states is not None:
            # The one selection over the batch that every kind of layer implements.
            layer.reorder_cache(cast(torch.LongTensor, index.to(states.first.device)))
            if states.kind == ATTENTION:
                attention: Any = layer
                attention.keys = attention.keys[:, :, -columns:]
                attention.values = attention.values[:, :, -columns:]
                _set_columns(attention, columns)


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
        head_dim = given.second.shape[2]
        conv = self._move("conv", layer, given.first[0])
        recurrent = self._move("ssm", layer, given.second[0].flatten(0, 1))
        return LayerState(MAMBA, conv[None], recurrent.unflatten(0, (-1, head_dim))[None])

    def _move(self, name: str, layer: int, state: torch.Tensor) -> torch.Tensor:
        """A state (channels, columns) at the other size's widths."""
        # By way of the parent's width, the only one in which elements of both sizes have one place.
        spec, axis_map = self._specs[layer, name], self._axis_map
        whole = state.new_zeros(axis_map.shape(spec, axis_map.full)[0], state.shape[1])
        start = 0
        for low, high in axis_map.runs(spec, 0, self._giver):
            whole[low:high] = state[start : start + high - low]
            start += high - low
        return torch.cat([whole[low:high] for low, high in axis_map.runs(spec, 0, self._taker)])
