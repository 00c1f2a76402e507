"""The run config: one strict TOML file, checked before any work starts.

Unknown keys fail with the nearest known name; every default is defined once, here.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from star_elastic.cost import METRICS, Workload
from star_elastic.errors import ConfigError
from star_elastic.router.router import Annealing


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training rows. `loss_on`: every token, or only those of completions and last answers."""

    train: tuple[str, ...]
    context: int = 1024
    loss_on: Literal["all", "answers"] = "all"

    def __post_init__(self):
        require(bool(self.train), "data.train names no file; list JSONL files")
        require(self.context >= 2, f"data.context={self.context} is less than 2 tokens")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Rows that importance is estimated on: the first of the training data, or stored scores.

    `basis` of the residual stream, from which hidden channels are cut: the parent's own channels,
    or its principal components, of which far fewer do (not for models with tied embeddings).
    """

    num_samples: int = 256
    batch_size: int = 16
    scores: str = ""
    basis: Literal["channels", "principal"] = "channels"

    def __post_init__(self):
        require(self.num_samples >= 1, "calibration.num_samples must be at least 1")
        require(self.batch_size >= 1, "calibration.batch_size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The router: `weight` of its budget loss, and the share of all steps after which the widths
    are fixed and every size trains as a plain slice. While it learns, a step reads `batch_size`
    rows of the step's batch (0: all): its noise comes from the draws of widths, not from the data,
    and every one of its steps costs as much as the widest choice.
    """

    learning_rate: float = 1e-2
    weight: float = 1.0
    commit_at: float = 0.3
    batch_size: int = 0
    hard_share: float = 0.004
    annealing: Annealing = field(default_factory=Annealing)

    def __post_init__(self):
        require(0 < self.commit_at <= 1, f"router.commit_at={self.commit_at} is not in (0, 1]")
        require(self.batch_size >= 0, f"router.batch_size={self.batch_size} is negative")
        require(self.weight >= 0, f"router.weight={self.weight} is negative")
        require(self.learning_rate > 0, f"router.learning_rate={self.learning_rate} is not > 0")
        a = self.annealing
        require(
            a.tau_start > 0 and a.tau_end > 0 and a.scale_start > 0 and a.scale_end > 0,
            f"router.annealing has tau {a.tau_start} to {a.tau_end} and scale {a.scale_start} to "
            f"{a.scale_end}; all must be > 0",
        )
        require(0 <= self.hard_share <= 1, f"router.hard_share={self.hard_share} is not in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine to `final_learning_rate`."""

    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 60
    betas: tuple[float, ...] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} is not > 0")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)",
        )
        for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}={value} is negative")
        require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} is not > 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long and how much at a time. `sizes_per_step`: all sizes on the same tokens with one
    teacher forward, or one size drawn by `size_weights`, which weigh the losses otherwise.
    `workers` threads share a step's rows: for models too small to fill the cores one by one.
    """

    steps: int
    batch_size: int = 32
    sizes_per_step: Literal["all", "one"] = "all"
    size_weights: tuple[float, ...] = ()
    save_every: int = 200
    workers: int = 1
    autocast: bool = True

    def __post_init__(self):
        require(self.steps >= 1, f"schedule.steps={self.steps} is less than 1")
        require(self.batch_size >= 1, f"schedule.batch_size={self.batch_size} is less than 1")
        require(self.workers >= 1, f"schedule.workers={self.workers} is less than 1")
        require(self.save_every >= 1, f"schedule.save_every={self.save_every} is less than 1")
        require(all(w > 0 for w in self.size_weights), "schedule.size_weights must be positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `sizes` maps each name, largest first, to budgets (fractions by metric);
    `choices` maps each elastic axis to its widths, largest first (empty: a default grid);
    `workload` is the decoding that budgets on bytes and operations are counted for.
    """

    parent: str
    out: str
    sizes: Mapping[str, Mapping[str, float]]
    data: DataConfig
    schedule: ScheduleConfig
    seed: int = 0
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    workload: Workload = field(default_factory=Workload)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        require(bool(self.sizes), "sizes is empty; add for example [sizes.small] active = 0.5")
        for name, budgets in self.sizes.items():
            require(bool(budgets), f"sizes.{name} has no budget; add for example active = 0.5")
            for metric, fraction in budgets.items():
                require(
                    metric in METRICS,
                    f"sizes.{name}.{metric} is no budget; use {', '.join(METRICS)}",
                )
                require(
                    isinstance(fraction, (int, float)) and 0 < fraction <= 1,
                    f"sizes.{name}.{metric}={fraction} is not a fraction in (0, 1]",
                )
        load = self.workload
        require(
            load.context >= 0 and load.batch >= 1 and load.dtype_bytes >= 1,
            f"workload has context={load.context}, batch={load.batch}, "
            f"dtype_bytes={load.dtype_bytes}; give tokens >= 0, sequences and bytes >= 1",
        )
        weights = self.schedule.size_weights
        require(
            not weights or len(weights) == len(self.sizes),
            f"schedule.size_weights has {len(weights)} entries for {len(self.sizes)} sizes",
        )


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def load_run_config(file: str | Path) -> RunConfig:
    """Reads a run config. Relative paths in it are relative to the file. Raises ConfigError."""
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; name a run config (TOML)")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML ({error})") from None
    config = parse(RunConfig, content, "")
    base = file.parent

    def resolve(path: str) -> str:
        return path if not path or Path(path).is_absolute() else str(base / path)

    data = dataclasses.replace(config.data, train=tuple(resolve(p) for p in config.data.train))
    calibration = dataclasses.replace(config.calibration, scores=resolve(config.calibration.scores))
    return dataclasses.replace(
        config,
        parent=resolve(config.parent),
        out=resolve(config.out),
        data=data,
        calibration=calibration,
    )


def parse(kind: type, content: Any, where: str) -> Any:
    """A config dataclass from plain data, strictly. `where` is the dotted path for messages."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where or 'the config'} is {content!r}; it must be a table")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
            raise ConfigError(f"{where}{key} is not a key of the run config; {advice}")
    values = {key: _value(hints[key], value, f"{where}{key}") for key, value in content.items()}
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING
        if name not in values and required and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing; the run config needs it")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return parse(hint, value, f"{where}.")
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(
                f"{where}={value!r} is unknown; use {' or '.join(map(repr, options))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}={value!r} is not a list")
        inner = typing.get_args(hint)[0]
        return tuple(_value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping or origin is typing.get_origin(Mapping[str, Any]):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r} is not a table")
        inner = typing.get_args(hint)[1]
        return {key: _value(inner, item, f"{where}.{key}") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}={value!r} is not a {hint.__name__}")
    return value


def to_plain(config: Any) -> Any:
    """A config as plain JSON data, to be saved resolved beside its results."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    return list(config) if isinstance(config, tuple) else config
