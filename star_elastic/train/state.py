"""Saved training states: everything a run needs to go on as if it had never stopped.

Tensors are written by PyTorch's distributed checkpointing in its safetensors format, every rank its
own part, and load on any number of ranks. A state directory is replaced as a whole: the new one is
complete before the old one goes.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from star_elastic.errors import CheckpointError, reason
from star_elastic.files.paths import is_file
from star_elastic.files.writing import flush, write_json
from star_elastic.router.commit import Commitment
from star_elastic.train.loop import Trainer

STATE, PREVIOUS = "state", "state.previous"
PROGRESS = "state.json"


def save_state(trainer: Trainer, run: Path) -> None:
    """Writes the trainer's state to `run/state`, keeping the previous one until it is complete.

    Called on all ranks. Raises CheckpointError if the disk is full; the last state is intact then.
    """
    world = trainer.world
    target, previous, temporary = run / STATE, run / PREVIOUS, run / f".{STATE}.partial"
    positions = world.gather(trainer.reader.position)
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    world.wait()

    def prepare() -> None:
        temporary.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        _save_tensors(trainer, temporary)

    def settle() -> None:
        if world.is_first:
            write_json(temporary / PROGRESS, _progress(trainer, positions))
            flush(temporary)  # before the state that it replaces goes

    for part in (prepare, write, settle):  # all ranks write, or none does
        problem = ""
        try:
            part()
        except (OSError, RuntimeError, CheckpointException, CheckpointError) as error:
            problem = reason(error, -1)
        if world.any(bool(problem)):
            if world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{target} cannot be written ({problem or 'on another rank'}); make room and go on "
                "(with --resume if there is a saved state: the last one is intact)"
            )
    if world.is_first:
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(target, previous)
        os.replace(temporary, target)
        shutil.rmtree(previous, ignore_errors=True)
    world.wait()


def _save_tensors(trainer: Trainer, folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save(trainer.tensors(), storage_writer=writer, no_dist=trainer.world.size == 1)


def _progress(trainer: Trainer, positions: list[dict]) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "committed": {name: fixed.to_json() for name, fixed in trainer.committed.items()},
        "data": positions,
        "tensors": sorted(trainer.tensors()),
    }


def has_state(run: Path) -> bool:
    """Whether a run can be resumed."""
    return any(is_file(run / name / PROGRESS) for name in (STATE, PREVIOUS))


def load_state(trainer: Trainer, run: Path) -> None:
    """Puts the trainer where the saved state left it. Raises CheckpointError."""
    folder = next((run / n for n in (STATE, PREVIOUS) if is_file(run / n / PROGRESS)), None)
    if folder is None:
        raise CheckpointError(f"{run} holds no saved state; start without --resume")
    try:
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        tensors = trainer.tensors(content["tensors"])
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt"):  # torch tells of damage in pages of its own
                pass
        reader = HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=trainer.world.size == 1)
        trainer.step, trainer.tokens = content["step"], content["tokens"]
        trainer.committed = {
            name: Commitment.from_json(fixed) for name, fixed in content["committed"].items()
        }
        trainer.reader.load(content["data"])
    except (Exception, CheckpointException) as e:
        raise CheckpointError(
            f"{folder} is damaged or of another run ({reason(e, -1)}); start anew in another "
            "directory"
        ) from None
    if trainer.committed:
        trainer.router.requires_grad_(False)
