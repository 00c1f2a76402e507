"""What the models really wrote: kept in a file beside the result, and some of it for the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from star_elastic.evaluate.accuracy import MAX_TEXT
from star_elastic.evaluate.assemble import Solved
from star_elastic.evaluate.grid import Entry
from star_elastic.evaluate.problems import TEST, Splits
from star_elastic.evaluate.tasks import Problem
from star_elastic.files.writing import write_text

FILE = "answers.jsonl"
MAX_ROWS = 20_000
"""Of the file: with texts of at most `MAX_TEXT` characters it stays below some 30 MB."""
NUM_SAMPLES = 6
"""Problems that the page shows."""


def write_answers(
    out: Path, entries: Sequence[Entry], splits: Splits, solved: Sequence[Solved]
) -> dict[str, Any]:
    """Writes a line for each plan and test problem, and returns what the file holds.

    A line has `plan`, `task`, `problem`, `expected`, `text` (all that was written, at most
    `MAX_TEXT` characters of it), `extracted` (what the matching rule took for the answer, or null)
    and `correct`. Of many problems, those evenly spaced that make `MAX_ROWS` lines.
    """
    kept = spaced(len(splits.test), max(MAX_ROWS // len(entries), 1))
    lines = [
        json.dumps(row, ensure_ascii=False)
        for entry, found in zip(entries, solved, strict=True)
        for row in _rows(entry, splits.test, found, kept)
    ]
    write_text(out / FILE, "\n".join(lines) + "\n")
    return {
        "file": FILE,
        "num_rows": len(lines),
        "num_problems": len(kept),
        "of_problems": len(splits.test),
        "max_characters": MAX_TEXT,
    }


def spaced(count: int, most: int) -> list[int]:
    """At most so many places of `count`, evenly spaced."""
    num = min(count, most)
    return [number * count // num for number in range(num)]


def _rows(
    entry: Entry, problems: Sequence[Problem], found: Solved, kept: Sequence[int]
) -> Iterator[dict[str, Any]]:
    for place in kept:
        problem = problems[place]
        yield {
            "plan": entry.label,
            "task": problem.task,
            "problem": problem.question,
            "expected": problem.answer,
            **_written(found, place),
        }


def _written(found: Solved, place: int) -> dict[str, Any]:
    outcomes = found[TEST]["outcomes"]
    names = {"text": "text", "extracted": "extracted", "correct": "is_right"}
    return {name: outcomes[column][place] for name, column in names.items()}


def choose_samples(
    entries: Sequence[Entry], splits: Splits, solved: Sequence[Solved]
) -> list[dict[str, Any]]:
    """Some test problems with what single sizes wrote: the largest, the smallest, one between.

    Problems on which they differ come first, then those that all have wrong, then any; of one task
    after the other.
    """
    plans = _shown_plans(entries)
    rights = [solved[number][TEST]["outcomes"]["is_right"] for number in plans]
    marks = list(zip(*rights, strict=True))

    def interest(place: int) -> int:
        own = marks[place]
        return 0 if len(set(own)) > 1 else 2 if all(own) else 1

    seen: dict[tuple[int, str], int] = {}
    ranks = []
    for place, problem in enumerate(splits.test):
        key = interest(place), problem.task
        seen[key] = seen.get(key, -1) + 1
        ranks.append((key[0], seen[key], place))
    return [
        {
            "task": splits.test[place].task,
            "problem": splits.test[place].question,
            "expected": splits.test[place].answer,
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
