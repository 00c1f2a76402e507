"""A whole run, readable top to bottom: check, rank, sort, train, write the elastic checkpoint.

A run directory holds `run.json` (the resolved config), `scores.safetensors`, `metrics.jsonl`,
`state/` (the last saved state), and in the end `elastic/` (after quantisation-aware training also
`quantised/`). Under torchrun all ranks run this; the
first one writes.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

import star_elastic
from star_elastic.checkpoint import digest_files, load_tensors, save_tensors, write_json
from star_elastic.errors import CheckpointError, ConfigError, Interrupted, reason
from star_elastic.importance.files import load_scores, save_scores
from star_elastic.manifest import Manifest, Size, load_manifest, save_manifest
from star_elastic.nesting.elastic import ElasticModel
from star_elastic.nesting.stream import save_model
from star_elastic.nesting.submodel import load_parent, load_tokenizer, sort_in_place
from star_elastic.progress import Progress, Silent
from star_elastic.quant.fake import FILE_NAME as FAKE
from star_elastic.quant.fake import FakeQuantisation
from star_elastic.quant.layout import Scheme
from star_elastic.router.budget import AIM, Commitment
from star_elastic.router.files import LATENCY, ROUTER
from star_elastic.router.grid import Grid
from star_elastic.router.router import Router
from star_elastic.train.calibrate import BASIS, SCORES, Calibration
from star_elastic.train.check import Checked, check, latency_file
from star_elastic.train.config import RunConfig
from star_elastic.train.distributed import World, join_world
from star_elastic.train.loop import StepReport, Trainer
from star_elastic.train.quantise import (
    InputCalibration,
    calibrate_sizes,
    quantise_family,
    shared_scales,
)
from star_elastic.train.sources import Source
from star_elastic.train.state import has_state, load_state, save_state
from star_elastic.train.strict import to_plain
from star_elastic.train.teacher import TeacherCache

ELASTIC, QUANTISED = "elastic", "quantised"
ORDERS = "orders.safetensors"
RUN = "run.json"
TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where the elastic checkpoint is, and what training cost. `tokens` read from the data."""

    elastic: Path
    steps: int
    tokens: int
    seconds: float


def train(
    config: RunConfig, *, resume: bool = False, progress: Progress | None = None
) -> RunResult:
    """Runs nested distillation as configured and writes the elastic checkpoint.

    Everything that can be wrong with the config is checked before work starts. SIGINT and SIGTERM
    save the state and raise `Interrupted`; `resume` goes on from the last state.
    """
    with join_world() as world:
        shown = (progress or Silent()) if world.is_first else Silent()
        try:
            return _train(config, resume, shown, world)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or config.out} cannot be read or written ({reason(error)}); make "
                "room or correct the path, then go on (with --resume if there is a saved state)"
            ) from error


def _train(config: RunConfig, resume: bool, progress: Progress, world: World) -> RunResult:
    run = Path(config.out)
    checked = check(config, world.size)
    _prepare_directory(run, config, resume)
    given = None
    if config.calibration.scores and not (run / SCORES).is_file():
        given = load_scores(Path(config.calibration.scores), checked.axis_map)
    tokenizer = load_tokenizer(config.parent)
    sources = [Source(source.files, tokenizer, source.loss_on) for source in config.data]
    world.wait()
    if world.is_first:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / RUN, _written(config))
        if config.latency and latency_file(config) != run / LATENCY:
            shutil.copyfile(config.latency, run / LATENCY)
        if given:
            save_scores(run / SCORES, given[0], checked.axis_map, given[1])
    world.wait()

    trainer, orders, basis = _build(config, checked, sources, run, progress, world)
    if resume:
        load_state(trainer, run)
    seconds = _loop(trainer, run, progress)
    elastic = run / ELASTIC
    state = _whole_state(trainer.student, world)

    def finish(directory: Path) -> None:
        save_manifest(_manifest(config, checked, trainer), directory)
        if config.family and _has_its_router(config, checked):
            shutil.copyfile(Path(config.family) / ROUTER, directory / ROUTER)
        elif not checked.fixed:
            save_tensors(directory / ROUTER, trainer.router.state_dict())
        if config.latency:
            shutil.copyfile(run / LATENCY, directory / LATENCY)
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
                dtype=_stored_dtype(checked),
                finish=finish,
            )
        if quantised is not None:
            quantise_family(
                elastic, run / QUANTISED, config.quant.format,
                keep=config.quant.keep, frozen=quantised, progress=progress,
            )  # fmt: skip
    world.wait()
    return RunResult(elastic, trainer.step, trainer.tokens, seconds)


