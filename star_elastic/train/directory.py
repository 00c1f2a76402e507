"""A run directory: how a run begins and goes on in it, and what may change between the two."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from star_elastic.checkpoints.companions import BASIS, LATENCY
from star_elastic.data.sources import Source
from star_elastic.errors import CheckpointError, ConfigError, reason
from star_elastic.files.paths import exists, has_file, is_file, names_in
from star_elastic.files.writing import read_json, write_json
from star_elastic.models.fake_quantisation import FILE_NAME as FAKE
from star_elastic.strict import to_plain
from star_elastic.train.calibrate import DEPTH, SCORES
from star_elastic.train.check import latency_file
from star_elastic.train.config import RunConfig
from star_elastic.train.distributed import World
from star_elastic.train.fingerprint import (
    compare_data,
    digest_model,
    files_by_source,
    sample_data,
)
from star_elastic.train.state import PROGRESS, STATE, has_state
from star_elastic.train.verdict import VERDICT

ELASTIC, QUANTISED = "elastic", "quantised"
RUN, METRICS = "run.json", "metrics.jsonl"
MEASURED = (SCORES, BASIS, DEPTH, FAKE)
"""What is measured before training and kept: it holds for the config that the run began with."""
FILES = "files"
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
MAY_CHANGE = re.compile(
    r"stages\[\d+\]\.(final_)?learning_rate|router\.learning_rate|optimizer\.clip_norm"
    r"|engine\..*|data\[\d+\]\.(bad_rows|files|loss_on|notes)|out|parent|family"
    r"|latency|calibration\.(scores|batch_size)"
)
"""Keys that may change when a run goes on: what messages advise to correct, how a step or a ranking
is computed, what becomes of bad rows, and where files are (what they hold is compared by itself,
but for a latency table: the one in use is kept in the run)."""


def require_ready(
    run: Path, config: RunConfig, sources: Sequence[Source], resume: bool
) -> list[str]:
    """What has changed in the data since the run began and may, as lines to tell.

    A run that was stopped before its first state begins again with or without `resume`; what was
    ranked by then is kept. Raises CheckpointError or ConfigError unless the run can begin in the
    directory, or go on.
    """
    if not resume and (has_state(run) or exists(run / ELASTIC)):
        raise CheckpointError(f"{run} is not empty; resume it with --resume or name another out")
    if resume and not exists(run):
        raise CheckpointError(
            f"{run} holds no run to go on with; correct out, or start without --resume"
        )
    if not exists(run) or not names_in(run):
        return []
    if exists(run / STATE) and not has_state(run):
        raise CheckpointError(
            f"{run / STATE} is damaged ({PROGRESS} is missing); restore it, or start another run "
            "in another directory"
        )
    if not is_file(run / RUN):
        raise CheckpointError(f"{run} holds something else; name another out")
    if not has_state(run) and not any(exists(run / file) for file in MEASURED):
        return []  # nothing but a config that was never used
    refused, allowed = _changes(run, config, sources)
    if refused:
        counts = [re.match(r"the rows of .* \((\d+) then, (\d+) now\)$", line) for line in refused]
        fewer = any(found and int(found[1]) > int(found[2]) for found in counts)
        told = "; a row that is taken out leaves its line empty" if fewer else ""
        raise ConfigError(
            f"{', '.join(refused)} differ from the run in {run}{told}; put back what changed, or "
            "start another run in another directory"
        )
    judged = exists(run / VERDICT) or not any(source.held_out for source in config.data)
    if resume and exists(last_of(run, config)) and judged:
        raise CheckpointError(f"{last_of(run, config)} is complete already; nothing to resume")
    if resume and has_file(run / METRICS) and not has_state(run) and not exists(run / ELASTIC):
        return [f"no state is saved in {run}: it begins again, at the first step", *allowed]
    return allowed


@contextmanager
def alone_in(run: Path, world: World) -> Iterator[None]:
    """While the block runs, no other process may train in the directory, which is made if need be.

    The lock is one on the directory, and goes with the process. Raises CheckpointError on all ranks
    if another has it. File systems that know no locks give none.
    """
    with ExitStack() as held:

        def lock() -> None:
            run.mkdir(parents=True, exist_ok=True)
            folder = os.open(run, os.O_RDONLY)
            held.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another process trains in {run}; wait until it ends or stop it, or name "
                    "another out"
                ) from None
            except OSError:
                pass

        world.from_first(lock)
        yield


def begun_files(run: Path) -> list[list[Mapping[str, Any]]]:
    """What the files of each source were when the run in a directory began; empty if there is none.
    A file that cannot be read is `require_ready`'s to refuse."""
    with suppress(*UNREADABLE):
        return files_by_source(_saved(run)[FILES]["data"])
    return []


def _saved(run: Path) -> Any:
    """What `run.json` says. Raises one of UNREADABLE; so may whoever looks into it."""
    return json.loads((run / RUN).read_text(encoding="utf-8"))


def last_of(run: Path, config: RunConfig) -> Path:
    """The last checkpoint that a run writes."""
    return run / (QUANTISED if config.quant.format else ELASTIC)


def begin(run: Path, config: RunConfig, sources: Sequence[Source]) -> None:
    """Writes the resolved config with what parent and data are, and a copy of the latency table in
    use."""
    written = _written(config, sources)
    if not is_file(run / RUN) or read_json(run / RUN) != written:
        write_json(run / RUN, written)
    if config.latency and latency_file(config) != run / LATENCY:
        shutil.copyfile(config.latency, run / LATENCY)


def _written(config: RunConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """What `run.json` holds: the resolved config, and what its files were."""
    files = {
        "parent": digest_model(config.parent),
        "family": digest_model(config.family) if config.family else "",
        "scores": _digest_scores(config),
        "data": sample_data(sources),
    }
    return {**json.loads(json.dumps(to_plain(config))), FILES: files}


def _digest_scores(config: RunConfig) -> str:
    """What the scores that the config gives are, as digits; empty without any. A run keeps a copy,
    so the file itself may be gone when it goes on: then what it was."""
    if not config.calibration.scores:
        return ""
    file = Path(config.calibration.scores)
    if is_file(file):
        return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()  # whatever its name
    with suppress(*UNREADABLE):
        return str(_saved(Path(config.out))[FILES]["scores"])
    return ""


def _changes(
    run: Path, config: RunConfig, sources: Sequence[Source]
) -> tuple[list[str], list[str]]:
    """What differs from the config and the files that the directory was begun with: what must not,
    each key with its values as `calibration.context (1024 then, 512 now)`, and what may."""
    now = _written(config, sources)
    after = dict(_flat({key: value for key, value in now.items() if key != FILES}))
    try:
        saved = _saved(run)
        files = saved.pop(FILES)
        before = dict(_flat(saved))
        models = [key for key in ("parent", "family") if files[key] != now[FILES][key]]
        refused, allowed = compare_data(files["data"], now[FILES]["data"])
        # (Runs that began with an earlier version have no such entry.)
        if files.get("scores", now[FILES]["scores"]) != now[FILES]["scores"]:
            refused.append("the scores that calibration.scores names")
    except UNREADABLE as error:
        raise CheckpointError(
            f"{run / RUN} cannot be read ({reason(error)}); start another run in another directory"
        ) from None
    keys = [key for key in dict.fromkeys([*after, *before]) if not MAY_CHANGE.fullmatch(key)]
    changed = [
        f"{key} ({_shown(before, key)} then, {_shown(after, key)} now)"
        for key in keys
        if before.get(key) != after.get(key)
    ]
    return [*changed, *(f"the files of the {name}" for name in models), *refused], allowed


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
