"""A run directory: how a run begins and goes on in it, and what may change between the two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from star_elastic.checkpoint import digest_files, write_json
from star_elastic.companions import BASIS, LATENCY
from star_elastic.errors import CheckpointError, ConfigError, reason
from star_elastic.quant.fake import FILE_NAME as FAKE
from star_elastic.train.calibrate import DEPTH, SCORES
from star_elastic.train.check import latency_file
from star_elastic.train.config import RunConfig
from star_elastic.train.state import has_state
from star_elastic.train.strict import to_plain

ELASTIC, QUANTISED = "elastic", "quantised"
RUN, METRICS = "run.json", "metrics.jsonl"
TEACHER = "teacher"
MEASURED = (SCORES, BASIS, DEPTH, FAKE)
"""What is measured before training and kept: it holds for the config that the run began with."""
FILES = "files"


def require_ready(run: Path, config: RunConfig, resume: bool) -> None:
    """Raises CheckpointError or ConfigError unless the run can begin in the directory, or go on.

    A run that was stopped before its first state begins again with or without `resume`; what was
    ranked by then is kept.
    """
    last = run / (QUANTISED if config.quant.format else ELASTIC)
    if not resume and (has_state(run) or (run / ELASTIC).exists()):
        raise CheckpointError(f"{run} is not empty; resume it with --resume or name another out")
    if resume and not run.exists():
        raise CheckpointError(
            f"{run} holds no run to go on with; correct out, or start without --resume"
        )
    if not run.exists() or not any(run.iterdir()):
        return
    if not (run / RUN).is_file():
        raise CheckpointError(f"{run} holds something else; name another out")
    if not has_state(run) and not any((run / file).exists() for file in MEASURED):
        return  # nothing but a config that was never used
    changed = _changes(run, config)
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} differ from the run in {run}; put back what changed, or start "
            "another run in another directory"
        )
    if resume and last.exists():
        raise CheckpointError(f"{last} is complete already; nothing to resume")


def begin(run: Path, config: RunConfig) -> None:
    """Makes the directory with the resolved config, and a copy of the latency table in use."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / RUN, _written(config))
    if config.latency and latency_file(config) != run / LATENCY:
        shutil.copyfile(config.latency, run / LATENCY)


def fingerprint(config: RunConfig) -> str:
    """What the parent and the data are: their files by name, size and content."""
    own = [config.family] if config.family else []
    roots = [config.parent, *own, *(file for source in config.data for file in source.files)]
    files = (file for root in map(Path, roots) for file in (root, *sorted(root.rglob("*"))))
    return digest_files(file for file in files if file.is_file())


def _written(config: RunConfig) -> dict:
    """What `run.json` holds: the resolved config, and what its files were."""
    return {**json.loads(json.dumps(to_plain(config))), FILES: fingerprint(config)}


def _changes(run: Path, config: RunConfig) -> list[str]:
    """What differs, of what must not, from the config that the directory was begun with: each
    key with its values, as `calibration.context (1024 then, 512 now)`."""
    try:
        saved = _lasting(json.loads((run / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{run / RUN} cannot be read ({reason(error)}); start another run in another directory"
        ) from None
    then, now = (dict(_flat(content)) for content in (saved, _lasting(_written(config))))
    changed = [key for key in dict.fromkeys([*now, *then]) if then.get(key) != now.get(key)]
    return [
        "the parent's or the data's files"
        if key == FILES
        else f"{key} ({_shown(then, key)} then, {_shown(now, key)} now)"
        for key in changed
    ]


def _flat(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables by dotted key; tables in a list have its number."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    elif isinstance(content, list) and any(isinstance(item, dict) for item in content):
        for number, item in enumerate(content):
            yield from _flat(item, f"{path}[{number}]")
    else:
        yield path, content


def _shown(content: dict[str, Any], key: str) -> str:
    return json.dumps(content.get(key), ensure_ascii=False)


def _lasting(written: dict) -> dict:
    """What may not change when a run goes on. How a step is computed may, and where the directory
    is; learning rates and the clipping may be corrected."""
    for stage in written["stages"]:
        del stage["learning_rate"], stage["final_learning_rate"]
    del written["router"]["learning_rate"], written["optimizer"]["clip_norm"]
    lasting = {"engine.teacher_samples": written["engine"]["teacher_samples"]}
    return lasting | {k: v for k, v in written.items() if k not in ("engine", "out")}
