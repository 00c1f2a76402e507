"""`star-elastic count`: what a model costs at any widths."""

from pathlib import Path

from typer import Option

from star_elastic.architectures import ModelConfig, read_config
from star_elastic.axes.widths import parse_widths
from star_elastic.cli.options import AsJson, Batch, DtypeBytes, Model, SsmDtypeBytes
from star_elastic.cli.terminal import show
from star_elastic.cost.count import CostModel, Workload, count_parts
from star_elastic.strict import MOST_TOKENS
from star_elastic.tables import Table

COUNTED = ("total", "active", "weight_bytes", "state_bytes", "flops_per_token",
           "prefill_flops_per_token")  # fmt: skip
"""What is told of a cost."""


def count(
    model: Model,
    widths: str = Option("", help="For example hidden=1920,expert_ffn=960."),
    context: int = Option(0, help="Tokens of context for KV bytes.", min=0, max=MOST_TOKENS),
    batch: Batch = 1,
    dtype_bytes: DtypeBytes = 2,
    ssm_dtype_bytes: SsmDtypeBytes = 4,
    as_json: AsJson = False,
) -> None:
    """Exact total and active parameters, bytes and operations; needs no weights.

    Operations are per token. A decoded token goes through the LM head; of a prompt that is read at
    once, only the last token does.
    """
    axis_map = read_countable(model).axis_map
    chosen = axis_map.complete(parse_widths(widths))
    load = Workload(context, batch, dtype_bytes, ssm_dtype_bytes)
    cost = CostModel(axis_map, load).count(chosen)
    parts = count_parts(axis_map, chosen)
    counts = {name: getattr(cost, name) for name in COUNTED}
    rows = [[part, f"{size:,}", f"{size / cost.total:.1%}"] for part, size in parts.items()]
    show(
        as_json,
        {"family": axis_map.model_type, "widths": dict(chosen), **counts, "parts": parts},
        Table(f"{axis_map.model_type}  {chosen}", ["part", "parameters", "share"], rows),
        f"total   {cost.total:,}\nactive  {cost.active:,}",
        f"weights {cost.weight_bytes:,} bytes",
        f"states  {cost.state_bytes:,} bytes at context {context:,} x batch {batch:,}",
        f"FLOPs   {cost.flops_per_token:,} per decoded token at context {context:,}, "
        f"{cost.prefill_flops_per_token:,} per token of a prompt but the last",
    )


def read_countable(model: Path) -> ModelConfig:
    """The config of a checkpoint. Raises ConfigError for weights that another tool has quantised:
    the figures of the model that they stand for are not theirs."""
    config = read_config(model)
    if config.get("quantization_config"):  # only then worth the seconds that torch takes to load
        from star_elastic.checkpoints.layouts import read_scheme

        read_scheme(config, config.axis_map)
    return config
