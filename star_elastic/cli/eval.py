"""`star-elastic eval`: what elastic budget control gives, measured on problems."""

import shlex
import sys
from pathlib import Path
from typing import Any

from typer import Option

from star_elastic.cli.bars import progress_bars
from star_elastic.cli.options import AsJson, Device, Dtype, Elastic
from star_elastic.cli.terminal import show
from star_elastic.files.writing import require_folder
from star_elastic.generate.phases import DEFAULT_MAX_NEW_TOKENS
from star_elastic.strict import MOST_ROWS, MOST_TOKENS

MATCH = (
    "When an answer to --data is right. auto (the default): a number must equal the last number of "
    "the reply, a text must be the whole reply. Or for all: exact (the whole reply), last-number, "
    "contains (anywhere, as whole words, in upper or lower case), regex:PATTERN (what the "
    "pattern's group finds last). The bundled tasks have their own check: the whole reply. A reply "
    "is what follows the trace; white space around it does not count."
)


def evaluate(
    elastic: Elastic,
    out: Path = Option(help="New directory for the results, or one to go on in."),
    problems: int | None = Option(None, help="Test problems per task.", min=1),
    validation: int | None = Option(None, help="Problems per task to choose plans on.", min=1),
    sizes: str = Option("", help="Sizes to compare: large,small (default: all)."),
    budgets: str = Option("", help="Thinking budgets: 16,32,none (default: from natural traces)."),
    dials: str = Option(
        "0.1,0.25,0.5", help="Shares of tokens that the larger of two sizes writes, or none."
    ),
    data: Path | None = Option(
        None, help='Your own problems: JSONL rows {"prompt": ..., "answer": ...}.'
    ),
    match: str | None = Option(None, help=MATCH),
    batch_size: int = Option(64, help="Sequences at once.", min=1, max=MOST_ROWS),
    switch: str = Option("catch-up", help="catch-up, reprefill or hand-over."),
    max_new_tokens: int = Option(
        DEFAULT_MAX_NEW_TOKENS, help="Tokens per problem in all.", min=1, max=MOST_TOKENS
    ),
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: int = Option(0, help="Seed of the problems and the intervals."),
    as_json: AsJson = False,
) -> None:
    """What elastic budget control gives against the largest size alone: all plans, compared.

    Plans with thinking are tried where the chat template opens a trace; otherwise every size
    answers at once. DIR gets evaluation.json and answers.jsonl, what every plan wrote.
    """
    from star_elastic.evaluate.grid import parse_budgets, parse_dials
    from star_elastic.evaluate.run import RESULT, Settings, evaluate_family
    from star_elastic.models.placement import choose_device, choose_dtype, name_of
    from star_elastic.report.tables import evaluation_notes, evaluation_tables

    require_folder(out)
    options: dict[str, Any] = {
        "sizes": tuple(size.strip() for size in sizes.split(",") if size.strip()),
        "budgets": parse_budgets(budgets) if budgets else None,
        "dials": parse_dials(dials),
        "data": data, "match": match, "num_validation": validation, "num_test": problems,
        "switch": switch, "batch_size": batch_size, "max_new_tokens": max_new_tokens, "seed": seed,
        "dtype": name_of(choose_dtype(dtype, elastic)), "device": choose_device(device),
    }  # fmt: skip
    settings = Settings(**options)
    command = shlex.join(["star-elastic", *sys.argv[1:]])
    with progress_bars(f"stopped; the same command goes on where {out} stands") as progress:
        result = evaluate_family(elastic, settings, out, command=command, progress=progress)
    where = f"{out / RESULT}; as a page: star-elastic report {shlex.quote(str(out))}"
    show(as_json, result, *evaluation_tables(result), *evaluation_notes(result), where)
