"""What the models really wrote: kept in a file beside the result, and some of it for the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from star_elastic.evaluate.accuracy import MAX_TEXT, Solved
from star_elastic.evaluate.grid import Entry
from star_elastic.evaluate.problems import TEST, Splits
from star_elastic.files.writing import write_text

FILE = "answers.jsonl"
MAX_ROWS = 20_000
"""Of the file: with texts of at most `MAX_TEXT` characters it stays below some 30 MB."""
NUM_SAMPLES = 6
"""Problems that the page shows."""


def write_answers(
    out: Path, entries: Sequence[Entry], splits: Splits, solved: Sequence[Mapping[str, Solved]]
) -> dict[str, Any]:
    """Writes a line for each plan and test problem, and returns what the file holds.

    A line has `plan`, `task`, `problem`, `expected`, `text` (all that was written, at most
    `MAX_TEXT` characters of it), `extracted` (what the matching rule took for the answer, or null)
    and `correct`. Of many problems, those evenly spaced that make `MAX_ROWS` lines.
    """
    count = len(splits.test)
    most = min(count, max(MAX_ROWS // len(entries), 1))
    kept = [number * count // most for number in range(most)]
    lines = [
        json.dumps(
            {"plan": entry.label, **_asked(splits, place), **_written(found, place)},
            ensure_ascii=False,
        )
        for entry, found in zip(entries, solved, strict=True)
        for place in kept
    ]
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


def _written(found: Mapping[str, Solved], place: int) -> dict[str, Any]:
    own = found[TEST].outcomes[place]
    return {"text": own.text, "extracted": own.extracted, "correct": own.is_right}


def choose_samples(
    entries: Sequence[Entry], splits: Splits, solved: Sequence[Mapping[str, Solved]]
) -> list[dict[str, Any]]:
    """Some test problems with what single sizes wrote: the largest, the smallest, one between.

    Problems on which they differ come first, then those that all have wrong, then any; of one task
    after the other.
    """
    plans = _shown_plans(entries)
    marks = zip(*(solved[number][TEST].right for number in plans), strict=True)
    seen: Counter[tuple[int, str]] = Counter()
    ranks = []
    for place, (problem, own) in enumerate(zip(splits.test, marks, strict=True)):
        interest = 0 if len(set(own)) > 1 else 2 if all(own) else 1
        ranks.append((interest, seen[interest, problem.task], place))
        seen[interest, problem.task] += 1
    return [
        {
            **_asked(splits, place),
            "replies": [
                {"plan": entries[number].label, **_written(solved[number], place)}
                for number in plans
            ],
        }
        for _, _, place in sorted(ranks)[:NUM_SAMPLES]
    ]


def _shown_plans(entries: Sequence[Entry]) -> list[int]:
    """Places of single sizes with the largest budget that each has, from the largest size."""
    alone = {entry.sizes: number for number, entry in enumerate(entries) if entry.kind == "single"}
    places = list(alone.values())
    if len(places) > 3:
        places = [places[0], places[len(places) // 2], places[-1]]
    return places
