"""What the models really wrote: kept in a file beside the result, and some of it for the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from star_elastic.evaluate.accuracy import MAX_TEXT, Trials
from star_elastic.evaluate.grid import Entry
from star_elastic.evaluate.problems import TEST, Splits
from star_elastic.files.writing import write_text

FILE = "answers.jsonl"
MAX_ROWS = 20_000
"""Of the file: with texts of at most `MAX_TEXT` characters it stays below some 30 MB."""
NUM_SAMPLES = 6
"""Problems that the page shows."""


def write_answers(
    out: Path, entries: Sequence[Entry], splits: Splits, trials: Trials
) -> dict[str, Any]:
    """Writes a line for each plan and test problem, and returns what the file holds.

    A line has `plan`, `task`, `problem`, `expected`, `text` (all that was written, at most
    `MAX_TEXT` characters of it), `extracted` (what the matching rule took for the answer, or null)
    and `correct`. Of many problems, those evenly spaced that make `MAX_ROWS` lines.
    """
    count = len(splits.test)
    most = min(count, max(MAX_ROWS // len(entries), 1))
    kept = [number * count // most for number in range(most)]
    rows = (
        {"plan": own.label, **_asked(splits, place), **_written(trials, own.label, place)}
        for own in entries
        for place in kept
    )
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(out / FILE, "\n".join(lines) + "\n")
    return {
        "file": FILE,
        "num_rows": len(lines),
        "num_problems": len(kept),
        "of_problems": count,
        "max_characters": MAX_TEXT,
    }


def _asked(splits: Splits, place: int) -> dict[str, str]:
    problem = splits.test[place]
    return {"task": problem.task, "problem": problem.question, "expected": problem.answer}


def _written(trials: Trials, label: str, place: int) -> dict[str, Any]:
    own = trials[label][TEST].outcomes[place]
    return {"text": own.text, "extracted": own.extracted, "correct": own.is_right}


def choose_samples(
    entries: Sequence[Entry], splits: Splits, trials: Trials
) -> list[dict[str, Any]]:
    """Some test problems with what single sizes wrote: the largest, the smallest, one between.

    Each size has the largest of its budgets. Problems on which they differ come first, then those
    that all have wrong, then any; of one task after the other.
    """
    labels = [*{own.sizes: own.label for own in entries if own.kind == "single"}.values()]
    if len(labels) > 3:
        labels = [labels[0], labels[len(labels) // 2], labels[-1]]
    marks = zip(*(trials[label][TEST].right for label in labels), strict=True)
    seen: Counter[tuple[int, str]] = Counter()
    ranks = []
    for place, (problem, own) in enumerate(zip(splits.test, marks, strict=True)):
        interest = 0 if len(set(own)) > 1 else 2 if all(own) else 1
        ranks.append((interest, seen[interest, problem.task], place))
        seen[interest, problem.task] += 1
    return [
        {
            **_asked(splits, place),
            "replies": [{"plan": label, **_written(trials, label, place)} for label in labels],
        }
        for _, _, place in sorted(ranks)[:NUM_SAMPLES]
    ]
