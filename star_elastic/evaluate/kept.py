"""Results that are made one by one and kept in a directory, so that a stopped evaluation goes on.

A directory belongs to one set of settings: what was kept under others is never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from star_elastic.errors import CheckpointError, ConfigError, library_boundary
from star_elastic.files.writing import write_json, write_text

SETTINGS, KEPT = "settings.json", "kept"


class Kept:
    """The directory `out` of one evaluation; nothing is written before the first result.

    Raises CheckpointError if `out` holds anything else, ConfigError if it was begun with other
    settings.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any]):
        self.out = Path(out)
        self.settings = json.loads(json.dumps(settings))
        there = next(p for p in (self.out.absolute(), *self.out.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise CheckpointError(f"{out} cannot be written; name another directory")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        saved = read_object(self.out / SETTINGS)
        if saved is None:
            raise CheckpointError(f"{out} holds something else; name a new directory")
        keys = {**self.settings, **saved}
        changed = [key for key in keys if saved.get(key) != self.settings.get(key)]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} differ from the evaluation in {out}; go on with its own "
                "settings, or name a new directory"
            )

    def fetch(self, name: str, make: Callable[[], Any]) -> Any:
        """What is kept under a name; made and kept first if it is not there yet."""
        # A file of its own for any name, told apart by its digest.
        plain = re.sub(r"[^A-Za-z0-9.@]+", "-", name).strip("-.")[:60]
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        file = self.out / KEPT / f"{plain}-{digest}.json"
        saved = read_object(file)
        if saved is None or saved.get("name") != name:
            saved = json.loads(json.dumps({"name": name, "content": make()}))
            with library_boundary(f"{self.out} cannot be written", "choose another"):
                self.out.mkdir(parents=True, exist_ok=True)
                if not (self.out / SETTINGS).exists():
                    write_json(self.out / SETTINGS, self.settings)
                file.parent.mkdir(exist_ok=True)
            # One line: thousands of numbers, read by programs.
            write_text(file, json.dumps(saved, ensure_ascii=False) + "\n")
        return saved["content"]


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object of a file, or None if it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
