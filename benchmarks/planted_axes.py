"""Does the router find what can be cut? Parents with one axis planted half-dead, shipped defaults.

    python benchmarks/planted_axes.py --out results/planted_axes.json   # 2 CPU cores, 10 minutes
    python benchmarks/planted_axes.py --smoke                           # two cases, a few steps

Every parent is random and tiny; half of the units of one of its axes do nothing, anywhere among the
others. A size gets the budget that is met by cutting exactly these units, and a run of the train
command's own code is asked for it beside the whole parent. An answer is *right* if that axis is cut
to half and every other axis is whole: the router's own likeliest widths (*argmax*), before any step
that no data sees, and the *widths* that the size is then fixed to. Only `commit_at` is not the
default: what follows once the widths are fixed does not change them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from planting import HYBRID, LLAMA, write_planted_parent

from star_elastic.axes import AxisMap
from star_elastic.checkpoints.manifest import Size, load_manifest
from star_elastic.cli.bars import progress_bars
from star_elastic.cli.terminal import at_the_command_line, command_line, print_table
from star_elastic.cost.count import CostModel
from star_elastic.data.source_config import SourceConfig
from star_elastic.demo import write_rows
from star_elastic.files.writing import write_json
from star_elastic.progress import Progress
from star_elastic.router.grid import default_choices
from star_elastic.train.config import (
    CalibrationConfig,
    EngineConfig,
    RouterConfig,
    RunConfig,
    StageConfig,
)
from star_elastic.train.run import train

CASES = [(HYBRID, a) for a in ("hidden", "ffn", "experts", "expert_ffn", "shared_ffn", "ssm_heads")]
CASES += [(LLAMA, a) for a in ("ffn", "heads")]
STEPS = (28, 150, 600)
CONTEXT, WINDOWS = 64, 2
SMALL = "small"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of the router")
    parser.add_argument("--seeds", type=int, default=1, help="parents of every kind")
    parser.add_argument("--smoke", action="store_true", help="two cases, a few steps")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    cases = CASES
    if options.smoke:
        cases, options.steps, options.seeds = [CASES[3], CASES[6]], [3], 1
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder, progress_bars() as bars:
        write_rows(Path(folder) / "rows.jsonl", 2_000, seed=0)
        for steps in options.steps:
            for seed in range(options.seeds):
                for config, axis in cases:
                    runs.append(run_case(Path(folder), config, axis, steps, seed, bars))
    result = {
        "command": command_line("benchmarks/planted_axes.py"),
        "summary": {str(steps): summarise(runs, steps) for steps in options.steps},
        "runs": runs,
    }
    print_table(
        "Router steps until the planted axis, and only it, is cut",
        ["steps", "argmax right", "widths right", "widths from the data", "cases"],
        [[steps, *map(str, row.values())] for steps, row in result["summary"].items()],
    )
    if options.out:
        write_json(options.out, result)
    else:
        print(json.dumps(result["summary"]))


def run_case(
    folder: Path, config: Mapping[str, Any], axis: str, steps: int, seed: int, bars: Progress
) -> dict[str, Any]:
    """Trains one planted parent for so many router steps; what the router chose."""
    name = f"{config['model_type']}-{axis}-{seed}-{steps}"
    parent, out = folder / f"{name}-parent", folder / name
    axis_map = write_planted_parent(config, axis, parent, seed)
    planted = axis_map.full.replace(**{axis: axis_map.axes[axis].size // 2})
    metric, budget = budget_of(axis_map, planted, axis)
    choices = default_choices(axis_map)
    if axis not in choices:  # query heads, which the defaults leave whole
        choices[axis] = (axis_map.axes[axis].size, axis_map.axes[axis].size // 2)
    begin = time.monotonic()
    result = train(
        RunConfig(
            parent=str(parent),
            out=str(out),
            seed=seed,
            sizes={"large": {metric: 1.0}, SMALL: {metric: budget}},
            choices=choices,
            data=(SourceConfig(files=(str(folder / "rows.jsonl"),)),),
            stages=(
                StageConfig(tokens=steps * WINDOWS * CONTEXT, context=CONTEXT, batch_size=WINDOWS),
            ),
            calibration=CalibrationConfig(num_samples=32, context=CONTEXT),
            router=RouterConfig(commit_at=1.0),
            engine=EngineConfig(save_every=100_000, autocast=False),
        ),
        progress=bars,
    )
    size = load_manifest(result.elastic, axis_map).size(SMALL)
    return {
        "parent": config["model_type"], "axis": axis, "seed": seed, "steps": steps,
        "budget": {metric: budget}, "planted": _elastic(planted, choices),
        **answers(size, planted, choices), "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def budget_of(axis_map: AxisMap, planted: Mapping, axis: str) -> tuple[str, float]:
    """The budget that cutting the dead half meets. Experts hardly cost active parameters, so theirs
    is on the total."""
    metric = "total" if axis == "experts" else "active"
    cost = CostModel(axis_map)
    return metric, cost.count(planted).metric(metric) / cost.full.metric(metric)


def answers(size: Size, planted: Mapping, choices: Mapping) -> dict[str, Any]:
    """The router's own choice and the final widths, and whether they are right."""
    assert size.argmax is not None
    return {
        "argmax": _elastic(size.argmax, choices),
        "argmax_right": all(size.argmax[axis] == planted[axis] for axis in choices),
        "widths": _elastic(size.widths, choices),
        "widths_right": all(size.widths[axis] == planted[axis] for axis in choices),
        "widths_from": size.widths_from,
        "data_free_steps": size.data_free_steps,
        "budget_miss": size.cost["budget_miss"],
    }


def _elastic(widths: Mapping, choices: Mapping) -> dict[str, Any]:
    return {axis: widths[axis] for axis in choices}


def summarise(runs: Sequence[Mapping[str, Any]], steps: int) -> dict[str, int]:
    """How many of the runs of so many router steps are right."""
    own = [run for run in runs if run["steps"] == steps]
    return {
        "argmax_right": sum(run["argmax_right"] for run in own),
        "widths_right": sum(run["widths_right"] for run in own),
        "from_data": sum(run["widths_from"] == "data" for run in own),
        "cases": len(own),
    }


if __name__ == "__main__":
    with at_the_command_line():
        main()
