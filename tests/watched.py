"""What a run does in its first steps, seen from outside: for tests that each key of a config, and
each option of a command, is heard.

Spies stand before real objects and call them; nothing is replaced.
"""

from __future__ import annotations

import dataclasses
import shutil
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from star_elastic.models import elastic
from star_elastic.models.elastic import ElasticModel
from star_elastic.progress import Silent
from star_elastic.router.router import Router
from star_elastic.train.calibrate import SCORES
from star_elastic.train.distributed import World
from star_elastic.train.loop import StepReport, Trainer
from star_elastic.train.reader import WindowReader
from star_elastic.train.stages import Position
from tests.tiny_run import build_trainer, config_in


def keys_of(kind: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of a config dataclass, and of those inside it."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), 0)
        if inner:
            yield from keys_of(typing.cast(type, inner), f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


@dataclass(frozen=True)
class Forward:
    """One forward of a model in training: its size, the shape of its windows, dtypes."""

    size: Any
    rows: int
    tokens: int
    autocast: bool
    dtype: torch.dtype
    is_teacher: bool


@dataclass
class Watched:
    """A run after its first steps."""

    trainer: Trainer
    orders: dict[str, torch.Tensor]
    basis: torch.Tensor | None
    batches: list[Any] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    num_recomputed: int = 0
    ranked: list[int] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Of student and router, as they are now."""
        return {name: p.detach().clone() for name, p in self.trainer._parameters()}

    @property
    def kd(self) -> list[dict[str, float]]:
        """The losses of every step."""
        return [report.kd for report in self.reports]

    def gradient(self, step: int = 0, part: str = "student") -> torch.Tensor:
        """All gradients of a step as one vector, as the optimiser has seen them."""
        own = {n: g for n, g in self.gradients[step].items() if n.startswith(part)}
        return torch.cat([own[name].flatten() for name in sorted(own)])


class _Ranked(Silent):
    """How many rows have been ranked, batch by batch."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._now = ""

    def stage(self, name: str, total: int) -> None:
        self._now = name

    def advance(self, done: int, note: str = "") -> None:
        if self._now == "rank":
            self.rows.append(done)


Watch = Callable[..., Watched]


@pytest.fixture(scope="module")
def scores(run_folder, tmp_path_factory) -> Path:
    """The scores of the tiny parent's units, that runs need not measure again."""
    folder = tmp_path_factory.mktemp("scores")
    build_trainer(config_in(run_folder, "scores"), folder, World())
    return folder / SCORES


@pytest.fixture
def watch(run_folder, scores, tmp_path, monkeypatch) -> Watch:
    """Runs the first steps of the tiny run with some of its text replaced, and looks on."""
    numbers = iter(range(1000))

    def watch(
        steps: int = 1, *, measure: bool = False, folder: Path | None = None, **changes: str
    ) -> Watched:
        folder = folder or run_folder
        scratch = tmp_path / f"watched-{next(numbers)}"
        config = config_in(folder, scratch.name, **changes)
        scratch.mkdir()
        if not measure and folder is run_folder:
            shutil.copyfile(scores, scratch / SCORES)
        progress = _Ranked()
        trainer, orders, basis = build_trainer(config, scratch, World(), progress, whole=True)
        seen = Watched(trainer, orders, basis, ranked=progress.rows)
        with monkeypatch.context() as patch:
            _spy(patch, seen)
            for _ in range(steps):
                seen.reports.append(trainer.train_step())
                seen.gradients.append(
                    {n: p.grad.clone() for n, p in trainer._parameters() if p.grad is not None}
                )
        return seen

    return watch


def _spy(patch: pytest.MonkeyPatch, seen: Watched) -> None:
    hidden_states, recompute = ElasticModel.hidden_states, elastic.checkpoint
    read, decide = WindowReader.read, Router.decide
    teachers = {id(learner.teacher) for learner in seen.trainer.workers.learners}

    def forward(model: ElasticModel, size: Any, **inputs: Any):
        states, head = hidden_states(model, size, **inputs)
        rows, tokens = inputs["input_ids"].shape
        seen.forwards.append(
            Forward(
                size, rows, tokens, torch.is_autocast_enabled("cpu"), states.dtype,
                id(model) in teachers,
            )
        )  # fmt: skip
        return states, head

    def again(*args: Any, **options: Any):
        seen.num_recomputed += 1
        return recompute(*args, **options)

    def take(reader: WindowReader, at: Position):
        windows = read(reader, at)
        seen.batches.append(windows.batch)
        return windows

    def choose(router: Router, budget: Any, temperature: Any, **options: Any):
        decision = decide(router, budget, temperature, **options)
        if router is seen.trainer.router:
            seen.decisions.append({"temperature": temperature, "decision": decision, **options})
        return decision

    patch.setattr(ElasticModel, "hidden_states", forward)
    patch.setattr(elastic, "checkpoint", again)
    patch.setattr(WindowReader, "read", take)
    patch.setattr(Router, "decide", choose)
