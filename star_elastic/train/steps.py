"""The steps of a run one after the other: told, logged, saved, and stopped between two of them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from star_elastic.errors import Interrupted
from star_elastic.files.paths import has_file
from star_elastic.progress import Progress
from star_elastic.router.budget import AIM
from star_elastic.signals import Stop
from star_elastic.train.directory import METRICS
from star_elastic.train.loop import StepReport, Trainer
from star_elastic.train.pace import Pace
from star_elastic.train.state import has_state, save_state


def how_to_go_on(run: Path) -> str:
    """What a user who has stopped a run should know."""
    if has_state(run):
        return "stopped; go on with --resume"
    return "stopped before training began; the same command goes on (finished rankings are kept)"


def run_steps(trainer: Trainer, run: Path, progress: Progress, stop: Stop) -> float:
    """Trains to the last step; returns the seconds in this process.

    Raises Interrupted between two steps, when the state is saved. Before any other error goes on
    its way, the state is saved if the trainer says that it is sound.
    """
    world, steps = trainer.world, trainer.curriculum.num_steps
    if world.is_first:
        _drop_later_metrics(run / METRICS, trainer.step)
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
                raise Interrupted(how_to_go_on(run))
            raise Interrupted(f"stopped at step {trainer.step}; go on with --resume")
        try:
            report = trainer.train_step()
        except Exception:
            if trainer.is_sound and trainer.step > saved:
                save_state(trainer, run)
            raise
        now = time.monotonic()
        if line := pace.after(report.step, now - last):
            progress.say(line)
        if world.is_first:
            row = {**asdict(report), "seconds": round(now - last, 4)}
            with open(run / METRICS, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        last = now
        progress.advance(trainer.step, _note(report, trainer))
        if report.rows_skipped and not tells_skipped:
            tells_skipped = True
            first = next(filter(None, world.gather(trainer.reader.first_skipped)), "as before")
            progress.say(f"rows that cannot be read are left out, the first: {first}")
        if trainer.step % trainer.config.engine.save_every == 0:
            save_state(trainer, run)
            saved = trainer.step
    if not trainer.committed:
        trainer.commit()
    save_state(trainer, run)
    return time.monotonic() - begin


def _drop_later_metrics(file: Path, step: int) -> None:
    """Drops the log's rows after the last saved state; the run writes them again."""
    if not has_file(file):
        return
    kept = 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] >= step or not line.endswith(b"\n"):
                break
        except (ValueError, LookupError, TypeError):
            break  # a line that a killed run began, or that something else has written
        kept += len(line)
    os.truncate(file, kept)


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
