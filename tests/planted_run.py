"""Runs of the train command on parents with one axis planted half-dead (benchmarks/planting.py).

Fixtures of this file are those of tests.fixtures, so that every test can use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.planting import HYBRID, LLAMA, write_planted_parent
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.manifest import Manifest, load_manifest
from star_elastic.cost.count import CostModel
from star_elastic.data.source_config import SourceConfig
from star_elastic.demo import write_rows
from star_elastic.progress import Silent
from star_elastic.train.build import build_trainer
from star_elastic.train.config import (
    CalibrationConfig,
    EngineConfig,
    RouterConfig,
    RunConfig,
    StageConfig,
)
from star_elastic.train.distributed import World
from star_elastic.train.inputs import open_inputs
from star_elastic.train.loop import Trainer
from star_elastic.train.run import train

CONTEXT, WINDOWS = 48, 2
LEARNED_STEPS = 60
"""Router steps after which the shipped defaults have found the planted axes of these tests."""


class Heard(Silent):
    """Keeps the lines that a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Planted:
    """A parent whose `axis` is half-dead, with the widths at which only that half is cut."""

    folder: Path
    axis: str
    axis_map: AxisMap
    widths: Widths
    choices: Mapping[str, tuple[int, ...]]

    def config(self, name: str, steps: int, **router: Any) -> RunConfig:
        """A run with the router's defaults whose small size is met by the planted widths alone;
        the router learns in all of its steps."""
        cost = CostModel(self.axis_map)
        share = cost.count(self.widths).active / cost.full.active
        return RunConfig(
            parent=str(self.folder / "parent"),
            out=str(self.folder / name),
            sizes={"large": {"active": 1.0}, "small": {"active": share}},
            choices=self.choices,
            data=(SourceConfig(files=(str(self.folder / "rows.jsonl"),)),),
            stages=(
                StageConfig(tokens=steps * WINDOWS * CONTEXT, context=CONTEXT, batch_size=WINDOWS),
            ),
            calibration=CalibrationConfig(num_samples=16, context=CONTEXT),
            router=replace(RouterConfig(commit_at=1.0), **router),
            engine=EngineConfig(autocast=False, save_every=1000),
        )

    def trainer(self, name: str, steps: int = 10, **router: Any) -> Trainer:
        """The trainer of such a run before its first step; its calibration is kept and shared."""
        config = self.config(name, steps, **router)
        scratch = self.folder / "calibration"
        scratch.mkdir(exist_ok=True)
        data = tuple(replace(source, held_out=0) for source in config.data)
        inputs = open_inputs(replace(config, out=str(scratch), data=data))
        return build_trainer(inputs, Silent(), World())[0]


@dataclass(frozen=True)
class PlantedRun:
    """A finished run on a planted parent: its checkpoint, manifest, and what it said."""

    planted: Planted
    elastic: Path
    manifest: Manifest
    lines: list[str]


def plant(folder: Path, config: Mapping[str, Any], axis: str) -> Planted:
    """Writes a parent with a half-dead axis, and rows beside it."""
    axis_map = write_planted_parent(config, axis, folder / "parent")
    write_rows(folder / "rows.jsonl", 400, seed=0)
    halves = {
        name: (axis.size, axis.size // 2)
        for name, axis in axis_map.axes.items()
        if axis.ranked and name != "heads"
    }
    half = axis_map.full.replace(**{axis: axis_map.axes[axis].size // 2})
    return Planted(folder, axis, axis_map, half, halves)


def run_planted(planted: Planted, name: str, steps: int, **router: Any) -> PlantedRun:
    """Trains as the train command does."""
    torch.set_num_threads(1)
    heard = Heard()
    result = train(planted.config(name, steps, **router), progress=heard)
    manifest = load_manifest(result.elastic, planted.axis_map)
    return PlantedRun(planted, result.elastic, manifest, heard.lines)


@pytest.fixture(scope="session")
def planted_hybrid(tmp_path_factory):
    """A hybrid whose experts' neurons are half dead."""
    config = {**HYBRID, "hidden_size": 32, "hybrid_override_pattern": "ME*"}
    return plant(tmp_path_factory.mktemp("planted-hybrid"), config, "expert_ffn")


@pytest.fixture(scope="session")
def planted_llama(tmp_path_factory):
    """A llama whose MLP neurons are half dead."""
    config = {**LLAMA, "hidden_size": 32}
    return plant(tmp_path_factory.mktemp("planted-llama"), config, "ffn")


@pytest.fixture(scope="session", params=["planted_hybrid", "planted_llama"])
def planted(request):
    """Each of them."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def planted_run(planted):
    """A run of the shipped defaults that is long enough to find the planted axis."""
    return run_planted(planted, "learned", LEARNED_STEPS)


@pytest.fixture(scope="session")
def unlearned_run(planted):
    """A run of two router steps, after which the router still keeps the parent whole."""
    return run_planted(planted, "unlearned", 2)
