"""The run config: one strict TOML file, checked before any work starts.

Every default is defined once, here; those of the stages, the optimiser and the router are the
papers' (arXiv 2605.07182 and 2511.16664). What a key does stands below it, and docs/run_config.md
is made from that (`reference.py`).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from star_elastic.architectures.config_file import is_hub_name, not_a_directory
from star_elastic.bundled import find_model
from star_elastic.checkpoints.manifest import require_size_name
from star_elastic.cost.amounts import parse_budget
from star_elastic.cost.count import METRICS, Workload
from star_elastic.data.source_config import SourceConfig
from star_elastic.errors import ConfigError, library_boundary
from star_elastic.files.paths import is_file, is_folder, no_file
from star_elastic.quant.formats import FORMATS
from star_elastic.router.router import Annealing
from star_elastic.strict import (
    MOST,
    MOST_ROWS,
    MOST_TOKENS,
    parse,
    require,
    require_above_zero,
    require_not_negative,
    require_within,
)
from star_elastic.train.stages import StageConfig

MOST_THREADS = 2**10
"""Of a process."""
MOST_BYTES = 16
"""Of a number."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the parent's units are ranked: by forward passes over the first rows of the data."""

    num_samples: int = 256
    """Rows to rank on. More make the order surer, and ranking longer."""
    batch_size: int = 16
    """Rows at a time; less where memory is short. The ranking does not depend on it."""
    context: int = 1024
    """Tokens at which rows are cut for ranking; no more than the parent has positions."""
    scores: str = ""
    """Scores that `star-elastic rank` has written, in place of ranking."""
    basis: Literal["channels", "principal"] = "channels"
    """What hidden channels are cut from: the parent's own channels, or the principal components of
    its residual stream, of which far fewer do. Start with `principal` unless the parent's
    embeddings are tied, where it is refused."""

    def __post_init__(self):
        for name, least, most in (
            ("num_samples", 1, MOST), ("batch_size", 1, MOST_ROWS), ("context", 2, MOST_TOKENS),
        ):  # fmt: skip
            require_within(name, getattr(self, name), least, most)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The router, which learns how much of each axis a budget buys."""

    learning_rate: float = 2e-2
    """Learning rate of the router."""
    weight: float = 1.0
    """Weight of the loss that pulls the sizes' costs to their budgets."""
    commit_at: float = 0.3
    """Share of all steps after which the widths are fixed and every size trains as the plain slice
    that leaves. The steps before cost most. Start with what gives the router 150 steps or more."""
    hard_share: float = 0.004
    """Share of the router's decisions that are drawn as one width instead of a mixture."""
    annealing: Annealing = field(default_factory=Annealing)
    """How the router's decisions sharpen."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Widths of every size, as `small = "hidden=1920,ffn=4096"`, in place of a router that learns
    them. Axes left out stay whole."""

    def __post_init__(self):
        require(
            0 < self.commit_at <= 1,
            f"commit_at={self.commit_at} is not in (0, 1]; give a share of the steps like 0.3",
        )
        require_not_negative(self, "weight")
        require_above_zero(self, learning_rate="one like 2e-2")
        a = self.annealing
        require(
            0 < a.tau_end <= a.tau_start and 0 < a.scale_start <= a.scale_end,
            f"annealing has tau_start={a.tau_start}, tau_end={a.tau_end}, "
            f"scale_start={a.scale_start}, scale_end={a.scale_end}; all must be > 0, tau may not "
            "rise and the scale not fall",
        )
        require(
            0 < a.tau_decay <= 1 and a.scale_growth >= 0,
            f"annealing has tau_decay={a.tau_decay} and scale_growth={a.scale_growth}; give "
            "a factor in (0, 1] and a number >= 0",
        )
        require(
            0 <= self.hard_share <= 1,
            f"hard_share={self.hard_share} is not in [0, 1]; give a share like 0.004",
        )

    def num_steps(self, run_steps: int) -> int:
        """Steps that the router learns for in a run of `run_steps`."""
        return max(1, round(self.commit_at * run_steps))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for the shared weights; the router's Adam has the same `betas`."""

    betas: tuple[float, ...] = (0.9, 0.98)
    """Decay of the two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Largest norm of the gradients of a step; larger ones are scaled down to it. The weights' and
    the router's are clipped apart."""

    def __post_init__(self):
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas={list(self.betas)} are not two numbers in [0, 1); give two like [0.9, 0.98]",
        )
        require_not_negative(self, "weight_decay")
        require_above_zero(self, clip_norm="a norm like 1.0")


