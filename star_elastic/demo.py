"""The whole road on the bundled parent: rank, train, slice, evaluate, report.

`DEMO` is the recipe behind `star-elastic demo` (minutes on 2 CPU cores); longer recipes are other
values of `Recipe` through the same `run_recipe`.
"""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import PreTrainedModel

import star_elastic
from star_elastic import bundled
from star_elastic.architectures import read_config
from star_elastic.axes import LAYERS
from star_elastic.cost.count import CostModel, Workload
from star_elastic.data.rendering import Renderer
from star_elastic.data.source_config import SourceConfig
from star_elastic.errors import CheckpointError, Interrupted
from star_elastic.evaluate.accuracy import Evaluation, evaluate_plan
from star_elastic.evaluate.tasks import TASKS, Problem, draw_conversation, messages, sample_problems
from star_elastic.files.paths import exists, names_in
from star_elastic.files.writing import require_folder, write_json, write_text
from star_elastic.generate.engine import Generator
from star_elastic.generate.family import ElasticFamily, load
from star_elastic.generate.phases import Plan, think_and_answer
from star_elastic.measure.divergence import compare, read
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel, sort_in_place
from star_elastic.progress import Progress, Silent
from star_elastic.report.charts import plot_plans
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.strict import to_plain
from star_elastic.train.config import (
    CalibrationConfig,
    EngineConfig,
    RouterConfig,
    RunConfig,
    StageConfig,
)
from star_elastic.train.directory import ELASTIC, METRICS
from star_elastic.train.run import train
from star_elastic.train.state import has_state

Item = TypeVar("Item")
Result = TypeVar("Result")
PARENT = "parent"
UNTRAINED = "untrained"
CONTEXT = 256
LEARNING_RATE = 1e-3
EVALUATION_BATCH = 200
MAX_NEW_TOKENS = 192
KL_PROBLEMS = 40
WORKERS = 2
"""Threads that train and evaluate: the smallest machines have two cores."""


