"""How much of SmolLM2-135M can be cut without training, and what a good order is worth.

Ranks the parent's units on calibration text, sorts it, cuts prefixes of one or several axes at
about 10, 20 and 30 % of the parameters, and measures perplexity on other text: units ordered by
importance, by weight magnitude and at random. On the way it checks, on these real weights, that
sorting leaves the logits alone and that a slice saved to disk is the submodel in memory.

    python recipes/smollm2/prepare.py --work WORK
    python recipes/smollm2/rank_and_cut.py --work WORK

Writes smollm2_cuts.json and smollm2_cuts.png into --out, and smollm2_scores.safetensors, a sorted
checkpoint and one slice into WORK. `--smoke` runs the same code on a tiny random model, offline.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from prepare import SEPARATOR, prepare_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from star_elastic.architectures import architecture_of
from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.cost.count import CostModel
from star_elastic.data.rendering import Document
from star_elastic.data.row_files import JsonLines
from star_elastic.errors import ConfigError
from star_elastic.files.writing import write_json
from star_elastic.importance.estimate import estimate_scores
from star_elastic.importance.files import ScoreInfo, save_scores
from star_elastic.importance.orders import magnitude_scores, orders_from_scores, random_orders
from star_elastic.measure.divergence import Reading, compare, read
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel
from star_elastic.nesting.slice import Orders, sort_state
from star_elastic.report.charts import drawn_to
from star_elastic.rewrite.stream import slice_checkpoint, sort_checkpoint
from star_elastic.train.fingerprint import digest_weights

REMOVED = (0.1, 0.2, 0.3)
"""Shares of the parent's parameters to cut."""
FFN_STEP = 16
CASES = (("hidden", "ffn", "heads"), ("hidden", "ffn"), ("ffn",), ("hidden",), ("heads",))
"""Axes that are cut together."""
TOLERANCE = 1e-5
"""Allowed difference of float32 logits, relative to the largest."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run does; every default is defined here."""

    work: Path
    out: Path = Path("results")
    calibration_tokens: int = 16_384
    evaluation_tokens: int = 8_192
    window: int = 512
    random_seeds: int = 2
    dtype: str = "bfloat16"
    smoke: bool = False

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        line = "python recipes/smollm2/rank_and_cut.py --work WORK"
        for name, value in asdict(self).items():
            if name not in ("work", "out") and value != getattr(Run, name):
                option = "--" + name.replace("_", "-")
                line += f" {option}" if value is True else f" {option} {value}"
        return line


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One measured submodel. `nats` is per token; differences are paired by window."""

    axes: str
    order: str
    widths: dict[str, int]
    parameters: int
    removed: float
    nats: float
    perplexity: float
    nats_above_parent: float
    standard_error: float


def main() -> int:
    run = parse_run()
    if run.smoke:
        prepare_tiny(run.work)
    started = time.perf_counter()
    parent, config = load_parent(run.work / "parent")
    axis_map = architecture_of(config).axis_map(config)
    calibration = read_windows(run, "calibration", run.calibration_tokens)
    evaluation = read_windows(run, "evaluation", run.evaluation_tokens)

    runner = copy.deepcopy(parent).to(getattr(torch, run.dtype))
    scores = rank(run, runner, axis_map, calibration)
    orders: dict[str, Orders] = {
        "importance": orders_from_scores(scores, axis_map),
        "magnitude": orders_from_scores(magnitude_scores(parent.state_dict(), axis_map), axis_map),
        **{f"random {seed}": random_orders(axis_map, seed) for seed in range(run.random_seeds)},
    }
    checks = check_laws(run, parent, config, axis_map, orders["importance"], evaluation[:1])
    documents = [Document(ids, first=0) for ids in evaluation.tolist()]
    exact = read(parent, documents)
    reference = compare(exact, exact, documents)
    del parent
    uncut = read(runner, documents).apart()  # the runner's weights will change
    before = compare(uncut, uncut, documents)
    say(f"parent: perplexity {before.perplexity:.3f} in {run.dtype}")
    cuts = list(measure_cuts(runner, config, axis_map, orders, documents, uncut))

    report = {
        "command": run.command,
        "hardware": f"2 CPU cores, {torch.get_num_threads()} thread(s) used",
        "model": "tiny random llama"
        if run.smoke
        else "SmolLM2-135M-Instruct, dequantised from Q4_1",
        "dtype": run.dtype,
        "window_tokens": run.window,
        "calibration": {"text": "OpenWebText passages", "tokens": calibration.numel()},
        "evaluation": {"text": "Wikipedia passages", "predicted_tokens": before.tokens},
        "checks": checks,
        "parent": {
            "parameters": int(CostModel(axis_map).full.total),
            "nats": before.nats,
            "perplexity": before.perplexity,
            "perplexity_float32": reference.perplexity,
        },
        "cuts": [asdict(cut) for cut in cuts],
        "seconds": round(time.perf_counter() - started),
    }
    run.out.mkdir(parents=True, exist_ok=True)
    write_json(run.out / "smollm2_cuts.json", report)
    plot(cuts, before.perplexity, run.out / "smollm2_cuts.png")
    print(table(cuts, before.perplexity))
    failed = [name for name, error in checks.items() if not error <= TOLERANCE]
    for name in failed:
        say(f"FAILED: {name}: logits differ by {checks[name]:.1e} of the largest")
    return 1 if failed else 0


def parse_run() -> Run:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory outside the repository")
    parser.add_argument(
        "--out", type=Path, help="default: results, with --smoke the work directory"
    )
    for name in ("calibration_tokens", "evaluation_tokens", "window", "random_seeds"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Run, name))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=Run.dtype)
    parser.add_argument("--smoke", action="store_true", help="tiny random model, offline")
    options = vars(parser.parse_args())
    options["out"] = options["out"] or (options["work"] if options["smoke"] else Run.out)
    if options["smoke"]:
        options |= {"window": 16, "calibration_tokens": 640, "evaluation_tokens": 320}
        options |= {"dtype": "float32"}
    return Run(**options)


def read_windows(run: Run, role: str, max_tokens: int) -> torch.Tensor:
    """Windows (W, T) of the text for calibration or evaluation: the texts end to end, each with a
    separator behind it, without what does not fill a window. Raises ConfigError if nothing does."""
    tokenizer = AutoTokenizer.from_pretrained(run.work / "parent")
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    rows, ids = JsonLines(run.work / f"{role}.jsonl"), []
    for number in range(len(rows)):
        if len(ids) < max_tokens:
            ids += [*tokenizer.encode(rows[number]["text"], add_special_tokens=False), separator]
    count = min(len(ids), max_tokens) // run.window
    if not count:
        raise ConfigError(f"{rows.path} does not fill a window of {run.window} tokens; shorten it")
    return torch.tensor(ids[: count * run.window]).reshape(count, run.window)


def rank(
    run: Run, model: PreTrainedModel, axis_map: AxisMap, windows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Importance scores on the calibration windows; also saved."""

    def progress(num_samples: int, num_tokens: int) -> None:
        say(f"calibration: {num_samples} of {len(windows)} windows, {num_tokens} tokens")

    batches = ((ids, torch.ones_like(ids)) for ids in windows.split(4))
    scores = estimate_scores(model, axis_map, batches, progress)
    info = ScoreInfo(
        num_samples=len(windows),
        num_tokens=windows.numel(),
        source="calibration.jsonl",
        weights=digest_weights(run.work / "parent"),
    )
    save_scores(run.work / "smollm2_scores.safetensors", scores, axis_map, info)
    return scores


