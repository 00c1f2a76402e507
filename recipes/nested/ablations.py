"""The papers' ablations on the bundled parent: nested runs of equal length, one change each.

    python recipes/nested/ablations.py --out runs/ablations             # about 15 minutes a seed
    python recipes/nested/ablations.py --out runs/x --smoke             # the same code, seconds

    curriculum   one stage, two stages, uniform or weighted to the large sizes
    widths       the router's against uniform, random feasible and hand-chosen ones at equal cost
    shape        width against depth at equal active parameters; widths of their own in every layer
Every run trains all its sizes on the same number of tokens; runs with given widths have no router's
part. Writes `ablations.json` into the directory.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from arms import SIZES, Lab, Outcome, nats, parse_options, percent, run_seeds, spread

from star_elastic.axes import LAYERS
from star_elastic.axes.widths import Width, Widths, parse_widths
from star_elastic.cli.terminal import at_the_command_line, print_table
from star_elastic.demo import DEMO, stages
from star_elastic.errors import ShapeError
from star_elastic.files.writing import write_json
from star_elastic.router.budget import AIM, budget_miss
from star_elastic.router.grid import Grid
from star_elastic.train.stages import LATER_WEIGHTS, StageConfig

UNIFORM = (1 / 3, 1 / 3, 1 / 3)
TO_LARGE = LATER_WEIGHTS[len(SIZES)]
HAND = {
    "medium": "hidden=152,expert_ffn=48",
    "small": "hidden=128,expert_ffn=32,ssm_heads=12",
    "tiny": "hidden=96,expert_ffn=32,ssm_heads=12",
}
"""Round numbers that a person might choose; `shared_ffn` is what then meets the budget."""
ALIKE = ("one stage, weighted", "two stages, uniform", "random widths, again")
"""Runs that differ from others in numbers alone; a smoke run leaves them out."""


def main() -> None:
    options = parse_options(
        "The papers' ablations: nested runs of equal length, one change each.",
        seeds=3, router_steps=60, steps=180, problems=30,
    )  # fmt: skip
    report = make_report(options, run_seeds(options, arms))
    write_json(options.out / "ablations.json", report)
    show(report)


def arms(lab: Lab, options: argparse.Namespace) -> list[Outcome]:
    """Every run of a seed."""
    plain = stages(options.router_steps, options.steps, context=options.context)
    learning = [weigh(stage, UNIFORM) for stage in plain]
    router_share = options.router_steps / (options.router_steps + options.steps)
    grid = Grid(dict(DEMO.choices))

    def learned(arm: str, plan: Sequence[StageConfig], grid: Grid = grid) -> list[Outcome]:
        trainer = lab.trainer(lab.student(), SIZES, plan, grid=grid, commit_at=router_share)
        return lab.run(arm, trainer, points=1)

    def given(arm: str, widths: Mapping[str, Widths]) -> list[Outcome]:
        total = sum(stage.tokens for stage in learning)
        plan = [replace(learning[-1], tokens=total)]
        return lab.run(arm, lab.trainer(lab.student(), SIZES, plan, widths=widths), points=1)

    first, second = learning
    halves = two_stages(second)
    depth = lab.calibration.depth()
    per_layer = {
        name: len(lab.axis_map.axes[name].layers)
        for name in ("expert_ffn", "shared_ffn", "ssm_heads")
    }
    runs: dict[str, Callable[[str], list[Outcome]]] = {
        "one stage, uniform": lambda arm: learned(arm, learning),
        "one stage, weighted": lambda arm: learned(arm, [first, weigh(second, TO_LARGE)]),
        "two stages, uniform then weighted": lambda arm: learned(arm, [first, *halves]),
        "two stages, uniform": lambda arm: learned(
            arm, [first, *(weigh(s, UNIFORM) for s in halves)]
        ),
        "uniform widths": lambda arm: given(arm, uniform_widths(lab)),
        "random widths": lambda arm: given(arm, random_widths(lab, lab.seed)),
        "random widths, again": lambda arm: given(arm, random_widths(lab, lab.seed + 1000)),
        "hand-chosen widths": lambda arm: given(arm, hand_widths(lab)),
        "depth first": lambda arm: given(arm, {n: depth_widths(lab, depth, n) for n in SIZES}),
        "widths per layer": lambda arm: learned(arm, learning, Grid(dict(DEMO.choices), per_layer)),
    }
    if options.smoke:
        runs = {arm: run for arm, run in runs.items() if arm not in ALIKE}
    return [outcome for arm, run in runs.items() for outcome in run(arm)]


def weigh(stage: StageConfig, weights: tuple[float, ...]) -> StageConfig:
    """A stage with other weights of the sizes."""
    return replace(stage, size_weights=weights)


def two_stages(stage: StageConfig) -> list[StageConfig]:
    """A stage split as the papers do: short windows first, then long ones weighted to the large
    sizes, 60 % and 40 % of the tokens. The learning rate falls over both."""
    middle = (stage.learning_rate + stage.final_learning_rate) / 2
    short = replace(
        stage, tokens=round(0.6 * stage.tokens), context=stage.context // 2,
        batch_size=2 * stage.batch_size, final_learning_rate=middle,
    )  # fmt: skip
    long = replace(
        stage, tokens=round(0.4 * stage.tokens), learning_rate=middle, size_weights=TO_LARGE
    )
    return [short, long]


def nearest(lab: Lab, candidates: Sequence[Mapping[str, Width]], name: str) -> Widths:
    """Of some widths, those that cost nearest to a size's budget."""
    legal = []
    for candidate in candidates:
        try:
            legal.append(lab.axis_map.complete(candidate))
        except ShapeError:
            continue
    return min(legal, key=lambda widths: budget_miss(widths, SIZES[name], lab.cost))


