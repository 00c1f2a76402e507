"""What comparisons on the bundled parent share: one lab, in which arms are trained and measured.

An arm is a set of sizes that train together over shared weights: all of them (a nested run), one
alone, or one from random weights. All arms of a seed see the same rows, the same sorted parent and
the same frozen teacher; they differ in what the comparison is about, and in nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from star_elastic import bundled
from star_elastic.axes import LAYERS
from star_elastic.axes.widths import Widths, parse_widths
from star_elastic.cli.bars import progress_bars
from star_elastic.cost.count import CostModel
from star_elastic.data.sources import Source
from star_elastic.demo import (
    CONTEXT,
    DEMO,
    MAX_NEW_TOKENS,
    PARENT,
    divergences_from_parent,
    run_config,
    shallow_parent,
    write_rows,
)
from star_elastic.errors import ConfigError
from star_elastic.evaluate.accuracy import evaluate_plan
from star_elastic.evaluate.tasks import TASKS, Problem, sample_problems
from star_elastic.files.writing import write_json
from star_elastic.generate.engine import Generator
from star_elastic.generate.phases import think_and_answer
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel, sort_in_place
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.progress import Progress
from star_elastic.router.commit import Commitment
from star_elastic.router.grid import Grid
from star_elastic.router.router import Router
from star_elastic.train.calibrate import Calibration
from star_elastic.train.config import CalibrationConfig, RunConfig, StageConfig
from star_elastic.train.loop import Trainer

SIZES = {"medium": {"active": 0.7}, "small": {"active": 0.5}, "tiny": {"active": 0.35}}


@dataclass(kw_only=True)
class Outcome:
    """One trained size of one arm.

    `active` is its share of the parent's active parameters. `curve` lists (tokens read, KL to the
    parent on held-out problems, nats per token); `tokens` is what the arm read in all and `flops`
    what its training cost, teacher included, for all of its sizes together.
    """

    arm: str
    size: str
    widths: Widths
    active: float
    accuracy: float
    kl: float
    tokens: int
    flops: float
    seconds: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "widths": str(self.widths)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Outcome:
        """The inverse of `to_json`."""
        curve = [(tokens, kl) for tokens, kl in content["curve"]]
        return cls(**{**content, "widths": Widths(parse_widths(content["widths"])), "curve": curve})


class Lab:
    """The bundled parent, its data and its held-out problems for one seed."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        num_rows: int,
        problems_per_task: int,
        watched: int,
        calibration_rows: int,
        max_new_tokens: int,
        smoke: bool,
        progress: Progress,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / f"rows-{seed}.jsonl"
        write_rows(rows, num_rows, seed)
        self.rows, self.folder, self.seed, self.progress = rows, folder, seed, progress
        self.parent = shallow_parent(folder / "parent") if smoke else bundled.PARENT
        self.teacher, self.config = load_parent(self.parent)
        self.tokenizer = load_tokenizer(self.parent)
        self.source = Source([rows], self.tokenizer, "answers")
        self.elastic_teacher = ElasticModel(self.teacher, self.config)
        self.architecture, self.axis_map = (
            self.elastic_teacher.architecture,
            self.elastic_teacher.axis_map,
        )
        self.cost = CostModel(self.axis_map)
        # Problems and training rows are apart by a hash of the problem, whatever the seed.
        self.problems = sample_problems(TASKS, "test", problems_per_task, seed)
        # Those on which the divergence from the parent is measured.
        self.watched = self.problems[:: max(len(self.problems) // watched, 1)]
        self._calibration_rows = calibration_rows
        self._max_new_tokens = max_new_tokens
        every = {LAYERS: tuple(range(len(self.axis_map.axes[LAYERS].layers), 0, -1))}
        self.calibration = Calibration(
            replace(self._run_config(DEMO.sizes, DEMO.stages, 1.0), choices=every),
            folder / f"calibration-{seed}", self.teacher, self.config, self.axis_map,
            [self.source], progress,
        )  # fmt: skip
        self._orders = self.calibration.orders()
        self._basis = self.calibration.basis()
        del self._orders["hidden"]

    def _run_config(
        self,
        sizes: Mapping[str, Mapping[str, float]],
        stages: Sequence[StageConfig],
        commit_at: float,
    ) -> RunConfig:
        recipe = replace(
            DEMO, parent=str(self.parent), sizes=sizes, stages=tuple(stages), seed=self.seed,
            router=replace(DEMO.router, commit_at=commit_at),
        )  # fmt: skip
        calibration = CalibrationConfig(
            num_samples=self._calibration_rows, batch_size=32, context=CONTEXT, basis="principal"
        )
        config = run_config(recipe, self.rows, self.folder)
        return replace(config, calibration=calibration)

    def student(self) -> ElasticModel:
        """A fresh sorted parent to be trained."""
        parent, _ = load_parent(self.parent)
        sort_in_place(parent, self.axis_map, self._orders, self._basis)
        return ElasticModel(parent, self.config)

    def random_student(self, widths: Widths) -> ElasticModel:
        """A model of a size's shape with random weights."""
        config = self.architecture.config_at(self.config, widths)
        fields = {k: v for k, v in config.items() if k != "model_type"}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model_config = AutoConfig.for_model(config["model_type"], **fields)
            model = AutoModelForCausalLM.from_config(model_config)
        return ElasticModel(model, config)

    def trainer(
        self,
        student: ElasticModel,
        sizes: Mapping[str, Mapping[str, float]],
        stages: Sequence[StageConfig],
        *,
        grid: Grid | None = None,
        widths: Mapping[str, Widths] | None = None,
        commit_at: float = 1.0,
    ) -> Trainer:
        """A run over `sizes`: with a grid the router learns their widths, else they are given."""
        grid = grid or Grid({"hidden": (self.axis_map.axes["hidden"].size,)})
        router = Router(grid, len(sizes), self.seed)
        trainer = Trainer(
            self._run_config(sizes, stages, commit_at), student, self.elastic_teacher, router,
            [self.source], sizes, self.cost,
        )  # fmt: skip
        if widths:
            trainer.committed = {name: Commitment(widths[name], 0.0) for name in sizes}
        return trainer

    def run(self, arm: str, trainer: Trainer, *, points: int = 6) -> list[Outcome]:
        """Trains an arm to its end and measures each of its sizes."""
        steps = trainer.curriculum.num_steps
        marks = {round(steps * (point + 1) / points) for point in range(points)}
        curves: dict[str, list[tuple[int, float]]] = {name: [] for name in trainer.names}
        self.progress.stage(f"{arm} ({self.seed})", steps)
        flops = seconds = 0.0
        while trainer.step < steps:
            begin = time.monotonic()
            report = trainer.train_step()
            seconds += time.monotonic() - begin
            flops += self._flops(trainer, report.num_tokens, list(report.kd))
            if trainer.step in marks and trainer.committed and trainer.step < steps:
                for name, kl in self.divergences(trainer, self.watched).items():
                    curves[name].append((trainer.tokens, kl))
            self.progress.advance(trainer.step)
        measured = self.measure(trainer)
        return [
            Outcome(
                arm=arm, size=name, widths=trainer.committed[name].widths, kl=kl,
                active=self.active(trainer.committed[name].widths),
                accuracy=accuracy, tokens=trainer.tokens, flops=flops,
                seconds=seconds, curve=[*curves[name], (trainer.tokens, kl)],
            )
            for name, (accuracy, kl) in measured.items()
        ]  # fmt: skip

    def active(self, widths: Widths) -> float:
        """Share of the parent's active parameters at some of its widths."""
        return self.cost.count(widths).active / self.cost.full.active

    def _flops(self, trainer: Trainer, num_tokens: int, names: Sequence[str]) -> float:
        """Operations of a step: the teacher's forward once, three forwards' worth per size (forward
        and backward). While the router learns, a size costs up to the whole parent and is counted
        as such.
        """
        full = self.cost.full.flops_per_token
        own = CostModel(trainer.student.axis_map)
        each = [
            own.count(trainer.committed[name].widths).flops_per_token if trainer.committed else full
            for name in names
        ]
        return num_tokens * (full + 3 * sum(each))

    def measure(self, trainer: Trainer) -> dict[str, tuple[float, float]]:
        """Accuracy with thinking, and KL to the parent, of every size."""
        generator = self._generator(trainer)
        apart = divergences_from_parent(generator, trainer.names, self.watched)
        found = {}
        for name in trainer.names:
            plan = think_and_answer(name, name, max_new_tokens=self._max_new_tokens)
            result = evaluate_plan(generator, self.problems, plan, batch_size=200)
            found[name] = (result.accuracy, apart[name])
        return found

    def divergences(self, trainer: Trainer, problems: Sequence[Problem]) -> dict[str, float]:
        """KL to the parent of every size, nats per token."""
        return divergences_from_parent(self._generator(trainer), trainer.names, problems)

    def _generator(self, trainer: Trainer) -> Generator:
        student = trainer.student
        models: dict[str, Any] = {PARENT: self.teacher}
        for name, fixed in trainer.committed.items():
            models[name] = build_submodel(student.parent, student.model_config, fixed.widths)
        return Generator(models, self.tokenizer, self.architecture.end_of_thinking)


# What the recipes' command lines share


def parse_options(
    description: str, *, seeds: int, router_steps: int, steps: int, problems: int
) -> argparse.Namespace:
    """The options of a recipe, with its defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--router-steps", type=int, default=router_steps, help="of 2 windows")
    parser.add_argument("--steps", type=int, default=steps, help="of 4 windows")
    parser.add_argument("--problems", type=int, default=problems, help="held-out, per task")
    parser.add_argument("--smoke", action="store_true", help="one seed, a few steps")
    options = parser.parse_args()
    options.watched, options.calibration_rows, options.max_new_tokens = 40, 256, MAX_NEW_TOKENS
    options.context = CONTEXT
    if options.smoke:
        options.seeds, options.router_steps, options.steps, options.problems = 1, 1, 1, 1
        options.watched, options.calibration_rows, options.max_new_tokens = 1, 4, 4
        options.context = 64  # half of it still holds what some prompts ask for
    return options


def run_seeds(
    options: argparse.Namespace, arms: Callable[[Lab, argparse.Namespace], list[Outcome]]
) -> list[Outcome]:
    """All arms of every seed. A seed's outcomes are kept, so that a stopped recipe goes on.

    Raises ConfigError if the directory holds those of other options or of another recipe.
    """
    outcomes = []
    made_with = {k: v for k, v in vars(options).items() if k not in ("out", "seeds")}
    made_with["recipe"] = Path(sys.argv[0]).stem
    with progress_bars() as bars:
        for seed in range(options.seeds):
            done = options.out / "work" / f"outcomes-{seed}.json"
            if done.is_file():
                if json.loads(done.read_text(encoding="utf-8"))["made_with"] != made_with:
                    raise ConfigError(f"{done} was made otherwise; name another directory")
            else:
                lab = Lab(
                    options.out / "work", seed,
                    num_rows=40 * (options.router_steps + options.steps) + 64,
                    problems_per_task=options.problems, watched=options.watched,
                    calibration_rows=options.calibration_rows,
                    max_new_tokens=options.max_new_tokens, smoke=options.smoke, progress=bars,
                )  # fmt: skip
                found = [replace(outcome, seed=seed) for outcome in arms(lab, options)]
                rows = [outcome.to_json() for outcome in found]
                write_json(done, {"made_with": made_with, "outcomes": rows})
            rows = json.loads(done.read_text(encoding="utf-8"))["outcomes"]
            outcomes += [Outcome.from_json(row) for row in rows]
    return outcomes


def spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation over seeds."""
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def percent(mean_and_std: Sequence[float]) -> str:
    """`mean ± std` of shares."""
    return f"{mean_and_std[0]:.1%} ± {mean_and_std[1]:.1%}"


def nats(mean_and_std: Sequence[float]) -> str:
    """`mean ± std` of divergences."""
    return f"{mean_and_std[0]:.4f} ± {mean_and_std[1]:.4f}"
