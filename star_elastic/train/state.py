"""Saved training states: everything a run needs to go on as if it had never stopped.

A state directory is replaced as a whole: the new one is complete before the old one goes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from star_elastic.checkpoint import load_tensors, save_tensors, write_json
from star_elastic.errors import CheckpointError
from star_elastic.router.budget import Commitment
from star_elastic.train.loop import Trainer
from star_elastic.widths import Widths

STATE, PREVIOUS = "state", "state.previous"


def save_state(trainer: Trainer, run: Path) -> None:
    """Writes the trainer's state to `run/state`, keeping the previous one until it is complete."""
    target, previous = run / STATE, run / PREVIOUS
    temporary = run / f".{STATE}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(temporary / "model.safetensors", dict(trainer.student.parent.named_parameters()))
    save_tensors(temporary / "router.safetensors", trainer.router.state_dict())
    moments = {
        f"{index}.{key}": value
        for index, entry in trainer.optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    save_tensors(temporary / "optimizer.safetensors", moments)
    committed = {name: asdict(fixed) for name, fixed in trainer.committed.items()}
    for name, fixed in trainer.committed.items():
        committed[name]["widths"] = dict(fixed.widths)
    write_json(temporary / "state.json", {"step": trainer.step, "committed": committed})
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    os.replace(temporary, target)
    shutil.rmtree(previous, ignore_errors=True)


def has_state(run: Path) -> bool:
    """Whether a run can be resumed."""
    return any((run / name / "state.json").is_file() for name in (STATE, PREVIOUS))


def load_state(trainer: Trainer, run: Path) -> None:
    """Puts the trainer where the saved state left it. Raises CheckpointError."""
    folder = next(
        (run / name for name in (STATE, PREVIOUS) if (run / name / "state.json").is_file()), None
    )
    if folder is None:
        raise CheckpointError(f"{run} holds no saved state; start without --resume")
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        weights = load_tensors(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in trainer.student.parent.named_parameters():
                parameter.copy_(weights[name])
        trainer.router.load_state_dict(load_tensors(folder / "router.safetensors"))
        trainer.optimizer.load_state_dict(_optimizer_state(trainer, folder))
        trainer.step = content["step"]
        trainer.committed = {
            name: Commitment(Widths(fixed["widths"]), fixed["miss"], fixed["repair"])
            for name, fixed in content["committed"].items()
        }
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} is damaged or of another run ({error!r}); start anew in another directory"
        ) from None
    if trainer.committed:
        trainer.router.requires_grad_(False)


def _optimizer_state(trainer: Trainer, folder: Path) -> dict:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_tensors(folder / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": trainer.optimizer.state_dict()["param_groups"]}
