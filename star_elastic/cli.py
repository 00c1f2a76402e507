"""The command line. Results go to stdout (one JSON object with --json), progress to stderr.

Exit codes: 0 done, 1 a check failed or the user stopped the run, 2 the user's mistake, told in one
line with nothing written. Heavy imports happen inside commands, so that --help is quick.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from star_elastic.axes import LAYERS
from star_elastic.errors import ConfigError, Interrupted, StarElasticError
from star_elastic.widths import parse_widths

app = typer.Typer(
    help="One reasoning model, many nested sizes inside a single checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
STAGES = {
    "rank": "Rank units", "rank layers": "Rank layers", "train": "Train sizes", "slice": "Slice",
    "evaluate": "Evaluate", "latency": "Latency",
}  # fmt: skip


class Bars:
    """Progress bars on stderr, one per stage."""

    def __init__(self) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description:12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        """Starts the bar of a stage; the display begins with the first one."""
        self._bars.start()
        self._task = self._bars.add_task(STAGES.get(name, name), total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Moves the bar of the current stage."""
        self._bars.update(self._task, completed=done, note=note)


def print_json(content: object) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A number cut short would be worse than a long line.
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)


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


def run_and_show(recipe: Any, out: Path, as_json: bool, run_recipe: Any) -> None:
    """Runs a recipe with progress bars and prints its report."""
    with Bars() as bars:
        report = run_recipe(recipe, out, bars)
    if as_json:
        print_json(report)
        return
    show_report(report)
    print(f"report: {out / 'report.json'}   plot: {out / 'pareto.png'}   family: {out}/run/elastic")


def show_report(report: Mapping[str, Any]) -> None:
    """The report's two tables: the sizes, and the ways to think and answer."""
    parent = report["parent"]
    rows = [
        ["parent", millions(parent["active"]), millions(parent["total"]), "", "",
         f"{parent['accuracy']:.1%} ± {parent['standard_error']:.1%}", "", ""]
    ]  # fmt: skip
    for name, size in report["sizes"].items():
        untrained = size["untrained_accuracy"]
        rows.append([
            name,
            f"{millions(size['active'])} {size['active_share']:.1%}",
            f"{millions(size['total'])} {size['total_share']:.1%}",
            f"{size['budget_miss']:.2%}",
            f"{size['kl_to_parent']:.4f}",
            f"{size['accuracy']:.1%} ± {size['standard_error']:.1%}",
            f"{size['share_of_parent']:.1%}",
            "" if untrained is None else f"{untrained:.1%}",
        ])  # fmt: skip
    columns = ["size", "active params", "total params", "off budget", "KL", "accuracy",
               "of parent", "untrained"]  # fmt: skip
    print_table("Sizes: thinking, held-out problems", columns, rows)
    plans = [
        [e["label"], f"{e['accuracy']:.1%}", f"{1e3 * e['seconds']:.1f}",
         f"{e['flops'] / 1e6:,.0f}", f"{e['bytes_per_token'] / 1e6:.2f}",
         f"{e['thinking_tokens']:.0f}", f"{e['cut_share']:.0%}"]
        for e in sorted(report["evaluations"], key=lambda e: e["flops"])
    ]  # fmt: skip
    columns = ["thinks>answers@budget", "accuracy", "ms/problem", "MFLOP/problem", "MB/token",
               "thinking tokens", "cut short"]  # fmt: skip
    print_table("Ways to think and answer, cheapest first", columns, plans)


def millions(count: float) -> str:
    """`1.26M`."""
    return f"{count / 1e6:.2f}M"


@app.command()
def count(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory or config.json.")],
    widths: Annotated[str, typer.Option(help="For example hidden=1920,expert_ffn=960.")] = "",
    context: Annotated[int, typer.Option(help="Tokens of context for KV bytes.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Sequences held at once.", min=1)] = 1,
    dtype_bytes: Annotated[int, typer.Option(help="Bytes per parameter.", min=1)] = 2,
    as_json: AsJson = False,
) -> None:
    """Exact total and active parameters, bytes and operations; needs no weights."""
    from star_elastic.cost import CostModel, Workload, count_parts
    from star_elastic.families import family_of, read_config

    config = read_config(model)
    axis_map = family_of(config).axis_map(config)
    chosen = axis_map.complete(parse_widths(widths))
    load = Workload(context=context, batch=batch, dtype_bytes=dtype_bytes)
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
        "parts": parts,
    }
    if as_json:
        print_json(result)
        return
    rows = [[part, f"{size:,}", f"{size / cost.total:.1%}"] for part, size in parts.items()]
    print_table(f"{axis_map.family}  {chosen}", ["part", "parameters", "share"], rows)
    print(f"total   {cost.total:,}\nactive  {cost.active:,}")
    print(
        f"weights {cost.weight_bytes:,} bytes; states {cost.state_bytes:,} bytes at context ",
        end="",
    )
    print(f"{context} x batch {batch}; {cost.flops_per_token:,} FLOPs per token")