def uniform_widths(lab: Lab) -> dict[str, Widths]:
    """The same share of every axis, as near as the grid allows, on the budget by `shared_ffn`."""

    def at(share: float, shared: int) -> dict[str, int]:
        widths = {
            axis: min(grid, key=lambda w: abs(w / grid[0] - share))
            for axis, grid in DEMO.choices.items()
        }
        return {**widths, "shared_ffn": shared}

    shares = [s / 100 for s in range(30, 100)]
    candidates = [at(s, w) for s in shares for w in range(16, 129, 4)]
    found = {}
    for name in SIZES:
        near = [c for c in candidates if budget_miss(lab.axis_map.complete(c), SIZES[name],
                                                     lab.cost) <= AIM]  # fmt: skip
        # Of those on the budget, the one whose shares differ least.
        found[name] = lab.axis_map.complete(min(near, key=unevenness))
    return found


def unevenness(widths: Mapping[str, int]) -> float:
    """Spread of the shares that widths keep of their axes."""
    shares = [widths[axis] / grid[0] for axis, grid in DEMO.choices.items()]
    return max(shares) - min(shares)


def random_widths(lab: Lab, seed: int) -> dict[str, Widths]:
    """Uniformly random widths of the grid that meet the budget within 0.5 %."""
    draw = random.Random(seed)
    found = {}
    for name, budgets in SIZES.items():
        while name not in found:
            widths = lab.axis_map.complete({a: draw.choice(g) for a, g in DEMO.choices.items()})
            if budget_miss(widths, budgets, lab.cost) <= AIM:
                found[name] = widths
    return found


def hand_widths(lab: Lab) -> dict[str, Widths]:
    """The hand-chosen widths with the `shared_ffn` that meets the budgets."""
    found = {}
    for name, text in HAND.items():
        base = parse_widths(text)
        found[name] = nearest(lab, [{**base, "shared_ffn": w} for w in range(8, 129, 4)], name)
    return found


def depth_widths(lab: Lab, depth: Sequence[int], name: str) -> Widths:
    """The most important layers that cost nearest to a size's budget, with the hidden width (192 to
    144) making up for what whole layers cannot meet."""
    candidates = []
    for count in range(1, len(depth) + 1):
        kept = set(depth[:count])
        mask = tuple(int(layer in kept) for layer in range(len(depth)))
        candidates += [{LAYERS: mask, "hidden": h} for h in range(192, 143, -8)]
    return nearest(lab, candidates, name)


def make_report(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over seeds by run and size, and every outcome."""
    table = []
    for arm in dict.fromkeys(o.arm for o in outcomes):
        for size in SIZES:
            own = [o for o in outcomes if o.arm == arm and o.size == size]
            table.append({
                "arm": arm, "size": size, "widths": [str(o.widths) for o in own],
                "active": spread([o.active for o in own]),
                "accuracy": spread([o.accuracy for o in own]), "kl": spread([o.kl for o in own]),
            })  # fmt: skip
    return {
        "command": "python recipes/nested/ablations.py --out runs/ablations"
        + (" --smoke" if options.smoke else ""),
        "seeds": options.seeds,
        "problems_per_task": options.problems,
        "table": table,
        "outcomes": [o.to_json() for o in outcomes],
    }


def show(report: dict[str, Any]) -> None:
    rows = [
        [row["arm"], row["size"], f"{row['active'][0]:.1%}",
         percent(row["accuracy"]), nats(row["kl"])]
        for row in report["table"]
    ]  # fmt: skip
    columns = ["run", "size", "active", "accuracy", "KL to parent"]
    print_table(f"Ablations, {report['seeds']} seeds (mean ± std)", columns, rows)


if __name__ == "__main__":
    with at_the_command_line():
        main()