MICRO_TOKENS = 16_384
"""Tokens of one forward unless `micro_batch` says otherwise: enough to fill a GPU, and a bound that
the papers' stages need, whose steps have twelve million tokens."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed. None of it changes what is learned beyond rounding."""

    micro_batch: int = 0
    """Windows at a time, of a step's; 0: as many as hold 16,384 tokens, at least one. Start with 1
    where memory is short, and raise it until it is full."""
    workers: int = 1
    """Threads that share a step's windows, for models too small to fill the cores one by one. One
    on several ranks."""
    recompute: bool = False
    """Keeps no activations inside blocks and computes them again: less memory, a third more time.
    Start with `true` where a micro-batch of one window does not fit."""
    autocast: bool | None = None
    """Multiplies in bf16; experts' scores, the Mamba state, losses, weights and their updates stay
    in fp32. Left out: where the device has units for it, which many CPUs have not."""
    save_every: int = 200
    """Steps between two saved states."""

    def __post_init__(self):
        for name, least, most in (
            ("micro_batch", 0, MOST_ROWS), ("workers", 1, MOST_THREADS), ("save_every", 1, MOST),
        ):  # fmt: skip
            require_within(name, getattr(self, name), least, most)

    def windows_at_once(self, context: int) -> int:
        """The most windows of `context` tokens that one forward reads."""
        return self.micro_batch or max(1, MICRO_TOKENS // context)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Quantisation-aware training of a `family`, whose sizes stay as they are."""

    format: str = ""
    """`fp8`, `fp8-channel`, `fp8-block` or `nvfp4`. Empty: no quantisation."""
    keep: tuple[str, ...] = ()
    """Parts that stay as they are, as `attention` or `mamba before attention`."""
    samples: int = 256
    """Rows of the data that the inputs' scales are measured on."""
    percentile: float = 100.0
    """Of the inputs' magnitudes, what the scales cover; 100: all."""

    def __post_init__(self):
        require(
            not self.format or self.format in FORMATS,
            f"format={self.format!r} is unknown; use {', '.join(FORMATS)}",
        )
        require(bool(self.format or not self.keep), "keep needs a format; name one, as nvfp4")
        require_within("samples", self.samples, 1, MOST)
        require(
            0 < self.percentile <= 100,
            f"percentile={self.percentile} is not in (0, 100]; give 100 for all",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Relative paths are relative to the file."""

    parent: str
    """The model to make sizes of: a Hugging Face checkpoint directory with safetensors weights and
    a tokenizer, or `bundled-parent`, which comes with the package. Of a family, the full
    size is taken. Start with a small one: training takes 20 bytes per parameter and activations."""
    out: str
    """The run's directory: states while it trains, `elastic/` in the end. Start with a new one for
    every run."""
    sizes: Mapping[str, Mapping[str, float | str]]
    """The sizes by name, largest first, each with its budgets: `active` and `total` parameters,
    `bytes`, `flops` per token, `ms` per token. A budget is a share of the parent's cost (`0.6`,
    `"60%"`) or an amount (`"830M"`, `"1.6GB"`). Start with `active` budgets of 1.0 for the largest,
    which then goes on as the parent, and 0.6 for the smallest."""
    data: tuple[SourceConfig, ...]
    """What the sizes learn on. Start with one source like the text that the parent was tuned on."""
    stages: tuple[StageConfig, ...]
    """The curriculum, stage after stage. Start with one."""
    seed: int = 0
    """Seed of shuffles and of the router's noise."""
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Widths to choose from, by axis, from the full one down, as `ffn = [1536, 1280, 1024]`; axes
    left out stay whole. Empty: a grid down to half on all axes but `heads`, `layers`, `top_k`."""
    per_layer: tuple[str, ...] = ()
    """Axes on which every layer chooses a width of its own. Such sizes run here, but cannot leave
    as plain checkpoints."""
    workload: Workload = field(default_factory=Workload)
    """The decoding that budgets in bytes and operations are counted for."""
    latency: str = ""
    """The table that budgets in milliseconds are counted with, measured on the machine that is to
    serve: `star-elastic latency --for RUN.toml --out TABLE.json`."""
    family: str = ""
    """An elastic checkpoint of this parent to train on from, at the widths that its sizes have."""
    objective: Literal["distillation", "task"] = "distillation"
    """What is learned: the parent's distribution, or the data's own next tokens."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Training through a quantised format."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """How the parent's units are ranked."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How widths are learned."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How a step is computed."""

    def __post_init__(self):
        require(bool(self.parent), "parent is empty; name a checkpoint directory")
        require(bool(self.out), "out is empty; name a directory for the run")
        require(bool(self.sizes), "sizes is empty; add for example [sizes.small] active = 0.5")
        require(bool(self.data), "data is empty; add [[data]] with files")
        require(bool(self.stages), "stages is empty; add [[stages]] with tokens")
        for name, budgets in self.sizes.items():
            require_size_name(name)
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
        for name, most in (
            ("context", MOST_TOKENS), ("batch", MOST_ROWS),
            ("dtype_bytes", MOST_BYTES), ("ssm_dtype_bytes", MOST_BYTES),
        ):  # fmt: skip
            require_within(f"workload.{name}", getattr(load, name), 0, most)
        require_within("seed", abs(self.seed), 0, MOST)
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
        stages = (stage.resolve(n, len(self.sizes)) for n, stage in enumerate(self.stages))
        object.__setattr__(self, "stages", tuple(stages))


def load_run_config(file: str | Path) -> RunConfig:
    """Reads a run config. Relative paths in it are relative to the file. Raises ConfigError."""
    file = Path(file)
    if is_folder(file):
        inside = sorted(found.name for found in file.glob("*.toml"))
        advice = f", for example {file / inside[0]}" if inside else ""
        raise ConfigError(f"{file} is a directory; name a run config, which is a TOML file{advice}")
    if not is_file(file):
        raise ConfigError(f"{file} {no_file(file)}; name a run config (TOML)")
    with library_boundary(
        f"{file} is not valid TOML", "correct the file, and save it as UTF-8", ConfigError
    ):
        # Some editors begin a file with a byte order mark.
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    config = parse(RunConfig, content, "")
    for name in (config.parent, config.family):
        if is_hub_name(name) and not os.path.isdir(file.parent / name):
            raise ConfigError(not_a_directory(Path(name)))

    def resolve(path: str) -> str:
        return os.path.abspath(file.parent / path) if path else path

    models = {
        name: os.path.abspath(find_model(path, file.parent)) if path else path
        for name, path in (("parent", config.parent), ("family", config.family))
    }
    scores = resolve(config.calibration.scores)
    return replace(
        config,
        data=tuple(replace(own, files=tuple(map(resolve, own.files))) for own in config.data),
        calibration=replace(config.calibration, scores=scores),
        out=resolve(config.out),
        latency=resolve(config.latency),
        **models,
    )
