"""What one rank of a distributed test does; started by torchrun, or alone.

ranks.py gradients RUN.toml OUT   the first step; rank 0 writes its gradients and losses
ranks.py stop RUN.toml STEP       trains until a step, then stops as if interrupted
ranks.py wait SECONDS             rank 0 works for so long, more than its collectives may take
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from star_elastic.errors import Interrupted
from star_elastic.progress import Silent
from star_elastic.train.config import RunConfig, load_run_config
from star_elastic.train.distributed import World, join_world
from star_elastic.train.loop import StepReport
from star_elastic.train.run import train
from tests.tiny_run import build_trainer


def gradients(config: RunConfig, out: Path, world: World) -> None:
    """The (clipped) gradients of the first step, and its losses."""
    trainer = build_trainer(config, out.with_suffix(""), world)
    report: StepReport = trainer.train_step()
    found = {"losses": torch.tensor([*report.kd.values(), *report.budget.values()])}
    for name, parameter in trainer._parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = getattr(gradient, "full_tensor", lambda whole=gradient: whole)().clone()
    if world.is_first:
        save_file(found, out)
        out.with_suffix(".json").write_text(json.dumps({"tokens": report.num_tokens}))


class StopAt(Silent):
    """Interrupts this rank after some steps."""

    def __init__(self, step: int):
        self.step = step

    def advance(self, done: int, note: str = "") -> None:
        if note and done == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def wait(seconds: float) -> None:
    """Waits for a rank that works for three times as long as collectives may take."""
    with join_world() as world:
        world.wait()
        set_timeout(timedelta(seconds=seconds / 3), dist.group.WORLD)
        if world.is_first:
            time.sleep(seconds)
        world.wait()
        print("met")


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "wait":
        wait(float(sys.argv[2]))
        return
    mode, file, last = sys.argv[1:]
    config = load_run_config(file)
    if mode == "gradients":
        with join_world() as world:
            gradients(config, Path(last), world)
        return
    try:
        train(config, progress=StopAt(int(last)))
    except Interrupted as stopped:
        print(stopped)


if __name__ == "__main__":
    main()
