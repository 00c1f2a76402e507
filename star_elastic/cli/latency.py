"""`star-elastic latency`: milliseconds on this machine, of any widths or of a family's sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument, Option

from star_elastic.architectures import ModelConfig
from star_elastic.axes import LAYERS
from star_elastic.bundled import find_model
from star_elastic.checkpoints.companions import is_elastic
from star_elastic.checkpoints.manifest import load_manifest
from star_elastic.cli.bars import progress_bars
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Device, Dtype
from star_elastic.cli.sizes import width_text
from star_elastic.cli.terminal import show
from star_elastic.cost.count import Workload
from star_elastic.cost.latency import save_table
from star_elastic.errors import ConfigError
from star_elastic.files.writing import require_writable, write_json
from star_elastic.strict import MOST_ROWS, MOST_TOKENS
from star_elastic.tables import Table

if TYPE_CHECKING:
    from star_elastic.measure.latency_bench import Setting

MOST_SECONDS = 10**6
"""Of a measurement: more is a slip of the pen."""
DEFAULT_CONTEXT = 256
Choices = Mapping[str, Sequence[int]] | None


def latency(
    out: Path = Option(help="Table to write (.json)."),
    model: Path | None = Argument(
        None, parser=find_model, help="Parent or elastic checkpoint, or config.json."
    ),
    run: Path | None = Option(
        None, "--for", help="Or a run config: its parent, over its choices, at its workload."
    ),
    sizes: bool = Option(False, "--sizes", help="The named sizes themselves, prefill and decode."),
    phase: str = Option("decode", help="decode or prefill (not with --sizes)."),
    batch: list[int] = Option(
        [], help="Sequences at once; with --sizes several.", min=1, max=MOST_ROWS
    ),
    context: list[int] = Option(
        [], help="Tokens of context; with --sizes several.", min=1, max=MOST_TOKENS
    ),
    dtype: Dtype = "float32",
    device: Device = "auto",
    seconds: float = Option(60.0, help="Time to measure for.", min=0, max=MOST_SECONDS),
    as_json: AsJson = False,
) -> None:
    """Measures on this machine what any widths cost in milliseconds per token, for `ms` budgets.

    With --sizes, what the sizes of an elastic checkpoint take, at every batch and context named.
    """
    require_writable(out, as_file=True)  # mistakes first: what follows may take minutes
    if (model is None) == (run is None):
        raise ConfigError("name a checkpoint to measure, or a run config with --for RUN.toml")
    if sizes:
        if model is None:
            raise ConfigError("--sizes measures an elastic checkpoint; name one in place of --for")
        works = batch or [1], context or [DEFAULT_CONTEXT]
        _measure_sizes(model, dtype, device, *works, seconds, out, as_json)
        return
    if len(batch) > 1 or len(context) > 1:
        raise ConfigError("a table holds one batch and one context; name one, or use --sizes")
    from star_elastic.measure.latency_bench import Setting
    from star_elastic.models.placement import choose_device, choose_dtype

    choices, workload = None, Workload()
    if run is not None:
        model, choices, workload = _of_run(run)
    assert model is not None
    config = read_countable(model)
    if run is None and is_elastic(model):
        choices = load_manifest(model, config.axis_map).choices
    setting = Setting(
        phase=phase, batch=(batch or [workload.batch])[0], seconds=seconds,
        context=(context or [workload.context or DEFAULT_CONTEXT])[0],
        dtype=choose_dtype(dtype, model), device=choose_device(device),
    )  # fmt: skip
    _measure_widths(config, choices, setting, out, as_json)


def _of_run(run: Path) -> tuple[Path, Choices, Workload]:
    """The parent of a run config, its choices of widths, and its workload."""
    from star_elastic.train.check import read_parent
    from star_elastic.train.config import load_run_config

    config = load_run_config(run)
    *_, grid = read_parent(config)
    return Path(config.parent), grid.choices, config.workload


def _measure_widths(
    config: ModelConfig, choices: Choices, setting: Setting, out: Path, as_json: bool
) -> None:
    """Measures a table over all choices, writes it, and tells how well it predicts other widths."""
    from star_elastic.measure.latency import measure

    with progress_bars(f"stopped; {out} was not written") as progress:
        progress.stage("latency", max(round(setting.seconds), 1))
        table, checks = measure(
            config, setting, choices=choices,
            progress=lambda done, _: progress.advance(round(done)),
        )  # fmt: skip
        save_table(table, out)
    axis_map = config.axis_map
    full = table.milliseconds(axis_map.full, axis_map)
    errors = sorted(abs(check.error) for check in checks)
    content = {
        "table": str(out), "device": table.machine.device, "threads": table.machine.threads,
        "ms_per_token": full, "median_error": errors[len(errors) // 2], "worst_error": errors[-1],
        "checks": [
            {"widths": dict(check.widths), "predicted": check.predicted,
             "measured": check.measured, "error": check.error}
            for check in checks
        ],
    }  # fmt: skip
    axes = [axis for axis in axis_map.axes if axis != LAYERS]
    rows = [
        [f"{check.predicted:.3f}", f"{check.measured:.3f}", f"{check.error:+.1%}",
         *(width_text(check.widths[axis]) for axis in axes)]
        for check in checks
    ]  # fmt: skip
    columns = ["predicted", "measured", "error", *axes]
    show(
        as_json, content, Table("ms per token at held-out widths", columns, rows),
        f"{out}: {full:.3f} ms per token at full width ({table.phase}, batch {table.batch}, "
        f"context {table.context}, {table.dtype})",
        f"on {table.machine.device}, {table.machine.threads} threads",
    )  # fmt: skip


def _measure_sizes(
    elastic: Path, dtype: str, device: str, batches: list[int], contexts: list[int],
    seconds: float, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Measures the sizes of a family, writes and tells their times."""
    from star_elastic.generate.family import load
    from star_elastic.measure.size_latency import describe_machine, measure_sizes
    from star_elastic.models.placement import name_of

    family = load(elastic, dtype, device)
    with progress_bars(f"stopped; {out} was not written") as progress:
        times = measure_sizes(dict(family), batches, contexts, seconds=seconds, progress=progress)
    dtype = name_of(family.parent.dtype)
    machine = describe_machine(family.parent.dtype, str(family.parent.device))
    content = {"machine": machine, "dtype": dtype, "sizes": [row.to_json() for row in times]}
    write_json(out, content)
    rows = [
        [row.size, str(row.batch), f"{row.context:,}", f"{row.prefill_ms:,.2f}",
         f"{row.decode_ms:,.2f}", f"{1e3 * row.batch / row.decode_ms:,.0f}"]
        for row in times
    ]  # fmt: skip
    title = f"{machine['device']}, {machine['threads']} threads, {dtype}"
    columns = ["size", "batch", "context", "prefill ms", "decode ms", "decoded tokens/s"]
    show(as_json, {"table": str(out), **content}, Table(title, columns, rows), str(out))
