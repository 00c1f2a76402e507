"""Models that come with the package, and the names that users give for them.

`bundled` is a small trained family, `bundled-parent` the model that it was made from. Both solve a
few procedural tasks, so that everything can be tried without a download (see their cards). Whatever
takes a path to a model asks `find_model` first, and so takes the names as well.
"""

from __future__ import annotations

import os
from pathlib import Path

FAMILY = Path(__file__).parent / "family"
"""An elastic checkpoint with the sizes large, medium and small."""
PARENT = Path(__file__).parent / "parent"
"""A plain checkpoint of a NemotronH-type hybrid of 2.8M parameters."""
NAMES = {"bundled": FAMILY, "bundled-parent": PARENT}


def find_model(path: str | Path, folder: str | Path = "") -> Path:
    """Where a model lies that the user has named: a path relative to `folder`, or one of `NAMES`
    where nothing of that name is there."""
    given = Path(folder, path)
    return given if os.path.lexists(given) else NAMES.get(str(path), given)


def name_of(path: str | Path) -> str:
    """What a user calls a model: a path, or the name of one that came with the package."""
    return next((name for name, own in NAMES.items() if own == Path(path)), str(path))
