"""Three sizes in BF16, FP8 and NVFP4 on the bundled parent: quantised after training, and healed.

    python recipes/quantised/formats.py --out runs/quantised          # half an hour a seed
    python recipes/quantised/formats.py --out runs/x --smoke          # the same code, a minute

Arms, all from one family whose sizes end on the edges of NVFP4's blocks:
    BF16          the family itself
    FP8, NVFP4    quantised after training (PTQ), inputs calibrated on the training rows
    QAD           then distilled from the BF16 parent through the format, all sizes together
    QAT           the same, on the rows' own next tokens
Every size is measured as it leaves: accuracy over the tasks, KL to the parent, bytes. A seed draws
rows, router, order and held-out problems anew. Writes `quantised.json` and `quantised.png`
(accuracy and KL against bytes, means over seeds); a stopped recipe goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.ticker import StrMethodFormatter

from star_elastic import bundled
from star_elastic.cli.bars import progress_bars
from star_elastic.cli.terminal import at_the_command_line, command_line, print_table
from star_elastic.demo import (
    CONTEXT,
    DEMO,
    MAX_NEW_TOKENS,
    PARENT,
    divergences_from_parent,
    run_config,
    shallow_parent,
    stages,
    write_rows,
)
from star_elastic.errors import ConfigError
from star_elastic.evaluate.accuracy import evaluate_plan
from star_elastic.evaluate.tasks import TASKS, sample_problems
from star_elastic.files.writing import write_json
from star_elastic.generate.engine import Generator
from star_elastic.generate.family import load
from star_elastic.generate.phases import think_and_answer
from star_elastic.models.load import load_parent
from star_elastic.progress import Progress
from star_elastic.report.charts import drawn_to
from star_elastic.rewrite.family import InputCalibration, quantise_family
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.train.config import QuantConfig, RouterConfig, RunConfig, StageConfig
from star_elastic.train.directory import ELASTIC, QUANTISED
from star_elastic.train.run import train
from star_elastic.train.state import has_state

CHOICES = {
    "hidden": tuple(range(192, 95, -16)),
    "experts": (16, 14, 12, 10, 8),
    "expert_ffn": (64, 48, 32, 16),
    "shared_ffn": tuple(range(128, 15, -16)),
    "ssm_heads": (16, 14, 12, 10, 8),
}
ARMS = {
    "BF16": ("", ""),
    "FP8 PTQ": ("fp8", ""),
    "FP8 QAD": ("fp8", "distillation"),
    "NVFP4 PTQ": ("nvfp4", ""),
    "NVFP4 QAT": ("nvfp4", "task"),
    "NVFP4 QAD": ("nvfp4", "distillation"),
}
"""Format and objective of the training through it."""
COLOURS = {"BF16": "#444444", "FP8": "#1f6fb4", "NVFP4": "#d9730d"}
MARKERS = {"": "o", "PTQ": "v", "QAT": "s", "QAD": "^"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--router-steps", type=int, default=80, help="of the family, of 2 windows")
    parser.add_argument("--steps", type=int, default=360, help="of the family, of 4 windows")
    parser.add_argument("--heal-steps", type=int, default=240, help="of QAD and QAT, of 4 windows")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of QAD and QAT")
    parser.add_argument("--problems", type=int, default=40, help="held-out, per task")
    parser.add_argument("--smoke", action="store_true", help="one seed, three arms, a few steps")
    options = parser.parse_args()
    options.samples, options.watched, options.max_new_tokens = 256, 40, MAX_NEW_TOKENS
    options.arms, options.context = list(ARMS), CONTEXT
    if options.smoke:
        options.seeds, options.router_steps, options.steps, options.heal_steps = 1, 1, 1, 1
        options.samples, options.watched, options.max_new_tokens, options.problems = 4, 1, 4, 1
        options.arms, options.context = ["BF16", "FP8 PTQ", "NVFP4 QAD"], 32
    options.out.mkdir(parents=True, exist_ok=True)
    with progress_bars() as bars:
        seeds = [run_seed(seed, options, bars) for seed in range(options.seeds)]
    report = {
        "command": command_line("recipes/quantised/formats.py"),
        "seeds": options.seeds,
        "problems": options.problems * len(TASKS),
        "heal_tokens": options.heal_steps * 4 * options.context,
        "learning_rate": options.learning_rate,
        "arms": {arm: summary([seed[arm] for seed in seeds]) for arm in options.arms},
    }
    for sizes in report["arms"].values():
        for name, size in sizes.items():
            size["of_bf16"] = share_of(size, report["arms"]["BF16"][name])
    write_json(options.out / "quantised.json", report)
    plot(report["arms"], options.out / "quantised.png")
    show(report["arms"])


def run_seed(seed: int, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Every size of every arm of one seed."""
    lab = Lab(options.out / "work" / f"seed-{seed}", seed, options, progress)
    lab.require_same_options()
    family = lab.family()
    return {arm: lab.measured(arm, lab.make_arm(family, arm)) for arm in options.arms}


