"""What a run will do, said before it does it: steps, rows, sizes, bytes; and what looks wrong, each
with what to do about it.

Everything is counted from the config, the parent's config.json and the number of rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from star_elastic.bundled import name_of
from star_elastic.checkpoints.companions import is_elastic
from star_elastic.cost.amounts import show_amount
from star_elastic.files.paths import is_file
from star_elastic.progress import Progress
from star_elastic.router.commit import LEARNED
from star_elastic.signals import num_ranks
from star_elastic.train.calibrate import SCORES
from star_elastic.train.check import beyond_positions, ranking_context
from star_elastic.train.directory import ELASTIC
from star_elastic.train.distributed import multiplies_bf16
from star_elastic.train.fingerprint import digest_weights
from star_elastic.train.inputs import RunInputs
from star_elastic.train.stages import Curriculum
from star_elastic.train.state import STATE

STATE_BYTES = 12
"""Per parameter, of a saved state: the weight and the optimiser's two moments, in fp32."""
TRAINING_BYTES = {"distillation": 20, "task": 16}
"""Per parameter, while training: weight, gradient, two moments and, to distil, the teacher's."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run will do, as lines to read, and what looks wrong with it."""

    facts: tuple[str, ...]
    warnings: tuple[str, ...]

    def say(self, progress: Progress) -> None:
        """Tells all of it, warnings last."""
        for line in self.facts:
            progress.say(line)
        for line in self.warnings:
            progress.say(f"warning: {line}")


def look_ahead(inputs: RunInputs, device: torch.device) -> Outlook:
    """What a run will do on a device (one of those of all ranks)."""
    look = _Look(inputs, device)
    return Outlook(tuple(look.facts()), tuple(look.warnings()))


