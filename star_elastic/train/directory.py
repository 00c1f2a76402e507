"""A run directory: how a run begins and goes on in it, and what may change between the two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from star_elastic.checkpoint import digest_files, write_json
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.router.files import LATENCY
from star_elastic.train.check import latency_file
from star_elastic.train.config import RunConfig
from star_elastic.train.state import has_state
from star_elastic.train.strict import to_plain

ELASTIC, QUANTISED = "elastic", "quantised"
RUN, METRICS = "run.json", "metrics.jsonl"
TEACHER = "teacher"


def require_ready(run: Path, config: RunConfig, resume: bool) -> None:
    """Raises CheckpointError or ConfigError unless the run can begin in the directory, or go on."""
    if resume:
        if not has_state(run):
            raise CheckpointError(f"{run} holds no saved state; start without --resume")
        changed = _changed_keys(run, config)
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} differ from the run in {run}; resume with its own config, "
                "or start another run in another directory"
            )
        last = run / (QUANTISED if config.quant.format else ELASTIC)
        if last.exists():
            raise CheckpointError(f"{last} is complete already; nothing to resume")
    elif has_state(run) or (run / ELASTIC).exists():
        raise CheckpointError(f"{run} is not empty; resume it with --resume or name another out")
    elif run.exists() and any(run.iterdir()) and _changed_keys(run, config):
        raise CheckpointError(f"{run} holds something else; name another out")


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
    return {**json.loads(json.dumps(to_plain(config))), "files": fingerprint(config)}


def _changed_keys(run: Path, config: RunConfig) -> list[str]:
    """Keys of the config that differ from the one the directory was begun with, of those that must
    not."""
    wanted = _lasting(_written(config))
    try:
        saved = _lasting(json.loads((run / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        saved = {}
    return sorted(key for key in wanted if wanted[key] != saved.get(key))


def _lasting(written: dict) -> dict:
    """What may not change when a run goes on. How a step is computed may, and where the directory
    is; learning rates and the clipping may be corrected."""
    for stage in written["stages"]:
        del stage["learning_rate"], stage["final_learning_rate"]
    del written["router"]["learning_rate"], written["optimizer"]["clip_norm"]
    lasting = {"engine.teacher_samples": written["engine"]["teacher_samples"]}
    return lasting | {k: v for k, v in written.items() if k not in ("engine", "out")}
