"""Every axis for real: each axis of the bundled parent cut alone, at equal cost.

    python recipes/hour/axes_alone.py --out runs/axes
    python recipes/hour/axes_alone.py --out runs/axes-smoke --smoke

For a cost (active or total parameters) and a share of it to save, each axis gets the width that
saves nearest to that much; axes that cannot save so much alone are left out. All cuts are then
distilled in one nested run with fixed widths, and evaluated before and after.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from star_elastic import bundled
from star_elastic.axes.widths import Widths
from star_elastic.cli.bars import progress_bars
from star_elastic.cli.terminal import at_the_command_line, print_table
from star_elastic.cost.count import CostModel
from star_elastic.data.sources import Source
from star_elastic.demo import (
    DEMO,
    PARENT,
    Recipe,
    divergences_from_parent,
    run_config,
    shallow_parent,
    stages,
    write_rows,
)
from star_elastic.evaluate.accuracy import evaluate_plan
from star_elastic.evaluate.tasks import TASKS, sample_problems
from star_elastic.generate.engine import Generator
from star_elastic.generate.phases import DEFAULT_MAX_NEW_TOKENS, think_and_answer
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel, sort_in_place
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.router.commit import Commitment
from star_elastic.router.router import Router
from star_elastic.train.calibrate import Calibration
from star_elastic.train.config import StageConfig
from star_elastic.train.loop import Trainer

NEAR = 0.01
"""A cut counts as equal in cost if it is within this share of the parent's cost."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One axis cut alone to save a share of one cost."""

    metric: str
    saved: float
    axis: str
    widths: Widths

    @property
    def name(self) -> str:
        return f"{self.axis}={self.widths[self.axis]}"


def one_stage(plain: StageConfig, steps: int, num_sizes: int) -> StageConfig:
    """The last stage of a recipe for so many steps, in which all cuts weigh the same."""
    tokens = steps * plain.batch_size * plain.context
    return replace(plain, tokens=tokens, size_weights=(1 / num_sizes,) * num_sizes)


def equal_cuts(cost: CostModel, metric: str, saved: float) -> list[Cut]:
    """For each axis, the width that saves nearest to `saved` of the cost, where one comes near."""
    full = cost.axis_map.full
    whole = cost.count(full).metric(metric)
    cuts = []
    for name, axis in cost.axis_map.axes.items():
        if not axis.ranked:
            continue
        step = axis.num_groups if axis.num_groups > 1 or axis.size <= 16 else 8
        grid = [w for w in range(axis.size - step, axis.minimum - 1, -step) if w > 0]
        share = {w: 1 - cost.count(full.replace(**{name: w})).metric(metric) / whole for w in grid}
        width = min(share, key=lambda w: abs(share[w] - saved))
        if abs(share[width] - saved) <= NEAR:
            widths = full.replace(**{name: width})
            cuts.append(Cut(metric=metric, saved=share[width], axis=name, widths=widths))
    return cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100, help="nested distillation steps")
    parser.add_argument("--problems", type=int, default=20, help="problems per task")
    parser.add_argument("--smoke", action="store_true", help="two steps, one problem per task")
    options = parser.parse_args()
    recipe, max_new_tokens = DEMO, DEFAULT_MAX_NEW_TOKENS
    if options.smoke:
        options.steps, options.problems, max_new_tokens = 2, 1, 8
        recipe = replace(
            DEMO, parent=str(shallow_parent(options.out / "parent")),
            calibration_rows=16, stages=stages(1, 1, windows=2, context=32),
        )  # fmt: skip
    report = measure(recipe, options.out, options.steps, options.problems, max_new_tokens)
    columns = ["cut alone", "cost", "saved", "KL untrained", "KL trained",
               "accuracy untrained", "accuracy trained"]  # fmt: skip
    rows = [
        [c["name"], c["metric"], f"{c['saved']:.1%}", f"{c['kl_untrained']:.4f}",
         f"{c['kl_trained']:.4f}", f"{c['accuracy_untrained']:.1%}", f"{c['accuracy_trained']:.1%}"]
        for c in report["cuts"]
    ]  # fmt: skip
    print_table(f"Each axis alone (parent {report['parent_accuracy']:.1%})", columns, rows)


def measure(
    recipe: Recipe, out: Path, steps: int, problems_per_task: int, max_new_tokens: int
) -> dict:
    """Cuts, distils, evaluates; writes `axes_alone.json` and returns its content."""
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "train.jsonl"
    write_rows(rows, max(16 * steps, 64), DEMO.seed)
    path = recipe.parent or bundled.PARENT
    parent, config = load_parent(path)
    teacher, _ = load_parent(path)
    tokenizer = load_tokenizer(path)
    elastic = ElasticModel(parent, config)
    cost = CostModel(elastic.axis_map)
    cuts = [*equal_cuts(cost, "active", 0.12), *equal_cuts(cost, "total", 0.2)]
    sizes = {c.name: {c.metric: 1 - c.saved} for c in cuts}
    stage = one_stage(recipe.stages[-1], steps, len(sizes))
    recipe = replace(recipe, sizes=sizes, stages=(stage,))
    run = run_config(recipe, rows, out)
    source = Source([rows], tokenizer, "answers")
    with progress_bars() as bars:
        calibration = Calibration(run, out, teacher, config, elastic.axis_map, [source], bars)
        orders, basis = calibration.orders(), calibration.basis()
        sort_in_place(parent, elastic.axis_map, orders, basis)
        problems = sample_problems(TASKS, "test", problems_per_task, DEMO.seed)

        def evaluate() -> dict[str, tuple[float, float]]:
            models = {PARENT: teacher}
            models |= {c.name: build_submodel(parent, config, c.widths) for c in cuts}
            generator = Generator(models, tokenizer, elastic.architecture.end_of_thinking)
            bars.stage("evaluate", len(models))
            apart = divergences_from_parent(generator, list(models), problems[::5])
            found = {}
            for number, name in enumerate(models, start=1):
                plan = think_and_answer(name, name, max_new_tokens=max_new_tokens)
                accuracy = evaluate_plan(generator, problems, plan)
                found[name] = (accuracy.accuracy, apart[name])
                bars.advance(number, name)
            return found

        before = evaluate()
        router = Router({"hidden": (elastic.axis_map.axes["hidden"].size,)}, len(sizes))
        trainer = Trainer(
            run, elastic, ElasticModel(teacher, config), router, [source], sizes, cost
        )
        trainer.committed = {c.name: Commitment(c.widths, 0.0) for c in cuts}
        bars.stage("train", steps)
        while trainer.step < trainer.curriculum.num_steps:
            trainer.train_step()
            bars.advance(trainer.step)
        elastic.eval()
        after = evaluate()
    report = {
        "command": "python recipes/hour/axes_alone.py --out runs/axes",
        "steps": steps,
        "problems_per_task": problems_per_task,
        "parent_accuracy": before[PARENT][0],
        "cuts": [
            {
                "name": c.name, "metric": c.metric, "saved": c.saved,
                "accuracy_untrained": before[c.name][0], "kl_untrained": before[c.name][1],
                "accuracy_trained": after[c.name][0], "kl_trained": after[c.name][1],
            }
            for c in cuts
        ],
    }  # fmt: skip
    (out / "axes_alone.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    with at_the_command_line():
        main()
