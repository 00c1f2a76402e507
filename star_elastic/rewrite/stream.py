"""Sorting and slicing of whole checkpoints on disk, some rows of one tensor at a time.

Both read the source block by block and write an ordinary checkpoint; the model is never held in
memory, and a slice reads none of the rows that it drops. The pieces of a tensor that is stacked in
memory (experts) are renumbered on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from star_elastic.architectures import Architecture, ModelConfig, read_config
from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap, Dim, Piece, TensorSpec, size_of
from star_elastic.axes.dims import runs
from star_elastic.axes.widths import Width
from star_elastic.checkpoints.layouts import (
    COMPRESSED_TENSORS,
    CONFIG_KEY,
    MODELOPT,
    MODELOPT_FILE,
    config_entry,
    in_modelopt,
    modelopt_entry,
    read_scheme,
    require_layout,
    stored_map,
)
from star_elastic.checkpoints.quantised import stored_input_scales
from star_elastic.checkpoints.stored import StoredModel, most_common_dtype
from star_elastic.checkpoints.tensors import (
    DEFAULT_SHARD_BYTES,
    CheckpointReader,
    Planned,
    Progress,
    Rows,
    rows_at_once,
)
from star_elastic.checkpoints.write import write_checkpoint
from star_elastic.checkpoints.written_config import require_readable, written_config
from star_elastic.errors import ConfigError
from star_elastic.files.writing import write_json
from star_elastic.models.load import require_loadable
from star_elastic.models.skeleton import build_skeleton
from star_elastic.models.tokenizer import require_beside
from star_elastic.nesting.slice import (
    Orders,
    check_orders,
    dim_order,
    follow,
    orders_of,
    slice_tensor,
    sort_tensor,
)

Convert = Callable[[CheckpointReader, str], Iterable[torch.Tensor]]
"""Reads a tensor of the source and makes blocks of the written one, row by row."""
Part = tuple[Rows | None, Convert]
"""The rows of the source (None: all) that the conversion reads."""
AHEAD_BYTES = 32 * 1024**2
"""What is fetched from the disk while tensors before it are written."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor to write: where it comes from and what to do with it."""

    planned: Planned
    source: str
    rows: Rows | None
    convert: Convert


def _open(path: Path, axis_map: AxisMap, architecture: Architecture) -> StoredModel:
    """A checkpoint whose every tensor will be written or is left behind on purpose."""
    source = StoredModel(path, axis_map, architecture)
    source.require_whole()
    return source


def _jobs(
    source: StoredModel,
    target: AxisMap,
    names: Mapping[str, str],
    kept_first: Callable[[TensorSpec], list[int]],
    part: Callable[[TensorSpec, Piece], Part],
) -> Iterator[_Job]:
    """The tensors to write, in the order of the table.

    `target` is the table of the model that is written, `names` maps the source's tensors to its.
    `kept_first(spec)` lists the old rows of dimension 0 of a stacked tensor, in their new order.
    """
    for old_name, new_name in names.items():
        spec, written = source.axis_map.tensors[old_name], target.tensors[new_name]
        pieces = spec.pieces_of(kept_first(spec)) if spec.is_stacked else spec.pieces
        for new, old in zip(written.pieces, pieces, strict=True):
            name = source.name_of(spec, old)
            shape = target.shape(written.on_disk(new), target.full)
            planned = Planned(new.name, shape, source.reader.dtype(name))
            yield _Job(planned, name, *part(spec, old))


