"""`star-elastic train`: a run from its config, or a look at what it would do."""

from dataclasses import asdict
from pathlib import Path

from typer import Argument, Exit, Option

from star_elastic.cli.bars import progress_bars
from star_elastic.cli.options import AsJson
from star_elastic.cli.terminal import show
from star_elastic.cli.verdict import verdict_parts
from star_elastic.signals import is_first_rank


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
            if not found.is_sound:
                raise Exit(2)
        return
    with progress_bars() as progress:
        result = training.train(config, resume=resume, progress=progress)
    if is_first_rank():
        done = f"{result.elastic}: {result.steps} steps, {result.tokens:,} tokens"
        show(as_json, result.to_json(), done, *verdict_parts(result.verdict))
