"""A checkpoint whose nested widths are known becomes a family, without training.

For models that were released elastic (units sorted, widths of the sizes published), and for whoever
wants to try sizes on any other. The weights are written as they are, `elastic.json` beside them.
Nothing here knows whether the sizes are any good: that lies in how the checkpoint was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import star_elastic
from star_elastic.architectures import ModelConfig, read_config
from star_elastic.axes.widths import Width, Widths
from star_elastic.bundled import name_of
from star_elastic.checkpoints.companions import is_elastic
from star_elastic.checkpoints.elastic import write_family_files
from star_elastic.checkpoints.layouts import read_scheme, stored_map
from star_elastic.checkpoints.manifest import Manifest, Size, recorded, require_size_name
from star_elastic.checkpoints.written_config import require_readable
from star_elastic.cost.count import CostModel
from star_elastic.errors import ConfigError, ShapeError
from star_elastic.files.writing import require_writable
from star_elastic.models.load import require_checkpoint
from star_elastic.models.skeleton import build_skeleton
from star_elastic.progress import Progress, Silent, staged
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.router.grid import grid_holding

FULL = "full"
"""What the parent's own widths are called as a size, unless they are given another name."""


def adopt_checkpoint(
    path: str | Path,
    sizes: Mapping[str, Mapping[str, Width]],
    out: str | Path,
    *,
    full: str = FULL,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a checkpoint as a family to the new directory `out`: its tensors byte for byte, and
    the sizes, the parent's own widths (called `full`) the first of them, from the largest to the
    smallest. Axes that a size does not name are whole.

    A quantised checkpoint stays as it is. Raises ConfigError, ShapeError or CheckpointError in one
    line for names, widths and files that make no family; nothing is left behind then.
    """
    path, progress = Path(path), progress or Silent()
    require_writable(out)
    if is_elastic(path):
        raise ConfigError(
            f"{path} is a family already; cut widths of your own from it with star-elastic slice "
            "--widths, or adopt a copy of it without its elastic.json"
        )
    require_checkpoint(path)
    require_readable(path)
    config = read_config(path)
    for name in (full, *sizes):
        require_size_name(name)
    if full in sizes:
        raise ConfigError(
            f"size {full!r} has the name that the parent's own widths go by; rename it, or give "
            "them another with --full"
        )
    manifest = _manifest(name_of(path), config, _checked(sizes, config, full), full)
    slice_checkpoint(
        path, {}, out, progress=staged(progress, "write"),
        finish=lambda directory: write_family_files(directory, manifest),
    )  # fmt: skip
    return manifest


def _checked(
    sizes: Mapping[str, Mapping[str, Width]], config: ModelConfig, full: str
) -> dict[str, Widths]:
    """The widths of every axis by size. Raises ConfigError or ShapeError for those that no plain
    checkpoint can have, and for sizes that are one."""
    axis_map = config.axis_map
    stored = stored_map(axis_map, read_scheme(config, axis_map))
    names = {axis_map.full: full}
    for name, given in sizes.items():
        try:
            widths = axis_map.complete(given)
            small = config.at(widths)
            stored.require_edges(widths)
        except ShapeError as error:
            raise ShapeError(f"size {name!r}: {error}") from None
        if widths == axis_map.full:
            raise ConfigError(
                f"size {name!r} has the parent's own widths, which are a size already, {full!r}; "
                f"leave it out (--full {name} gives that one this name)"
            )
        if widths in names:
            raise ConfigError(
                f"sizes {names[widths]!r} and {name!r} have the same widths; leave one of them out"
            )
        build_skeleton(small, file=f"the config.json of size {name!r}")
        names[widths] = name
    return {name: widths for widths, name in names.items()}


def _manifest(
    parent: str, config: ModelConfig, widths: Mapping[str, Widths], full: str
) -> Manifest:
    axis_map = config.axis_map
    cost = CostModel(axis_map)
    counted = {name: cost.count(own) for name, own in widths.items()}
    # By what a token uses, as their budgets have it; the parent has more of everything.
    order = sorted(widths, key=lambda n: (n != full, -counted[n].active, -counted[n].total))
    grid = grid_holding(widths.values(), axis_map)
    return Manifest(
        family=axis_map.model_type,
        choices=grid.choices,
        sizes={
            name: Size(
                widths[name],
                budgets={"active": counted[name].active / cost.full.active},
                cost=recorded(counted[name]),
                widths_from="adopt",
            )
            for name in order
        },
        depth=grid.depth,
        provenance={
            "parent": Path(parent).name,
            "adopted": True,
            "steps": 0,
            "package_version": star_elastic.__version__,
        },
    )
