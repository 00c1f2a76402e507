"""`star-elastic sizes`: the family in an elastic checkpoint as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from star_elastic.axes import LAYERS, AxisMap
from star_elastic.checkpoints.manifest import Manifest, load_manifest
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Elastic
from star_elastic.cli.terminal import show
from star_elastic.cost.count import CostModel
from star_elastic.tables import Table

ORIGINS = {
    "data": "the router learned them",
    "budget": "the router had learned too little, the budget decides most of them",
    "config": "the run config names them",
    "adopt": "star-elastic adopt was told them",
}
"""What decided the widths of a size, in words."""


def sizes(elastic: Elastic, as_json: AsJson = False) -> None:
    """The sizes of an elastic checkpoint: widths, budgets, exact cost."""
    axis_map = read_countable(elastic).axis_map
    manifest = load_manifest(elastic, axis_map)
    content = describe_family(manifest, axis_map)
    found = {size.widths_from for size in manifest.sizes.values()}
    told = [f"widths from {name}: {meaning}" for name, meaning in ORIGINS.items() if name in found]
    if content["adopted"]:
        told.append(f"adopted from {manifest.provenance.get('parent')}: nothing was trained since")
    show(as_json, content, family_table(elastic, manifest, axis_map), *told)


def describe_family(manifest: Manifest, axis_map: AxisMap) -> dict[str, Any]:
    """A family as plain data: every size with what it costs, and whether its sizes were only named
    (`adopted`), not trained."""
    cost, content = CostModel(axis_map), {}
    for name, size in manifest.sizes.items():
        counted = cost.count(size.widths)
        content[name] = {
            **{key: value for key, value in size.to_json().items() if key != "cost"},
            "total": counted.total, "active": counted.active, "weight_bytes": counted.weight_bytes,
        }  # fmt: skip
    adopted = manifest.provenance.get("adopted") is True
    return {"family": manifest.family, "adopted": adopted, "sizes": content}


def family_table(path: Path, manifest: Manifest, axis_map: AxisMap) -> Table:
    """A family as a table."""
    cost = CostModel(axis_map)
    full = cost.full
    # Layers and top_k are shown where a size cuts them.
    axes = [
        name for name, axis in axis_map.axes.items()
        if axis.ranked or any(s.widths[name] != axis.size for s in manifest.sizes.values())
    ]  # fmt: skip
    rows = []
    for name, size in manifest.sizes.items():
        counted = cost.count(size.widths)
        widths: Mapping[str, Any] = {
            **size.widths, LAYERS: len(axis_map.kept_layers(size.widths)),
        }  # fmt: skip
        rows.append([
            name, f"{counted.active:,} ({counted.active / full.active:.1%})",
            f"{counted.total:,} ({counted.total / full.total:.1%})",
            *(width_text(widths[axis]) for axis in axes), size.widths_from,
        ])  # fmt: skip
    return Table(str(path), ["size", "active", "total", *axes, "widths from"], rows)


def width_text(width: int | tuple[int, ...]) -> str:
    """A width, or the range of widths that differ between layers."""
    return str(width) if isinstance(width, int) else f"{min(width)}-{max(width)}"
