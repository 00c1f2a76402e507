"""Tables of text, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells. `tones` (gain, none, loss) colour the last cell of each row; the first
    `num_text` columns are text, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    tones: Sequence[str] = ()
    num_text: int = 1
