"""`star-elastic sizes`: the family in an elastic checkpoint as a table."""

from star_elastic.axes import LAYERS
from star_elastic.checkpoints.manifest import load_manifest
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Elastic
from star_elastic.cli.terminal import show
from star_elastic.cost.count import CostModel
from star_elastic.tables import Table

ORIGINS = {
    "data": "the router learned them",
    "budget": "the router had learned too little, the budget decides most of them",
    "config": "the run config names them",
}
"""What decided the widths of a size, in words."""


def sizes(elastic: Elastic, as_json: AsJson = False) -> None:
    """The sizes of an elastic checkpoint: widths, budgets, exact cost."""
    axis_map = read_countable(elastic).axis_map
    manifest = load_manifest(elastic, axis_map)
    cost = CostModel(axis_map)
    full = cost.full
    # Layers and top_k are shown where a size cuts them.
    axes = [
        name for name, axis in axis_map.axes.items()
        if axis.ranked or any(s.widths[name] != axis.size for s in manifest.sizes.values())
    ]  # fmt: skip
    content, rows = {}, []
    for name, size in manifest.sizes.items():
        counted = cost.count(size.widths)
        content[name] = {
            **{key: value for key, value in size.to_json().items() if key != "cost"},
            "total": counted.total, "active": counted.active, "weight_bytes": counted.weight_bytes,
        }  # fmt: skip
        widths = {**size.widths, LAYERS: len(axis_map.kept_layers(size.widths))}
        rows.append([
            name, f"{counted.active:,} ({counted.active / full.active:.1%})",
            f"{counted.total:,} ({counted.total / full.total:.1%})",
            *(width_text(widths[axis]) for axis in axes), size.widths_from,
        ])  # fmt: skip
    table = Table(str(elastic), ["size", "active", "total", *axes, "widths from"], rows)
    found = {size.widths_from for size in manifest.sizes.values()}
    told = [f"widths from {name}: {meaning}" for name, meaning in ORIGINS.items() if name in found]
    show(as_json, {"family": manifest.family, "sizes": content}, table, *told)


def width_text(width: int | tuple[int, ...]) -> str:
    """A width, or the range of widths that differ between layers."""
    return str(width) if isinstance(width, int) else f"{min(width)}-{max(width)}"
