"""A whole run, readable top to bottom: check, build (`build.py`: rank, sort), train, write.

A run directory holds `run.json` (the resolved config), `scores.safetensors`, `metrics.jsonl`,
`state/` (the last saved state), and in the end `elastic/` (after quantisation-aware training also
`quantised/`) and `verdict.json`. Under torchrun all ranks run this; the first one writes.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import star_elastic
from star_elastic.checkpoints.companions import BASIS, LATENCY, ORDERS, ROUTER
from star_elastic.checkpoints.manifest import Manifest, Size, load_manifest, save_manifest
from star_elastic.checkpoints.tensors import save_tensors
from star_elastic.data.sources import (
    MAX_CONTEXT,
    Document,
    Source,
    held_out_documents,
    open_sources,
)
from star_elastic.errors import CheckpointError, Interrupted, RowError, is_out_of_memory, reason
from star_elastic.files.paths import exists, has_file
from star_elastic.files.writing import require_folder
from star_elastic.importance.files import save_scores
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.placement import choose_device
from star_elastic.models.tokenizer import load_tokenizer, stop_tokens
from star_elastic.progress import Progress, Silent, staged
from star_elastic.rewrite.family import quantise_family
from star_elastic.rewrite.stream import save_model
from star_elastic.router.budget import AIM
from star_elastic.router.commit import Commitment
from star_elastic.signals import Stop, Stoppable, num_ranks, stop_on_signals
from star_elastic.strict import to_plain
from star_elastic.train.build import build_trainer
from star_elastic.train.calibrate import SCORES, given_scores
from star_elastic.train.check import Checked, check
from star_elastic.train.config import RunConfig
from star_elastic.train.directory import (
    ELASTIC,
    METRICS,
    QUANTISED,
    alone_in,
    begin,
    begun_files,
    last_of,
    require_ready,
)
from star_elastic.train.distributed import World, join_world
from star_elastic.train.loop import StepReport, Trainer
from star_elastic.train.outlook import look_ahead
from star_elastic.train.pace import Pace
from star_elastic.train.row_check import RowCheck, check_rows, require_lessons, warn_of_rows
from star_elastic.train.state import has_state, load_state, save_state
from star_elastic.train.verdict import VERDICT, Verdict, judge_run

LOST_RANK = re.compile("closed by peer|reset by peer|remote process exited")
"""In what gloo and NCCL say when another rank is gone."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where the elastic checkpoint is, what training cost (`tokens` read from the data, `seconds`
    in this process) and what became of the sizes (None if no row was held out)."""

    elastic: Path
    steps: int
    tokens: int
    seconds: float
    verdict: Verdict | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        verdict = self.verdict.to_json() if self.verdict else None
        own = {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        return {"elastic": str(self.elastic), **own, "verdict": verdict}


def train(
    config: RunConfig, *, resume: bool = False, progress: Progress | None = None
) -> RunResult:
    """Runs nested distillation as configured and writes the elastic checkpoint.

    Everything that can be wrong with the config is checked before work starts. The first SIGINT or
    SIGTERM ends the run with `Interrupted` where it can go on from: after a step with its state
    saved, before that with what was ranked kept. With `resume` a run goes on from its last state.
    """
    run = Path(config.out)
    with join_world() as world:
        shown = (progress or Silent()) if world.is_first else Silent()
        with stop_on_signals(shown.say) as stop:
            try:
                return _train(config, resume, shown, stop, world)
            except OSError as error:
                raise CheckpointError(
                    f"{error.filename or run} cannot be read or written ({reason(error)}); make "
                    "room or correct the path, then go on (with --resume if there is a saved state)"
                ) from error
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise CheckpointError(
                        f"memory ran out ({reason(error)}); lower engine.micro_batch or set "
                        "engine.recompute = true (before training also calibration.batch_size), "
                        "then go on (with --resume if there is a saved state)"
                    ) from error
                if stop.is_asked and world.size > 1:  # another rank has stopped before this one
                    raise Interrupted(_how_to_go_on(run)) from None
                if world.size > 1 and LOST_RANK.search(str(error)):
                    raise CheckpointError(
                        f"another rank has ended ({reason(error)}); look for what it said, then go "
                        "on (with --resume if there is a saved state)"
                    ) from error
                raise


def check_run(config: RunConfig, progress: Progress) -> RowCheck:
    """What `train` will do, told through `progress`, and what every row of its data is; nothing is
    written. Raises what `train` would raise before work."""
    checked = check(config, num_ranks())
    given = given_scores(config, checked.axis_map)
    tokenizer = load_tokenizer(config.parent)
    sources = open_sources(config.data, tokenizer, checked.axis_map.num_embeddings, config.seed)
    run = Path(config.out)
    require_folder(run)
    # A run that has begun is looked at for its data alone.
    if exists(run) and not has_state(run) and not exists(run / ELASTIC):
        require_ready(run, config, sources, resume=False)
    device = torch.device(choose_device("auto"))
    outlook = look_ahead(config, checked, sources, device, given[1] if given else None)
    for fact in outlook.facts:
        progress.say(fact)
    found = check_rows(config, sources, progress, stop_tokens(config.parent, tokenizer))
    found.warnings[:0] = outlook.warnings
    return found


def _how_to_go_on(run: Path) -> str:
    """What a user who has stopped a run should know."""
    if has_state(run):
        return "stopped; go on with --resume"
    return "stopped before training began; the same command goes on (finished rankings are kept)"


@contextmanager
def _told_of_rows(go_on: str) -> Iterator[None]:
    """Whoever corrects a row that stops a run, should know how the run goes on, and how without."""
    try:
        yield
    except RowError as error:
        raise CheckpointError(
            f'{error}, keeping one row a line, and {go_on}, or set bad_rows = "skip" in [[data]] '
            "(a row that is taken out, or joined to the line before, leaves its line empty)"
        ) from error


def _train(config: RunConfig, resume: bool, shown: Progress, stop: Stop, world: World) -> RunResult:
    run = Path(config.out)
    if world.is_first:
        require_folder(run)
    progress = Stoppable(shown, stop, lambda: _how_to_go_on(run))
    checked = check(config, world.size)
    tokenizer = load_tokenizer(config.parent)
    sources = open_sources(
        config.data, tokenizer, checked.axis_map.num_embeddings, config.seed, begun_files(run)
    )
    told = require_ready(run, config, sources, resume)
    given = given_scores(config, checked.axis_map)
    for line in told:
        progress.say(line)
    longest = max(stage.context for stage in config.stages)
    go_on = "go on with --resume" if has_state(run) or exists(run / ELASTIC) else "start again"
    with _told_of_rows(go_on):  # read now: what is wrong is told before work, not after it
        held_out = held_out_documents(sources, longest)
    world.wait()  # until every rank has looked at the directory, before one writes into it
    with alone_in(run, world):
        if world.is_first:
            begin(run, config, sources)
        world.wait()

        seconds = 0.0
        if not exists(last_of(run, config)):
            if not has_state(run):
                with _told_of_rows("start again"):
                    require_lessons(config, sources, progress)
                info = given[1] if given else None
                look_ahead(config, checked, sources, world.device, info).say(progress)
                ends = stop_tokens(config.parent, tokenizer)
                for line in (line for source in sources for line in warn_of_rows(source, ends)):
                    progress.say(f"warning: {line}")
                if given and world.is_first:  # from here on the run's config is fixed
                    save_scores(run / SCORES, given[0], checked.axis_map, given[1])
                world.wait()
            seconds = _train_sizes(config, checked, sources, shown, progress, stop, world)
        verdict = None
        if world.is_first:
            verdict = _judge(config, sources, held_out, progress, world)
        world.wait()
    made = load_manifest(run / ELASTIC, checked.axis_map).provenance
    return RunResult(run / ELASTIC, made["steps"], made["tokens"], seconds, verdict)


def _train_sizes(
    config: RunConfig,
    checked: Checked,
    sources: list[Source],
    shown: Progress,
    progress: Progress,
    stop: Stop,
    world: World,
) -> float:
    """Trains and writes what training leaves; returns the seconds of training."""
    run = Path(config.out)
    with _told_of_rows("start again"):
        trainer, orders, basis = build_trainer(config, checked, sources, run, progress, world)
    if has_state(run):
        load_state(trainer, run)
    with _told_of_rows("go on with --resume"):
        seconds = _loop(trainer, run, shown, stop)
    elastic = run / ELASTIC
    state = _whole_state(trainer.student, world)

    def finish(directory: Path) -> None:
        save_manifest(_manifest(config, checked, trainer), directory)
        if config.family and _has_its_router(config, checked):
            shutil.copyfile(Path(config.family) / ROUTER, directory / ROUTER)
        elif not checked.fixed:
            save_tensors(directory / ROUTER, trainer.router.state_dict())
        # A table stays true of a family that is trained on: its shapes are the same.
        table = (run if config.latency else Path(config.family or run)) / LATENCY
        if has_file(table):
            shutil.copyfile(table, directory / LATENCY)
        if orders:  # a family that is trained on may not say how it was sorted
            save_tensors(directory / ORDERS, dict(orders))
        if basis is not None:
            save_tensors(directory / BASIS, {"hidden": basis})

    quantised = trainer.student.fake
    if world.is_first:
        if not elastic.exists():  # it does if the run was stopped while it was quantised
            save_model(
                state,
                checked.model_config,
                Path(config.parent),
                elastic,
                dtype=checked.dtypes,
                progress=staged(progress, "write"),
                finish=finish,
            )
        if quantised is not None:
            quantise_family(
                elastic, run / QUANTISED, config.quant.format,
                keep=config.quant.keep, frozen=quantised, progress=progress,
            )  # fmt: skip
    world.wait()
    return seconds


def _judge(
    config: RunConfig,
    sources: list[Source],
    held_out: list[Document],
    progress: Progress,
    world: World,
) -> Verdict | None:
    """The verdict on what the run has written; kept beside it. None if nothing is held out that it
    could be judged by."""
    run = Path(config.out)
    if not held_out:
        why = "no row is held out (see data.held_out; a source needs 10 rows)"
        if count := sum(len(source.held_out) for source in sources):
            why = (
                f"none of the {count:,} rows held out has a token that counts among its first "
                f"{MAX_CONTEXT:,}, which are read"
            )
        progress.say(f"no verdict: {why}")
        return None
    gc.collect()  # what training has left
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    quantised = run / QUANTISED if config.quant.format else None
    verdict = judge_run(
        Path(config.parent), run / ELASTIC, held_out, progress,
        quantised=quantised, device=str(world.device),
    )  # fmt: skip
    verdict.save(run / VERDICT)
    return verdict


def _has_its_router(config: RunConfig, checked: Checked) -> bool:
    """Whether the family's router is one for the very sizes of this run."""
    sizes = load_manifest(config.family, checked.axis_map).sizes
    budgets = {name: dict(size.budgets) for name, size in sizes.items()}
    same = list(budgets.items()) == [(n, dict(b)) for n, b in checked.budgets.items()]
    return same and has_file(Path(config.family) / ROUTER)


