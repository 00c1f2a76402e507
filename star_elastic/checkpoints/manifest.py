"""`elastic.json`: what makes a checkpoint elastic.

An elastic checkpoint is a plain Hugging Face directory of the sorted parent, which any tool loads
as the parent, plus this file: the axes with their choices and the named sizes with their widths.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.companions import MANIFEST
from star_elastic.cost.count import METRICS, Cost, CostModel
from star_elastic.errors import CheckpointError, ConfigError, ShapeError, library_boundary
from star_elastic.files.paths import has_file, is_file
from star_elastic.files.writing import read_json, write_json
from star_elastic.strict import read_value, require

FORMAT_VERSION = 1
COUNTED = ("total", "active")
"""Costs that follow from the widths alone."""
LONGEST_NAME = 64
"""Characters of a size's name, which names files."""

SIZE_TYPES = {
    "widths": Mapping[str, Any], "argmax": Mapping[str, Any], "budgets": Mapping[str, float],
    "cost": Mapping[str, float], "repair": Mapping[str, int | tuple[int, ...]],
    "data_free_steps": int, "widths_from": str,
}  # fmt: skip
TYPES = {
    "format_version": int, "family": str, "choices": Mapping[str, tuple[int, ...]],
    "sizes": Mapping[str, Mapping[str, Any]], "per_layer": tuple[str, ...],
    "depth": tuple[int, ...], "provenance": Mapping[str, Any],
    "own_input_scales": tuple[str, ...],
}  # fmt: skip
"""What the values of `elastic.json` are."""


@dataclass(frozen=True, slots=True)
class Size:
    """A named size: its widths, the budgets it was asked to meet and what it costs.

    `budgets` are fractions of the parent's cost by metric (for example active: 0.75); `cost` the
    exact counts at `widths`. `argmax` is the trained router's own choice (None: there was no
    router) and `repair` the steps on the grid that led from there onto the budget (negative:
    narrower; one number for every layer on an axis where each decides for itself);
    `data_free_steps` is their number if more than one per place was needed, else 0. `widths_from`:
    the `data`, the `budget` (the router had not learned what to cut), the `config`, or `adopt`
    (whoever adopted the checkpoint); empty if it is not known.
    """

    widths: Widths
    budgets: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    repair: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    argmax: Widths | None = None
    data_free_steps: int = 0
    widths_from: str = ""

    @classmethod
    def from_json(cls, content: Mapping[str, Any], axis_map: AxisMap, where: str = "") -> Size:
        """From what `elastic.json` holds, checked against the model's axis map. `where`: its keys'
        place in messages. Raises ConfigError for values of another type, ShapeError for widths."""
        for key, kind in SIZE_TYPES.items():
            if key in content and not (key == "argmax" and content[key] is None):
                read_value(kind, content[key], f"{where}{key}")
        widths = axis_map.complete(Widths(content["widths"]))
        argmax = content.get("argmax")
        return cls(**{
            **content,
            "widths": widths,
            "argmax": None if argmax is None else axis_map.complete(Widths(argmax)),
        })  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: dict(v) if isinstance(v, Mapping) else v for key, v in own.items()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The family in one checkpoint. `sizes` is ordered from the largest to the smallest.

    `per_layer` lists the axes on which layers have widths of their own, `depth` the layers from the
    most important one where `layers` is elastic. `own_input_scales` are the sizes of a quantised
    family that multiply with scales of their own inputs, which lie in a file beside the weights.
    """

    family: str
    choices: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, Size]
    per_layer: tuple[str, ...] = ()
    depth: tuple[int, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    own_input_scales: tuple[str, ...] = ()

    def size(self, name: str) -> Size:
        """A size by name. Raises CheckpointError naming the sizes there are."""
        if name not in self.sizes:
            raise CheckpointError(
                f"size {name!r} is not in this family; it has {', '.join(self.sizes)}"
            )
        return self.sizes[name]


def save_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes `elastic.json` atomically."""
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    content["choices"] = {axis: list(grid) for axis, grid in manifest.choices.items()}
    content["sizes"] = {name: size.to_json() for name, size in manifest.sizes.items()}
    write_json(directory / MANIFEST, content)


