"""A whole run, readable top to bottom: check, rank, sort, train, write the elastic checkpoint.

A run directory holds `run.json` (the resolved config), `scores.safetensors`, `metrics.jsonl`,
`state/` while it trains, and in the end `elastic/`.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import star_elastic
from star_elastic.axes import AxisMap
from star_elastic.checkpoint import load_tensors, save_tensors, write_json
from star_elastic.cost import CostModel
from star_elastic.errors import CheckpointError, ConfigError, Interrupted, ShapeError
from star_elastic.families import family_of, read_config
from star_elastic.importance.basis import principal_basis
from star_elastic.importance.estimate import estimate_scores
from star_elastic.importance.files import ScoreInfo, load_scores, save_scores
from star_elastic.importance.orders import orders_from_scores
from star_elastic.manifest import Manifest, Size, save_manifest
from star_elastic.nesting.rotate import check_rotatable
from star_elastic.nesting.stream import save_model
from star_elastic.nesting.submodel import ElasticModel, load_parent, sort_in_place
from star_elastic.router.budget import TOLERANCE, Commitment, check_budgets
from star_elastic.router.router import Router
from star_elastic.train.config import RunConfig, to_plain
from star_elastic.train.data import Batch, BatchOrder, Examples, JsonLines
from star_elastic.train.loop import StepReport, Trainer
from star_elastic.train.state import has_state, load_state, save_state
from star_elastic.widths import default_step

ELASTIC = "elastic"
BASIS = "basis.safetensors"
SCORES = "scores.safetensors"


class Progress(Protocol):
    """Told what a run does; the command line draws bars from it."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the stage are finished."""


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str, total: int) -> None:
        """Ignored."""

    def advance(self, done: int, note: str = "") -> None:
        """Ignored."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where the elastic checkpoint is, and what training cost."""

    elastic: Path
    steps: int
    tokens: int
    seconds: float


def default_choices(axis_map: AxisMap) -> dict[str, tuple[int, ...]]:
    """Widths from full down to half on every axis but query heads, which the papers keep."""
    grid = {}
    for name, axis in axis_map.axes.items():
        if name == "heads":
            continue
        step = max(default_step(axis.size, axis.num_groups), axis.num_groups)
        divisors = [axis_map.axes[d].size for first, d in axis_map.multiples if first == name]
        step = math.lcm(step, *divisors) if divisors else step
        least = max(axis.size // 2, axis.minimum)
        widths = [w for w in range(axis.size, least - 1, -step) if w % axis.num_groups == 0]
        if len(widths) > 1:
            grid[name] = tuple(widths)
    return grid


def check_choices(choices: Mapping[str, tuple[int, ...]], axis_map: AxisMap) -> None:
    """Raises ShapeError or ConfigError unless every axis's grid is legal and starts at full."""
    for name, grid in choices.items():
        if name not in axis_map.axes:
            raise ShapeError(
                f"choices.{name}: no such axis in this {axis_map.family} model; "
                f"use {', '.join(axis_map.axes)}"
            )
        axis = axis_map.axes[name]
        if not grid or list(grid) != sorted(set(grid), reverse=True) or grid[0] != axis.size:
            raise ConfigError(
                f"choices.{name}={list(grid)} must descend from the full width {axis.size}"
            )
        for width in grid:
            axis_map.check_width(name, width)
    for first, second in axis_map.multiples:
        pairs = itertools.product(
            *(choices.get(name, (axis_map.axes[name].size,)) for name in (first, second))
        )
        for pair in pairs:
            axis_map.complete(dict(zip((first, second), pair, strict=True)))


def train(
    config: RunConfig, *, resume: bool = False, progress: Progress | None = None
) -> RunResult:
    """Runs nested distillation as configured and writes the elastic checkpoint.

    Everything that can be wrong with the config is checked before work starts. SIGINT and SIGTERM
    save the state and raise `Interrupted`; `resume` goes on from the last state.
    """
    progress = progress or Silent()
    run = Path(config.out)
    model_config = read_config(config.parent)
    axis_map = family_of(model_config).axis_map(model_config)
    choices = dict(config.choices) or default_choices(axis_map)
    check_choices(choices, axis_map)
    if config.calibration.basis == "principal":
        check_rotatable(axis_map)
    for name, budgets in config.sizes.items():
        check_budgets(name, budgets, CostModel(axis_map, config.workload), choices)
    _prepare_directory(run, config, resume)
    given = _given_scores(config, run, axis_map)
    rows = JsonLines(config.data.train)
    tokenizer = load_tokenizer(config.parent)
    examples = Examples(rows, tokenizer, config.data.context, config.data.loss_on)

    teacher, _ = load_parent(config.parent)
    parent, _ = load_parent(config.parent)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "run.json", to_plain(config))
    if given:
        save_scores(run / SCORES, *given)
    scores = _scores(config, run, teacher, axis_map, examples, progress)
    orders = orders_from_scores(scores, axis_map)
    basis = _basis(config, run, teacher, axis_map, examples)
    if basis is not None:
        del orders["hidden"]
    sort_in_place(parent, axis_map, orders, basis)

    student = ElasticModel(parent, model_config)
    router = Router(choices, len(config.sizes), config.seed)
    batches = BatchOrder(examples, config.schedule.batch_size, config.seed)
    trainer = Trainer(config, student, teacher, router, batches)
    if resume:
        load_state(trainer, run)
    tokens, seconds = _loop(trainer, run, progress)

    def finish(directory: Path) -> None:
        save_manifest(_manifest(config, trainer, choices, tokens), directory)
        save_tensors(directory / "router.safetensors", router.state_dict())
        save_tensors(directory / "orders.safetensors", dict(orders))
        if basis is not None:
            save_tensors(directory / BASIS, {"hidden": basis})

    dtype = getattr(torch, str(model_config.get("dtype") or model_config.get("torch_dtype")), None)
    elastic = run / ELASTIC
    save_model(
        student.state(),
        model_config,
        Path(config.parent),
        elastic,
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
        finish=finish,
    )
    return RunResult(elastic, trainer.step, tokens, seconds)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} has no usable tokenizer ({first}); put tokenizer.json beside the weights"
        ) from None


