"""Time of plans at batch 1 where arithmetic counts: what they read, read again by a larger model.

    python benchmarks/replay.py --evaluation runs/eval --out results/replay.json   # a hybrid of 67M
    python benchmarks/replay.py --evaluation runs/eval --smoke                     # seconds

The bundled family solves problems, but a step of it is all overhead, whatever the size: its time
says little about models that are read from memory. So every plan of an evaluation is run on the
bundled family, and all that its sizes read (which tokens, at once or one by one, from which cache)
is read again, in that order, by a hybrid of random weights whose sizes have the same shares of
active parameters. Compares the time of plans with that of the largest size alone: plans interleaved
problem by problem, medians of `--rounds`, summed over the first test problems of each task. Beside
it, from the evaluation and so over all of its test problems: accuracy, counted operations, weight
bytes, measured time. Choosing tokens is not replayed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import LARGE, TINY, build_model, medians_in_turn, widths_at
from transformers import PreTrainedModel

from star_elastic.architectures import architecture_of
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.written_config import GROUPED_MULTIPLE
from star_elastic.cli.terminal import at_the_command_line, command_line, print_table
from star_elastic.cost.count import CostModel
from star_elastic.errors import ConfigError
from star_elastic.evaluate.difficulty import dials_by_pair
from star_elastic.evaluate.grid import Entry, make_grid
from star_elastic.evaluate.problems import bundled_problems
from star_elastic.evaluate.run import DEFAULT_PROBLEMS
from star_elastic.files.writing import write_json
from star_elastic.generate.caches import RowCache
from star_elastic.generate.decode import BatchDecoder
from star_elastic.generate.family import load
from star_elastic.generate.phases import Generation
from star_elastic.models.submodel import build_submodel
from star_elastic.report.page import load_result

PLANS = (
    "large", "medium", "small", "small~large 5%", "small~medium 5%", "small~large 5% lines",
    "small>large", "large@72", "large@56",
)  # fmt: skip
BISECTIONS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluation", type=Path, required=True, help="directory of an `eval`")
    parser.add_argument(
        "--plans", nargs="+", default=PLANS, help="labels; absent ones are left out"
    )
    parser.add_argument("--problems", type=int, default=2, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny model, one problem, one round")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    evaluation = load_result(options.evaluation)
    entries = chosen(evaluation, options.plans)
    solved = solve(evaluation, entries, 1 if options.smoke else options.problems)
    if options.smoke:
        options.rounds, solved = 1, {label: found[:1] for label, found in solved.items()}
    config = TINY if options.smoke else LARGE
    models, shares = stand_ins(config, evaluation["sizes"])
    seconds = replayed(models, solved, options.rounds)
    result = {
        "command": command_line("benchmarks/replay.py"),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "parameters": sum(p.numel() for p in models[next(iter(models))].parameters()),
        "active_shares": shares,
        "num_problems": len(next(iter(solved.values()))),
        "plans": [
            row(plan, evaluation["plans"], seconds)
            for plan in evaluation["plans"]
            if plan["label"] in seconds
        ],
    }
    show(result)
    if options.out:
        write_json(options.out, result)


def chosen(evaluation: Mapping[str, Any], labels: Sequence[str]) -> list[Entry]:
    """The plans of the evaluation with these labels, the largest size alone first."""
    found, settings = evaluation["calibration"], evaluation["settings"]
    if settings["switch"] == "hand-over":
        raise ConfigError("caches that were handed over cannot be replayed; use --switch catch-up")
    entries = make_grid(
        tuple(settings["sizes"]), found["budgets"], dials_by_pair(found["policies"]),
        alike=found["alike"], max_new_tokens=settings["max_new_tokens"], switch=settings["switch"],
    )  # fmt: skip
    first = entries[0].sizes
    alone = next((e for e in entries if e.sizes == first and e.budget is None), None)
    if alone is None:
        raise ConfigError(f"the evaluation has no plan of {first[0]} alone without a budget")
    return [alone, *(e for e in entries if e.label in labels and e is not alone)]


def solve(
    evaluation: Mapping[str, Any], entries: Sequence[Entry], per_task: int
) -> dict[str, list[Generation]]:
    """What the family itself makes of the evaluation's first test problems of each task."""
    settings = evaluation["settings"]
    family = load(evaluation["elastic"], settings["dtype"], "cpu")
    counts = (
        DEFAULT_PROBLEMS if settings[name] is None else settings[name]
        for name in ("num_validation", "num_test")
    )
    splits = bundled_problems(*counts, settings["seed"])
    if settings["data"] != splits.name:
        raise ConfigError(f"only plans of {splits.name} are replayed, not of {settings['data']}")
    taken: dict[str, list[str]] = {}
    for problem in splits.test:
        taken.setdefault(problem.task, []).append(problem.question)
    prompts = [question for own in taken.values() for question in own[:per_task]]
    return {e.label: family.generator.generate(prompts, e.plan) for e in entries}


