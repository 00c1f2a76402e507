"""How many hooks hang on tensors after each step of a run, counted on one rank."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from star_elastic.train.config import load_run_config
from star_elastic.train.distributed import join_world
from tests.tiny_run import build_trainer


def count_hooks() -> int:
    """Hooks on every tensor that is alive (and not frozen), FSDP's own parameters included."""
    gc.collect()
    total = 0
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor):  # asking proxies for their class may warn
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                total += len(getattr(value, kind) or ())
    return total


def hooks_after_steps(files: Sequence[Path], scratch: Path) -> list[list[int]]:
    """The hooks after each step of some runs, from the router's first step to the last.

    Warnings are errors, among them FSDP's about outputs that are views of its parameters.
    """
    torch.set_num_threads(1)
    gc.freeze()  # what is here already is not looked through again and again
    found = []
    with warnings.catch_warnings(), join_world() as world:
        warnings.simplefilter("error")
        for file in files:
            trainer = build_trainer(load_run_config(file), scratch, world)
            counts = []
            for _ in range(trainer.curriculum.num_steps):
                trainer.train_step()
                counts.append(count_hooks())
            assert trainer.committed
            found.append(counts)
    return found