@app.command()
def rank(
    model: Annotated[Path, typer.Argument(help="Parent checkpoint directory.")],
    data: Annotated[Path, typer.Option(help="JSONL file of calibration rows.")],
    out: Annotated[Path, typer.Option(help="Scores file to write (.safetensors).")],
    samples: Annotated[int, typer.Option(help="Rows to measure on.", min=1)] = 1024,
    context: Annotated[int, typer.Option(help="Tokens per row at most.", min=2)] = 1024,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    as_json: AsJson = False,
) -> None:
    """Importance scores of every unit of every axis, from forward passes on data."""
    from star_elastic.families import family_of
    from star_elastic.importance.files import save_scores
    from star_elastic.nesting.submodel import load_parent, load_tokenizer
    from star_elastic.train.calibrate import rank as rank_units
    from star_elastic.train.sources import Source, calibration_batches

    _require_new_file(out)
    source = Source([data], load_tokenizer(model))
    parent, config = load_parent(model)
    axis_map = family_of(config).axis_map(config)
    count = min(samples, len(source))
    batches = calibration_batches(
        [source], [1.0], num_samples=count, batch_size=batch_size, context=context
    )
    with Bars() as bars:
        scores, info = rank_units(
            parent, axis_map, batches, num_samples=count, name=data.name, progress=bars
        )
    save_scores(out, scores, axis_map, info)
    result = {"scores": str(out), "samples": info.num_samples, "tokens": info.num_tokens}
    print_json(result) if as_json else print(
        f"{out}: {len(scores)} orders from {info.num_samples} rows, {info.num_tokens:,} tokens"
    )


def _require_new_file(out: Path) -> None:
    """Refuses at once what could not be written after minutes of work."""
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new file or remove it first")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.parent} is not a directory; make it, or name another file")


