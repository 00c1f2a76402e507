"""What training leaves: the elastic checkpoint, and the same family quantised."""

from __future__ import annotations

from pathlib import Path

import torch

import star_elastic
from star_elastic.bundled import name_of
from star_elastic.checkpoints.companions import LATENCY
from star_elastic.checkpoints.elastic import ElasticCheckpoint, write_family_files
from star_elastic.checkpoints.manifest import Manifest, Size, recorded
from star_elastic.files.paths import has_file
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.progress import Progress, staged
from star_elastic.rewrite.family import quantise_family
from star_elastic.rewrite.stream import save_model
from star_elastic.router.commit import Commitment
from star_elastic.strict import to_plain
from star_elastic.train.directory import ELASTIC, QUANTISED
from star_elastic.train.inputs import RunInputs
from star_elastic.train.loop import Trainer


def write_family(
    inputs: RunInputs,
    trainer: Trainer,
    orders: dict[str, torch.Tensor],
    basis: torch.Tensor | None,
    progress: Progress,
) -> None:
    """Writes `elastic/` of a run, and `quantised/` where it trained through a format. `orders` and
    `basis` say how the parent was sorted. Called on all ranks; the first one writes."""
    config, run, world = inputs.config, inputs.folder, trainer.world
    state = _whole_state(trainer)

    def finish(directory: Path) -> None:
        router = None if inputs.spec.fixed else trainer.router.state_dict()
        # A table stays true of a family that is trained on: its shapes are the same.
        table = (run if config.latency else Path(config.family or run)) / LATENCY
        write_family_files(
            directory, _manifest(inputs, trainer), orders=orders, basis=basis,
            router=_given_router(inputs) or router, latency=table if has_file(table) else None,
        )  # fmt: skip

    if world.is_first:
        elastic, spec = run / ELASTIC, inputs.spec
        if not elastic.exists():  # it does if the run was stopped while it was quantised
            save_model(
                state, spec.model_config, Path(config.parent), elastic,
                dtype=spec.dtypes, progress=staged(progress, "write"), finish=finish,
            )  # fmt: skip
        if spec.scheme is not None:
            # As the run's directory keeps it: what trains lies on the device that trains.
            frozen = FakeQuantisation.load(run, spec.axis_map, spec.scheme)
            quantise_family(
                elastic, run / QUANTISED, config.quant.format,
                keep=config.quant.keep, frozen=frozen, progress=progress,
            )  # fmt: skip
    world.wait()


def _given_router(inputs: RunInputs) -> dict[str, torch.Tensor] | None:
    """The router of the family that was trained on, if it is one for the very sizes of this run."""
    if not inputs.config.family:
        return None
    family = ElasticCheckpoint(inputs.config.family)
    budgets = [(name, dict(size.budgets)) for name, size in family.manifest.sizes.items()]
    same = budgets == [(name, dict(own)) for name, own in inputs.spec.budgets.items()]
    return family.router_state if same else None


def _whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trained weights in one piece, on the first rank (others get none)."""
    state = {}
    for name, value in trainer.student.state().items():
        gathered = getattr(value, "full_tensor", lambda whole=value: whole)()
        if trainer.world.is_first:
            state[name] = gathered.detach().cpu()
    return state


def _manifest(inputs: RunInputs, trainer: Trainer) -> Manifest:
    config, spec = inputs.config, inputs.spec

    def costs(fixed: Commitment) -> dict[str, float]:
        return {
            **recorded(trainer.cost.count(fixed.widths)),
            "budget_miss": round(fixed.miss, 6),
            **({} if fixed.possible is None else {"least_miss": round(fixed.possible, 6)}),
        }

    sizes = {}
    for name in trainer.names:
        fixed = trainer.committed[name]
        sizes[name] = Size(
            fixed.widths, spec.budgets[name], costs(fixed), fixed.repair, fixed.argmax,
            fixed.data_free_steps, fixed.widths_from,
        )  # fmt: skip
    return Manifest(
        family=trainer.student.axis_map.model_type,
        choices=spec.grid.choices,
        sizes=sizes,
        per_layer=tuple(trainer.router.grid.per_layer),
        depth=trainer.router.grid.depth,
        provenance={
            "parent": Path(name_of(config.parent)).name,
            "data": [Path(file).name for source in config.data for file in source.files],
            "seed": config.seed,
            "steps": trainer.step,
            "workload": to_plain(config.workload),
            "tokens": trainer.tokens,
            "package_version": star_elastic.__version__,
        },
    )