def _build(
    config: RunConfig,
    checked: Checked,
    sources: list[Source],
    run: Path,
    progress: Progress,
    world: World,
) -> tuple[Trainer, dict[str, torch.Tensor], torch.Tensor | None]:
    """Ranks and sorts the parent and puts student, teacher and router together."""
    device = str(world.device)
    teacher, _ = load_parent(config.parent, device=device)
    if config.family:
        parent, orders, basis = _family(config, device)
        grid = checked.grid
    else:
        parent, orders, basis, grid = _sorted(
            config, checked, teacher, sources, run, progress, world
        )
    fake = None
    if checked.scheme is not None:
        fake = _fake(config, checked, checked.scheme, parent, sources, run, progress, world)
    elastic = partial(ElasticModel, config=checked.model_config)
    student = world.shard(elastic(parent, recompute=config.engine.recompute, fake=fake))
    router = Router(grid, len(config.sizes), config.seed).to(world.device)
    trainer = Trainer(
        config,
        student,
        world.shard(elastic(teacher)),
        router,
        sources,
        checked.budgets,
        checked.cost,
        world,
        _teacher_cache(config, teacher.config.vocab_size, run, world),
    )
    if checked.fixed:
        trainer.committed = dict(checked.fixed)
        router.requires_grad_(False)
    return trainer, orders, basis


def _has_its_router(config: RunConfig, checked: Checked) -> bool:
    """Whether the family's router is one for the very sizes of this run."""
    sizes = load_manifest(config.family, checked.axis_map).sizes
    budgets = {name: dict(size.budgets) for name, size in sizes.items()}
    same = list(budgets.items()) == [(n, dict(b)) for n, b in checked.budgets.items()]
    return same and (Path(config.family) / ROUTER).is_file()


Sorted = tuple[PreTrainedModel, dict[str, torch.Tensor], torch.Tensor | None]


def _family(config: RunConfig, device: str) -> Sorted:
    """The weights of a family that is trained on, with the order and basis that it is in."""
    family = Path(config.family)
    parent, _ = load_parent(family, device=device)
    orders = load_tensors(family / ORDERS) if (family / ORDERS).is_file() else {}
    basis = load_tensors(family / BASIS)["hidden"] if (family / BASIS).is_file() else None
    return parent, orders, basis


def _fake(
    config: RunConfig,
    checked: Checked,
    scheme: Scheme,
    parent: PreTrainedModel,
    sources: list[Source],
    run: Path,
    progress: Progress,
    world: World,
) -> FakeQuantisation:
    """What is frozen of the quantised weights and inputs; a run directory keeps it."""
    stored = _stored_dtype(checked)
    if world.agree((run / FAKE).is_file()):
        return FakeQuantisation.load(run, checked.axis_map, scheme).on(world.device, stored)
    widths = {name: size.widths for name, size in checked.fixed.items()}
    samples = InputCalibration(
        samples=config.quant.samples,
        context=config.calibration.context,
        percentile=config.quant.percentile,
    )
    scales = calibrate_sizes(
        parent,
        checked.model_config,
        checked.axis_map,
        widths,
        scheme,
        sources,
        samples,
        progress,
    )
    shared = shared_scales(scales, scheme, checked.axis_map)
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    fake = world.agree(FakeQuantisation.of(state, checked.axis_map, scheme, shared))
    if world.is_first:
        fake.save(run)
    return fake.on(world.device, stored)


