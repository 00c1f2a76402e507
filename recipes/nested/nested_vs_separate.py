"""N sizes from one run against N sizes trained one by one, on the bundled parent.

    python recipes/nested/nested_vs_separate.py --out runs/nested          # about 35 minutes
    python recipes/nested/nested_vs_separate.py --out runs/x --smoke       # the same code, seconds

Arms, for every seed, on the same rows with the same orders, basis and teacher:
    nested      one run of T tokens, router included, all sizes on the same tokens
    separate T  each size cut at the nested run's widths and distilled alone on T tokens
    separate T/N   the same on T/N tokens each: equal tokens in all
    scratch T   each size from random weights, distilled alone on T tokens
    untrained   the slices without training
Two comparisons follow: at equal total tokens (nested against separate T/N), and the papers' claim
(nested against separate T, which reads N times as many). Writes `nested_vs_separate.json` and
`nested_vs_separate.png` (learning curves) into the directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arms import SIZES, Lab, Outcome, nats, parse_options, percent, run_seeds, spread

from star_elastic.cli.terminal import at_the_command_line, print_table
from star_elastic.demo import DEMO, stages
from star_elastic.files.writing import write_json
from star_elastic.report.charts import drawn_to
from star_elastic.router.grid import Grid
from star_elastic.train.config import StageConfig

COLOURS = {"nested": "#d9730d", "separate T": "#1f6fb4", "separate T/N": "#6fb41f",
           "scratch T": "#8a8a8a"}  # fmt: skip


def main() -> None:
    options = parse_options(
        "N sizes from one run against N sizes trained one by one.",
        seeds=3, router_steps=60, steps=240, problems=40,
    )  # fmt: skip
    outcomes = run_seeds(options, arms)
    report = make_report(options, outcomes)
    file = options.out / "nested_vs_separate.json"
    write_json(file, report)
    plot(outcomes, file.with_suffix(".png"))
    show(report)


def arms(lab: Lab, options: argparse.Namespace) -> list[Outcome]:
    """All arms of a seed."""
    learning = balanced(stages(options.router_steps, options.steps, context=options.context))
    share = options.router_steps / (options.router_steps + options.steps)
    nested = lab.trainer(
        lab.student(), SIZES, learning, grid=Grid(dict(DEMO.choices)), commit_at=share
    )
    outcomes = lab.run("nested", nested)
    widths = {name: fixed.widths for name, fixed in nested.committed.items()}
    total = sum(stage.tokens for stage in learning)
    for arm, tokens in (("separate T", total), ("separate T/N", total // len(SIZES))):
        for name, budgets in SIZES.items():
            alone = lab.trainer(
                lab.student(), {name: budgets}, one_stage(tokens, options.context), widths=widths
            )
            outcomes += lab.run(arm, alone)
    for name, budgets in SIZES.items():
        student = lab.random_student(widths[name])
        full = {name: student.axis_map.full}
        trainer = lab.trainer(
            student, {name: budgets}, one_stage(total, options.context), widths=full
        )
        outcomes += [
            replace(o, widths=widths[name], active=lab.active(widths[name]))
            for o in lab.run("scratch T", trainer)
        ]
    untrained = lab.trainer(lab.student(), SIZES, learning, widths=widths)
    for name, (accuracy, kl) in lab.measure(untrained).items():
        outcomes.append(Outcome(
            arm="untrained", size=name, widths=widths[name], accuracy=accuracy,
            active=lab.active(widths[name]),
            kl=kl, tokens=0, flops=0, seconds=0,
        ))  # fmt: skip
    return outcomes


def balanced(learning: Sequence[StageConfig]) -> list[StageConfig]:
    """The stages with all sizes weighing the same: arms must not differ in whom they favour."""
    even = (1 / len(SIZES),) * len(SIZES)
    return [replace(stage, size_weights=even) for stage in learning]


def one_stage(tokens: int, context: int) -> list[StageConfig]:
    """The demo's main stage for one size alone, over a number of tokens."""
    plain = stages(1, 1, context=context)[-1]
    warmup = max(tokens // (plain.batch_size * plain.context) // 20, 1)
    return [replace(plain, tokens=tokens, size_weights=(1.0,), warmup_steps=warmup)]


def make_report(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over seeds with their standard deviations, by arm and size, and every outcome."""
    table = []
    for arm in dict.fromkeys(o.arm for o in outcomes):
        of_arm = [o for o in outcomes if o.arm == arm]
        for size in SIZES:
            own = [o for o in of_arm if o.size == size]
            table.append({
                "arm": arm, "size": size,
                "accuracy": spread([o.accuracy for o in own]), "kl": spread([o.kl for o in own]),
            })  # fmt: skip
        runs = 1 if arm == "nested" else len(SIZES)
        seeds = max(len(of_arm) // len(SIZES), 1)
        each = of_arm[:: len(SIZES)] if arm == "nested" else of_arm
        for row in table[-len(SIZES) :]:
            row["runs"] = 0 if arm == "untrained" else runs
            row["tokens"] = sum(o.tokens for o in each) / seeds
            row["flops"] = sum(o.flops for o in each) / seeds
    return {
        "command": "python recipes/nested/nested_vs_separate.py --out runs/nested"
        + (" --smoke" if options.smoke else ""),
        "seeds": options.seeds,
        "problems_per_task": options.problems,
        "sizes": SIZES,
        "table": table,
        "nested_minus": {arm: differences(outcomes, arm) for arm in ("separate T", "separate T/N")},
        "outcomes": [o.to_json() for o in outcomes],
    }


def differences(outcomes: Sequence[Outcome], arm: str) -> dict[str, dict[str, list[float]]]:
    """Nested minus another arm, seed by seed, by size: mean and standard deviation."""
    found = {}
    for size in SIZES:
        ours, theirs = (
            [o for o in outcomes if o.arm == name and o.size == size] for name in ("nested", arm)
        )
        pairs = list(zip(ours, theirs, strict=True))
        found[size] = {
            "accuracy": spread([a.accuracy - b.accuracy for a, b in pairs]),
            "kl": spread([a.kl - b.kl for a, b in pairs]),
        }
    return found


def show(report: dict[str, Any]) -> None:
    rows = [
        [row["arm"], row["size"], percent(row["accuracy"]), nats(row["kl"]), str(row["runs"]),
         f"{row['tokens'] / 1e6:.2f}M", f"{row['flops'] / 1e12:.2f}"]
        for row in report["table"]
    ]  # fmt: skip
    columns = ["arm", "size", "accuracy", "KL to parent", "runs", "tokens in all", "TFLOP in all"]
    print_table(f"Nested against separate, {report['seeds']} seeds (mean ± std)", columns, rows)
    rows = [
        [arm, size, percent(of_size["accuracy"]), nats(of_size["kl"])]
        for arm, of_arm in report["nested_minus"].items()
        for size, of_size in of_arm.items()
    ]
    print_table("Nested minus the other, seed by seed", ["arm", "size", "accuracy", "KL"], rows)


def plot(outcomes: Sequence[Outcome], file: Path) -> None:
    """Learning curves: KL to the parent against tokens read by the run, one panel per size."""
    with drawn_to(file, len(SIZES), (1000, 340)) as (_, panels):
        for panel, size in zip(panels, SIZES, strict=True):
            for outcome in (o for o in outcomes if o.size == size and o.curve):
                tokens, kl = zip(*outcome.curve, strict=True)
                label = outcome.arm if outcome.seed == 0 else None
                panel.plot([x / 1e6 for x in tokens], kl, ".-", color=COLOURS[outcome.arm],
                           label=label, linewidth=1.2, alpha=0.8)  # fmt: skip
            panel.set(yscale="log", title=size, xlabel="tokens read by the run (millions)")
        panels[0].set_ylabel("KL to the parent (nats per token)")
        panels[-1].legend()


if __name__ == "__main__":
    with at_the_command_line():
        main()
