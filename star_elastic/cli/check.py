"""`star-elastic check`: what runs a checkpoint, and whether its files are sound."""

from dataclasses import asdict
from pathlib import Path

from star_elastic.checkpoints.companions import LATENCY, MANIFEST, ROUTER
from star_elastic.checkpoints.manifest import load_manifest
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Model
from star_elastic.cli.terminal import show
from star_elastic.cost.latency import load_table
from star_elastic.files.paths import has_file, is_folder
from star_elastic.tables import Table


def check(checkpoint: Model, as_json: AsJson = False) -> None:
    """Which engines and GPUs run a slice, a family or any checkpoint, and why others do not.

    Of the weights it reads names, shapes and dtypes, not the values.
    """
    from star_elastic.export.engines import check_engines
    from star_elastic.models.submodel import require_checkpoint

    require_checkpoint(checkpoint)
    if is_folder(checkpoint) and has_file(checkpoint / MANIFEST):
        _require_family(checkpoint)
    verdicts = check_engines(checkpoint)
    content = {"checkpoint": str(checkpoint), "engines": [asdict(v) for v in verdicts]}
    rows = [[v.engine, "yes" if v.runs else "no", v.note] for v in verdicts]
    table = Table(str(checkpoint), ["runs on", "", "what to know"], rows, num_text=3)
    show(as_json, content, table)


def _require_family(path: Path) -> None:
    """Raises CheckpointError for a file that a family has beside its weights and that is damaged,
    or another model's."""
    from star_elastic.checkpoints.quantised import load_input_scales
    from star_elastic.models.submodel import load_sorting
    from star_elastic.router.files import load_router

    _, axis_map = read_countable(path)
    manifest = load_manifest(path, axis_map)
    load_sorting(path, axis_map)
    if has_file(path / ROUTER):
        load_router(path, manifest, axis_map)
    if has_file(path / LATENCY):
        load_table(path / LATENCY, axis_map)
    for name in manifest.sizes:
        load_input_scales(path, manifest, name)
