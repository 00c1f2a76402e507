"""A nested run as users start it, on a random hybrid of about 100M: tokens per second and memory.

    python benchmarks/nested_run.py --out results/nested_run.json    # one GPU, a few minutes
    python benchmarks/nested_run.py --smoke                          # a tiny model, any machine

Three stages of one run (rank, sort, router, distillation, elastic checkpoint): the router learns
with all sizes; all sizes on the same tokens, as plain slices; one size per step, which tells the
sizes apart. Weights are random, so losses say only that the run learns; `training_cost.py` compares
with masks at full width.

The committed figures (`results/nested_run.json`) were measured when experts still multiplied in
fp32 under autocast.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import TINY, build_model
from training_cost import HUNDRED

from star_elastic import bundled
from star_elastic.architectures import architecture_of
from star_elastic.cli.bars import progress_bars
from star_elastic.cli.terminal import at_the_command_line, command_line
from star_elastic.cost.count import CostModel
from star_elastic.data.source_config import SourceConfig
from star_elastic.demo import write_rows
from star_elastic.files.writing import write_json
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.rewrite.stream import save_model
from star_elastic.train.config import (
    CalibrationConfig,
    EngineConfig,
    RouterConfig,
    RunConfig,
    StageConfig,
)
from star_elastic.train.run import train

SIZES = {"large": {"active": 1.0}, "medium": {"active": 0.78}, "small": {"active": 0.58}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs=3, default=[24, 24, 36], help="of each stage")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="a step")
    parser.add_argument("--smoke", action="store_true", help="tiny model, a few steps")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.context, options.windows = [2, 2, 6], 128, 2
    with tempfile.TemporaryDirectory() as folder, progress_bars() as bars:
        parameters = write_parent(Path(folder) / "parent", TINY if options.smoke else HUNDRED)
        tokens = sum(options.steps) * options.context * options.windows
        write_rows(Path(folder) / "rows.jsonl", tokens // 40, seed=0)
        train(run_config(Path(folder), options), progress=bars)
        rows = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    result = {
        "command": command_line("benchmarks/nested_run.py"),
        "machine": describe(),
        "parameters": parameters,
        "tokens_per_step": options.context * options.windows,
        **summarise([json.loads(row) for row in rows]),
    }
    if torch.cuda.is_available():
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)


def write_parent(path: Path, config: dict[str, Any]) -> int:
    """A random hybrid with the bundled parent's tokenizer; returns its parameters."""
    tokenizer = load_tokenizer(bundled.PARENT)
    config = {**config, "vocab_size": len(tokenizer)}
    config |= {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False}
    model = build_model(config)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    save_model(state, config, bundled.PARENT, path, dtype=torch.float32)
    axis_map = architecture_of(config).axis_map(config)
    return CostModel(axis_map).full.total


def run_config(folder: Path, options: argparse.Namespace) -> RunConfig:
    """A router's stage, one with all sizes on the same tokens, and one with a size per step."""
    shape = {"context": options.context, "batch_size": options.windows}
    per_step = options.context * options.windows
    stages = tuple(
        StageConfig(tokens=steps * per_step, sizes_per_step=sizes, warmup_steps=2, **shape)
        for steps, sizes in zip(options.steps, ("all", "all", "one"), strict=True)
    )
    return RunConfig(
        parent=str(folder / "parent"),
        out=str(folder / "run"),
        sizes=SIZES,
        data=(SourceConfig(files=(str(folder / "rows.jsonl"),)),),
        stages=stages,
        calibration=CalibrationConfig(num_samples=64),
        router=RouterConfig(commit_at=options.steps[0] / sum(options.steps)),
        engine=EngineConfig(save_every=10_000),
    )


def summarise(rows: list[dict]) -> dict[str, Any]:
    """Speed of every stage, and in the last one of every size; losses at both ends of each."""
    stages = []
    for number in sorted({row["stage"] for row in rows}):
        own = [row for row in rows if row["stage"] == number]
        stages.append({
            "tokens_per_second": speed(own, "num_tokens"),
            "tokens_and_sizes_per_second": speed(own, "num_distilled"),
            "kd_first": own[0]["kd"],
            "kd_last": own[-1]["kd"],
        })  # fmt: skip
    by_size = defaultdict(list)
    for row in rows:
        if len(row["kd"]) == 1:
            by_size[next(iter(row["kd"]))].append(row)
    sizes = {name: {"tokens_per_second": speed(own, "num_tokens")} for name, own in by_size.items()}
    return {"stages": stages, "one_size_a_step": sizes}


def speed(rows: list[dict], key: str) -> float:
    """The median over the steps; the first of them builds skeletons and is left out."""
    return statistics.median(row[key] / row["seconds"] for row in rows[1:] or rows)


def describe() -> dict[str, Any]:
    """The machine."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    with at_the_command_line():
        main()
