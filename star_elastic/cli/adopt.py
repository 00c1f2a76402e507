"""`star-elastic adopt`: a checkpoint whose nested widths are known as a family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typer import Option

from star_elastic.axes.widths import Width, parse_widths
from star_elastic.cli.bars import progress_bars
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Device, Model
from star_elastic.cli.sizes import describe_family, family_table
from star_elastic.cli.terminal import show
from star_elastic.cli.train import verdict_parts
from star_elastic.errors import ConfigError
from star_elastic.files.writing import require_writable
from star_elastic.strict import at

if TYPE_CHECKING:
    from star_elastic.data.sources import Document

ROWS = 64
"""Rows that the sizes are held against the checkpoint on."""
UNKNOWN = (
    "nothing was trained: a size that the checkpoint was not trained at, or whose units are not "
    "sorted, is a bad one; hold the sizes against it with --data, or train them with star-elastic "
    "train"
)


def adopt(
    model: Model,
    size: list[str] = Option(
        help="A size by name and widths, 12b:hidden=1920,expert_ffn=960; one --size for each."
    ),
    out: Path = Option(help="New directory for the family."),
    full: str = Option("full", help="What the checkpoint's own widths are called as a size."),
    data: list[Path] | None = Option(
        None, help="JSONL rows: 64 of them show how far each size is from the checkpoint."
    ),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Makes a family of a checkpoint that was trained elastic elsewhere: no training, no sorting.

    Every tensor stays as it is. A budget between the sizes (slice --budget) takes a router, which
    only training makes.
    """
    asked = parse_sizes(size)
    require_writable(out)
    from star_elastic.models.placement import choose_device
    from star_elastic.rewrite.adopt import adopt_checkpoint
    from star_elastic.train.verdict import VERDICT, judge_run

    device, verdict = choose_device(device), None
    with progress_bars(f"stopped; {out} was not written") as progress:
        rows = rows_to_judge_on(model, data) if data else []
        manifest = adopt_checkpoint(model, asked, out, full=full, progress=progress)
    with progress_bars(f"stopped; {out} is complete, its verdict is missing") as progress:
        if rows:
            verdict = judge_run(model, out, rows, progress, device=device)
            verdict.save(out / VERDICT)
        else:
            progress.say(f"note: {UNKNOWN}")
    axis_map = read_countable(out).axis_map
    content = {
        "out": str(out), **describe_family(manifest, axis_map),
        "verdict": verdict.to_json() if verdict else None,
    }  # fmt: skip
    show(as_json, content, family_table(out, manifest, axis_map), *verdict_parts(verdict))


def parse_sizes(texts: list[str]) -> dict[str, dict[str, Width]]:
    """Widths by size from `name:axis=width,axis=width`. Raises ConfigError."""
    sizes: dict[str, dict[str, Width]] = {}
    for text in texts:
        name, colon, widths = text.partition(":")
        name = name.strip()
        if not colon or not name or not widths.strip():
            raise ConfigError(
                f"--size {text[:200]!r} is not of the form name:widths; write for example "
                "--size 12b:hidden=1920,expert_ffn=960"
            )
        if name in sizes:
            raise ConfigError(f"--size names {name} twice; rename one of the two")
        with at(f"--size {name[:200]}: "):
            sizes[name] = parse_widths(widths)
    return sizes


def rows_to_judge_on(model: Path, data: list[Path]) -> list[Document]:
    """The first rows of some files, as a checkpoint reads them. Raises CheckpointError or
    ConfigError for files and rows that cannot be read, and for rows that teach nothing."""
    from star_elastic.data.sources import (
        MAX_CONTEXT,
        MAX_TOKENS,
        Source,
        first_documents,
        shorten,
    )
    from star_elastic.models.tokenizer import load_tokenizer

    num_embeddings = read_countable(model).axis_map.num_embeddings
    source = Source(data, load_tokenizer(model), num_embeddings=num_embeddings)
    found = shorten(first_documents([source], [1.0], ROWS), MAX_TOKENS, MAX_CONTEXT)
    if not found:
        raise ConfigError(f"{source.name} has no row with a token to judge by; name longer rows")
    return found