def load_manifest(directory: str | Path, axis_map: AxisMap) -> Manifest:
    """Reads `elastic.json` and checks every size against the model's axis map.

    Raises CheckpointError if the file is missing, damaged or of another format version, or if a
    size does not fit the model.
    """
    file = Path(directory) / MANIFEST
    if is_file(directory):
        raise CheckpointError(
            f"{directory} is a file; name the checkpoint directory that it lies in"
        )
    if not has_file(file):
        raise CheckpointError(
            f"{directory} holds no {MANIFEST}, so it is not an elastic checkpoint; make one with "
            "star-elastic train (a slice is an ordinary one, which transformers loads)"
        )
    content = read_json(file)
    with library_boundary(f"{file} is damaged", "restore the file"):
        try:
            manifest = _parse(content, axis_map, file)
        except ConfigError as error:
            raise CheckpointError(f"{file} is damaged ({error}); restore the file") from None
    if manifest.family != axis_map.model_type or not manifest.sizes:
        raise CheckpointError(
            f"{file} describes {len(manifest.sizes)} sizes of a {manifest.family} model, but "
            f"config.json is {axis_map.model_type}; restore the matching pair"
        )
    return manifest


def _parse(content: Any, axis_map: AxisMap, file: Path) -> Manifest:
    version = read_value(int, content["format_version"], "format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, this package reads {FORMAT_VERSION}; "
            "upgrade star-elastic"
        )
    for key, kind in TYPES.items():
        if key in content:
            read_value(kind, content[key], key)
    sizes = {}
    for name, size in content["sizes"].items():
        require(bool(name) and name == Path(name).name, f"sizes has the name {name!r}")
        try:
            sizes[name] = Size.from_json(size, axis_map, f"sizes.{name}.")
        except ShapeError as error:
            raise ConfigError(f"sizes.{name}.widths: {error}") from None
    _check_sizes(sizes, CostModel(axis_map))
    return Manifest(
        family=content["family"],
        choices={axis: tuple(grid) for axis, grid in content["choices"].items()},
        sizes=sizes,
        per_layer=tuple(content.get("per_layer", ())),
        depth=tuple(content.get("depth", ())),
        provenance=content.get("provenance", {}),
        own_input_scales=tuple(content.get("own_input_scales", ())),
    )


def _check_sizes(sizes: Mapping[str, Size], cost: CostModel) -> None:
    """Raises ConfigError for budgets that are none, for widths that do not cost what is recorded of
    them, and for sizes whose budgets are out of order: the router knows sizes by their places."""
    for name, size in sizes.items():
        for metric, share in size.budgets.items():
            where = f"sizes.{name}.budgets.{metric}"
            require(metric in METRICS, f"{where} is no budget; use {', '.join(METRICS)}")
            require(0 < share <= 1, f"{where}={share} is no share of the parent; give one like 0.5")
        counted = cost.count(size.widths)
        for metric in COUNTED:
            now = counted.metric(metric)
            if (told := size.cost.get(metric, now)) != now:
                raise ConfigError(
                    f"sizes.{name}.widths have {now:,} {metric} parameters, and sizes.{name}.cost "
                    f"says {told:,.0f}"
                )
    require_order({name: size.budgets for name, size in sizes.items()})


def require_size_name(name: str) -> None:
    """Raises ConfigError for a name that no size may be given: it names files, and stands between
    colons and commas in plans."""
    require(
        len(name) <= LONGEST_NAME and re.fullmatch(r"[A-Za-z0-9][\w.=-]*", name) is not None,
        f"sizes has the name {name[: LONGEST_NAME + 1]!r}; use letters, digits, '.', '_', '=' and "
        f"'-', at most {LONGEST_NAME}, and begin with a letter or a digit",
    )


def recorded(cost: Cost) -> dict[str, float]:
    """What `elastic.json` tells of the cost of a size."""
    return {
        "total": cost.total,
        "active": cost.active,
        "weight_bytes": cost.weight_bytes,
        "state_bytes": cost.state_bytes,
        "flops_per_token": cost.flops_per_token,
        **({} if cost.ms is None else {"ms": round(cost.ms, 6)}),
    }


def require_order(budgets: Mapping[str, Mapping[str, float]]) -> None:
    """Raises ConfigError unless the sizes, by their budgets as fractions, are named from the
    largest to the smallest."""
    for (first, larger), (second, smaller) in itertools.pairwise(budgets.items()):
        shared = [metric for metric in larger if metric in smaller]
        if shared and all(larger[metric] < smaller[metric] for metric in shared):
            raise ConfigError(
                f"size {second!r} has a larger budget than {first!r} before it; name the sizes "
                "from the largest to the smallest"
            )