@dataclass(frozen=True)
class Lab:
    """Where one seed's family and arms are made, unless they are there, and measured."""

    folder: Path
    seed: int
    options: argparse.Namespace
    progress: Progress

    def require_same_options(self) -> None:
        """Raises ConfigError if the directory holds what other options have made."""
        file = self.folder / "made_with.json"
        own = {k: v for k, v in vars(self.options).items() if k not in ("out", "seeds")}
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, own)
        elif json.loads(file.read_text(encoding="utf-8")) != own:
            raise ConfigError(f"{self.folder} was made otherwise; name another directory")

    @property
    def parent(self) -> Path:
        """The bundled parent, or what stands for it in a smoke run."""
        return shallow_parent(self.folder / "parent") if self.options.smoke else bundled.PARENT

    @property
    def rows(self) -> Path:
        """Training rows, drawn by this seed."""
        file, options = self.folder / "rows.jsonl", self.options
        if not file.exists():
            write_rows(file, 40 * (options.router_steps + options.steps) + 64, self.seed)
        return file

    def family(self) -> Path:
        """The BF16 family: as in the demo, on a grid of whole blocks."""
        run, options = self.folder / "family", self.options
        if not (run / ELASTIC).exists():
            share = options.router_steps / (options.router_steps + options.steps)
            recipe = replace(
                DEMO, parent=str(self.parent), choices=CHOICES,
                calibration_rows=2 * options.samples,
                stages=stages(options.router_steps, options.steps, context=options.context),
                router=replace(DEMO.router, commit_at=share), seed=self.seed,
            )  # fmt: skip
            self.train(run_config(recipe, self.rows, run))
        return run / ELASTIC

    def train(self, config: RunConfig) -> None:
        train(config, resume=has_state(Path(config.out)), progress=self.progress)

    def make_arm(self, family: Path, arm: str) -> Path:
        """The checkpoint of an arm."""
        format_name, objective = ARMS[arm]
        if not format_name:
            return family
        out, options = self.folder / file_name(arm), self.options
        if not objective:
            if not out.exists():
                calibration = InputCalibration(
                    files=(self.rows,), samples=options.samples, context=options.context
                )
                quantise_family(
                    family, out, format_name, calibration=calibration, progress=self.progress
                )
            return out
        if not (out / QUANTISED).exists():
            rate = options.learning_rate
            stage = StageConfig(
                tokens=options.heal_steps * 4 * options.context,
                context=options.context, batch_size=4,
                learning_rate=rate, final_learning_rate=rate / 20, warmup_steps=4,
                size_weights=(0.4, 0.3, 0.3),
            )  # fmt: skip
            recipe = replace(
                DEMO, parent=str(self.parent), choices={}, stages=(stage,), seed=self.seed
            )  # fmt: skip
            self.train(replace(
                run_config(recipe, self.rows, out),
                family=str(family), objective=objective, router=RouterConfig(),
                quant=QuantConfig(format=format_name, samples=options.samples),
            ))  # fmt: skip
        return out / QUANTISED

    def measured(self, arm: str, path: Path) -> dict[str, Any]:
        """What every size of an arm reaches."""
        file = self.folder / f"{file_name(arm)}.json"
        if not file.exists():
            write_json(file, dict(self.measure(path)))
        return json.loads(file.read_text(encoding="utf-8"))

    def measure(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Accuracy, KL to the parent and bytes of every size."""
        options = self.options
        family = load(path, "float32", "cpu")
        parent, _ = load_parent(self.parent)
        models = {PARENT: parent, **{name: family[name] for name in family}}
        generator = Generator(models, family.tokenizer, family.table.end_of_thinking)
        problems = sample_problems(TASKS, "test", options.problems, self.seed)
        watched = problems[:: max(len(problems) // options.watched, 1)]
        apart = divergences_from_parent(generator, list(family), watched)
        for name, size in family.sizes.items():
            plan = think_and_answer(name, name, max_new_tokens=options.max_new_tokens)
            result = evaluate_plan(generator, problems, plan, batch_size=200)
            cut = self.folder / "cut"
            shutil.rmtree(cut, ignore_errors=True)
            scales = family.checkpoint.input_scales(name)
            slice_checkpoint(path, size.widths, cut, input_scales=scales)
            yield (
                name,
                {
                    "widths": str(size.widths),
                    "accuracy": result.accuracy,
                    "per_task": dict(result.per_task),
                    "kl": apart[name],
                    "bytes": sum(file.stat().st_size for file in cut.glob("*.safetensors")),
                },
            )
            shutil.rmtree(cut)


def file_name(arm: str) -> str:
    return arm.replace(" ", "-").lower()


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every size of an arm: means and standard deviations over seeds, and what each found;
    `task_std` is the deviation over tasks of the means over seeds."""
    found = {}
    for name in seeds[0]:
        own = [seed[name] for seed in seeds]
        tasks = {
            task: statistics.mean(s["per_task"][task] for s in own) for task in own[0]["per_task"]
        }
        found[name] = {
            "accuracy": statistics.mean(s["accuracy"] for s in own),
            "accuracy_std": deviation([s["accuracy"] for s in own]),
            "task_std": deviation(list(tasks.values())),
            "per_task": tasks,
            "kl": statistics.mean(s["kl"] for s in own),
            "kl_std": deviation([s["kl"] for s in own]),
            "bytes": round(statistics.mean(s["bytes"] for s in own)),
            "seeds": own,
        }
    return found


def share_of(size: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
    """Accuracy relative to the unquantised size, seed by seed."""
    shares = [
        own["accuracy"] / max(other["accuracy"], 1e-9)
        for own, other in zip(size["seeds"], whole["seeds"], strict=True)
    ]
    return {"mean": statistics.mean(shares), "std": deviation(shares)}


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot(arms: dict[str, Any], file: Path) -> None:
    """Accuracy and KL to the parent against bytes: one line for each arm through its sizes."""
    with drawn_to(file, 2, (1000, 410), sharex=True) as (figure, panels):
        for arm, sizes in arms.items():
            kind, _, how = arm.partition(" ")
            megabytes = [size["bytes"] / 1e6 for size in sizes.values()]
            style = {"color": COLOURS[kind], "marker": MARKERS[how], "label": arm}
            style |= {"linestyle": "-" if how in ("", "QAD") else ":", "linewidth": 1.2}
            panels[0].plot(megabytes, [100 * s["accuracy"] for s in sizes.values()], **style)
            panels[1].plot(megabytes, [s["kl"] for s in sizes.values()], **style)
        panels[0].set_ylabel("accuracy, %")
        panels[1].set(ylabel="KL to the parent, nats per token", yscale="log")
        for panel in panels:
            panel.set(xscale="log", xlabel="MB on disk")
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        panels[0].legend()
        figure.suptitle("Small in many bits, or large in few: every size in every format")


def show(arms: dict[str, Any]) -> None:
    rows = [
        [
            arm, name, f"{size['accuracy']:.1%} ± {size['accuracy_std']:.1%}",
            f"{size['of_bf16']['mean']:.1%} ± {size['of_bf16']['std']:.1%}",
            f"{size['kl']:.4f} ± {size['kl_std']:.4f}", f"{size['bytes']:,}",
        ]
        for arm, sizes in arms.items() for name, size in sizes.items()
    ]  # fmt: skip
    columns = ["arm", "size", "accuracy", "of BF16", "KL to the parent", "bytes"]
    print_table("Every size in every format (mean ± std over seeds)", columns, rows)


if __name__ == "__main__":
    with at_the_command_line():
        main()
