"""A whole run, readable top to bottom: check, build (`build.py`: rank, sort), train, write.

A run directory holds `run.json` (the resolved config), `scores.safetensors`, `metrics.jsonl`,
`state/` (the last saved state), and in the end `elastic/` (after quantisation-aware training also
`quantised/`) and `verdict.json`. Under torchrun all ranks run this; the first one writes.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.data.sources import MAX_CONTEXT, Document, held_out_documents
from star_elastic.errors import CheckpointError, Interrupted, RowError, is_out_of_memory, reason
from star_elastic.files.paths import exists
from star_elastic.files.writing import require_folder
from star_elastic.importance.files import save_scores
from star_elastic.models.placement import choose_device
from star_elastic.progress import Progress, Silent
from star_elastic.signals import Stop, Stoppable, num_ranks, stop_on_signals
from star_elastic.train.build import build_trainer
from star_elastic.train.calibrate import SCORES
from star_elastic.train.config import RunConfig
from star_elastic.train.directory import (
    ELASTIC,
    QUANTISED,
    alone_in,
    begin,
    last_of,
    require_ready,
)
from star_elastic.train.distributed import World, join_world
from star_elastic.train.inputs import RunInputs, open_inputs
from star_elastic.train.outlook import look_ahead
from star_elastic.train.row_check import RowCheck, check_rows, require_lessons, warn_of_rows
from star_elastic.train.state import has_state, load_state
from star_elastic.train.steps import how_to_go_on, run_steps
from star_elastic.train.verdict import VERDICT, Verdict, judge_run
from star_elastic.train.write import write_family

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


def check_run(config: RunConfig, progress: Progress) -> RowCheck:
    """Tells what a run will do, and reads every row of its data; trains and writes nothing.

    What looks wrong with the run is among the warnings. Raises what keeps the run from beginning.
    """
    run = Path(config.out)
    require_folder(run)
    inputs = open_inputs(config, num_ranks())
    # A run that has begun is looked at for its data alone.
    if exists(run) and not has_state(run) and not exists(run / ELASTIC):
        require_ready(run, config, inputs.sources, resume=False)
    outlook = look_ahead(inputs, torch.device(choose_device("auto")))
    for fact in outlook.facts:
        progress.say(fact)
    contexts = list(inputs.contexts.values())
    found = check_rows(inputs.sources, contexts, progress, inputs.stops)
    found.warnings[:0] = outlook.warnings
    return found


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
            except RowError as error:
                # Whoever corrects the row should know how the run goes on, and how without it.
                has_begun = has_state(run) or exists(run / ELASTIC)
                raise CheckpointError(
                    f"{error}, keeping one row a line, and "
                    f"{'go on with --resume' if has_begun else 'start again'}, or set "
                    'bad_rows = "skip" in [[data]] (a row that is taken out, or joined to the line '
                    "before, leaves its line empty)"
                ) from error
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
                    raise Interrupted(how_to_go_on(run)) from None
                if world.size > 1 and LOST_RANK.search(str(error)):
                    raise CheckpointError(
                        f"another rank has ended ({reason(error)}); look for what it said, then go "
                        "on (with --resume if there is a saved state)"
                    ) from error
                raise


def _train(config: RunConfig, resume: bool, shown: Progress, stop: Stop, world: World) -> RunResult:
    run = Path(config.out)
    if world.is_first:
        require_folder(run)
    progress = Stoppable(shown, stop, lambda: how_to_go_on(run))
    inputs = open_inputs(config, world.size)
    for line in require_ready(run, config, inputs.sources, resume):
        progress.say(line)
    # Read now: what is wrong is told before work, not after it.
    held_out = held_out_documents(inputs.sources, max(inputs.contexts.values()))
    world.wait()  # until every rank has looked at the directory, before one writes into it
    with alone_in(run, world):
        if world.is_first:
            begin(run, config, inputs.sources)
        world.wait()

        seconds = 0.0
        if not exists(last_of(run, config)):
            if not has_state(run):
                _look_before(inputs, progress, world)
            trainer, orders, basis = build_trainer(inputs, progress, world)
            if has_state(run):
                load_state(trainer, run)
            seconds = run_steps(trainer, run, shown, stop)
            write_family(inputs, trainer, orders, basis, progress)
        verdict = _judge(inputs, held_out, progress, world) if world.is_first else None
        world.wait()
    made = ElasticCheckpoint(run / ELASTIC).manifest.provenance
    return RunResult(run / ELASTIC, made["steps"], made["tokens"], seconds, verdict)


def _look_before(inputs: RunInputs, progress: Progress, world: World) -> None:
    """What is told and refused before the work of a run that begins."""
    require_lessons(inputs.sources, inputs.contexts, progress)
    look_ahead(inputs, world.device).say(progress)
    for source in inputs.sources:
        for line in warn_of_rows(source, inputs.stops):
            progress.say(f"warning: {line}")
    if inputs.scores and world.is_first:  # from here on the run's config is fixed
        scores, info = inputs.scores
        save_scores(inputs.folder / SCORES, scores, inputs.spec.axis_map, info)
    world.wait()


def _judge(
    inputs: RunInputs, held_out: Sequence[Document], progress: Progress, world: World
) -> Verdict | None:
    """The verdict on what the run has written; kept beside it. None if nothing is held out that it
    could be judged by."""
    run, config = inputs.folder, inputs.config
    if not held_out:
        why = "no row is held out (see data.held_out; a source needs 10 rows)"
        if count := sum(len(source.held_out) for source in inputs.sources):
            why = (
                f"none of the {count:,} rows held out has a token that counts among its first "
                f"{MAX_CONTEXT:,}, which are read"
            )
        progress.say(f"no verdict: {why}")
        return None
    gc.collect()  # what training has left
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    verdict = judge_run(
        Path(config.parent), run / ELASTIC, held_out, progress,
        quantised=run / QUANTISED if config.quant.format else None, device=str(world.device),
    )  # fmt: skip
    verdict.save(run / VERDICT)
    return verdict