def _stored_dtype(checked: Checked) -> torch.dtype:
    """The dtype that the parent's config names, in which the family is stored."""
    named = checked.model_config.get("dtype") or checked.model_config.get("torch_dtype")
    dtype = getattr(torch, str(named), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _sorted(
    config: RunConfig,
    checked: Checked,
    teacher: PreTrainedModel,
    sources: list[Source],
    run: Path,
    progress: Progress,
    world: World,
) -> tuple[PreTrainedModel, dict[str, torch.Tensor], torch.Tensor | None, Grid]:
    """The parent with its units sorted, best first, and the router's grid."""
    parent, _ = load_parent(config.parent, device=str(world.device))
    calibration = Calibration(
        config, run, teacher, checked.model_config, checked.axis_map, sources, progress
    )
    write = world.is_first
    # Ranks measure alike, but for rounding: the first one's word counts.
    orders = world.agree(calibration.orders(write=write))
    basis = world.agree(calibration.basis(write=write))
    if basis is not None:
        del orders["hidden"]
    depth = world.agree(calibration.depth(write=write))
    sort_in_place(parent, checked.axis_map, orders, basis)

    return parent, orders, basis, checked.ranked_grid(depth)


def _teacher_cache(
    config: RunConfig, vocab_size: int, run: Path, world: World
) -> TeacherCache | None:
    if not config.engine.teacher_samples:
        return None
    return TeacherCache(
        run / TEACHER,
        num_samples=config.engine.teacher_samples,
        vocab_size=vocab_size,
        parent=Path(config.parent).name,
        data=_fingerprint(config),
        seed=config.seed,
        writer=world.rank,
    )


def _fingerprint(config: RunConfig) -> str:
    """What the parent and the data are: their files by name, size and content."""
    own = [config.family] if config.family else []
    roots = [config.parent, *own, *(file for source in config.data for file in source.files)]
    files = (file for root in map(Path, roots) for file in (root, *sorted(root.rglob("*"))))
    return digest_files(file for file in files if file.is_file())


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
        last = run / (QUANTISED if config.quant.format else ELASTIC)
        if last.exists():
            raise CheckpointError(f"{last} is complete already; nothing to resume")
    elif has_state(run) or (run / ELASTIC).exists():
        raise CheckpointError(f"{run} is not empty; resume it with --resume or name another out")
    elif run.exists() and any(run.iterdir()) and _changed_keys(run, config):
        raise CheckpointError(f"{run} holds something else; name another out")


def _written(config: RunConfig) -> dict:
    """What `run.json` holds: the resolved config, and what its files were."""
    return {**json.loads(json.dumps(to_plain(config))), "files": _fingerprint(config)}


def _changed_keys(run: Path, config: RunConfig) -> list[str]:
    """Keys of the config that differ from the one the directory was begun with, of those that must
    not."""
    wanted = _lasting(_written(config))
    try:
        saved = _lasting(json.loads((run / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        saved = {}
    return sorted(key for key in wanted if wanted[key] != saved.get(key))


def _lasting(written: dict) -> dict:
    """What may not change when a run goes on. How a step is computed may, and where the directory
    is; learning rates and the clipping may be corrected."""
    for stage in written["stages"]:
        del stage["learning_rate"], stage["final_learning_rate"]
    del written["router"]["learning_rate"], written["optimizer"]["clip_norm"]
    lasting = {"engine.teacher_samples": written["engine"]["teacher_samples"]}
    return lasting | {k: v for k, v in written.items() if k not in ("engine", "out")}


def _whole_state(student: ElasticModel, world: World) -> dict[str, torch.Tensor]:
    """The trained weights in one piece, on the first rank (others get none)."""
    state = {}
    for name, value in student.state().items():
        gathered = getattr(value, "full_tensor", lambda whole=value: whole)()
        if world.is_first:
            state[name] = gathered.detach().cpu()
    return state


def _loop(trainer: Trainer, run: Path, progress: Progress) -> float:
    """Trains to the last step; returns the seconds in this process."""
    world, steps = trainer.world, trainer.curriculum.num_steps
    if world.is_first:
        _drop_later_metrics(run, trainer.step)
    progress.stage("train", steps)
    begin = last = time.monotonic()
    with _stop_requested() as stop:
        while trainer.step < steps:
            report = trainer.train_step()
            now = time.monotonic()
            if world.is_first:
                row = {**asdict(report), "seconds": round(now - last, 4)}
                with open(run / "metrics.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
            last = now
            progress.advance(trainer.step, _note(report, trainer))
            stopped = world.any(stop.is_set())
            if stopped or trainer.step % trainer.config.engine.save_every == 0:
                save_state(trainer, run)
            if stopped:
                raise Interrupted(f"stopped at step {trainer.step}; go on with --resume")
        if not trainer.committed:
            trainer.commit()
        save_state(trainer, run)
    return time.monotonic() - begin


def _drop_later_metrics(run: Path, step: int) -> None:
    """Drops the log's rows after the last saved state; the run writes them again."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a line that a killed run began
    text = "".join(json.dumps(row) + "\n" for row in rows if row["step"] < step)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


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
        if fixed.miss > max(AIM, fixed.possible or 0.0) * (1 + 1e-9):
            phase += f", {name} misses its budget by {fixed.miss:.1%}"
    for count, what in ((report.rows_cut, "cut to the context"), (report.rows_dropped, "left out")):
        phase += f", {count:,} rows {what}" if count else ""
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
        sizes[name] = Size(fixed.widths, checked.budgets[name], costs(fixed), fixed.repair)
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
