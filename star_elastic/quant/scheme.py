"""What of a model is quantised: which parts, and which weights among them have whole blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from star_elastic.axes import AxisMap, Dim, TensorSpec
from star_elastic.axes.widths import Width
from star_elastic.errors import ConfigError
from star_elastic.quant.formats import Format, format_of

PARTS = ("attention", "mamba", "mlp", "shared experts", "routed experts")
"""Parts of a model whose weights are quantised; embeddings, head, routers, norms and convolutions
stay as they are."""
BEFORE_ATTENTION = "mamba before attention"
"""The Mamba layers whose outputs an attention layer reads, which NVIDIA's NVFP4 recipes keep."""
PARTNERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines fuse into one, which has one global scale."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """The format of a model's quantised weights, and which of those that could be are `kept` as
    they are (names in memory)."""

    format: Format
    kept: frozenset[str] = frozenset()

    def quantised(self, axis_map: AxisMap) -> dict[str, TensorSpec]:
        """The weights that are quantised, by name."""
        return {s.name: s for s in quantisable(axis_map) if s.name not in self.kept}

    def at(self, axis_map: AxisMap, widths: Mapping[str, Width]) -> Scheme:
        """The scheme of the model that is cut from this one at `widths`."""
        names = axis_map.names_at(widths)
        return replace(self, kept=frozenset(names[name] for name in self.kept if name in names))


def quantisable(axis_map: AxisMap) -> Iterator[TensorSpec]:
    """Matrices of linear layers, and stacks of them (experts)."""
    for spec in axis_map.tensors.values():
        is_stored = spec.is_matrix and len(spec.dims) == 2 + spec.is_stacked
        if spec.part in PARTS and not spec.is_buffer and is_stored:
            yield spec


def make_scheme(axis_map: AxisMap, format_name: str, keep: Iterable[str] = ()) -> Scheme:
    """Quantises all that can be, but for parts to `keep` and what blocks of the format do not fit.

    `keep` names parts, or "mamba before attention". Raises ConfigError for unknown ones, and if
    nothing is left to quantise.
    """
    format, keep = format_of(format_name), list(keep)
    known = (*PARTS, BEFORE_ATTENTION)
    for name in keep:
        if name not in known:
            raise ConfigError(f"part {name!r} is unknown; keep any of {', '.join(known)}")
    feeding = feeding_attention(axis_map) if BEFORE_ATTENTION in keep else ()
    kept = {
        spec.name
        for spec in quantisable(axis_map)
        if spec.part in keep
        or (spec.part == "mamba" and spec.layer in feeding)
        or not fits(spec, format)
    }
    scheme = Scheme(format, frozenset(kept))
    if not scheme.quantised(axis_map):
        raise ConfigError(
            f"nothing is left to quantise: no weight's shape is made of whole blocks of "
            f"{format.name}, or all parts are kept; use another format"
        )
    return scheme


def feeding_attention(axis_map: AxisMap) -> set[int]:
    """The last Mamba layer before every attention layer."""
    feeding: set[int] = set()
    last = None
    for layer, block in enumerate(axis_map.blocks):
        parts = {spec.part for spec in block.tensors}
        if "attention" in parts and last is not None:
            feeding.add(last)
        if "mamba" in parts:
            last = layer
    return feeding


def fits(spec: TensorSpec, format: Format) -> bool:
    """Whether every segment and group of a weight begins and ends on an edge of the blocks."""
    rows, columns = spec.dims[-2:]
    return _divides(rows, format.block[0]) and _divides(columns, format.block[1])


def _divides(dim: Dim, block: int) -> bool:
    return all(s.size // s.num_groups % max(block, 1) == 0 for s in dim)


def partners(name: str) -> tuple[str, ...]:
    """The names of a weight and of those that engines fuse with it."""
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    group = next((group for group in PARTNERS if last in group), (last,))
    end = name.removeprefix(f"{stem}.{last}")
    return tuple(f"{stem}.{other}{end}" for other in group)


# The stored tensors


# What config files say
