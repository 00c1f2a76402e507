"""Does a latency table predict whole models? Predicted against measured time at random widths.

    python benchmarks/latency_table.py            # the hybrid of size_cost.py, about 5 minutes
    python benchmarks/latency_table.py --smoke    # the same code on a tiny model, seconds

For each workload a table is measured, and in the same rounds whole models at `--checks` random
widths that are not on its grid, every other one with widths of its own in each layer. Reported are
ratios only, for absolute times mean nothing on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import torch
from common import LARGE, TINY

from star_elastic.cli.terminal import at_the_command_line
from star_elastic.measure.latency import Check, Setting, measure

WORKLOADS = (
    {"phase": "decode", "batch": 1, "context": 256},
    {"phase": "decode", "batch": 16, "context": 256},
    {"phase": "prefill", "batch": 1, "context": 256},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=75.0, help="of measuring per workload")
    parser.add_argument("--checks", type=int, default=12, help="random widths per workload")
    parser.add_argument("--smoke", action="store_true", help="tiny model, one axis, fewest rounds")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    workloads, choices = WORKLOADS, None
    if options.smoke:
        options.seconds, options.checks = 0.0, 2
        workloads, choices = (WORKLOADS[0], WORKLOADS[-1]), {"hidden": (64, 32)}
    config = dict(TINY if options.smoke else LARGE)
    threads = torch.get_num_threads()
    command = f"OMP_NUM_THREADS={threads} python benchmarks/latency_table.py"
    result: dict = {
        "command": command + (" --smoke" if options.smoke else ""),
        "machine": {"cpus": os.cpu_count(), "threads": threads},
        "workloads": [],
    }
    for workload in workloads:
        if options.smoke:
            workload = {**workload, "context": 8}
        setting = Setting(**workload, seconds=options.seconds)
        table, checks = measure(config, setting, choices=choices, num_checks=options.checks)
        points = sum(len(grid.milliseconds) for grid in table.parts.values())
        result["workloads"].append({**workload, "grid_points": points, **summary(checks)})
        show(result["workloads"][-1])
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def summary(checks: list[Check]) -> dict:
    """Predicted over measured time of every check, and how far from 1 they are."""
    errors = [abs(check.error) for check in checks]
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "checks": [
            {"widths": str(check.widths), "predicted_over_measured": 1 + check.error}
            for check in checks
        ],
    }


def show(row: dict) -> None:
    print(f"\n{row['phase']}, batch {row['batch']}, context {row['context']}")
    for check in row["checks"]:
        print(f"{check['predicted_over_measured']:7.3f}  {check['widths']}")
    print(f"error: median {row['median_error']:.1%}, worst {row['worst_error']:.1%}")


if __name__ == "__main__":
    with at_the_command_line():
        main()