def shallow_parent(out: Path) -> Path:
    """`out`, where the bundled parent's slice of five layers is written unless it is there: two of
    each kind but attention, in less than half of the time. Smoke runs of recipes train it."""
    if not exists(out):
        count = read_config(bundled.PARENT)["num_hidden_layers"]
        kept = tuple(int(layer < 3 or layer >= count - 2) for layer in range(count))
        slice_checkpoint(bundled.PARENT, {LAYERS: kept}, out)
    return out


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of the whole road on a parent of the bundled one's kind.

    `sizes` from the largest, each with its budgets; `budgets` are the thinking budgets (tokens) to
    try beside none at all; `pairs` the (thinks, answers) pairs; `max_new_tokens` of a problem;
    `calibration_rows` are ranked on; `parent` other than the bundled one; the rest as in the run
    config.
    """

    sizes: Mapping[str, Mapping[str, float]]
    choices: Mapping[str, tuple[int, ...]]
    num_rows: int
    stages: tuple[StageConfig, ...]
    problems_per_task: int
    budgets: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    max_new_tokens: int = MAX_NEW_TOKENS
    workload: Workload = field(default_factory=Workload)
    router: RouterConfig = field(default_factory=RouterConfig)
    calibration_rows: int = 512
    seed: int = 0
    parent: str = ""


def stages(
    router_steps: int,
    steps: int,
    *,
    windows: int = 4,
    context: int = CONTEXT,
    size_weights: tuple[float, ...] = (0.4, 0.3, 0.3),
) -> tuple[StageConfig, ...]:
    """The curriculum of a short run on the bundled parent.

    While the router learns, few windows a step: its noise comes from the draws of widths, not from
    the data, and each of its steps costs as much as the widest choice. The large size weighs most:
    it begins as the parent and must not lose what the others change for themselves. In a run of
    minutes they change little, and the small one, which has the longest way to go, weighs most.
    """

    def stage(steps: int, windows: int, *, warmup: int, final_share: float) -> StageConfig:
        return StageConfig(
            tokens=steps * windows * context, context=context, batch_size=windows,
            size_weights=size_weights, learning_rate=LEARNING_RATE,
            final_learning_rate=LEARNING_RATE * final_share, warmup_steps=warmup,
        )  # fmt: skip

    return (
        stage(router_steps, 2, warmup=max(router_steps // 4, 1), final_share=1),
        stage(steps, windows, warmup=1, final_share=1 / 50),
    )


DEMO = Recipe(
    sizes={"large": {"active": 1.0}, "medium": {"active": 0.75}, "small": {"active": 0.5}},
    choices={
        "hidden": tuple(range(192, 95, -8)),
        "experts": (16, 14, 12, 10, 8),
        "expert_ffn": tuple(range(64, 15, -8)),
        "shared_ffn": tuple(range(128, 15, -16)),
        "ssm_heads": (16, 14, 12, 10, 8),
    },
    num_rows=10_000,
    stages=stages(80, 250, size_weights=(0.3, 0.3, 0.4)),
    problems_per_task=15,
    budgets=(0, 64),
    pairs=(("small", "large"),),
    router=RouterConfig(commit_at=80 / 330),
    calibration_rows=256,
)


def run_recipe(recipe: Recipe, out: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Runs or resumes a recipe in the directory `out`; returns the report it writes there.

    Leaves `elastic/` (the family), `slices/<size>/` (ordinary checkpoints), `report.json` and
    `pareto.png`. Raises CheckpointError if `out` holds a finished run or something else.
    """
    out, progress = Path(out), progress or Silent()
    rows_file, run = out / "train.jsonl", out / "run"
    require_folder(out)
    if exists(out / "report.json"):
        raise CheckpointError(f"{out} holds a finished run; name another directory for a new one")
    if exists(out) and names_in(out) and not exists(rows_file):
        raise CheckpointError(f"{out} is not empty; name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    if not exists(rows_file):
        write_rows(rows_file, recipe.num_rows, recipe.seed)
    elastic = run / ELASTIC
    if not exists(elastic):
        try:
            train(run_config(recipe, rows_file, run), resume=has_state(run), progress=progress)
        except Interrupted:
            raise Interrupted(f"stopped; the same command goes on where {run} stands") from None
    family = load(elastic, "float32", "cpu")
    cut_slices(family, out / "slices", progress)
    problems = sample_problems(TASKS, "test", recipe.problems_per_task, recipe.seed)
    generator = Generator(
        _models(family, Path(recipe.parent or bundled.PARENT)), family.tokenizer,
        family.table.end_of_thinking,
    )  # fmt: skip
    evaluations = evaluate(generator, problems, plans(recipe), progress)
    solved = problems[:: max(len(problems) // KL_PROBLEMS, 1)]
    sizes = [name for name in generator.models if name != PARENT]
    divergences = divergences_from_parent(generator, sizes, solved, progress)
    report = make_report(recipe, family, evaluations, divergences, run)
    plot_plans(
        [e for e in evaluations if UNTRAINED not in e.label],
        out / "pareto.png",
        title="Bundled parent: one size alone against small thinks, large answers",
    )
    write_json(out / "report.json", report)
    return report


def write_rows(file: Path, count: int, seed: int) -> None:
    """Writes `count` training conversations as JSON lines, atomically."""
    draw = random.Random(f"rows/{seed}")
    rows = (json.dumps({"messages": draw_conversation(draw)}) for _ in range(count))
    write_text(file, "\n".join(rows) + "\n")


def run_config(recipe: Recipe, rows: Path, run: Path) -> RunConfig:
    """The run config of a recipe."""
    return RunConfig(
        parent=str(recipe.parent or bundled.PARENT),
        out=str(run),
        seed=recipe.seed,
        sizes=recipe.sizes,
        choices=recipe.choices,
        workload=recipe.workload,
        # The report is the verdict.
        data=(SourceConfig(files=(str(rows.absolute()),), loss_on="answers", held_out=0),),
        stages=recipe.stages,
        calibration=CalibrationConfig(
            num_samples=recipe.calibration_rows, batch_size=32, basis="principal"
        ),
        router=recipe.router,
        # On so small a model fp32 on two threads is as fast as bf16, and exact.
        engine=EngineConfig(save_every=100, workers=WORKERS, autocast=False),
    )


def cut_slices(family: ElasticFamily, directory: Path, progress: Progress) -> None:
    """Cuts every size into a checkpoint of its own and checks it against the size in memory.

    Raises CheckpointError if a saved slice does not compute what the submodel computes.
    """
    progress.stage("slice", len(family.sizes))
    ids = torch.arange(24)[None] % family.parent.config.vocab_size
    for number, (name, size) in enumerate(family.sizes.items(), start=1):
        out = directory / name
        if not out.exists():
            slice_checkpoint(family.path, size.widths, out)
        with torch.inference_mode():
            expected = load_parent(out)[0](input_ids=ids).logits
            difference = (expected - family[name](input_ids=ids).logits).abs().max()
        if difference > 1e-5 * expected.abs().max():
            raise CheckpointError(
                f"{out} differs from size {name!r} by {difference:.1e}; remove it, run again"
            )
        progress.advance(number, name)


def _models(family: ElasticFamily, path: Path) -> dict[str, PreTrainedModel]:
    """The parent, every size, and the same widths cut from the sorted parent without training."""
    parent, config = load_parent(path)
    models = {PARENT: parent, **family}
    sorted_parent, _ = load_parent(path)
    sort_in_place(sorted_parent, family.axis_map, family.checkpoint.orders, family.checkpoint.basis)
    for name, size in family.sizes.items():
        if size.widths != family.axis_map.full:
            models[f"{name} {UNTRAINED}"] = build_submodel(sorted_parent, config, size.widths)
    return models


def plans(recipe: Recipe) -> list[Plan]:
    """Every plan the report compares: single sizes, untrained slices, pairs, at each budget."""
    alone = [(name, name) for name in recipe.sizes]
    untrained = [
        (f"{name} {UNTRAINED}",) * 2
        for name, budgets in recipe.sizes.items()
        if any(share < 1 for share in budgets.values())
    ]
    ways = [(*pair, None) for pair in ((PARENT, PARENT), *alone, *untrained, *recipe.pairs)] + [
        (think, answer, budget)
        for think, answer in (*alone, *recipe.pairs)
        for budget in recipe.budgets
        if budget or think == answer
    ]
    tokens = recipe.max_new_tokens
    return [think_and_answer(t, a, thinking_budget=b, max_new_tokens=tokens) for t, a, b in ways]


def evaluate(
    generator: Generator,
    problems: Sequence[Problem],
    plans: Sequence[Plan],
    progress: Progress,
) -> list[Evaluation]:
    """Evaluates every plan on the same problems."""
    progress.stage("evaluate", len(plans))
    size = min(EVALUATION_BATCH, len(problems))
    return _side_by_side(
        partial(evaluate_plan, generator, problems, batch_size=size),
        plans,
        lambda done, found: progress.advance(done, f"{found.label} {found.accuracy:.1%}"),
    )


def divergences_from_parent(
    generator: Generator,
    names: Sequence[str],
    problems: Sequence[Problem],
    progress: Progress | None = None,
) -> dict[str, float]:
    """KL(parent || size) of sizes by name, in nats per token of the assistant's turns of solved
    problems."""
    progress = progress or Silent()
    progress.stage("compare", 1 + len(names))
    renderer = Renderer(generator.tokenizer, "answers")
    documents = [renderer.document({"messages": messages(problem)}) for problem in problems]
    parent, *sizes = _side_by_side(
        lambda name: read(generator.models[name], documents),
        [PARENT, *names],
        lambda done, _: progress.advance(done),
    )
    found = zip(names, sizes, strict=True)
    return {name: compare(parent, size, documents).kl for name, size in found}


def _side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], tell: Callable[[int, Result], None]
) -> list[Result]:
    """The results in order; `tell` gets how many there are, and the last one. Threads each compute
    alone: products of so small a model keep one core busy, not two."""
    count, done = min(WORKERS, os.cpu_count() or 1), []
    with ThreadPoolExecutor(count, "evaluation", torch.set_num_threads, (1,)) as pool:
        for found in pool.map(work, items):
            done.append(found)
            tell(len(done), found)
    return done


def make_report(
    recipe: Recipe,
    family: ElasticFamily,
    evaluations: Sequence[Evaluation],
    divergences: Mapping[str, float],
    run: Path,
) -> dict[str, Any]:
    """Everything measured, as plain data."""
    cost = CostModel(family.axis_map, recipe.workload)
    full = cost.full
    by_label = {e.label: e for e in evaluations}
    parent = by_label[PARENT]
    sizes = {}
    for name, size in family.sizes.items():
        counted = cost.count(size.widths)
        untrained = by_label.get(f"{name} {UNTRAINED}")
        sizes[name] = {
            "widths": dict(size.widths),
            "budgets": dict(size.budgets),
            "budget_miss": size.cost["budget_miss"],
            "repair": dict(size.repair),
            "widths_from": size.widths_from,
            "total": counted.total,
            "active": counted.active,
            "total_share": counted.total / full.total,
            "active_share": counted.active / full.active,
            "flops_per_token": counted.flops_per_token,
            "budget_shares": {m: counted.metric(m) / full.metric(m) for m in size.budgets},
            "accuracy": by_label[name].accuracy,
            "interval": by_label[name].interval,
            "share_of_parent": by_label[name].accuracy / max(parent.accuracy, 1e-9),
            "untrained_accuracy": untrained.accuracy if untrained else None,
            "kl_to_parent": divergences[name],
            "untrained_kl": divergences.get(f"{name} {UNTRAINED}"),
        }
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return {
        "package_version": star_elastic.__version__,
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "recipe": to_plain(recipe),
        "training": {
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "tokens_per_size": sum(row["num_tokens"] for row in rows),
            "steps": len(rows),
        },
        "parent": {
            "accuracy": parent.accuracy,
            "interval": parent.interval,
            "total": full.total,
            "active": full.active,
        },
        "sizes": sizes,
        "evaluations": [e.to_json() for e in evaluations],
    }