def _prepare_directory(run: Path, config: RunConfig, resume: bool) -> None:
    if resume:
        if not has_state(run):
            raise CheckpointError(f"{run} holds no saved state; start without --resume")
        changed = _changed_keys(run, config)
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} differ from the run in {run}; resume with its own config, "
                "or start another run in another directory"
            )
        if (run / ELASTIC).exists():
            raise CheckpointError(f"{run / ELASTIC} is complete already; nothing to resume")
    elif has_state(run) or (run / ELASTIC).exists():
        raise CheckpointError(f"{run} is not empty; resume it with --resume or name another out")
    elif run.exists() and any(run.iterdir()) and _changed_keys(run, config):
        raise CheckpointError(f"{run} holds something else; name another out")


def _changed_keys(run: Path, config: RunConfig) -> list[str]:
    """Tables of the config that differ from the one the directory was begun with."""
    wanted = json.loads(json.dumps(to_plain(config)))
    try:
        saved = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        saved = {}
    return sorted(key for key in wanted if wanted[key] != saved.get(key))


def _given_scores(config: RunConfig, run: Path, axis_map: AxisMap):
    """Scores that the config names and the run does not have yet, as `save_scores` takes them."""
    if not config.calibration.scores or (run / SCORES).is_file():
        return None
    scores, info = load_scores(Path(config.calibration.scores), axis_map)
    return scores, axis_map, info