def _write(
    source: StoredModel,
    jobs: list[_Job],
    config: Config,
    out: str | Path,
    max_shard_bytes: int,
    progress: Progress | None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    coming = _in_turn(source.reader, jobs)

    def value_of(name: str) -> Iterable[torch.Tensor]:
        job = next(coming)
        assert job.planned.name == name, (name, job)
        return job.convert(source.reader, job.source)

    write_checkpoint(
        out, config, source.reader.path, [job.planned for job in jobs], value_of,
        max_shard_bytes=max_shard_bytes, progress=progress, finish=finish,
    )  # fmt: skip


def _in_turn(reader: CheckpointReader, jobs: Iterable[_Job]) -> Iterator[_Job]:
    """The jobs in their order, while the system fetches what the next ones read."""
    waiting: deque[_Job] = deque()
    held = 0
    for job in jobs:
        reader.expect(job.source, job.rows)
        waiting.append(job)
        held += job.planned.num_bytes
        while held > AHEAD_BYTES:
            held -= waiting[0].planned.num_bytes
            yield waiting.popleft()
    yield from waiting


def slice_checkpoint(
    path: str | Path,
    widths: Mapping[str, Width],
    out: str | Path,
    *,
    input_scales: Mapping[str, torch.Tensor] | None = None,
    layout: str = COMPRESSED_TENSORS,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Cuts a sorted checkpoint to `widths` and writes an ordinary one to the new directory `out`.

    A quantised checkpoint is cut as it is, codes and scales, and gets `input_scales` (by weight) in
    place of its own, if there are any; `layout`: what its tensors are called. `finish(directory)`
    may add files before the directory gets its name. Raises ShapeError for widths the family cannot
    express (or that end inside a block that is quantised together) and CheckpointError for a
    damaged source or a taken `out`; nothing is left behind then.
    """
    path = Path(path)
    config = read_config(path)
    axis_map = config.axis_map
    complete = axis_map.complete(widths)
    target: Config = {**config.at(complete)}
    build_skeleton(target, file=f"the slice's config.json made of {path / 'config.json'}")
    require_readable(path)
    require_beside(path)
    scheme = read_scheme(config, axis_map)
    require_layout(scheme, layout)
    model, scales, renamed = axis_map.at(complete), {}, {}
    if scheme is not None:
        scales = stored_input_scales(input_scales or {}, axis_map, scheme)
        small_scheme = scheme.at(axis_map, complete)
        target.pop(CONFIG_KEY)
        if layout == MODELOPT:
            entry, renamed = modelopt_entry(model, small_scheme), in_modelopt(model, small_scheme)
            finish = _also(finish, partial(_write_modelopt, entry))
        else:
            target[CONFIG_KEY] = config_entry(model, small_scheme)
        axis_map = stored_map(axis_map, scheme)
        axis_map.require_edges(complete)
    smaller = axis_map.at(complete)
    source = _open(path, axis_map, config.architecture)
    target = written_config(target, model, source.dtype, scheme)

    def kept(spec: TensorSpec) -> list[int]:
        return [i for low, high in axis_map.runs(spec, 0, complete) for i in range(low, high)]

    def part(spec: TensorSpec, piece: Piece) -> Part:
        if spec.name in scales:
            return [], lambda *_: (scales[spec.name],)
        dims, here = spec.on_disk(piece).dims, axis_map.seen_by(spec.layer, complete)
        rows = runs(dims[0], here) if dims else None
        stored = partial(follow, spec=spec, axis_map=axis_map, widths=here)
        return rows, partial(_sliced, rows, dims, here, stored)

    names = axis_map.names_at(complete)
    jobs = list(_jobs(source, smaller, names, kept, part))
    if renamed:
        jobs = [_in_modelopt(job, renamed.get(job.planned.name)) for job in jobs]
    _write(source, jobs, target, out, max_shard_bytes, progress, finish)


def _sliced(
    rows: Rows | None,
    dims: tuple[Dim, ...],
    widths: Mapping,
    stored: Callable[[torch.Tensor], torch.Tensor],
    reader: CheckpointReader,
    name: str,
) -> Iterator[torch.Tensor]:
    """What survives of a tensor on disk, of which only these rows do, as it is stored."""
    for block in reader.blocks(name, rows):
        yield stored(slice_tensor(block, dims, widths, first=1))


def _in_modelopt(job: _Job, name: str | None) -> _Job:
    """A job of a quantised weight's tensor as ModelOpt's layout has it; others as they are."""
    if name is None:
        return job
    planned = replace(job.planned, name=name)
    if job.planned.shape != (1,):
        return replace(job, planned=planned)
    inverted = "global_scale" in job.planned.name

    def convert(reader: CheckpointReader, source: str) -> Iterator[torch.Tensor]:
        for value in job.convert(reader, source):
            yield (1 / value if inverted else value).reshape(())

    return replace(job, planned=replace(planned, shape=()), convert=convert)


def _write_modelopt(entry: Config, directory: Path) -> None:
    write_json(directory / MODELOPT_FILE, entry)


def _also(
    first: Callable[[Path], None] | None, second: Callable[[Path], None]
) -> Callable[[Path], None]:
    """Both, if there are two."""

    def run(directory: Path) -> None:
        if first:
            first(directory)
        second(directory)

    return run


def sort_checkpoint(
    path: str | Path,
    orders: Orders,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes the same model with every axis sorted by `orders`, best unit first.

    Raises ShapeError if an order does not permute its axis inside its groups.
    """
    path = Path(path)
    config = read_config(path)
    axis_map = config.axis_map
    check_orders(orders, axis_map)
    require_loadable(path, config)
    if read_scheme(config, axis_map) is not None:
        raise ConfigError(f"{path} is quantised; sort the checkpoint first, then quantise it")
    source = _open(path, axis_map, config.architecture)

    def moved(spec: TensorSpec) -> list[int]:
        order = dim_order(spec.dims[0], orders_of(spec.layer, axis_map, orders))
        return list(range(size_of(spec.dims[0]))) if order is None else order.tolist()

    def part(spec: TensorSpec, piece: Piece) -> Part:
        dims, here = spec.on_disk(piece).dims, orders_of(spec.layer, axis_map, orders)
        return None, partial(_sorted, dims, here)

    jobs = list(_jobs(source, axis_map, axis_map.names_at(axis_map.full), moved, part))
    written = written_config(config.at(axis_map.full), axis_map, source.dtype, None)
    _write(source, jobs, written, out, max_shard_bytes, progress, finish)


def _sorted(
    dims: tuple[Dim, ...], orders: Orders, reader: CheckpointReader, name: str
) -> Iterator[torch.Tensor]:
    """A tensor on disk in its new order. Where rows move the whole of it is read, since they come
    from anywhere."""
    order = dim_order(dims[0], orders) if dims else None
    if order is None:
        for block in reader.blocks(name):
            yield sort_tensor(block, dims, orders, first=1)
        return
    whole = reader.read(name)
    for rows in order.split(rows_at_once(whole[:1].nbytes)):
        yield sort_tensor(whole.index_select(0, rows), dims, orders, first=1)


def save_model(
    state: Mapping[str, torch.Tensor],
    config: Config,
    extras: Path,
    out: str | Path,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model in memory as a checkpoint in the family's on-disk layout.

    `extras` is the directory whose tokenizer and templates are copied along. `dtype`: of all
    tensors, or of each by name; buffers stay in fp32. config.json names the
    dtype that most elements have. `progress` is told bytes.
    """
    config = ModelConfig.of(config)
    axis_map = config.axis_map
    dtypes = {
        spec.name: torch.float32
        if spec.is_buffer
        else dtype
        if isinstance(dtype, torch.dtype)
        else dtype[spec.name]
        for spec in axis_map.tensors.values()
    }
    values: dict[str, tuple[TensorSpec, Piece]] = {}
    plan: list[Planned] = []
    for spec in axis_map.tensors.values():
        for piece in spec.pieces:
            values[piece.name] = (spec, piece)
            shape = axis_map.shape(spec.on_disk(piece), axis_map.full)
            plan.append(Planned(piece.name, shape, dtypes[spec.name]))

    def value_of(name: str) -> torch.Tensor:
        spec, piece = values[name]
        return state[spec.name][spec.box(piece)].detach().to(dtypes[spec.name])

    written = written_config(
        config.at(axis_map.full), axis_map, most_common_dtype(dtypes, axis_map), None
    )
    write_checkpoint(out, written, extras, plan, value_of, progress=progress, finish=finish)
