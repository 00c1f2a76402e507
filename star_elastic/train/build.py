"""The trainer of a run put together: parent ranked and sorted (or a family), teacher, router."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from star_elastic.axes import AxisMap
from star_elastic.data.sources import Source
from star_elastic.files.paths import has_file
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.fake_quantisation import FILE_NAME as FAKE
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import load_sorting, sort_in_place
from star_elastic.progress import Progress
from star_elastic.quant.scheme import Scheme
from star_elastic.rewrite.family import InputCalibration, calibrate_sizes, shared_scales
from star_elastic.router.grid import Grid
from star_elastic.router.router import Router
from star_elastic.train.calibrate import Calibration
from star_elastic.train.check import Checked
from star_elastic.train.config import RunConfig
from star_elastic.train.distributed import World
from star_elastic.train.loop import Trainer


def build_trainer(
    config: RunConfig,
    checked: Checked,
    sources: list[Source],
    run: Path,
    progress: Progress,
    world: World,
) -> tuple[Trainer, dict[str, torch.Tensor], torch.Tensor | None]:
    """Ranks and sorts the parent (or takes a family as it is) and puts student, teacher and router
    together; also returns the orders of the units and the basis of the residual stream, if any.

    What is measured on the way is kept in the directory `run`, and read from there by the next
    start.
    """
    device = str(world.device)
    if config.family:
        parent, orders, basis = _family(config, checked.axis_map, device)
        grid = checked.grid
    else:
        parent, orders, basis, grid = _sorted(config, checked, sources, run, progress, world)
    fake = None
    if checked.scheme is not None:
        fake = _fake(config, checked, checked.scheme, parent, sources, run, progress, world)
    elastic = partial(ElasticModel, config=checked.model_config)
    student = world.shard(elastic(parent, recompute=config.engine.recompute, fake=fake))
    teacher = None
    if config.objective == "distillation":
        teacher = world.shard(elastic(load_parent(config.parent, device=device)[0]))
    router = Router(grid, len(config.sizes), config.seed).to(world.device)
    trainer = Trainer(
        config,
        student,
        teacher,
        router,
        sources,
        checked.budgets,
        checked.cost,
        world,
        progress,
    )
    if checked.fixed:
        trainer.committed = dict(checked.fixed)
        router.requires_grad_(False)
    return trainer, orders, basis


def _family(
    config: RunConfig, axis_map: AxisMap, device: str
) -> tuple[PreTrainedModel, dict[str, torch.Tensor], torch.Tensor | None]:
    """The weights of a family that is trained on, with the order and basis that it is in."""
    family = Path(config.family)
    parent, _ = load_parent(family, device=device)
    return parent, *load_sorting(family, axis_map)


def _fake(
    config: RunConfig,
    checked: Checked,
    scheme: Scheme,
    parent: PreTrainedModel,
    sources: list[Source],
    run: Path,
    progress: Progress,
    world: World,
) -> FakeQuantisation:
    """What is frozen of the quantised weights and inputs; a run directory keeps it."""
    stored = checked.dtype
    if world.agree(has_file(run / FAKE)):
        return FakeQuantisation.load(run, checked.axis_map, scheme).on(world.device, stored)
    widths = {name: size.widths for name, size in checked.fixed.items()}
    samples = InputCalibration(
        samples=config.quant.samples,
        context=config.calibration.context,
        percentile=config.quant.percentile,
    )
    scales = calibrate_sizes(
        parent,
        checked.model_config,
        checked.axis_map,
        widths,
        scheme,
        sources,
        samples,
        progress,
    )
    shared = shared_scales(scales, scheme, checked.axis_map)
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    fake = world.agree(FakeQuantisation.of(state, checked.axis_map, scheme, shared))
    if world.is_first:
        fake.save(run)
    return fake.on(world.device, stored)


def _sorted(
    config: RunConfig,
    checked: Checked,
    sources: list[Source],
    run: Path,
    progress: Progress,
    world: World,
) -> tuple[PreTrainedModel, dict[str, torch.Tensor], torch.Tensor | None, Grid]:
    """The parent with its units sorted, best first, and the router's grid."""
    parent, _ = load_parent(config.parent, device=str(world.device))
    calibration = Calibration(
        config, run, parent, checked.model_config, checked.axis_map, sources, progress
    )
    write = world.is_first
    # Ranks measure alike, but for rounding: the first one's word counts.
    orders = world.agree(calibration.orders(write=write))
    basis = world.agree(calibration.basis(write=write))
    if basis is not None:
        del orders["hidden"]
    depth = world.agree(calibration.depth(write=write))
    sort_in_place(parent, checked.axis_map, orders, basis)

    return parent, orders, basis, checked.ranked_grid(depth)