def _scores(
    config: RunConfig,
    run: Path,
    model: PreTrainedModel,
    axis_map: AxisMap,
    examples: Examples,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    own = run / SCORES
    if own.is_file():
        return load_scores(own, axis_map)[0]
    scores, info = rank(
        model,
        axis_map,
        examples,
        num_samples=config.calibration.num_samples,
        batch_size=config.calibration.batch_size,
        source=", ".join(Path(file).name for file in config.data.train),
        progress=progress,
    )
    save_scores(own, scores, axis_map, info)
    return scores


def _basis(
    config: RunConfig, run: Path, model: PreTrainedModel, axis_map: AxisMap, examples: Examples
) -> torch.Tensor | None:
    if config.calibration.basis == "channels":
        return None
    own = run / BASIS
    if not own.is_file():
        options = config.calibration
        basis = find_basis(model, axis_map, examples, options.num_samples, options.batch_size)
        save_tensors(own, {"hidden": basis})
    return load_tensors(own)["hidden"]


def find_basis(
    model: PreTrainedModel,
    axis_map: AxisMap,
    examples: Examples,
    num_samples: int,
    batch_size: int,
) -> torch.Tensor:
    """Principal basis (H, H) of the residual stream on the first `num_samples` rows."""
    batches = calibration_batches(examples, min(num_samples, len(examples)), batch_size)
    return principal_basis(model, axis_map, ((b.input_ids, b.attention_mask) for b in batches))


def calibration_batches(examples: Examples, count: int, batch_size: int) -> Iterator[Batch]:
    """The first `count` rows in batches."""
    for start in range(0, count, batch_size):
        yield examples.batch(range(start, min(start + batch_size, count)))


def rank(
    model: PreTrainedModel,
    axis_map: AxisMap,
    examples: Examples,
    *,
    num_samples: int,
    batch_size: int,
    source: str,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], ScoreInfo]:
    """Importance scores on the first `num_samples` rows, and what they were measured on."""
    count = min(num_samples, len(examples))
    progress.stage("rank", count)
    num_tokens = 0

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal num_tokens
        for number, batch in enumerate(calibration_batches(examples, count, batch_size), start=1):
            num_tokens += batch.num_tokens
            yield batch.input_ids, batch.attention_mask
            progress.advance(min(number * batch_size, count))

    scores = estimate_scores(model, axis_map, batches())
    return scores, ScoreInfo(num_samples=count, num_tokens=num_tokens, source=source)


def _loop(trainer: Trainer, run: Path, progress: Progress) -> tuple[int, float]:
    """Trains to the last step; returns tokens seen per size and seconds in this process."""
    steps = trainer.config.schedule.steps
    tokens = sum(row["num_tokens"] for row in _metrics(run, trainer.step))
    progress.stage("train", steps)
    begin = last = time.monotonic()
    with _stop_requested() as stop, open(run / "metrics.jsonl", "a", encoding="utf-8") as log:
        while trainer.step < steps:
            report = trainer.train_step()
            tokens += report.num_tokens
            now = time.monotonic()
            log.write(json.dumps({**asdict(report), "seconds": round(now - last, 4)}) + "\n")
            last = now
            log.flush()
            progress.advance(trainer.step, _note(report, trainer))
            if stop.is_set() or trainer.step % trainer.config.schedule.save_every == 0:
                save_state(trainer, run)
            if stop.is_set():
                raise Interrupted(f"stopped at step {trainer.step}; go on with --resume")
        if not trainer.committed:
            trainer.commit()
        save_state(trainer, run)
    return tokens, time.monotonic() - begin


def _metrics(run: Path, step: int) -> list[dict]:
    """The log up to `step`; rows after the last saved state are dropped from the file."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a line that a killed run began
    rows = [row for row in rows if row["step"] < step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
    return rows


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM, so that a step is finished and saved first."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _note(report: StepReport, trainer: Trainer) -> str:
    losses = "  ".join(f"{name} {kd:.3f}" for name, kd in report.kd.items())
    phase = "sizes fixed" if trainer.committed else "router learns"
    for name, fixed in trainer.committed.items():
        if fixed.miss > TOLERANCE:
            phase += f", {name} misses its budget by {fixed.miss:.1%}"
    return f"KD nats/token {losses}  ({phase})"


def _manifest(config: RunConfig, trainer: Trainer, choices, tokens: int) -> Manifest:
    def costs(fixed: Commitment) -> dict[str, float]:
        counted = trainer.cost.count(fixed.widths)
        return {
            "total": counted.total,
            "active": counted.active,
            "weight_bytes": counted.weight_bytes,
            "state_bytes": counted.state_bytes,
            "flops_per_token": counted.flops_per_token,
            "budget_miss": round(fixed.miss, 6),
        }

    sizes = {}
    for name in trainer.names:
        fixed = trainer.committed[name]
        sizes[name] = Size(fixed.widths, config.sizes[name], costs(fixed), fixed.repair)
    return Manifest(
        family=trainer.student.family.model_type,
        choices=choices,
        sizes=sizes,
        provenance={
            "parent": Path(config.parent).name,
            "data": [Path(file).name for file in config.data.train],
            "seed": config.seed,
            "steps": trainer.step,
            "workload": to_plain(config.workload),
            "tokens_per_size": tokens,
            "package_version": star_elastic.__version__,
        },
    )
