"""`star-elastic check`: what runs a checkpoint, and whether its files are sound."""

from dataclasses import asdict
from pathlib import Path

from star_elastic.checkpoints.companions import is_elastic
from star_elastic.cli.options import AsJson, Model
from star_elastic.cli.terminal import show
from star_elastic.tables import Table


def check(checkpoint: Model, as_json: AsJson = False) -> None:
    """Which engines and GPUs run a slice, a family or any checkpoint, and why others do not.

    Of the weights it reads names, shapes and dtypes, not the values.
    """
    from star_elastic.export.engines import check_engines
    from star_elastic.models.load import require_checkpoint

    require_checkpoint(checkpoint)
    if is_elastic(checkpoint):
        _require_family(checkpoint)
    verdicts = check_engines(checkpoint)
    content = {"checkpoint": str(checkpoint), "engines": [asdict(v) for v in verdicts]}
    rows = [[v.engine, "yes" if v.runs else "no", v.note] for v in verdicts]
    table = Table(str(checkpoint), ["runs on", "", "what to know"], rows, num_text=3)
    show(as_json, content, table)


def _require_family(path: Path) -> None:
    """Raises CheckpointError for a file that a family has beside its weights and that is damaged,
    or another model's."""
    from star_elastic.checkpoints.elastic import ElasticCheckpoint
    from star_elastic.router.files import load_router

    family = ElasticCheckpoint(path)
    _ = family.orders, family.basis, family.latency  # each is checked when it is asked for
    for name in family.manifest.sizes:
        family.input_scales(name)
    if family.router_state is not None:
        load_router(family)
