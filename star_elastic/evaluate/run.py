"""An evaluation, readable top to bottom: check, calibrate, solve by every plan, compare, write.

The directory `out` holds `settings.json`, what was found so far (`kept/`), and in the end
`evaluation.json`, which `report` reads, and `answers.jsonl`. A stopped evaluation goes on where it
was.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import star_elastic
from star_elastic.axes.widths import Widths
from star_elastic.bundled import name_of
from star_elastic.errors import ConfigError, Interrupted
from star_elastic.evaluate import difficulty, problems
from star_elastic.evaluate.accuracy import SizeCost, Trial, solve
from star_elastic.evaluate.answers import choose_samples, write_answers
from star_elastic.evaluate.budgets import (
    Budget,
    alike_budgets,
    coinciding,
    common_groups,
    natural_budgets,
)
from star_elastic.evaluate.compare import assemble
from star_elastic.evaluate.grid import Entry, make_grid
from star_elastic.evaluate.kept import Kept
from star_elastic.evaluate.matching import BY_TASK, Match, parse_match
from star_elastic.evaluate.problems import VALIDATION, Splits
from star_elastic.evaluate.reuse import study_reuse
from star_elastic.files.paths import is_file, names_in
from star_elastic.files.writing import digest_files, write_json
from star_elastic.generate.caches import HandOver
from star_elastic.generate.engine import DEFAULT_BATCH_SIZE
from star_elastic.generate.family import load
from star_elastic.generate.phases import DEFAULT_MAX_NEW_TOKENS, Plan, Switch
from star_elastic.measure.size_latency import describe_machine
from star_elastic.progress import Progress, Silent

RESULT = "evaluation.json"
FORMAT_VERSION = 3
DEFAULT_DIALS = (0.1, 0.25, 0.5)
DEFAULT_MATCH = "auto"
DEFAULT_PROBLEMS = 20
"""Of each bundled task, in each split; of the user's own data all are taken."""
CURVE = tuple(position / 10 for position in range(11))
LOOKS = ("token", "line")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is evaluated, and how. Raises ConfigError.

    No `sizes`: all of the family; no `budgets`: from the lengths of natural traces, and none.
    `data` is a JSONL file of the user's own, instead of the bundled tasks, and `match` the rule for
    its answers (`parse_match`); `num_validation` and `num_test` are problems of each task at most.
    """

    sizes: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] | None = None
    dials: tuple[float, ...] = DEFAULT_DIALS
    data: Path | None = None
    match: str | None = None
    num_validation: int | None = None
    num_test: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    switch: Switch = "catch-up"
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.switch == "hand-over" and self.dials:
            raise ConfigError(
                "switch='hand-over' leaves no choice by difficulty, which looks at a token before "
                "it is written; use --dials none, or --switch catch-up"
            )
        if self.match is not None and self.data is None:
            raise ConfigError(
                f"match={self.match!r} is for problems of your own, and the bundled tasks have "
                "a check of their own; leave it out, or name problems with --data"
            )

    @property
    def rule(self) -> Match:
        """When an answer counts as right. Raises ConfigError."""
        return BY_TASK if self.data is None else parse_match(self.match or DEFAULT_MATCH)


def evaluate_family(
    elastic: str | Path,
    settings: Settings,
    out: str | Path,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates a family in the directory `out`, or goes on; returns what `evaluation.json` holds.

    Mistakes are found before anything is written. Raises ConfigError, BudgetError, CheckpointError
    with one line each, Interrupted when the user stops it.
    """
    run = _Run(elastic, settings, out, progress or Silent())
    try:
        result = run.result(command)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the same command goes on where {out} stands") from None
    write_json(run.kept.out / RESULT, result)
    return result


