"""`star-elastic check`: what runs a checkpoint, and whether its files are sound."""

from dataclasses import asdict
from pathlib import Path

from typer import Argument

from star_elastic.architectures import family_of, read_config
from star_elastic.bundled import find_model
from star_elastic.checkpoints.companions import LATENCY, MANIFEST, ROUTER
from star_elastic.checkpoints.manifest import load_manifest
from star_elastic.cli.options import AsJson
from star_elastic.cli.terminal import show
from star_elastic.cost.latency import load_table
from star_elastic.files.paths import has_file, is_folder
from star_elastic.tables import Table


def check(
    checkpoint: Path = Argument(parser=find_model, help="A slice, a family, or any checkpoint."),
    as_json: AsJson = False,
) -> None:
    """Which engines and GPUs run a checkpoint, and why others do not.

    Of the weights it reads names, shapes and dtypes, not the values.
    """
    from star_elastic.export.engines import check_engines
    from star_elastic.models.load import require_checkpoint

    require_checkpoint(checkpoint)
    if is_folder(checkpoint) and has_file(checkpoint / MANIFEST):
        _require_family(checkpoint)
    verdicts = check_engines(checkpoint)
    rows = [[v.engine, "yes" if v.runs else "no", v.note] for v in verdicts]
    show(
        as_json,
        {"checkpoint": str(checkpoint), "engines": [asdict(v) for v in verdicts]},
        Table(str(checkpoint), ["runs on", "", "what to know"], rows, num_text=3),
    )


def _require_family(path: Path) -> None:
    """Raises CheckpointError for a file that a family has beside its weights and that is damaged,
    or another model's."""
    from star_elastic.checkpoints.quantised import load_input_scales
    from star_elastic.models.submodel import load_sorting
    from star_elastic.router.files import load_router

    config = read_config(path)
    axis_map = family_of(config).axis_map(config)
    manifest = load_manifest(path, axis_map)
    load_sorting(path, axis_map)
    if has_file(path / ROUTER):
        load_router(path, manifest, axis_map)
    if has_file(path / LATENCY):
        load_table(path / LATENCY, axis_map)
    for name in manifest.sizes:
        load_input_scales(path, manifest, name)
