"""The run config: one strict TOML file, checked before any work starts.

Every default is defined once, here; those of the stages, the optimiser and the router are the
papers' (arXiv 2605.07182 and 2511.16664).
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from star_elastic.amounts import parse_budget
from star_elastic.cost import METRICS, Workload
from star_elastic.errors import ConfigError, reason
from star_elastic.quant.formats import FORMATS
from star_elastic.router.router import Annealing
from star_elastic.train.strict import parse, require


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Rows of one kind: JSONL files, or directories and parquet files of Hugging Face datasets.

    `weight` is its share of the tokens, relative to the other sources. `loss_on`: every token, or
    only those of completions and last answers.
    """

    files: tuple[str, ...]
    weight: float = 1.0
    loss_on: Literal["all", "answers"] = "all"

    def __post_init__(self):
        require(bool(self.files), "data.files names no file; list JSONL files or datasets")
        require(self.weight > 0, f"data.weight={self.weight} is not > 0; leave the source out")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum: `tokens` in all, in `batch_size` windows of `context` a step.

    The defaults of a run's first stage are short and uniform over the sizes, those of later ones
    long and weighted to the large sizes. `size_weights` has one entry per size, largest first.
    `sizes_per_step`: all sizes on the same tokens with one teacher forward, their losses weighted;
    or one size for each of the step's `groups` of windows, drawn by the weights. The learning rate
    warms up and falls to `final_learning_rate` by a cosine inside the stage.
    """

    tokens: int
    context: int = 0
    batch_size: int = 0
    size_weights: tuple[float, ...] = ()
    sizes_per_step: Literal["all", "one"] = "all"
    groups: int = 1
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 60

    def __post_init__(self):
        require(self.tokens >= 1, f"stages.tokens={self.tokens} is less than 1")
        require(
            self.context == 0 or self.context >= 2, f"stages.context={self.context} is not >= 2"
        )
        require(self.batch_size >= 0, f"stages.batch_size={self.batch_size} is negative")
        require(self.groups >= 1, f"stages.groups={self.groups} is less than 1")
        require(all(w > 0 for w in self.size_weights), "stages.size_weights must be positive")
        require(self.learning_rate > 0, f"stages.learning_rate={self.learning_rate} is not > 0")
        for name in ("final_learning_rate", "warmup_steps"):
            require(getattr(self, name) >= 0, f"stages.{name}={getattr(self, name)} is negative")
        require(
            self.final_learning_rate <= self.learning_rate,
            f"stages.final_learning_rate={self.final_learning_rate} is above learning_rate="
            f"{self.learning_rate}; set both",
        )

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the stage."""
        return max(1, round(self.tokens / (self.batch_size * self.context)))


