"""Every row of a run's data read once, before hours are spent on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from star_elastic.errors import RowError
from star_elastic.progress import Progress
from star_elastic.train.config import RunConfig
from star_elastic.train.sources import Source

SHOWN = 20
"""Bad rows that are told one by one."""
TOLD_EVERY = 100


@dataclass(slots=True)
class RowCheck:
    """What was found: rows in all, `bad` ones that cannot be read (what is wrong with the first
    SHOWN of them in `problems`), `tokens` that are fed and `counted` ones; and for every stage of
    the run, rows `cut` to its context and rows `left_out` because nothing in them counts."""

    rows: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    counted: int = 0
    cut: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The same, to read."""
        unshown = self.bad - len(self.problems)
        lines = [*self.problems, *([f"... and {unshown:,} more"] if unshown else [])]
        lines.append(
            f"{self.rows:,} rows, {self.bad:,} of them bad; {self.tokens:,} tokens, of which "
            f"{self.counted:,} count"
        )
        for number, (cut, left_out) in enumerate(zip(self.cut, self.left_out, strict=True)):
            lines.append(f"stages[{number}]: {cut:,} rows are cut, {left_out:,} teach nothing")
        return lines


def check_rows(config: RunConfig, sources: Sequence[Source], progress: Progress) -> RowCheck:
    """Reads every row of every source as training reads it, whether bad rows stop the run or not.
    Nothing is written."""
    contexts = [stage.context for stage in config.stages]
    found = RowCheck(cut=[0] * len(contexts), left_out=[0] * len(contexts))
    progress.stage("rows", sum(map(len, sources)))
    for source in sources:
        for row in range(len(source)):
            found.rows += 1
            try:
                document = source.document(row)
            except RowError as error:
                found.bad += 1
                if found.bad <= SHOWN:
                    found.problems.append(str(error))
                continue
            fed = len(document.fed)
            found.tokens += fed
            found.counted += max(fed - document.first, 0)
            for number, context in enumerate(contexts):
                found.cut[number] += fed > context
                found.left_out[number] += document.first >= min(fed, context)
            if found.rows % TOLD_EVERY == 0:
                progress.advance(found.rows)
    progress.advance(found.rows)
    return found
