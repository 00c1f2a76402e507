"""`star-elastic rank`: how important every unit of a parent is."""

from pathlib import Path

from typer import Option

from star_elastic.cli.bars import progress_bars
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Device, Dtype, Model
from star_elastic.cli.terminal import show
from star_elastic.files.writing import require_writable
from star_elastic.strict import MOST_ROWS, MOST_TOKENS


def rank(
    model: Model,
    data: Path = Option(help="JSONL file of calibration rows."),
    out: Path = Option(help="Scores file to write (.safetensors)."),
    samples: int = Option(1024, help="Rows to measure on.", min=1),
    context: int = Option(1024, help="Tokens per row at most.", min=2, max=MOST_TOKENS),
    batch_size: int = Option(8, min=1, max=MOST_ROWS),
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Importance scores of every unit of every axis, from forward passes on data."""
    from star_elastic.data.row_kinds import find_files
    from star_elastic.data.sources import Source, calibration_batches
    from star_elastic.importance.files import save_scores
    from star_elastic.models.load import load_parent
    from star_elastic.models.model_config import require_context
    from star_elastic.models.placement import choose_device, choose_dtype
    from star_elastic.models.tokenizer import load_tokenizer
    from star_elastic.train.calibrate import rank as rank_units
    from star_elastic.train.fingerprint import digest_weights

    require_writable(out, as_file=True)
    find_files(data)
    axis_map = read_countable(model).axis_map
    source = Source([data], load_tokenizer(model), num_embeddings=axis_map.num_embeddings)
    parent, _ = load_parent(model, choose_dtype(dtype, model), choose_device(device))
    require_context(parent.config, context=context)
    count = min(samples, len(source))
    batches = calibration_batches(
        [source], [1.0], num_samples=count, batch_size=batch_size, context=context
    )
    with progress_bars(f"stopped; {out} was not written, ranking begins anew") as progress:
        scores, info = rank_units(
            parent, axis_map, batches, num_samples=count, name=data.name,
            weights=digest_weights(model), progress=progress,
        )  # fmt: skip
        save_scores(out, scores, axis_map, info)
    show(
        as_json,
        {"scores": str(out), "samples": info.num_samples, "tokens": info.num_tokens},
        f"{out}: {len(scores)} orders from {info.num_samples} rows, {info.num_tokens:,} tokens",
    )
