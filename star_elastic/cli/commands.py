"""The commands. Results go to stdout (one JSON object with --json), progress to stderr.

Exit codes: 0 done, 1 a check failed or the user stopped the run, 2 the user's mistake, told in one
line with nothing written. Heavy imports happen inside commands, so that --help is quick.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from star_elastic.architectures.base import Config
from star_elastic.axes import LAYERS, AxisMap
from star_elastic.cli.bars import Bars
from star_elastic.cli.terminal import (
    print_generation,
    print_json,
    print_stream,
    print_table,
    print_verdict,
    run_and_show,
)
from star_elastic.cost.count import Workload
from star_elastic.errors import ConfigError
from star_elastic.files.paths import exists, has_file, is_folder
from star_elastic.generate.phases import (
    DEFAULT_GRACE,
    ByDifficulty,
    Plan,
    parse_phases,
)
from star_elastic.progress import staged
from star_elastic.signals import is_first_rank
from star_elastic.strict import MOST_ROWS, MOST_TOKENS
from star_elastic.widths import parse_widths

app = typer.Typer(
    help="One reasoning model, many nested sizes inside a single checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
MOST_SECONDS = 10**6
"""Of a measurement: more is a slip of the pen."""
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: what the weights are stored in.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="New directory for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    as_json: AsJson = False,
) -> None:
    """The whole road on the bundled parent: rank, train three sizes, slice, evaluate, plot."""
    from star_elastic.demo import DEMO, run_recipe

    run_and_show(DEMO, out, as_json, run_recipe)


@app.command()
def count(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory or config.json.")],
    widths: Annotated[str, typer.Option(help="For example hidden=1920,expert_ffn=960.")] = "",
    context: Annotated[
        int, typer.Option(help="Tokens of context for KV bytes.", min=0, max=MOST_TOKENS)
    ] = 0,
    batch: Annotated[int, typer.Option(help="Sequences held at once.", min=1, max=MOST_ROWS)] = 1,
    dtype_bytes: Annotated[
        int,
        typer.Option(
            help="Bytes per parameter and per element of KV and conv states.", min=1, max=16
        ),
    ] = 2,
    ssm_dtype_bytes: Annotated[
        int,
        typer.Option(help="Bytes per element of the SSM state (transformers: 4).", min=1, max=16),
    ] = 4,
    as_json: AsJson = False,
) -> None:
    """Exact total and active parameters, bytes and operations; needs no weights.

    Operations are per token. A decoded token goes through the LM head; of a prompt that is read at
    once, only the last token does.
    """
    from star_elastic.architectures import family_of, read_config
    from star_elastic.cost.count import CostModel, count_parts

    config = read_config(model)
    axis_map = family_of(config).axis_map(config)
    _require_known_weights(config, axis_map)
    chosen = axis_map.complete(parse_widths(widths))
    load = Workload(
        context=context, batch=batch, dtype_bytes=dtype_bytes, ssm_dtype_bytes=ssm_dtype_bytes
    )
    cost = CostModel(axis_map, load).count(chosen)
    parts = count_parts(axis_map, chosen)
    result = {
        "family": axis_map.family,
        "widths": dict(chosen),
        "total": cost.total,
        "active": cost.active,
        "weight_bytes": cost.weight_bytes,
        "state_bytes": cost.state_bytes,
        "flops_per_token": cost.flops_per_token,
        "prefill_flops_per_token": cost.prefill_flops_per_token,
        "parts": parts,
    }
    if as_json:
        print_json(result)
        return
    rows = [[part, f"{size:,}", f"{size / cost.total:.1%}"] for part, size in parts.items()]
    print_table(f"{axis_map.family}  {chosen}", ["part", "parameters", "share"], rows)
    print(f"total   {cost.total:,}\nactive  {cost.active:,}")
    print(f"weights {cost.weight_bytes:,} bytes")
    print(f"states  {cost.state_bytes:,} bytes at context {context:,} x batch {batch:,}")
    print(
        f"FLOPs   {cost.flops_per_token:,} per decoded token at context {context:,}, "
        f"{cost.prefill_flops_per_token:,} per token of a prompt but the last"
    )


def _require_known_weights(config: Config, axis_map: AxisMap) -> None:
    """Raises ConfigError for weights that another tool has quantised: the figures of the model that
    they stand for are not theirs."""
    if config.get("quantization_config"):
        from star_elastic.checkpoints.layouts import read_scheme

        read_scheme(config, axis_map)


@app.command()
def rank(
    model: Annotated[Path, typer.Argument(help="Parent checkpoint directory.")],
    data: Annotated[Path, typer.Option(help="JSONL file of calibration rows.")],
    out: Annotated[Path, typer.Option(help="Scores file to write (.safetensors).")],
    samples: Annotated[int, typer.Option(help="Rows to measure on.", min=1)] = 1024,
    context: Annotated[
        int, typer.Option(help="Tokens per row at most.", min=2, max=MOST_TOKENS)
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_ROWS)] = 8,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Importance scores of every unit of every axis, from forward passes on data."""
    from star_elastic.architectures import family_of, read_config
    from star_elastic.data.row_kinds import find_files
    from star_elastic.data.sources import Source, calibration_batches
    from star_elastic.files.writing import require_writable
    from star_elastic.importance.files import save_scores
    from star_elastic.models.placement import choose_device, choose_dtype
    from star_elastic.models.submodel import load_parent, load_tokenizer
    from star_elastic.train.calibrate import rank as rank_units
    from star_elastic.train.fingerprint import digest_weights

    require_writable(out, as_file=True)
    find_files(data)
    config = read_config(model)
    axis_map = family_of(config).axis_map(config)
    source = Source([data], load_tokenizer(model), num_embeddings=axis_map.num_embeddings)
    parent, _ = load_parent(model, choose_dtype(dtype, model), choose_device(device))
    count = min(samples, len(source))
    batches = calibration_batches(
        [source], [1.0], num_samples=count, batch_size=batch_size, context=context
    )
    with Bars(f"stopped; {out} was not written, ranking begins anew") as bars:
        scores, info = rank_units(
            parent,
            axis_map,
            batches,
            num_samples=count,
            name=data.name,
            weights=digest_weights(model),
            progress=bars,
        )
        save_scores(out, scores, axis_map, info)
    result = {"scores": str(out), "samples": info.num_samples, "tokens": info.num_tokens}
    print_json(result) if as_json else print(
        f"{out}: {len(scores)} orders from {info.num_samples} rows, {info.num_tokens:,} tokens"
    )


