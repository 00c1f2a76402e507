"""Problems in two splits that share none: plans are chosen on one and judged on the other.

They are the bundled tasks, or rows of the user's own. Rows fall into a split by a hash of their
prompt, so that a prompt is in the same split in every file and every run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_elastic import bundled
from star_elastic.data.encoding import half_character
from star_elastic.data.row_files import JsonLines
from star_elastic.errors import ConfigError
from star_elastic.evaluate.tasks import TASKS, Problem, sample_problems
from star_elastic.files.paths import is_file
from star_elastic.models.tokenizer import load_tokenizer

VALIDATION, TEST = "validation", "test"
VALIDATION_PERCENT = 40
"""Of the user's own rows; the others are for the test."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Problems to choose plans on, and others to judge the chosen on; `name` says what they are."""

    name: str
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]

    def __getitem__(self, split: str) -> tuple[Problem, ...]:
        return dict(self.items())[split]

    def items(self) -> tuple[tuple[str, tuple[Problem, ...]], ...]:
        """Both splits by name, the one to choose on first."""
        return (VALIDATION, self.validation), (TEST, self.test)


def knows_bundled_tasks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a family reads and writes as the bundled parent does."""
    its = load_tokenizer(bundled.PARENT)
    ours = (its.get_vocab(), its.chat_template)
    return ours == (tokenizer.get_vocab(), tokenizer.chat_template)


def bundled_problems(num_validation: int, num_test: int, seed: int) -> Splits:
    """So many problems of each of the bundled tasks. Raises ConfigError if there are fewer."""
    try:
        validation, test = (
            tuple(sample_problems(TASKS, split, count, seed))
            for split, count in ((VALIDATION, num_validation), (TEST, num_test))
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Splits("the bundled tasks", validation, test)


def read_problems(
    file: str | Path, num_validation: int | None = None, num_test: int | None = None
) -> Splits:
    """Rows `{"prompt": ..., "answer": ...}` of a JSONL file, the first so many of each task.

    An answer is a text or a number. A row may name its `task`; accuracies are means over tasks.
    Raises ConfigError for a file that gives no problems, CheckpointError for a line that is no
    JSON.
    """
    file = Path(file)
    if not is_file(file):
        raise ConfigError(f"{file} is not a file; name a JSONL file of prompts and answers")
    rows = JsonLines(file)
    if not len(rows):
        raise ConfigError(
            f'{file} is empty; give it rows such as {{"prompt": "2+2", "answer": "4"}}'
        )
    found: dict[str, Problem] = {}
    for number in range(len(rows)):
        problem = _problem(rows[number], file.stem, rows.where(number))
        if found.get(problem.question, problem).answer != problem.answer:
            raise ConfigError(
                f"{rows.where(number)} has another answer to the same prompt; keep one of the two"
            )
        found[problem.question] = problem
    most = {VALIDATION: num_validation, TEST: num_test}
    splits: dict[str, list[Problem]] = {split: [] for split in most}
    seen: Counter[tuple[str, str]] = Counter()
    for problem in found.values():
        digest = hashlib.sha256(problem.question.encode()).digest()
        is_validation = int.from_bytes(digest[:8], "big") % 100 < VALIDATION_PERCENT
        split = VALIDATION if is_validation else TEST
        seen[split, problem.task] += 1
        limit = most[split]
        if limit is None or seen[split, problem.task] <= limit:
            splits[split].append(problem)
    for name, own in splits.items():
        if not own:
            raise ConfigError(
                f"{file} has {len(found)} prompts, of which none falls into the {name} split "
                f"({VALIDATION_PERCENT} % are for validation, by a hash); give it more rows"
            )
    return Splits(file.name, tuple(splits[VALIDATION]), tuple(splits[TEST]))


def _problem(row: Mapping[str, Any], task: str, where: str) -> Problem:
    """What a row says, if it is a problem; `task` is the default, `where` names the row."""
    prompt, answer = row.get("prompt"), row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = json.dumps(answer)
    for field, value in (("prompt", prompt), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"{where} has no {field}; each row needs a prompt, a text, and an answer, "
                "a text or a number"
            )
    task = row.get("task", task)
    if not isinstance(task, str):
        raise ConfigError(f"{where} has a task that is no text; name it by one, or by none")
    for field, value in (("prompt", prompt), ("answer", answer), ("task", task)):
        if half := half_character(str(value)):
            raise ConfigError(
                f"{where} has half of a character, {half}, in its {field}, which no "
                "tokenizer encodes and no file holds; correct it"
            )
    return Problem(task, str(prompt).strip(), (), str(answer).strip())