@torch.no_grad()
def check_laws(
    run: Run,
    parent: PreTrainedModel,
    config: Config,
    axis_map: AxisMap,
    orders: Orders,
    ids: torch.Tensor,
) -> dict[str, float]:
    """Differences of float32 logits, relative to the largest, that must vanish."""
    for name in ("sorted", "slice"):
        shutil.rmtree(run.work / name, ignore_errors=True)
    sort_checkpoint(run.work / "parent", orders, run.work / "sorted")
    in_order, _ = load_parent(run.work / "sorted")
    widths = find_widths(axis_map, CASES[0])[1]
    slice_checkpoint(run.work / "sorted", widths, run.work / "slice")
    saved = AutoModelForCausalLM.from_pretrained(run.work / "slice", dtype=torch.float32)
    submodel = build_submodel(in_order, config, widths)

    def difference(model: PreTrainedModel, expected: PreTrainedModel) -> float:
        logits = expected(input_ids=ids).logits
        return ((model(input_ids=ids).logits - logits).abs().max() / logits.abs().max()).item()

    errors = {
        "sorted parent equals parent": difference(in_order, parent),
        "saved slice in plain transformers equals submodel": difference(saved.eval(), submodel),
    }
    for name, error in errors.items():
        say(f"check: {name}: {error:.1e}")
    return errors