@app.command()
def latency(
    model: Annotated[Path, typer.Argument(help="Parent or elastic checkpoint, or config.json.")],
    out: Annotated[Path, typer.Option(help="Table to write (.json).")],
    phase: Annotated[str, typer.Option(help="decode or prefill.")] = "decode",
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens of context.", min=1)] = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Time to measure for.", min=0)] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Measures on this machine what widths cost in milliseconds per token, for `ms` budgets."""
    # Mistakes first: what follows may take minutes.
    _require_new_file(out)
    from star_elastic.families import family_of, read_config
    from star_elastic.manifest import FILE_NAME, load_manifest

    config = read_config(model)
    axis_map = family_of(config).axis_map(config)
    choices = load_manifest(model, axis_map).choices if (model / FILE_NAME).is_file() else None

    import torch

    from star_elastic.evaluate.latency import Setting, measure
    from star_elastic.latency import save_table

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ConfigError(f"dtype={dtype!r} is unknown; use {' or '.join(dtypes)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(
        phase=phase, batch=batch, context=context, dtype=dtypes[dtype], device=device,
        seconds=seconds,
    )  # fmt: skip
    with Bars() as bars:
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
        f"{out}: {full:.3f} ms per token at full width ({phase}, batch {batch}, context {context}, "
        f"{dtype})\non {table.machine.device}, {table.machine.threads} threads"
    )


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Run config (TOML).")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state.")] = False,
    as_json: AsJson = False,
) -> None:
    """Nested distillation: sort, learn the sizes, train them, write the elastic checkpoint."""
    from star_elastic.train.config import load_run_config
    from star_elastic.train.run import train as run_training

    config = load_run_config(run)
    with Bars() as bars:
        result = run_training(config, resume=resume, progress=bars)
    summary = {"elastic": str(result.elastic), "steps": result.steps,
               "tokens": result.tokens, "seconds": result.seconds}  # fmt: skip
    if _is_first_rank():
        print_json(summary) if as_json else print(
            f"{result.elastic}: {result.steps} steps, {result.tokens:,} tokens"
        )


@app.command()
def sizes(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint directory.")],
    as_json: AsJson = False,
) -> None:
    """The sizes of an elastic checkpoint: widths, budgets, exact cost."""
    from star_elastic.cost import CostModel
    from star_elastic.families import family_of, read_config
    from star_elastic.manifest import load_manifest

    config = read_config(elastic)
    axis_map = family_of(config).axis_map(config)
    manifest = load_manifest(elastic, axis_map)
    cost = CostModel(axis_map)
    full = cost.count(axis_map.full)
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
        }  # fmt: skip
        rows.append([
            name, f"{counted.active:,} ({counted.active / full.active:.1%})",
            f"{counted.total:,} ({counted.total / full.total:.1%})",
            *(
                str(len(axis_map.kept_layers(size.widths))) if axis == LAYERS
                else _width_text(size.widths[axis])
                for axis in shown
            ),
        ])  # fmt: skip
    if as_json:
        print_json({"family": manifest.family, "sizes": result})
    else:
        print_table(str(elastic), ["size", "active", "total", *shown], rows)


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
    as_json: AsJson = False,
) -> None:
    """Cuts a size out as an ordinary checkpoint, with no further training.

    For a budget between trained ones the router gives widths; they were not trained themselves.
    """
    if sum(map(bool, (size, budget, widths))) != 1:
        raise ConfigError("name one of --size, --budget and --widths, for example --size small")
    from star_elastic.families import family_of, read_config
    from star_elastic.manifest import load_manifest
    from star_elastic.nesting.stream import slice_checkpoint

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
    with Bars() as bars:
        begun = False

        def progress(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                bars.stage("slice", total)
            begun = True
            bars.advance(done)

        slice_checkpoint(elastic, chosen, out, progress=progress)
    asked = size or budget or widths
    result = {"out": str(out), "size": asked, "widths": dict(chosen)}
    print_json(result) if as_json else print(f"{out}: {asked} ({chosen})")


@app.command()
def generate(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint directory.")],
    prompt: Annotated[str, typer.Argument(help="The user's message.")],
    size: Annotated[str, typer.Option(help="One size for both phases.")] = "",
    think: Annotated[str, typer.Option(help="The size that thinks.")] = "",
    answer: Annotated[str, typer.Option(help="The size that answers.")] = "",
    thinking_budget: Annotated[int | None, typer.Option(help="Tokens of thinking.")] = None,
    grace: Annotated[int, typer.Option(help="Tokens to finish the line at the budget.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens in all.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Elastic budget control: one size thinks, another answers."""
    from star_elastic.generate.family import load

    if size and (think or answer):
        raise ConfigError("--size names one size for both phases; leave out --think and --answer")
    family = load(elastic)
    (result,) = family.generate(
        [prompt], think=(think or size) or None, answer=(answer or size) or None,
        thinking_budget=thinking_budget, grace=grace, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed,
    )  # fmt: skip
    if as_json:
        print_json(result.to_json())
        return
    console = Console()
    if result.thinking:
        console.print(result.thinking, style="dim", markup=False, highlight=False)
    console.print(result.answer, markup=False, highlight=False)
    for phase in result.phases:
        console.print(
            f"[{phase.name}: {phase.size}, {phase.tokens} tokens, {phase.seconds:.2f} s, "
            f"{phase.ended}]",
            style="dim", markup=False, highlight=False,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `star-elastic` command."""
    with at_the_command_line():
        app(args=arguments, standalone_mode=True)


@contextmanager
def at_the_command_line() -> Iterator[None]:
    """What every program of ours does around its work: libraries stay quiet, a mistake of the user
    or a stop ends in one line with its exit code."""
    # Progress is ours to draw; which kernels are missing on this machine is no news to its owner.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:  # which read both when it was imported
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    said, code = "", 0
    try:
        yield
    except StarElasticError as error:
        said, code = f"error: {error}", 2
    except Interrupted as error:
        said, code = str(error), 1
    except SystemExit as error:  # how typer ends, also when all went well
        if error.code:
            raise
    if said:  # by every rank: torchrun stops the others as soon as one has ended
        print(said, file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # gloo's threads may abort a process that ends in the ordinary way, after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def _is_first_rank() -> bool:
    """Whether this process speaks, of all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
