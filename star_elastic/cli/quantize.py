"""`star-elastic quantize`: a family in FP8 or NVFP4."""

from pathlib import Path

from typer import Option

from star_elastic.cli.bars import progress_bars
from star_elastic.cli.options import AsJson, Device, Dtype, Elastic
from star_elastic.cli.terminal import show
from star_elastic.cli.train import verdict_parts
from star_elastic.data.source_config import SourceConfig
from star_elastic.files.writing import require_writable
from star_elastic.strict import MOST_TOKENS
from star_elastic.tables import Table


def quantize(
    elastic: Elastic,
    out: Path = Option(help="New directory for the quantised checkpoint."),
    format_name: str = Option(..., "--format", help="fp8, fp8-channel, fp8-block or nvfp4."),
    data: list[Path] | None = Option(None, help="JSONL rows to calibrate inputs on."),
    samples: int = Option(256, help="Rows to calibrate on.", min=1),
    context: int = Option(1024, help="Tokens per row at most.", min=1, max=MOST_TOKENS),
    percentile: float = Option(
        100.0, help="Of inputs' magnitudes, what the scale covers (100: all)."
    ),
    keep: list[str] | None = Option(
        None, help='Part to leave as it is: attention, "mamba before attention", ...'
    ),
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Quantises a family: one checkpoint from which every size is cut, without dequantising.

    Embeddings, head, routers, norms and convolutions stay as they are. With --data the sizes are
    also held against what they were before, on 64 rows that are kept out of calibration.
    """
    from star_elastic.models.placement import choose_device
    from star_elastic.rewrite.family import InputCalibration, held_out_of, quantise_family
    from star_elastic.train.verdict import VERDICT, judge_quantised

    require_writable(out)  # mistakes first: what follows may take minutes
    device = choose_device(device)
    calibration = InputCalibration(
        files=tuple(data or ()), samples=samples, context=context, percentile=percentile,
        held_out=SourceConfig.held_out,
    )  # fmt: skip
    with progress_bars(f"stopped; {out} was not written") as progress:
        held_out = held_out_of(elastic, calibration)
        parts = quantise_family(
            elastic, out, format_name, keep=keep or (), calibration=calibration, dtype=dtype,
            device=device, progress=progress,
        )  # fmt: skip
    verdict = None
    with progress_bars(f"stopped; {out} is complete, its verdict is missing") as progress:
        if held_out:
            verdict = judge_quantised(elastic, out, held_out, progress, device=device)
            verdict.save(out / VERDICT)
        else:
            progress.say("no verdict: it needs 10 rows or more (--data)")
    sizes = {name: (part.before, part.after) for name, part in parts.items()}
    before, after = map(sum, zip(*sizes.values(), strict=True))
    rows = [
        [name, f"{old:,}", f"{new:,}", f"{new / old:.3f}"]
        for name, (old, new) in {**sizes, "all": (before, after)}.items()
    ]
    content = {
        "out": str(out), "format": format_name, "bytes_before": before, "bytes": after,
        "parts": {name: {"before": old, "after": new} for name, (old, new) in sizes.items()},
        "verdict": verdict.to_json() if verdict else None,
    }  # fmt: skip
    table = Table(f"{out}  {format_name}", ["part", "bytes before", "bytes", "ratio"], rows)
    show(as_json, content, table, *verdict_parts(verdict))
