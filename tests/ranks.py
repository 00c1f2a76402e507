"""What ranks do in tests; started by `processes.on_ranks`, or by a test itself as the only one."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from star_elastic.cli.commands import program
from star_elastic.cli.terminal import run_program
from star_elastic.errors import CheckpointError, Interrupted
from star_elastic.progress import Silent
from star_elastic.train.config import RunConfig, load_run_config
from star_elastic.train.distributed import World, join_world
from star_elastic.train.run import RunResult, train
from tests.tiny_run import StopAt, build_trainer
from tests.watchers import Said

TOLERANCE = 1e-6
"""Of gradients, relative to the largest one of their tensor: sums run in another order."""


def gradients(config: RunConfig, scratch: Path, world: World) -> dict[str, torch.Tensor]:
    """The (clipped) gradients of the first step by parameter, whole; its losses and tokens."""
    trainer = build_trainer(config, scratch, world)
    report = trainer.train_step()
    found = {
        "losses": torch.tensor([*report.kd.values(), *report.budget.values()]),
        "tokens": torch.tensor(report.num_tokens),
    }
    for name, parameter in trainer._parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = getattr(gradient, "full_tensor", lambda whole=gradient: whole)().clone()
    return found


def gradients_of(files: Sequence[Path], folder: Path) -> list[dict[str, torch.Tensor]]:
    """The same of several run configs, one after the other, on this rank."""
    torch.set_num_threads(1)
    with join_world() as world:
        folder = folder / f"of-{world.size}"
        folder.mkdir(exist_ok=True)
        return [gradients(load_run_config(file), folder / file.stem, world) for file in files]


def stop(file: Path, step: int) -> str:
    """Trains until a step, then stops as if interrupted; what is said then."""
    return _interrupted(file, StopAt(step, signal.SIGTERM))


def stop_ranking(file: Path) -> str:
    """Trains until the first rank ranks, then all stop as if interrupted; what is said then."""
    pids = file.with_suffix(".pids")
    with pids.open("a") as written:
        written.write(f"{os.getpid()}\n")
    return _interrupted(file, StopRanking(pids))


def _interrupted(file: Path, progress: Silent) -> str:
    """Trains with a progress that stops the run; what is said then."""
    try:
        train(load_run_config(file), progress=progress)
    except Interrupted as stopped:
        return str(stopped)
    raise AssertionError("the run was not interrupted")


def told(file: Path) -> list[str]:
    """Goes on with a run to its end; the lines that this rank says meanwhile."""
    watcher = Said()
    train(load_run_config(file), resume=True, progress=watcher)
    return watcher.lines


class StopRanking(Silent):
    """Asks all ranks to stop, once, at the first progress that is no step's, as torchrun does."""

    def __init__(self, pids: Path):
        self.pids, self.asked = pids, False

    def advance(self, done: int, note: str = "") -> None:
        if not note and not self.asked:
            self.asked = True
            for pid in self.pids.read_text().split():
                os.kill(int(pid), signal.SIGINT)


def refused(file: Path) -> str:
    """Trains what cannot be trained to its end; what is said then."""
    try:
        train(load_run_config(file))
    except CheckpointError as error:
        return str(error)
    raise AssertionError("the run ended")


def run(file: Path, *, resume: bool = False) -> RunResult:
    """A whole run, or what is left of it."""
    return train(load_run_config(file), resume=resume)


def command(*arguments: str) -> str:
    """What this rank prints for a command that ends well."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_program(program, arguments)
    return printed.getvalue()


def wait(seconds: float) -> float:
    """Waits for a rank that works for three times as long as collectives may take; how long."""
    with join_world() as world:
        world.wait()
        set_timeout(timedelta(seconds=seconds / 3), dist.group.WORLD)
        begin = time.monotonic()
        if world.is_first:
            time.sleep(seconds)
        world.wait()
        return time.monotonic() - begin