def _whole_state(student: ElasticModel, world: World) -> dict[str, torch.Tensor]:
    """The trained weights in one piece, on the first rank (others get none)."""
    state = {}
    for name, value in student.state().items():
        gathered = getattr(value, "full_tensor", lambda whole=value: whole)()
        if world.is_first:
            state[name] = gathered.detach().cpu()
    return state


def _loop(trainer: Trainer, run: Path, progress: Progress, stop: Stop) -> float:
    """Trains to the last step; returns the seconds in this process.

    Raises Interrupted between two steps, when the state is saved. Before any other error goes on
    its way, the state is saved if the trainer says that it is sound.
    """
    world, steps = trainer.world, trainer.curriculum.num_steps
    if world.is_first:
        _drop_later_metrics(run, trainer.step)
    progress.stage("train", steps)
    progress.advance(trainer.step)
    begin = last = time.monotonic()
    saved, tells_skipped = trainer.step, False
    pace = Pace(trainer.curriculum, 0 if trainer.committed else trainer.commit_step)
    while trainer.step < steps:
        if world.any(stop.is_asked):
            if trainer.step > saved:
                save_state(trainer, run)
            if not trainer.step:
                raise Interrupted(_how_to_go_on(run))
            raise Interrupted(f"stopped at step {trainer.step}; go on with --resume")
        try:
            report = trainer.train_step()
        except Exception:
            if trainer.is_sound and trainer.step > saved:
                save_state(trainer, run)
            raise
        now = time.monotonic()
        line = pace.after(report.step, now - last)
        if line:
            progress.say(line)
        if world.is_first:
            row = {**asdict(report), "seconds": round(now - last, 4)}
            with open(run / METRICS, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        last = now
        progress.advance(trainer.step, _note(report, trainer))
        if report.rows_skipped and not tells_skipped:
            tells_skipped = True
            first = next(filter(None, world.gather(trainer.first_skipped)), "as before")
            progress.say(f"rows that cannot be read are left out, the first: {first}")
        if trainer.step % trainer.config.engine.save_every == 0:
            save_state(trainer, run)
            saved = trainer.step
    if not trainer.committed:
        trainer.commit()
    save_state(trainer, run)
    return time.monotonic() - begin


def _drop_later_metrics(run: Path, step: int) -> None:
    """Drops the log's rows after the last saved state; the run writes them again."""
    file = run / METRICS
    if not has_file(file):
        return
    rows = []
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
            if row["step"] < step:
                rows.append(row)
        except (ValueError, LookupError, TypeError):
            break  # a line that a killed run began, or that something else has written
    text = "".join(json.dumps(row) + "\n" for row in rows)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _note(report: StepReport, trainer: Trainer) -> str:
    losses = "  ".join(f"{name} {kd:.3f}" for name, kd in report.kd.items())
    phase = "sizes fixed" if trainer.committed else "router learns"
    for name, fixed in trainer.committed.items():
        if fixed.miss > max(AIM, fixed.possible or 0.0) * (1 + 1e-9):
            phase += f", {name} misses its budget by {fixed.miss:.1%}"
    for count, what in (
        (report.rows_cut, "cut to the context"),
        (report.rows_dropped, "left out"),
        (report.rows_skipped, "left out as bad"),  # in every epoch anew
    ):
        phase += f", {count:,} {'row' if count == 1 else 'rows'} {what}" if count else ""
    return f"KD nats/token {losses}  ({phase})"


def _manifest(config: RunConfig, checked: Checked, trainer: Trainer) -> Manifest:
    def costs(fixed: Commitment) -> dict[str, float]:
        counted = trainer.cost.count(fixed.widths)
        return {
            "total": counted.total,
            "active": counted.active,
            "weight_bytes": counted.weight_bytes,
            "state_bytes": counted.state_bytes,
            "flops_per_token": counted.flops_per_token,
            **({} if counted.ms is None else {"ms": round(counted.ms, 6)}),
            "budget_miss": round(fixed.miss, 6),
            **({} if fixed.possible is None else {"least_miss": round(fixed.possible, 6)}),
        }

    sizes = {}
    for name in trainer.names:
        fixed = trainer.committed[name]
        sizes[name] = Size(
            fixed.widths, checked.budgets[name], costs(fixed), fixed.repair, fixed.argmax,
            fixed.data_free_steps, fixed.widths_from,
        )  # fmt: skip
    return Manifest(
        family=trainer.student.family.model_type,
        choices=checked.grid.choices,
        sizes=sizes,
        per_layer=tuple(trainer.router.grid.per_layer),
        depth=trainer.router.grid.depth,
        provenance={
            "parent": Path(config.parent).name,
            "data": [Path(file).name for source in config.data for file in source.files],
            "seed": config.seed,
            "steps": trainer.step,
            "workload": to_plain(config.workload),
            "tokens": trainer.tokens,
            "package_version": star_elastic.__version__,
        },
    )
