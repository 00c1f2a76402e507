"""The longer form of the demo: up to an hour on 2 CPU cores, budgets on several costs at once.

    python recipes/hour/run.py --out runs/hour
    python recipes/hour/run.py --out runs/smoke --smoke      # the same code path, seconds

Active parameters hardly depend on the number of experts, so each size also has a budget on total
parameters: only then does the router cut experts as well. And it gives up Mamba heads, the units
that are missed most, only for memory: the small size has a budget on the bytes of serving 64
sequences, too, of which the Mamba states are a large part. Resumes if interrupted.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from star_elastic.cli.demo import run_and_show
from star_elastic.cli.terminal import at_the_command_line
from star_elastic.cost.count import Workload
from star_elastic.demo import DEMO, Recipe, shallow_parent, stages

HOUR: Recipe = replace(
    DEMO,
    sizes={
        "large": {"active": 1.0, "total": 1.0},
        "medium": {"active": 0.75, "total": 0.7},
        "small": {"active": 0.5, "total": 0.38, "bytes": 0.79},
    },
    # Three budgets at once need a fine grid to be met.
    choices={**DEMO.choices, "shared_ffn": tuple(range(128, 15, -8))},
    workload=Workload(context=256, batch=64),
    num_rows=50_000,
    calibration_rows=512,
    stages=stages(220, 1_980),
    problems_per_task=50,
    budgets=(0, 32, 64),
    pairs=(("small", "large"), ("medium", "large"), ("large", "small")),
    router=replace(DEMO.router, commit_at=0.1),
)
SMOKE: Recipe = replace(
    HOUR,
    num_rows=200,
    calibration_rows=16,
    stages=stages(1, 2, windows=2, context=64),
    problems_per_task=1,
    budgets=(2,),
    max_new_tokens=40,
    pairs=HOUR.pairs[:1],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new directory, or one to resume")
    parser.add_argument("--smoke", action="store_true", help="a few steps, same code path")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args()
    recipe = HOUR
    if options.smoke:
        recipe = replace(SMOKE, parent=str(shallow_parent(options.out.with_suffix(".parent"))))
    run_and_show(recipe, options.out, options.json)


if __name__ == "__main__":
    with at_the_command_line():
        main()