def stand_ins(
    config: Mapping[str, Any], sizes: Mapping[str, Any]
) -> tuple[dict[str, PreTrainedModel], dict[str, float]]:
    """A model of random weights for every size, with its share of the active parameters."""
    parent = build_model(config)
    axis_map = architecture_of(dict(config)).axis_map(dict(config))
    count = CostModel(axis_map).count
    whole = count(axis_map.full).active
    most = max(size["active"] for size in sizes.values())
    models, shares = {}, {}
    for name, size in sizes.items():
        widths = widths_of_share(axis_map, size["active"] / most)
        models[name] = build_submodel(parent, config, widths)
        shares[name] = count(widths).active / whole
    return models, shares


def widths_of_share(axis_map: AxisMap, share: float) -> Widths:
    """The same share of every axis, such that the active parameters are as near to `share` of all
    as bisection finds, in multiples that grouped products of experts take."""
    count = CostModel(axis_map).count
    wanted = share * count(axis_map.full).active
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if count(widths_at(axis_map, middle, step=GROUPED_MULTIPLE)).active < wanted:
            low = middle
        else:
            high = middle
    return axis_map.full if share == 1 else widths_at(axis_map, high, step=GROUPED_MULTIPLE)


def replayed(
    models: Mapping[str, PreTrainedModel], solved: Mapping[str, Sequence[Generation]], rounds: int
) -> dict[str, float]:
    """Seconds of every plan: the median of each problem, summed over problems."""
    total = dict.fromkeys(solved, 0.0)
    for number in range(len(next(iter(solved.values())))):
        sides = {label: partial(replay, models, own[number]) for label, own in solved.items()}
        for label, seconds in medians_in_turn(sides, rounds).items():
            total[label] += seconds
    return total


@torch.inference_mode()
def replay(models: Mapping[str, PreTrainedModel], generation: Generation) -> None:
    """Reads what the sizes of a plan have read, each with its own cache, in that order."""
    num = max(read.start + read.tokens for read in generation.reads)
    vocab_size = next(iter(models.values())).config.vocab_size
    ids = [place % vocab_size for place in range(num)]
    decoders = {r.size: BatchDecoder(models[r.size]) for r in generation.reads}
    kept: dict[str, tuple[RowCache, int]] = {}
    for read in generation.reads:
        decoder, stop = decoders[read.size], read.start + read.tokens
        if not read.at_once:
            for token in ids[read.start : stop]:
                decoder.step([token])
            continue
        for size, other in decoders.items():
            if len(other):
                kept[size] = other.take(0), other.lengths[0]
                other.keep([])
        if read.start:
            cache, length = kept[read.size]
            assert length == read.start, (length, read)
            decoder.resume([(cache, length, ids[read.start : stop])])
        else:
            decoder.prefill([ids[:stop]])


def row(
    plan: Mapping[str, Any], plans: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """A plan beside the largest size alone, the first that was replayed."""
    label, alone = plan["label"], next(iter(seconds))
    reference = next(own for own in plans if own["label"] == alone)["test"]
    found = plan["test"]
    return {
        "label": label,
        "accuracy": found["accuracy"],
        "operations": found["flops"] / reference["flops"],
        "weight_bytes": found["weight_bytes"] / reference["weight_bytes"],
        "time_in_batches": found["seconds"] / reference["seconds"],
        "time_replayed": seconds[label] / seconds[alone],
    }


def show(result: Mapping[str, Any]) -> None:
    print(
        f"replayed by a hybrid of {result['parameters']:,} parameters, {result['machine']}, "
        f"{result['num_problems']} problems, active shares "
        + ", ".join(f"{size} {share:.3f}" for size, share in result["active_shares"].items())
    )
    columns = ["accuracy", "operations", "weight_bytes", "time_in_batches", "time_replayed"]
    rows = [
        [plan["label"], f"{plan['accuracy']:.1%}", *(f"{plan[name]:.2f}" for name in columns[1:])]
        for plan in result["plans"]
    ]
    print_table(
        "Relative to the largest size alone",
        ["plan", *(name.replace("_", " ") for name in columns)], rows,
    )  # fmt: skip


if __name__ == "__main__":
    with at_the_command_line():
        main()
