"""`star-elastic slice`: one size as an ordinary checkpoint."""

from contextlib import suppress
from pathlib import Path

from typer import Option

from star_elastic.axes.widths import parse_widths
from star_elastic.cli.bars import progress_bars
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Elastic
from star_elastic.cli.terminal import show
from star_elastic.errors import ConfigError
from star_elastic.files.writing import require_writable
from star_elastic.progress import staged


def slice_size(
    elastic: Elastic,
    out: Path = Option(help="New directory for the ordinary checkpoint."),
    size: str = Option("", help="Name of the size to cut out."),
    budget: str = Option("", help="Or one between them: active=0.6, bytes=1GB."),
    widths: str = Option("", help="Or widths of your own: hidden=128,ffn=256."),
    layout: str = Option(
        "compressed-tensors", help="Of a quantised slice: compressed-tensors or modelopt."
    ),
    as_json: AsJson = False,
) -> None:
    """Cuts a size out as an ordinary checkpoint, with no further training.

    For a budget between trained ones the router gives widths; they were not trained themselves.
    """
    if sum(map(bool, (size, budget, widths))) != 1:
        raise ConfigError(
            "the size to cut is not given once; name one of --size, --budget and --widths, for "
            "example --size small"
        )
    from star_elastic.checkpoints.elastic import ElasticCheckpoint
    from star_elastic.rewrite.stream import slice_checkpoint
    from star_elastic.router.files import widths_for

    require_writable(out)
    family = ElasticCheckpoint(elastic, read_countable(elastic))
    if size:
        chosen = family.manifest.size(size).widths
    elif widths:
        chosen = family.axis_map.complete(parse_widths(widths))
    else:
        metric, _, amount = map(str.strip, budget.partition("="))
        share: float | str = amount
        with suppress(ValueError):  # an amount with its unit, then
            share = float(amount)
        chosen = widths_for(family, {metric: share}).widths
    with progress_bars(f"stopped; {out} was not written") as progress:
        scales = family.input_scales(size) if size else {}
        slice_checkpoint(
            elastic, chosen, out, input_scales=scales, layout=layout,
            progress=staged(progress, "slice"),
        )  # fmt: skip
    asked = size or budget or widths
    content = {"out": str(out), "size": asked, "widths": dict(chosen)}
    show(as_json, content, f"{out}: {asked} ({chosen})")