def find_widths(axis_map: AxisMap, axes: tuple[str, ...]) -> list[Widths]:
    """Widths nearest to each share of `REMOVED`; heads alone have few widths, so all of them.

    Heads that are cut with other axes lose one head per KV group, hidden and ffn the same share
    of their units. LlamaConfig wants hidden to be a multiple of the number of query heads.
    """
    heads = axis_map.axes["heads"]
    if axes == ("heads",):
        fewer = range(heads.size - heads.num_groups, heads.minimum - 1, -heads.num_groups)
        return [axis_map.complete({"heads": kept}) for kept in fewer]
    kept = heads.size - (heads.num_groups if "heads" in axes else 0)
    steps = {"hidden": kept, "ffn": FFN_STEP}
    grid = set()
    for percent in range(300, 1000):
        widths = {"heads": kept}
        for axis in {"hidden", "ffn"} & set(axes):
            size, step = axis_map.axes[axis].size, steps[axis]
            widths[axis] = max(round(size * percent / 1000 / step), 1) * step
        grid.add(axis_map.complete(widths))
    cost = CostModel(axis_map)
    total = cost.full.total

    def distance(removed: float, widths: Widths) -> tuple[float, str]:
        return abs(cost.count(widths).total - (1 - removed) * total), str(widths)

    return [min(grid, key=partial(distance, removed)) for removed in REMOVED]


@torch.no_grad()
def measure_cuts(
    runner: PreTrainedModel,
    config: Config,
    axis_map: AxisMap,
    orders: Mapping[str, Orders],
    documents: list[Document],
    uncut: Reading,
) -> Iterator[Cut]:
    """Every cut in every order beside the uncut model; the runner holds the sorted weights."""
    state = {name: value.clone() for name, value in runner.state_dict().items()}
    full = CostModel(axis_map).full.total
    plan = [(axes, widths) for axes in CASES for widths in find_widths(axis_map, axes)]
    for (name, order), start in zip(orders.items(), itertools.count(1), strict=False):
        runner.load_state_dict(sort_state(state, axis_map, order), strict=False)
        for number, (axes, widths) in enumerate(plan, start=1):
            submodel = build_submodel(runner, config, widths)
            parameters = submodel.num_parameters()
            assert parameters == CostModel(axis_map).count(widths).total, widths
            result = compare(uncut, read(submodel, documents), documents)
            say(
                f"order {start} of {len(orders)} ({name}), cut {number} of {len(plan)} ({widths}): "
                f"{parameters:,} parameters, perplexity {result.perplexity:.2f}"
            )
            yield Cut(
                axes="+".join(axes),
                order=name,
                widths=dict(widths),
                parameters=parameters,
                removed=1 - parameters / full,
                nats=result.nats,
                perplexity=result.perplexity,
                nats_above_parent=result.worse_by,
                standard_error=result.standard_error,
            )


def kinds(cuts: list[Cut]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """Perplexities by (axes, kind of order), then by share removed; random orders together."""
    grouped: dict[tuple[str, str], dict[float, list[float]]] = {}
    for cut in cuts:
        series = grouped.setdefault((cut.axes, cut.order.split()[0]), {})
        series.setdefault(cut.removed, []).append(cut.perplexity)
    return grouped


def table(cuts: list[Cut], parent: float) -> str:
    """Markdown table, one line per cut; random orders as geometric mean."""
    grouped = kinds(cuts)
    lines = [
        f"Perplexity (parent {parent:.2f})",
        "",
        "| axes | widths | parameters | removed | importance | magnitude | random |",
        "|---|---|---|---|---|---|---|",
    ]
    for cut in (cut for cut in cuts if cut.order == "importance"):
        widths = " ".join(f"{axis} {cut.widths[axis]}" for axis in cut.axes.split("+"))
        values = [
            grouped[cut.axes, kind][cut.removed] for kind in ("importance", "magnitude", "random")
        ]
        means = " | ".join(f"{math.exp(sum(map(math.log, v)) / len(v)):,.1f}" for v in values)
        lines.append(
            f"| {cut.axes} | {widths} | {cut.parameters:,} | {100 * cut.removed:.1f} % | {means} |"
        )
    return "\n".join(lines)


def plot(cuts: list[Cut], parent: float, file: Path) -> None:
    """One panel per set of axes: perplexity (log) against the share of parameters removed."""
    colours = {"importance": "tab:blue", "magnitude": "tab:orange", "random": "tab:grey"}
    names = list(dict.fromkeys(cut.axes for cut in cuts))
    grouped = kinds(cuts)
    with drawn_to(file, len(names), (270 * len(names), 310), sharey=True) as (_, panels):
        for name, panel in zip(names, panels, strict=True):
            for kind, colour in colours.items():
                series = sorted(grouped.get((name, kind), {}).items())
                removed = [0.0, *(100 * share for share, _ in series)]
                middle = [parent, *(math.exp(sum(map(math.log, v)) / len(v)) for _, v in series)]
                panel.plot(removed, middle, "o-", color=colour, label=kind, markersize=4)
                if any(len(values) > 1 for _, values in series):
                    low, high = ([parent, *(edge(v) for _, v in series)] for edge in (min, max))
                    panel.fill_between(removed, low, high, color=colour, alpha=0.25, linewidth=0)
            panel.set(yscale="log", title=name, xlabel="% of parameters removed")
        panels[0].set_ylabel("perplexity")
        panels[0].legend()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