class _Look:
    def __init__(self, inputs: RunInputs, device: torch.device):
        self.config, self.spec, self.run = inputs.config, inputs.spec, inputs.folder
        self.sources, self.scores, self.device = inputs.sources, inputs.scores, device
        self.ranked = ranking_context(self.config, self.spec.model_config)
        self.num_rows = sum(source.num_used for source in self.sources)
        self.steps = Curriculum(self.config.stages).num_steps
        self.router_steps = self.config.router.num_steps(self.steps)
        self.tokens = [stage.step_tokens * stage.num_steps for stage in self.config.stages]
        self.parameters = int(self.spec.cost.full.total)
        self.memory = self.parameters * TRAINING_BYTES[self.config.objective]
        self.is_ranked = is_file(self.run / SCORES)
        # Bytes by directory, but for small files.
        self.written = {
            ELASTIC: self.parameters * self.spec.dtype.itemsize,
            STATE: self.parameters * STATE_BYTES,
        }

    def facts(self) -> Iterator[str]:
        """What will happen, in its order."""
        yield f"{self.run}: {_counted(self.steps, 'step')}, {sum(self.tokens):,} tokens"
        if is_elastic(Path(self.config.parent)):
            parent = name_of(self.config.parent)
            yield f"  parent: {parent} is a family, and its full size is the model that is cut"
        for number, stage in enumerate(self.config.stages):
            windows = _counted(stage.batch_size, "window")
            yield (
                f"  stages[{number}]: {_counted(stage.num_steps, 'step')} of {windows} of "
                f"{stage.context:,} tokens, {self.tokens[number]:,} tokens"
            )
        yield f"  {self._learning()}"
        rows = ", ".join(f"{source.num_used:,} of {_short(source.name)}" for source in self.sources)
        held_out = sum(len(source.held_out) for source in self.sources)
        kept = f"{_counted(held_out, 'other')} held out for the verdict"
        yield f"  rows: {rows}; {kept}"
        for source in self.sources:
            yield from (f"  {line}" for line in source.found)
        if not self.config.family:
            yield f"  ranking: {self._ranking()}"
            yield f"  choices: {self._choices()}"
        full = self.spec.cost.full
        for name, budgets in self.spec.budgets.items():
            asked = ", ".join(
                f"{metric} {show_amount(fraction * full.metric(metric), metric)} ({fraction:.1%})"
                for metric, fraction in budgets.items()
            )
            yield f"  size {name}: {asked}"
        written = ", ".join(
            f"{name}/ {show_amount(count, 'bytes')}" for name, count in self.written.items()
        )
        yield f"  writes about: {written} (a state twice while it is replaced)"
        yield (
            f"  memory: {show_amount(self.memory, 'bytes')} in all for weights, gradients and "
            "moments, and what activations take"
        )

    def _learning(self) -> str:
        if self.spec.fixed:
            return "widths are given, every size trains as a plain slice from the first step"
        counted, left = 0, self.router_steps
        for stage in self.config.stages:
            part = min(stage.num_steps, left)
            counted, left = counted + part * stage.step_tokens, left - part
        return (
            f"the router learns for {_counted(self.router_steps, 'step')} ({counted:,} tokens), "
            f"then widths are fixed for the other {self.steps - self.router_steps:,}"
        )

    def _ranking(self) -> str:
        options = self.config.calibration
        if self.is_ranked:
            return "done before"
        if options.scores:
            return f"taken from {_short(options.scores)}"
        count = min(options.num_samples, self.num_rows)
        return f"forward passes over {count:,} rows of at most {self.ranked:,} tokens"

    def _choices(self) -> str:
        def shown(axis: str, widths: Sequence[int]) -> str:
            each = " in each layer" if axis in self.spec.grid.per_layer else ""
            return f"{axis} {widths[0]} to {widths[-1]} in {len(widths)} widths{each}"

        return ", ".join(shown(*pair) for pair in self.spec.grid.choices.items())

    def warnings(self) -> Iterator[str]:
        """What looks wrong: what is so, and what to do."""
        yield from beyond_positions(self.config, self.spec.model_config)
        yield from self._score_warnings()
        yield from self._stage_warnings()
        yield from self._router_warnings()
        yield from self._size_warnings()
        yield from self._machine_warnings()

    def _score_warnings(self) -> Iterator[str]:
        measured = self.scores[1].weights if self.scores else ""
        if measured and measured != digest_weights(self.config.parent):
            yield (
                f"calibration.scores={self.config.calibration.scores} were measured on other files "
                f"than those of {self.config.parent}: unless these are the same weights saved "
                "anew, rank this parent (star-elastic rank)"
            )

    def _stage_warnings(self) -> Iterator[str]:
        for number, stage in enumerate(self.config.stages):
            here, tokens = f"stages[{number}]", stage.step_tokens
            if stage.warmup_steps and stage.warmup_steps >= stage.num_steps:
                yield (
                    f"{here}.warmup_steps={stage.warmup_steps} of {stage.num_steps} steps: the "
                    "learning rate never reaches its peak; leave it out, which gives a tenth"
                )
            if stage.tokens < tokens:
                yield (
                    f"{here}.tokens={stage.tokens:,} is less than the {tokens:,} tokens of one "
                    "step, which is taken all the same; lower batch_size or context, or raise "
                    "tokens"
                )
            if stage.batch_size > self.num_rows:
                yield (
                    f"{here}.batch_size={stage.batch_size:,} windows a step from {self.num_rows:,} "
                    "rows: a step sees rows more than once; lower batch_size"
                )

    def _router_warnings(self) -> Iterator[str]:
        if not self.spec.fixed and self.router_steps < LEARNED:
            steps = _counted(self.router_steps, "step")
            yield (
                f"the router learns for {steps}, and below {LEARNED} the budgets decide most "
                "widths, not the data; raise stages.tokens, lower stages.batch_size, or raise "
                "router.commit_at"
            )
        options = self.config.calibration
        ranks = not (options.scores or self.config.family or self.is_ranked)
        count = min(options.num_samples, self.num_rows) * self.ranked
        read = sum(self.tokens)
        if ranks and count > read:
            yield (
                f"ranking reads up to {count:,} tokens and training {read:,}; lower "
                "calibration.num_samples or calibration.context"
            )

    def _size_warnings(self) -> Iterator[str]:
        first, budgets = next(iter(self.spec.budgets.items()))
        most = max(budgets.values())
        if most < 1 and not self.config.family:
            yield (
                f"the largest size, {first}, has {most:.1%} of the parent: no size of the family "
                "will answer as the parent does; add one with active = 1.0 to keep it"
            )

    def _machine_warnings(self) -> Iterator[str]:
        need = sum(self.written.values()) + self.written[STATE]
        place = next(folder for folder in (self.run, *self.run.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if free < need:
            yield (
                f"{show_amount(free, 'bytes')} are free at {place}, and the run writes up to "
                f"{show_amount(need, 'bytes')}; make room or name another out"
            )
        has = _device_bytes(self.device) * num_ranks()
        if has < self.memory:
            yield (
                f"training takes {show_amount(self.memory, 'bytes')} and there are "
                f"{show_amount(has, 'bytes')}; train on more GPUs with torchrun, or take a smaller "
                "parent"
            )
        if self.config.engine.autocast and not multiplies_bf16(self.device):
            yield (
                "engine.autocast multiplies in bf16, which this CPU has no units for and imitates "
                "several times slower; leave it out"
            )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _short(name: str) -> str:
    """Files of a source without their folders."""
    return ", ".join(Path(part).name for part in name.split(", "))


def _device_bytes(device: torch.device) -> int:
    """Memory of one rank's device; CPU ranks are taken to be alone on their machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