FIRST_STAGE = {"context": 8192, "batch_size": 1536}
LATER_STAGES = {"context": 49152, "batch_size": 512}
LATER_WEIGHTS = {3: (0.5, 0.3, 0.2)}
FAVOUR_LARGE = 0.6
"""Weights of the sizes in later stages: the papers' for three sizes, else each this share of the
next larger one's."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Rows that importance is estimated on: the first of the training data, or stored scores.

    `context` cuts longer rows. `basis` of the residual stream, from which hidden channels are cut:
    the parent's own channels, or its principal components, of which far fewer do (not for models
    with tied embeddings).
    """

    num_samples: int = 256
    batch_size: int = 16
    context: int = 1024
    scores: str = ""
    basis: Literal["channels", "principal"] = "channels"

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("batch_size", 1), ("context", 2)):
            value = getattr(self, name)
            require(value >= least, f"calibration.{name}={value} is less than {least}")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The router: `weight` of its budget loss, and the share of all steps after which the widths
    are fixed and every size trains as a plain slice; the annealing spans the steps before. `fixed`
    gives widths per size instead, and there is nothing to learn. `eps` of its AdamW is far above
    the usual: where a width hardly matters its gradients are far below `eps`, and so are its steps;
    a small `eps` would scale all axes' steps alike and cut for nothing what no budget asks for.
    """

    learning_rate: float = 1e-2
    eps: float = 1e-2
    weight: float = 1.0
    commit_at: float = 0.3
    hard_share: float = 0.004
    annealing: Annealing = field(default_factory=Annealing)
    fixed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        require(0 < self.commit_at <= 1, f"router.commit_at={self.commit_at} is not in (0, 1]")
        require(self.weight >= 0, f"router.weight={self.weight} is negative")
        for name in ("learning_rate", "eps"):
            require(getattr(self, name) > 0, f"router.{name}={getattr(self, name)} is not > 0")
        a = self.annealing
        require(
            a.tau_start > 0 and a.tau_end > 0 and a.scale_start > 0 and a.scale_end > 0,
            f"router.annealing has tau {a.tau_start} to {a.tau_end} and scale {a.scale_start} to "
            f"{a.scale_end}; all must be > 0",
        )
        require(0 <= self.hard_share <= 1, f"router.hard_share={self.hard_share} is not in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    betas: tuple[float, ...] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)",
        )
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} is negative")
        require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} is not > 0")


MICRO_TOKENS = 16_384
"""Tokens of one forward unless `micro_batch` says otherwise: enough to fill a GPU, and a bound that
the papers' stages need, whose steps have twelve million tokens."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed. But for `teacher_samples`, which adds noise without bias, none of it
    changes what is learned beyond rounding.

    `micro_batch` windows at a time; 0: as many as hold 16,384 tokens (`MICRO_TOKENS`), but at least
    one. `workers` threads share a step's windows: for models too small to fill the cores one by
    one. `recompute` keeps no activations inside blocks. `autocast` multiplies in bf16; experts'
    scores, the Mamba state, losses and optimiser stay in fp32. `teacher_samples` > 0 caches that
    many samples of the teacher's distribution per token instead of running it whenever a row comes
    again. `save_every` steps the state is saved.
    """

    micro_batch: int = 0
    workers: int = 1
    recompute: bool = False
    autocast: bool = True
    teacher_samples: int = 0
    save_every: int = 200

    def __post_init__(self):
        for name, least in (("micro_batch", 0), ("workers", 1), ("save_every", 1)):
            value = getattr(self, name)
            require(value >= least, f"engine.{name}={value} is less than {least}")
        require(
            0 <= self.teacher_samples <= 255,
            f"engine.teacher_samples={self.teacher_samples} is not in 0 to 255",
        )

    def windows_at_once(self, context: int) -> int:
        """The most windows of `context` tokens that one forward reads."""
        return self.micro_batch or max(1, MICRO_TOKENS // context)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Quantisation-aware training of a family whose sizes are fixed: `format` ("": none), parts to
    `keep` unquantised, and the inputs' calibration on the first `samples` rows of the data, of
    whose magnitudes the scales cover this `percentile`.
    """

    format: str = ""
    keep: tuple[str, ...] = ()
    samples: int = 256
    percentile: float = 100.0

    def __post_init__(self):
        require(
            not self.format or self.format in FORMATS,
            f"quant.format={self.format!r} is unknown; use {', '.join(FORMATS)}",
        )
        require(
            bool(self.format or not self.keep), "quant.keep needs quant.format; name one, as nvfp4"
        )
        require(self.samples >= 1, f"quant.samples={self.samples} is less than 1")
        require(
            0 < self.percentile <= 100, f"quant.percentile={self.percentile} is not in (0, 100]"
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `sizes` maps each name, largest first, to budgets by metric: fractions of the
    parent's cost, or amounts with a unit; `choices` maps each elastic axis to its widths, largest
    first (empty: a default grid); `per_layer` lists axes on which every layer has widths of its
    own; `workload` is the decoding that budgets on bytes and operations are counted for, `latency`
    the measured table for budgets in milliseconds. `family`: an elastic checkpoint of the parent to
    train on from, at the widths that its sizes have. `objective`: distillation from the parent, or
    the data's own next tokens.
    """

    parent: str
    out: str
    sizes: Mapping[str, Mapping[str, float | str]]
    data: tuple[SourceConfig, ...]
    stages: tuple[StageConfig, ...]
    seed: int = 0
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    per_layer: tuple[str, ...] = ()
    workload: Workload = field(default_factory=Workload)
    latency: str = ""
    family: str = ""
    objective: Literal["distillation", "task"] = "distillation"
    quant: QuantConfig = field(default_factory=QuantConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        require(bool(self.parent), "parent is empty; name a checkpoint directory")
        require(bool(self.out), "out is empty; name a directory for the run")
        require(bool(self.sizes), "sizes is empty; add for example [sizes.small] active = 0.5")
        require(bool(self.data), "data is empty; add [[data]] with files")
        require(bool(self.stages), "stages is empty; add [[stages]] with tokens")
        for name, budgets in self.sizes.items():
            require(
                re.fullmatch(r"[^\s/\\]+", name) is not None,
                f"sizes has the name {name!r}; use no spaces and slashes",
            )
            require(bool(budgets), f"sizes.{name} has no budget; add for example active = 0.5")
            for metric, amount in budgets.items():
                require(
                    metric in METRICS,
                    f"sizes.{name}.{metric} is no budget; use {', '.join(METRICS)}",
                )
                parse_budget(amount, metric, f"sizes.{name}.")
        load = self.workload
        require(
            load.context >= 0 and min(load.batch, load.dtype_bytes, load.ssm_dtype_bytes) >= 1,
            f"workload has context={load.context}, batch={load.batch}, "
            f"dtype_bytes={load.dtype_bytes}, ssm_dtype_bytes={load.ssm_dtype_bytes}; "
            "give tokens >= 0, sequences and bytes >= 1",
        )
        require(
            bool(self.family or not self.quant.format),
            "quant.format needs family, the elastic checkpoint to quantise; name one",
        )
        require(
            not (self.family and (self.router.fixed or self.choices or self.per_layer)),
            "family has widths already; leave choices, per_layer and router.fixed out",
        )
        for name in self.router.fixed:
            require(
                name in self.sizes, f"router.fixed.{name} is no size; use {', '.join(self.sizes)}"
            )
        require(
            not self.router.fixed or set(self.router.fixed) == set(self.sizes),
            "router.fixed gives widths for some sizes only; give them for all or for none",
        )
        object.__setattr__(
            self, "stages", tuple(self._resolve(n, s) for n, s in enumerate(self.stages))
        )

    def _resolve(self, number: int, stage: StageConfig) -> StageConfig:
        """A stage with its defaults filled in, which depend on where it stands."""
        shape = LATER_STAGES if number else FIRST_STAGE
        count = len(self.sizes)
        later = LATER_WEIGHTS.get(count, tuple(FAVOUR_LARGE**i for i in range(count)))
        weights = stage.size_weights or (later if number else (1.0,) * count)
        require(
            len(weights) == len(self.sizes),
            f"stages[{number}].size_weights has {len(weights)} entries for {len(self.sizes)} sizes",
        )
        total = sum(weights)
        stage = dataclasses.replace(
            stage,
            context=stage.context or shape["context"],
            batch_size=stage.batch_size or shape["batch_size"],
            size_weights=tuple(weight / total for weight in weights),
        )
        require(
            stage.batch_size % stage.groups == 0,
            f"stages[{number}].groups={stage.groups} does not divide batch_size={stage.batch_size}",
        )
        return stage


def load_run_config(file: str | Path) -> RunConfig:
    """Reads a run config. Relative paths in it are relative to the file. Raises ConfigError."""
    file = Path(file)
    if file.is_dir():
        inside = sorted(found.name for found in file.glob("*.toml"))
        advice = f", for example {file / inside[0]}" if inside else ""
        raise ConfigError(f"{file} is a directory; name a run config, which is a TOML file{advice}")
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; name a run config (TOML)")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML ({error}); correct the line") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({reason(error)}); correct the path") from None
    config = parse(RunConfig, content, "")

    def resolve(path: str) -> str:
        return os.path.abspath(file.parent / path) if path else path

    return dataclasses.replace(
        config,
        parent=resolve(config.parent),
        out=resolve(config.out),
        latency=resolve(config.latency),
        family=resolve(config.family),
        data=tuple(
            dataclasses.replace(source, files=tuple(map(resolve, source.files)))
            for source in config.data
        ),
        calibration=dataclasses.replace(
            config.calibration, scores=resolve(config.calibration.scores)
        ),
    )
