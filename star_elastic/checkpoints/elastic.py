"""The elastic checkpoint: every file that lies beside the weights of a family, read and written.

The weights are a plain Hugging Face checkpoint of the sorted parent. Beside them lie the sizes
(`elastic.json`), the trained router, how the parent was sorted, the latency table that budgets were
counted with, and of a quantised family the scales of every size's own inputs. Whoever makes a
family (training, quantising) writes it here, and whoever reads one reads it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from star_elastic.architectures import ModelConfig, read_config
from star_elastic.axes import AxisMap
from star_elastic.checkpoints.companions import (
    BASIS,
    INPUT_SCALES,
    LATENCY,
    ORDERS,
    ROUTER,
    copy_file,
)
from star_elastic.checkpoints.layouts import CONFIG_KEY
from star_elastic.checkpoints.manifest import Manifest, load_manifest, save_manifest
from star_elastic.checkpoints.tensors import load_tensors, save_tensors
from star_elastic.cost.latency import LatencyTable, load_table
from star_elastic.errors import CheckpointError, ShapeError
from star_elastic.files.paths import has_file
from star_elastic.nesting.rotate import check_basis
from star_elastic.nesting.slice import check_orders

Tensors = Mapping[str, torch.Tensor]
HIDDEN = "hidden"
CARRIED = (ROUTER, ORDERS, BASIS, LATENCY)
"""What a family keeps when its weights are rewritten without changing their order."""


class ElasticCheckpoint:
    """A family on disk. Each file is read and checked when it is first asked for; CheckpointError
    is raised for one that is damaged, missing although it is needed, or another model's."""

    def __init__(self, path: str | Path, config: ModelConfig | None = None):
        self.path = Path(path)
        self.config = config or read_config(path)

    @property
    def axis_map(self) -> AxisMap:
        """The sorted parent's."""
        return self.config.axis_map

    @property
    def is_quantised(self) -> bool:
        """Whether its weights are codes of a format."""
        return bool(self.config.get(CONFIG_KEY))

    @cached_property
    def manifest(self) -> Manifest:
        """The sizes, and the widths that they were chosen from."""
        return load_manifest(self.path, self.axis_map)

    @cached_property
    def orders(self) -> dict[str, torch.Tensor]:
        """How the parent's units were permuted, by axis and layer; empty if the family does not
        say."""
        if not has_file(file := self.path / ORDERS):
            return {}
        orders = load_tensors(file)
        with self._one_of(file):
            check_orders(orders, self.axis_map)
        return orders

    @cached_property
    def basis(self) -> torch.Tensor | None:
        """The basis (H, H) that the residual stream was rotated to, if it was."""
        if not has_file(file := self.path / BASIS):
            return None
        found = load_tensors(file)
        with self._one_of(file):
            if HIDDEN not in found:
                raise ShapeError("it holds no basis of the residual stream")
            check_basis(found[HIDDEN], self.axis_map)
        return found[HIDDEN]

    @cached_property
    def router_state(self) -> dict[str, torch.Tensor] | None:
        """The parameters of the trained router; None for a family whose widths were given."""
        return load_tensors(file) if has_file(file := self.path / ROUTER) else None

    @cached_property
    def latency(self) -> LatencyTable | None:
        """The table that budgets in milliseconds were counted with, if there were any."""
        return load_table(file, self.axis_map) if has_file(file := self.path / LATENCY) else None

    def input_scales(self, size: str) -> dict[str, torch.Tensor]:
        """The scales of one size's inputs, by the names of the weights in the parent; empty if it
        has those of the checkpoint itself.

        Raises CheckpointError if the size has some of its own and they are not there: with the
        shared ones its outputs would be others, and nothing would show it.
        """
        is_named = size in self.manifest.own_input_scales
        file, start = self.path / INPUT_SCALES, f"{size}/"
        if not is_named and not has_file(file):
            return {}
        found = load_tensors(file)
        scales = {n.removeprefix(start): scale for n, scale in found.items() if n.startswith(start)}
        if is_named and not scales:
            raise CheckpointError(f"{file} lacks the scales of size {size!r}; restore the file")
        return scales

    @contextmanager
    def _one_of(self, file: Path) -> Iterator[None]:
        try:
            yield
        except ShapeError as error:
            raise CheckpointError(
                f"{file} does not fit this {self.axis_map.model_type} model ({error}); restore "
                "the file"
            ) from None


def write_family_files(
    directory: Path,
    manifest: Manifest,
    *,
    orders: Tensors | None = None,
    basis: torch.Tensor | None = None,
    router: Tensors | None = None,
    latency: Path | None = None,
    input_scales: Mapping[str, Tensors] | None = None,
) -> None:
    """Writes everything that a family has beside its weights into a directory that is being made.

    `router`: its parameters; `latency`: the file to copy; `input_scales` by size and weight.
    """
    save_manifest(manifest, directory)
    if router is not None:
        save_tensors(directory / ROUTER, router)
    if latency is not None:
        copy_file(latency, directory / LATENCY)
    if orders:
        save_tensors(directory / ORDERS, dict(orders))
    if basis is not None:
        save_tensors(directory / BASIS, {HIDDEN: basis})
    if input_scales:
        flat = {
            f"{size}/{name}": scale
            for size, own in input_scales.items()
            for name, scale in own.items()
        }
        save_tensors(directory / INPUT_SCALES, flat)


def rewrite_family_files(
    source: ElasticCheckpoint,
    directory: Path,
    manifest: Manifest,
    input_scales: Mapping[str, Tensors] | None = None,
) -> None:
    """Writes the files of a family whose weights are written anew without changing their order:
    router, orders, basis and latency table are those of `source`. The table goes on saying which
    dtype it was measured in."""
    for name in CARRIED:
        if has_file(source.path / name):
            copy_file(source.path / name, directory / name)
    write_family_files(directory, manifest, input_scales=input_scales)