class _Run:
    """One evaluation under way: what it is of is found out and checked when it is made."""

    def __init__(
        self, elastic: str | Path, settings: Settings, out: str | Path, progress: Progress
    ):
        self.settings, self.progress = settings, progress
        self.match = settings.rule
        self.family = load(elastic, settings.dtype, settings.device)
        self.generator = self.family.generator
        self.sizes = self._find_sizes()
        self.splits = self._find_problems()
        self.prompts = [p.question for p in (*self.splits.validation, *self.splits.test)]
        self.thinks = self._find_whether_it_thinks()
        self.options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size,
        }  # fmt: skip
        self.grid = partial(
            make_grid,
            self.sizes,
            max_new_tokens=settings.max_new_tokens,
            switch=settings.switch,
            thinks=self.thinks,
        )
        self.kept = Kept(out, self._lasting())
        self._check()

    def _find_sizes(self) -> tuple[str, ...]:
        """The sizes to evaluate, from the largest; of those with equal widths the first."""
        asked, known = self.settings.sizes, self.family.sizes
        for size in asked:
            self.family.manifest.size(size)
        chosen: dict[Widths, str] = {}
        for size in known:
            if asked and size not in asked:
                continue
            first = chosen.setdefault(known[size].widths, size)
            if first != size:
                self.progress.say(
                    f"{size} has the widths of {first}: what {first} does holds for both"
                )
        return tuple(chosen.values())

    def _find_problems(self) -> Splits:
        counts = self.settings.num_validation, self.settings.num_test
        if self.settings.data is not None:
            return problems.read_problems(self.settings.data, *counts)
        if not problems.knows_bundled_tasks(self.family.tokenizer):
            raise ConfigError(
                "this family does not know the bundled tasks, which need the bundled tokenizer; "
                'name your own problems with --data FILE.jsonl, rows {"prompt": ..., "answer": ...}'
            )
        validation, test = (DEFAULT_PROBLEMS if count is None else count for count in counts)
        return problems.bundled_problems(validation, test, self.settings.seed)

    def _find_whether_it_thinks(self) -> bool:
        """Whether prompts open a trace, which the chat template decides; says so if they do not.

        Raises ConfigError for budgets of thinking where there is none.
        """
        tags = self.generator.tags
        if all(tags.encode_prompt(prompt, thinking=True).in_thinking for prompt in self.prompts):
            return True
        opens = f"the prompts of this family do not open {tags.open}"
        named = ",".join(str(budget) for budget in self.settings.budgets or () if budget)
        if named:
            raise ConfigError(
                f"budgets={named} are of tokens of thinking, but {opens}; use --budgets none, "
                "which evaluates plans without thinking"
            )
        self.progress.say(f"{opens}, so every plan answers at once: no thinking budgets, no pairs")
        return False

    def _lasting(self) -> dict[str, Any]:
        """What must not change while an evaluation goes on."""
        paths = [self.family.path / name for name in names_in(self.family.path)]
        return {
            "package_version": star_elastic.__version__,
            "format_version": FORMAT_VERSION,
            "checkpoint": digest_files([path for path in paths if is_file(path)]),
            "problems": hashlib.sha256(repr(self.splits).encode()).hexdigest()[:16],
            **asdict(self.settings),
            "sizes": self.sizes,
            "data": self.splits.name,
        }

    def _check(self) -> None:
        """Raises what any plan of the grid would, before any work."""
        budgets = self.settings.budgets if self.thinks else None
        plans = [entry.plan for entry in self.grid(budgets or (None,), {})]
        kinds = {(len(plan.sizes), plan.thinking_budget): plan for plan in plans}
        for plan in kinds.values():
            # A stream checks its prompts when it is opened, and works when it is read.
            self.generator.stream(self.prompts, plan, batch_size=self.settings.batch_size)
        if self.settings.switch == "hand-over":
            for pair in itertools.permutations(self.sizes, 2):
                HandOver(self.family.axis_map, *(self.family.sizes[size].widths for size in pair))

    def calibrate(self) -> dict[str, Any]:
        """On validation: natural traces, the budgets that cut them, the dial of every pair."""
        pairs = [*itertools.combinations(self.sizes, 2)] if self.settings.dials else []
        self.progress.stage("calibrate", len(self.sizes) + len(pairs))
        texts: dict[str, list[difficulty.Text]] = {}
        for number, size in enumerate(self.sizes, start=1):
            texts[size] = difficulty.write_texts(
                self.generator, self.splits.validation, size, thinks=self.thinks, **self.options
            )
            self.progress.advance(number, f"{size} writes")
        policies = []
        for number, (large, small) in enumerate(pairs, start=len(self.sizes) + 1):
            policies.append(self._policies(texts[large], small, large))
            self.progress.advance(number, f"{small} and {large} read")
        lengths = [text.num_trace for text in texts[self.sizes[0]]]
        budgets: list[Budget] = [None]
        if self.thinks:
            natural = natural_budgets(lengths, self.settings.max_new_tokens)
            budgets = natural if self.settings.budgets is None else [*self.settings.budgets]
        ends_line = self.generator.tags.ends_line
        return {
            "trace_tokens": {"mean": float(np.mean(lengths)), "longest": max(lengths)},
            "budgets": budgets,
            "alike": {
                size: alike_budgets(budgets, [text.thought for text in own], ends_line)
                for size, own in texts.items()
            },
            "policies": policies,
        }

    def _policies(self, texts: Sequence[difficulty.Text], small: str, large: str) -> dict[str, Any]:
        """The dial of one pair: the positions that are asked for, and a curve over all."""
        size = self.settings.batch_size
        readings = difficulty.read_texts(self.generator, texts, small, large, batch_size=size)
        asked, curve = (
            [
                dial.to_json()
                for look in LOOKS
                for dial in difficulty.calibrate(readings, positions, look)
            ]
            for positions in (self.settings.dials, CURVE)
        )
        return {
            "small": small,
            "large": large,
            "num_tokens": len(readings.differs),
            "num_lines": int(readings.begins_line.sum()),
            "differing_share": float(readings.differs.mean()),
            "dials": asked,
            "curve": curve,
        }

    def solve(self, entries: Sequence[Entry]) -> dict[str, dict[str, Trial]]:
        """Every plan tried on every problem, by label and split."""
        self.progress.stage("evaluate", len(entries))
        trials = {}
        for number, entry in enumerate(entries, start=1):
            kept = self.kept.fetch(f"plan {entry.label}", partial(self._solve_one, entry.plan))
            own = {split: Trial.from_json(content) for split, content in kept.items()}
            trials[entry.label] = own
            self.progress.advance(number, f"{entry.label} {np.mean(own[VALIDATION].right):.1%}")
        return trials

    def _solve_one(self, plan: Plan) -> dict[str, Any]:
        options = {"match": self.match, "batch_size": self.settings.batch_size}
        return {
            split: solve(self.generator, own, plan, **options).to_json()
            for split, own in self.splits.items()
        }

    def study_reuse(self, calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every pair with its caches handed over, on the test problems; none without thinking."""
        cases = [
            (think, answer, budget)
            for think, answer in (itertools.permutations(self.sizes, 2) if self.thinks else ())
            for budget in common_groups(calibration["budgets"], [calibration["alike"][think]])
            if budget != 0
        ]
        if cases:
            self.progress.stage("reuse", len(cases))
        found = []
        for number, case in enumerate(cases, start=1):
            found.append(self.kept.fetch(f"reuse {case}", partial(self._study_one, *case)))
            self.progress.advance(number, f"{case[0]}>{case[1]}")
        return found

    def _study_one(self, think: str, answer: str, budget: int | None) -> dict[str, Any]:
        try:
            options = {"match": self.match, "seed": self.settings.seed, **self.options}
            found = study_reuse(
                self.family, self.splits.test, think, answer, budget=budget, **options
            )
        except ConfigError as error:
            return {"think": think, "answer": answer, "budget": budget, "refused": str(error)}
        return asdict(found)

    def result(self, command: str) -> dict[str, Any]:
        """Everything that was found, as plain data."""
        calibration = self.kept.fetch("calibration", self.calibrate)
        if self.settings.budgets and self.thinks:
            for told in coinciding(calibration["alike"]):
                self.progress.say(
                    f"thinking budgets that cut the same of every validation trace: {told}; tried "
                    "once"
                )
        dials = difficulty.dials_by_pair(calibration["policies"])
        entries = self.grid(calibration["budgets"], dials, alike=calibration["alike"])
        trials = self.solve(entries)
        size_bytes = {s: SizeCost.of(self.family, s).bytes_per_token for s in self.sizes}
        reuse = self.study_reuse(calibration)
        settings = self.settings
        options = {"batch_size": settings.batch_size, "seed": settings.seed}
        return {
            "format_version": FORMAT_VERSION,
            "package_version": star_elastic.__version__,
            "elastic": name_of(self.family.path),
            "command": command,
            "machine": describe_machine(self.family.parent.dtype, settings.device),
            "settings": self.kept.settings,
            "problems": {
                "source": self.splits.name,
                **{split: Counter(p.task for p in own) for split, own in self.splits.items()},
            },
            "thinks": self.thinks,
            "match": {"name": self.match.name, "words": self.match.words},
            "sizes": {
                size: {
                    "active": self.family.cost(size).active,
                    "total": self.family.cost(size).total,
                    "bytes_per_token": own,
                    # How much faster memory alone lets it be at batch 1.
                    "bandwidth_bound": size_bytes[self.sizes[0]] / own,
                }
                for size, own in size_bytes.items()
            },
            "calibration": calibration,
            **assemble(entries, self.splits, trials, **options),
            "reuse": reuse,
            "answers": write_answers(self.kept.out, entries, self.splits, trials),
            "samples": choose_samples(entries, self.splits, trials),
        }
