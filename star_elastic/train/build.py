"""The trainer of a run put together: parent ranked and sorted (or a family), teacher, router."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.files.paths import has_file
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.fake_quantisation import FILE_NAME as FAKE
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import sort_in_place
from star_elastic.progress import Progress
from star_elastic.rewrite.family import InputCalibration, calibrate_sizes, shared_scales
from star_elastic.router.grid import Grid
from star_elastic.router.router import Router
from star_elastic.train.calibrate import Calibration
from star_elastic.train.check import ranking_context
from star_elastic.train.distributed import World
from star_elastic.train.inputs import RunInputs
from star_elastic.train.loop import Trainer


def build_trainer(
    inputs: RunInputs, progress: Progress, world: World
) -> tuple[Trainer, dict[str, torch.Tensor], torch.Tensor | None]:
    """Ranks and sorts the parent (or takes a family as it is) and puts student, teacher and router
    together; also returns the orders of the units and the basis of the residual stream, if any.

    What is measured on the way is kept in the run's directory, and read from there by the next
    start.
    """
    config, spec, device = inputs.config, inputs.spec, str(world.device)
    if config.family:  # its weights, in the order and basis that they are in
        parent, _ = load_parent(Path(config.family), device=device)
        family = ElasticCheckpoint(config.family)
        orders, basis = family.orders, family.basis
        grid = spec.grid
    else:
        parent, orders, basis, grid = _sorted(inputs, progress, world)
    fake = _fake(inputs, parent, progress, world)
    elastic = partial(ElasticModel, config=spec.model_config)
    student = world.shard(elastic(parent, recompute=config.engine.recompute, fake=fake))
    teacher = None
    if config.objective == "distillation":
        teacher = world.shard(elastic(load_parent(config.parent, device=device)[0]))
    router = Router(grid, len(config.sizes), config.seed).to(world.device)
    trainer = Trainer(
        config, student, teacher, router, inputs.sources, spec.budgets, spec.cost, world, progress
    )
    if spec.fixed:
        trainer.committed = dict(spec.fixed)
        router.requires_grad_(False)
    return trainer, orders, basis


def _fake(
    inputs: RunInputs, parent: PreTrainedModel, progress: Progress, world: World
) -> FakeQuantisation | None:
    """What is frozen of the quantised weights and inputs, if the run trains through a format; the
    run's directory keeps it."""
    config, spec, run = inputs.config, inputs.spec, inputs.folder
    if spec.scheme is None:
        return None
    if world.agree(has_file(run / FAKE)):
        fake = FakeQuantisation.load(run, spec.axis_map, spec.scheme)
        return fake.on(world.device, spec.dtype)
    widths = {name: size.widths for name, size in spec.fixed.items()}
    samples = InputCalibration(
        samples=config.quant.samples,
        context=ranking_context(config, spec.model_config),
        percentile=config.quant.percentile,
    )
    scales = calibrate_sizes(
        parent, spec.model_config, spec.axis_map, widths, spec.scheme, inputs.sources, samples,
        progress,
    )  # fmt: skip
    shared = shared_scales(scales, spec.scheme, spec.axis_map)
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    fake = world.agree(FakeQuantisation.of(state, spec.axis_map, spec.scheme, shared))
    if world.is_first:
        fake.save(run)
    return fake.on(world.device, spec.dtype)


def _sorted(
    inputs: RunInputs, progress: Progress, world: World
) -> tuple[PreTrainedModel, dict[str, torch.Tensor], torch.Tensor | None, Grid]:
    """The parent with its units sorted, best first, and the router's grid."""
    config, spec = inputs.config, inputs.spec
    parent, _ = load_parent(config.parent, device=str(world.device))
    calibration = Calibration(
        config, inputs.folder, parent, spec.model_config, spec.axis_map, inputs.sources, progress,
        keep=world.is_first,
    )  # fmt: skip
    # Ranks measure alike, but for rounding: the first one's word counts.
    orders, basis = world.agree(calibration.orders()), world.agree(calibration.basis())
    if basis is not None:
        del orders["hidden"]
    depth = world.agree(calibration.depth())
    sort_in_place(parent, spec.axis_map, orders, basis)
    return parent, orders, basis, spec.ranked_grid(depth)
