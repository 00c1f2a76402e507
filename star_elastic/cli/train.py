"""`star-elastic train`: a run from its config, or a look at what it would do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument, Option

from star_elastic.cli.bars import progress_bars
from star_elastic.cli.options import AsJson
from star_elastic.cli.terminal import show
from star_elastic.signals import is_first_rank
from star_elastic.tables import Table

if TYPE_CHECKING:
    from star_elastic.train.verdict import Verdict

LONGEST = 200
"""Characters of a sample's text that are shown."""


def train(
    run: Path = Argument(help="Run config (TOML)."),
    resume: bool = Option(False, "--resume", help="Go on from the last state."),
    check_only: bool = Option(
        False, "--check", help="Read every row of the data, and train nothing."
    ),
    as_json: AsJson = False,
) -> None:
    """Nested distillation: sort, learn the sizes, train them, write the elastic checkpoint."""
    from star_elastic.train import run as training
    from star_elastic.train.config import load_run_config

    config = load_run_config(run)
    if check_only:
        if is_first_rank():  # one of them reads for all
            with progress_bars() as progress:
                found = training.check_run(config, progress)
            show(as_json, asdict(found), *found.lines())
            found.require_sound()
        return
    with progress_bars() as progress:
        result = training.train(config, resume=resume, progress=progress)
    if is_first_rank():
        done = f"{result.elastic}: {result.steps} steps, {result.tokens:,} tokens"
        show(as_json, result.to_json(), done, *verdict_parts(result.verdict))


def verdict_parts(verdict: Verdict | None) -> Iterator[Table | str]:
    """A table of the sizes, a sample, what to know, and what to type next; or nothing."""
    if verdict is None:
        return
    told = verdict.to_json()
    untrained = any(size["untrained"] for size in told["sizes"].values())
    origin = any(size["widths_from"] for size in told["sizes"].values())
    rows = []
    for name, size in told["sizes"].items():
        cut = size["untrained"]
        rows.append([
            name, f"{size['kl']:.4f}", f"{size['equal_top1']:.1%}",
            _perplexity(size["perplexity"]), _perplexity(size["reference_perplexity"]),
            *([_perplexity(cut["perplexity"]) if cut else ""] if untrained else []),
            *([size["widths_from"]] if origin else []),
        ])  # fmt: skip
    columns = ["size", "KL, nats/token", "equal top-1", "perplexity", f"of {told['reference']}"]
    columns += ["same cut, untrained"] if untrained else []
    columns += ["widths from"] if origin else []
    yield Table(f"{told['held_out_rows']} held-out rows, {told['tokens']:,} tokens", columns, rows)
    sample = told["sample"]
    yield f"prompt: {_one_line(sample['prompt'])}"
    for name, text in [(told["reference"], sample["reference"]), *sample["sizes"].items()]:
        yield f"  {name}: {_one_line(text)}"
    for remark in told["remarks"]:
        yield f"note: {remark}"
    yield f"next: {told['next']}"


def _perplexity(value: float | None) -> str:
    return "infinite" if value is None else f"{value:,.4g}"


def _one_line(text: str) -> str:
    """A text on one line, cut where it is long."""
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