@app.command()
def latency(
    out: Annotated[Path, typer.Option(help="Table to write (.json).")],
    model: Annotated[
        Path | None, typer.Argument(help="Parent or elastic checkpoint, or config.json.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--for", help="Or a run config: its parent, over its choices, at its workload."
        ),
    ] = None,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="The named sizes themselves, prefill and decode.")
    ] = False,
    phase: Annotated[str, typer.Option(help="decode or prefill (not with --sizes).")] = "decode",
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sequences at once; with --sizes several.", min=1, max=MOST_ROWS),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of context; with --sizes several.", min=1, max=MOST_TOKENS),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seconds: Annotated[
        float, typer.Option(help="Time to measure for.", min=0, max=MOST_SECONDS)
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Measures on this machine what any widths cost in milliseconds per token, for `ms` budgets.

    With --sizes, what the sizes of an elastic checkpoint take, at every batch and context named.
    """
    from star_elastic.files.writing import require_writable

    require_writable(out, as_file=True)  # mistakes first: what follows may take minutes
    if (model is None) == (run is None):
        raise ConfigError("name a checkpoint to measure, or a run config with --for RUN.toml")
    batches, contexts = batch or [1], context or [256]
    if sizes:
        if model is None:
            raise ConfigError("--sizes measures an elastic checkpoint; name one in place of --for")
        _size_latency(model, out, batches, contexts, dtype, device, seconds, as_json)
        return
    if len(batches) > 1 or len(contexts) > 1:
        raise ConfigError("a table holds one batch and one context; name one, or use --sizes")
    if run is not None:
        model, config, axis_map, choices, load = _grid_of_run(run)
        batches = batch or [load.batch]
        contexts = context or [load.context or contexts[0]]
    else:
        assert model is not None
        config, axis_map, choices = _grid_of_checkpoint(model)

    from star_elastic.cost.latency import save_table
    from star_elastic.measure.latency import Setting, measure
    from star_elastic.models.placement import choose_device, choose_dtype

    setting = Setting(
        phase=phase, batch=batches[0], context=contexts[0], seconds=seconds,
        dtype=choose_dtype(dtype, model), device=choose_device(device),
    )  # fmt: skip
    with Bars(f"stopped; {out} was not written") as bars:
        bars.stage("latency", max(round(seconds), 1))
        table, checks = measure(
            config, setting, choices=choices, progress=lambda done, _: bars.advance(round(done))
        )
        save_table(table, out)
    full = table.milliseconds(axis_map.full, axis_map)
    errors = sorted(abs(check.error) for check in checks)
    result = {
        "table": str(out), "device": table.machine.device, "threads": table.machine.threads,
        "ms_per_token": full, "median_error": errors[len(errors) // 2], "worst_error": errors[-1],
        "checks": [
            {"widths": dict(check.widths), "predicted": check.predicted,
             "measured": check.measured, "error": check.error}
            for check in checks
        ],
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    axes = [axis for axis in axis_map.axes if axis != "layers"]
    rows = [
        [f"{check.predicted:.3f}", f"{check.measured:.3f}", f"{check.error:+.1%}",
         *(_width_text(check.widths[axis]) for axis in axes)]
        for check in checks
    ]  # fmt: skip
    print_table("ms per token at held-out widths", ["predicted", "measured", "error", *axes], rows)
    print(
        f"{out}: {full:.3f} ms per token at full width ({phase}, batch {batches[0]}, "
        f"context {contexts[0]}, {table.dtype})\n"
        f"on {table.machine.device}, {table.machine.threads} threads"
    )


def _grid_of_run(
    run: Path,
) -> tuple[Path, Any, AxisMap, Mapping[str, Sequence[int]], Workload]:
    """Of a run config the parent, its config and table, the choices, and the workload."""
    from star_elastic.train.check import read_parent
    from star_elastic.train.config import load_run_config

    of_run = load_run_config(run)
    config, axis_map, _, grid = read_parent(of_run)
    return Path(of_run.parent), config, axis_map, grid.choices, of_run.workload


def _grid_of_checkpoint(model: Path) -> tuple[Any, AxisMap, Mapping[str, Sequence[int]] | None]:
    """A checkpoint's config and table, and the choices of an elastic one."""
    from star_elastic.architectures import family_of, read_config
    from star_elastic.checkpoints.manifest import FILE_NAME, load_manifest

    config = read_config(model)
    axis_map = family_of(config).axis_map(config)
    _require_known_weights(config, axis_map)
    elastic = is_folder(model) and has_file(model / FILE_NAME)
    return config, axis_map, load_manifest(model, axis_map).choices if elastic else None


def _size_latency(
    elastic: Path, out: Path, batches: list[int], contexts: list[int], dtype: str, device: str,
    seconds: float, as_json: bool,
) -> None:  # fmt: skip
    """Measures the sizes of an elastic checkpoint, writes and prints their times."""
    from star_elastic.files.writing import write_json
    from star_elastic.generate.family import load
    from star_elastic.measure.size_latency import describe_machine, measure_sizes
    from star_elastic.models.placement import name_of

    family = load(elastic, dtype, device)
    dtype = name_of(family.parent.dtype)
    with Bars(f"stopped; {out} was not written") as bars:
        times = measure_sizes(dict(family), batches, contexts, seconds=seconds, progress=bars)
    machine = describe_machine(family.parent.dtype, str(family.parent.device))
    result = {"machine": machine, "dtype": dtype, "sizes": [row.to_json() for row in times]}
    write_json(out, result)
    if as_json:
        print_json({"table": str(out), **result})
        return
    rows = [
        [row.size, str(row.batch), f"{row.context:,}", f"{row.prefill_ms:,.2f}",
         f"{row.decode_ms:,.2f}", f"{1e3 * row.batch / row.decode_ms:,.0f}"]
        for row in times
    ]  # fmt: skip
    columns = ["size", "batch", "context", "prefill ms", "decode ms", "decoded tokens/s"]
    print_table(f"{machine['device']}, {machine['threads']} threads, {dtype}", columns, rows)
    print(out)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Run config (TOML).")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state.")] = False,
    check_only: Annotated[
        bool, typer.Option("--check", help="Read every row of the data, and train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Nested distillation: sort, learn the sizes, train them, write the elastic checkpoint."""
    from star_elastic.train.config import load_run_config
    from star_elastic.train.run import train as run_training

    config = load_run_config(run)
    if check_only:
        if is_first_rank():  # one of them reads for all
            _check_rows(config, as_json)
        return
    with Bars() as bars:
        result = run_training(config, resume=resume, progress=bars)
    if not is_first_rank():
        return
    verdict = result.verdict.to_json() if result.verdict else None
    if as_json:
        print_json({
            "elastic": str(result.elastic), "steps": result.steps, "tokens": result.tokens,
            "seconds": result.seconds, "verdict": verdict,
        })  # fmt: skip
        return
    print(f"{result.elastic}: {result.steps} steps, {result.tokens:,} tokens")
    if verdict:
        print_verdict(verdict)


@app.command("config")
def config_reference() -> None:
    """Every key of the run config: type, default, what it does, what to start with."""
    from star_elastic.train.reference import reference

    sys.stdout.write(reference())


def _check_rows(config: Any, as_json: bool) -> None:
    """Tells what a run will do and what its rows are; exit code 2 if one is bad, also where a
    run would leave it out, or if a source has none to learn from."""
    from dataclasses import asdict

    from star_elastic.train.run import check_run

    with Bars() as bars:
        found = check_run(config, bars)
    print_json(asdict(found)) if as_json else print("\n".join(found.lines()))
    if not found.is_sound:
        raise typer.Exit(2)


@app.command()
def sizes(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint directory.")],
    as_json: AsJson = False,
) -> None:
    """The sizes of an elastic checkpoint: widths, budgets, exact cost."""
    from star_elastic.architectures import family_of, read_config
    from star_elastic.checkpoints.manifest import load_manifest
    from star_elastic.cost.count import CostModel

    config = read_config(elastic)
    axis_map = family_of(config).axis_map(config)
    _require_known_weights(config, axis_map)
    manifest = load_manifest(elastic, axis_map)
    cost = CostModel(axis_map)
    full = cost.full
    # Layers and top_k are shown where a size cuts them.
    shown = [
        name for name, axis in axis_map.axes.items()
        if axis.ranked or any(s.widths[name] != axis.size for s in manifest.sizes.values())
    ]  # fmt: skip
    result, rows = {}, []
    for name, size in manifest.sizes.items():
        counted = cost.count(size.widths)
        result[name] = {
            "widths": dict(size.widths), "budgets": dict(size.budgets),
            "total": counted.total, "active": counted.active,
            "weight_bytes": counted.weight_bytes, "repair": dict(size.repair),
            "argmax": None if size.argmax is None else dict(size.argmax),
            "data_free_steps": size.data_free_steps, "widths_from": size.widths_from,
        }  # fmt: skip
        rows.append([
            name, f"{counted.active:,} ({counted.active / full.active:.1%})",
            f"{counted.total:,} ({counted.total / full.total:.1%})",
            *(
                str(len(axis_map.kept_layers(size.widths))) if axis == LAYERS
                else _width_text(size.widths[axis])
                for axis in shown
            ),
            size.widths_from,
        ])  # fmt: skip
    if as_json:
        print_json({"family": manifest.family, "sizes": result})
    else:
        print_table(str(elastic), ["size", "active", "total", *shown, "widths from"], rows)


def _width_text(width: int | tuple[int, ...]) -> str:
    """A width, or the range of widths that differ between layers."""
    return str(width) if isinstance(width, int) else f"{min(width)}-{max(width)}"


@app.command("slice")
def slice_size(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint directory.")],
    out: Annotated[Path, typer.Option(help="New directory for the ordinary checkpoint.")],
    size: Annotated[str, typer.Option(help="Name of the size to cut out.")] = "",
    budget: Annotated[str, typer.Option(help="Or one between them: active=0.6, bytes=1GB.")] = "",
    widths: Annotated[str, typer.Option(help="Or widths of your own: hidden=128,ffn=256.")] = "",
    layout: Annotated[
        str, typer.Option(help="Of a quantised slice: compressed-tensors or modelopt.")
    ] = "compressed-tensors",
    as_json: AsJson = False,
) -> None:
    """Cuts a size out as an ordinary checkpoint, with no further training.

    For a budget between trained ones the router gives widths; they were not trained themselves.
    """
    if sum(map(bool, (size, budget, widths))) != 1:
        raise ConfigError("name one of --size, --budget and --widths, for example --size small")
    from star_elastic.architectures import family_of, read_config
    from star_elastic.checkpoints.manifest import load_manifest
    from star_elastic.checkpoints.quantised import load_input_scales
    from star_elastic.files.writing import require_writable
    from star_elastic.rewrite.stream import slice_checkpoint

    require_writable(out)
    config = read_config(elastic)
    axis_map = family_of(config).axis_map(config)
    manifest = load_manifest(elastic, axis_map)
    if size:
        chosen = manifest.size(size).widths
    elif widths:
        chosen = axis_map.complete(parse_widths(widths))
    else:
        from star_elastic.router.files import widths_for

        metric, _, amount = map(str.strip, budget.partition("="))
        given: float | str = amount
        with suppress(ValueError):
            given = float(amount)
        chosen = widths_for(elastic, manifest, axis_map, {metric: given}).widths
    with Bars(f"stopped; {out} was not written") as bars:
        scales = load_input_scales(elastic, manifest, size) if size else {}
        slice_checkpoint(
            elastic, chosen, out, input_scales=scales, layout=layout,
            progress=staged(bars, "slice"),
        )  # fmt: skip
    asked = size or budget or widths
    result = {"out": str(out), "size": asked, "widths": dict(chosen)}
    print_json(result) if as_json else print(f"{out}: {asked} ({chosen})")


@app.command()
def quantize(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint directory.")],
    out: Annotated[Path, typer.Option(help="New directory for the quantised checkpoint.")],
    format_name: Annotated[
        str, typer.Option("--format", help="fp8, fp8-channel, fp8-block or nvfp4.")
    ],
    data: Annotated[
        list[Path] | None, typer.Option(help="JSONL rows to calibrate inputs on.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows to calibrate on.", min=1)] = 256,
    context: Annotated[
        int, typer.Option(help="Tokens per row at most.", min=1, max=MOST_TOKENS)
    ] = 1024,
    percentile: Annotated[
        float, typer.Option(help="Of inputs' magnitudes, what the scale covers (100: all).")
    ] = 100.0,
    keep: Annotated[
        list[str] | None,
        typer.Option(help='Part to leave as it is: attention, "mamba before attention", ...'),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Quantises a family: one checkpoint from which every size is cut, without dequantising.

    Embeddings, head, routers, norms and convolutions stay as they are. With --data the sizes are
    also held against what they were before, on 64 rows that are kept out of calibration.
    """
    from star_elastic.data.source_config import SourceConfig
    from star_elastic.files.writing import require_writable
    from star_elastic.models.placement import choose_device
    from star_elastic.rewrite.family import InputCalibration, held_out_of, quantise_family
    from star_elastic.train.verdict import VERDICT, judge_quantised

    require_writable(out)  # mistakes first: what follows may take minutes
    device = choose_device(device)
    calibration = InputCalibration(
        files=tuple(data or ()), samples=samples, context=context, percentile=percentile,
        held_out=SourceConfig.held_out,
    )  # fmt: skip
    with Bars(f"stopped; {out} was not written") as bars:
        held_out = held_out_of(elastic, calibration)
        parts = quantise_family(
            elastic, out, format_name, keep=keep or (), calibration=calibration, dtype=dtype,
            device=device, progress=bars,
        )  # fmt: skip
    verdict = None
    with Bars(f"stopped; {out} is complete, its verdict is missing") as bars:
        if held_out:
            verdict = judge_quantised(elastic, out, held_out, bars, device=device)
            verdict.save(out / VERDICT)
        else:
            bars.say("no verdict: it needs 10 rows or more (--data)")
    before = sum(part.before for part in parts.values())
    after = sum(part.after for part in parts.values())
    if as_json:
        print_json({
            "out": str(out), "format": format_name, "bytes_before": before, "bytes": after,
            "parts": {n: {"before": p.before, "after": p.after} for n, p in parts.items()},
            "verdict": verdict.to_json() if verdict else None,
        })  # fmt: skip
        return
    rows = [
        [name, f"{part.before:,}", f"{part.after:,}", f"{part.after / part.before:.3f}"]
        for name, part in parts.items()
    ]
    rows.append(["all", f"{before:,}", f"{after:,}", f"{after / before:.3f}"])
    print_table(f"{out}  {format_name}", ["part", "bytes before", "bytes", "ratio"], rows)
    if verdict:
        print_verdict(verdict.to_json())


@app.command()
def check(
    checkpoint: Annotated[Path, typer.Argument(help="A slice, a family, or any checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Which engines and GPUs run a checkpoint, and why others do not.

    Of the weights it reads names, shapes and dtypes, not the values.
    """
    from dataclasses import asdict

    from star_elastic.export.engines import check_engines
    from star_elastic.models.submodel import require_checkpoint

    require_checkpoint(checkpoint)
    _require_family(checkpoint)
    verdicts = check_engines(checkpoint)
    if as_json:
        print_json({"checkpoint": str(checkpoint), "engines": [asdict(v) for v in verdicts]})
        return
    rows = [[v.engine, "yes" if v.runs else "no", v.note] for v in verdicts]
    print_table(str(checkpoint), ["runs on", "", "what to know"], rows, text=3)


def _require_family(path: Path) -> None:
    """Raises CheckpointError for a file that a family has beside its weights and that is damaged,
    or another model's. Of other checkpoints there is nothing to say."""
    from star_elastic.architectures import family_of, read_config
    from star_elastic.checkpoints.companions import LATENCY, MANIFEST, ROUTER
    from star_elastic.checkpoints.manifest import load_manifest
    from star_elastic.checkpoints.quantised import load_input_scales
    from star_elastic.cost.latency import load_table
    from star_elastic.models.submodel import load_sorting
    from star_elastic.router.files import load_router

    if not is_folder(path) or not has_file(path / MANIFEST):
        return
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


@app.command()
def generate(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint directory.")],
    prompt: Annotated[str, typer.Argument(help="The user's message.")],
    size: Annotated[str, typer.Option(help="One size for both phases.")] = "",
    think: Annotated[str, typer.Option(help="The size that thinks.")] = "",
    answer: Annotated[str, typer.Option(help="The size that answers.")] = "",
    thinking_budget: Annotated[int | None, typer.Option(help="Tokens of thinking.")] = None,
    grace: Annotated[
        int | None, typer.Option(help="Tokens to finish the line at the budget (32).")
    ] = None,
    unsure: Annotated[
        float | None,
        typer.Option(help="Entropy (nats) above which the answering size helps the thinking one."),
    ] = None,
    phases: Annotated[
        str, typer.Option(help="Or any phases: large:budget:16,small:end_of_thinking:64,large.")
    ] = "",
    switch: Annotated[str, typer.Option(help="reprefill, catch-up or hand-over.")] = "reprefill",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens in all.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that hold this much.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Elastic budget control: one size thinks, another answers."""
    if phases and (thinking_budget is not None or grace is not None):
        raise ConfigError(
            "--phases gives every phase a budget of its own; leave out --thinking-budget, --grace"
        )
    named = bool(size), bool(think or answer or unsure is not None), bool(phases)
    if sum(named) > 1:
        raise ConfigError(
            "--size is one size for all, --think and --answer are two, --phases any; use one way"
        )
    if stream and as_json:
        raise ConfigError("--stream prints tokens and --json one object; use one of them")
    if unsure is not None and not (think and answer):
        raise ConfigError("--unsure needs --think (the smaller size) and --answer (the larger)")
    from star_elastic.generate.family import load

    own = {"max_new_tokens": max_new_tokens, "switch": switch, "stop": tuple(stop or ())}
    family = load(elastic, dtype, device)
    if phases:
        plan = Plan(parse_phases(phases), **own)
    else:
        thinks: Any = think or size or None
        if unsure is not None:
            thinks = ByDifficulty(small=think, large=answer, threshold=unsure)
        plan = family.plan(
            thinks, answer or size or None, thinking_budget=thinking_budget,
            grace=DEFAULT_GRACE if grace is None else grace, **own,
        )  # fmt: skip
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    console = Console()
    if stream:
        events = family.generator.stream([prompt], plan, **sampling)
        result = print_stream(events, console, list(family))
    else:
        (result,) = family.generator.generate([prompt], plan, **sampling)
    if as_json:
        print_json(result.to_json())
        return
    print_generation(console, result, streamed=stream)


@app.command("eval")
def evaluate(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint directory.")],
    out: Annotated[Path, typer.Option(help="New directory for the results, or one to go on in.")],
    problems: Annotated[int | None, typer.Option(help="Test problems per task.", min=1)] = None,
    validation: Annotated[
        int | None, typer.Option(help="Problems per task to choose plans on.", min=1)
    ] = None,
    sizes: Annotated[str, typer.Option(help="Sizes to compare: large,small (default: all).")] = "",
    budgets: Annotated[
        str, typer.Option(help="Thinking budgets: 16,32,none (default: from natural traces).")
    ] = "",
    dials: Annotated[
        str, typer.Option(help="Shares of tokens that the larger of two sizes writes, or none.")
    ] = "0.1,0.25,0.5",
    data: Annotated[
        Path | None,
        typer.Option(help='Your own problems: JSONL rows {"prompt": ..., "answer": ...}.'),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="When an answer to --data is right. auto (the default): a number must equal the "
            "last number of the reply, a text must be the whole reply. Or for all: exact (the "
            "whole reply), last-number, contains (anywhere, as whole words, in upper or lower "
            "case), regex:PATTERN (what the pattern's group finds last). The bundled tasks have "
            "their own check: the whole reply. A reply is what follows the trace; white space "
            "around it does not count."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.", min=1, max=MOST_ROWS)] = 64,
    switch: Annotated[str, typer.Option(help="catch-up, reprefill or hand-over.")] = "catch-up",
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens per problem in all.", min=1, max=MOST_TOKENS)
    ] = 256,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the problems and the intervals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """What elastic budget control gives against the largest size alone: all plans, compared.

    Plans with thinking are tried where the chat template opens a trace; otherwise every size
    answers at once. DIR gets evaluation.json and answers.jsonl, what every plan wrote.
    """
    from star_elastic.evaluate.grid import parse_budgets, parse_dials
    from star_elastic.evaluate.run import RESULT, Settings, evaluate_family
    from star_elastic.files.writing import require_folder
    from star_elastic.models.placement import choose_device, choose_dtype, name_of
    from star_elastic.report.tables import evaluation_notes, evaluation_tables

    require_folder(out)
    options: dict[str, Any] = {
        "sizes": tuple(size.strip() for size in sizes.split(",") if size.strip()),
        "budgets": parse_budgets(budgets) if budgets else None,
        "dials": parse_dials(dials),
        "data": data, "match": match, "num_validation": validation, "num_test": problems,
        "switch": switch, "batch_size": batch_size, "max_new_tokens": max_new_tokens, "seed": seed,
        "dtype": name_of(choose_dtype(dtype, elastic)), "device": choose_device(device),
    }  # fmt: skip
    settings = Settings(**options)
    command = shlex.join(["star-elastic", *sys.argv[1:]])
    with Bars(f"stopped; the same command goes on where {out} stands") as bars:
        result = evaluate_family(elastic, settings, out, command=command, progress=bars)
    if as_json:
        print_json(result)
        return
    for table in evaluation_tables(result):
        print_table(table.title, table.columns, table.rows, text=table.num_text)
    for line in evaluation_notes(result):
        print(line)
    print(f"{out / RESULT}; as a page: star-elastic report {shlex.quote(str(out))}")


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Directory that eval has written.")],
    as_json: AsJson = False,
) -> None:
    """What eval has found as one page to read, report.html, and a plot, pareto.png."""
    from star_elastic.files.writing import require_folder
    from star_elastic.report.report import write_report

    if exists(out):
        require_folder(out)
    page, plot = write_report(out)
    print_json({"page": str(page), "plot": str(plot)}) if as_json else print(f"{page}   {plot}")


class _Command(TyperCommand):
    """A command that takes no empty value: what a shell makes of a variable that is not set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.get_params(ctx):
            value = given.get(parameter.name or "")
            if "" in (value if isinstance(value, (list, tuple)) else [value]):
                name = parameter.opts[0]
                shown = name if name.startswith("-") else name.upper()
                advice = "" if parameter.required else ", or leave it out"
                raise ConfigError(f"{shown} is empty; give it a value{advice}")
        return super().parse_args(ctx, args)


for command in app.registered_commands:
    command.cls = _Command
program = typer.main.get_command(app)
"""All of it, built once however often a process runs it: that takes longer than many a command."""
