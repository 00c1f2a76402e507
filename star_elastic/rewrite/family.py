"""Post-training quantisation of a family: every size is calibrated, one checkpoint is written.

The weights' scales are those of the full width, shared by all sizes. Inputs have a scale per size,
because a small size's activations are its own: a slice takes its size's scales along, and the
checkpoint itself, and so its full size and widths without a name, has the largest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from star_elastic.architectures import read_config
from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.elastic import ElasticCheckpoint, rewrite_family_files
from star_elastic.checkpoints.layouts import stored_map
from star_elastic.checkpoints.manifest import Manifest
from star_elastic.checkpoints.quantised import PartBytes, count_bytes
from star_elastic.data.sources import (
    MAX_CONTEXT,
    Document,
    Source,
    epochs_key,
    first_documents,
    held_out_documents,
)
from star_elastic.errors import ConfigError, ShapeError
from star_elastic.files.writing import require_writable
from star_elastic.models.calibration import calibrate_inputs
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.models.load import load_parent, require_loadable
from star_elastic.models.model_config import require_context
from star_elastic.models.placement import choose_device, choose_dtype
from star_elastic.models.submodel import build_submodel
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.progress import Progress, Silent, staged
from star_elastic.quant.scheme import Scheme, make_scheme
from star_elastic.rewrite.quantise import quantise_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCalibration:
    """Rows that inputs are calibrated on (the first of the files, without `held_out` ones, as in
    `Source.hold_out`), cut to `context` tokens, and the percentile of magnitudes that the scales
    cover (100: all)."""

    files: Sequence[Path] = ()
    held_out: int = 0
    samples: int = 256
    context: int = 1024
    percentile: float = 100.0


def quantise_family(
    elastic: str | Path,
    out: str | Path,
    format_name: str,
    *,
    keep: Iterable[str] = (),
    calibration: InputCalibration | None = None,
    frozen: FakeQuantisation | None = None,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, PartBytes]:
    """Quantises an elastic checkpoint into the new directory `out`; returns bytes by part.

    Every size of the family must end on the edges of the format's blocks. `frozen`: magnitudes and
    scales that quantisation-aware training has kept, in place of measured ones. `dtype` and
    `device` (see `placement`) are those to calibrate in. Raises ConfigError, ShapeError or
    CheckpointError with one line, before anything is written.
    """
    path, progress = Path(elastic), progress or Silent()
    calibration = calibration or InputCalibration()
    require_writable(out)
    if not 0 < calibration.percentile <= 100:
        raise ConfigError(f"percentile={calibration.percentile} is not in (0, 100]; use 99.99")
    family = ElasticCheckpoint(path)
    config, axis_map, manifest = family.config, family.axis_map, family.manifest
    if family.is_quantised:
        raise ConfigError(f"{path} is quantised already; quantise the checkpoint it was made from")
    require_loadable(path, config)
    scheme = make_scheme(axis_map, format_name, keep)
    _require_edges(manifest, axis_map, scheme)
    scales: dict[str, dict[str, torch.Tensor]] = {}
    if frozen is not None:
        shared = frozen.inputs
    else:
        if scheme.format.is_calibrated:
            source = _calibration_source(path, axis_map, scheme, calibration)
            parent, _ = load_parent(path, choose_dtype(dtype, path), choose_device(device))
            require_context(parent.config, context=calibration.context)
            widths = {name: size.widths for name, size in manifest.sizes.items()}
            scales = calibrate_sizes(
                parent, config, axis_map, widths, scheme, [source], calibration, progress
            )
            del parent
        shared = shared_scales(scales, scheme, axis_map)

    def finish(directory: Path) -> None:
        # The full size has the scales of the checkpoint itself.
        cut = [n for n, size in manifest.sizes.items() if size.widths != axis_map.full]
        own = {name: scales[name] for name in cut if scales.get(name)}
        named = replace(manifest, own_input_scales=tuple(own))
        rewrite_family_files(family, directory, named, input_scales=own)

    quantise_checkpoint(
        path, scheme, out, input_scales=shared, largest=frozen.largest if frozen else None,
        progress=staged(progress, "quantize"), finish=finish,
    )  # fmt: skip
    return count_bytes(path, Path(out))


def _require_edges(manifest: Manifest, axis_map: AxisMap, scheme: Scheme) -> None:
    """Raises ShapeError for a size that does not end on the edges of the format's blocks."""
    stored = stored_map(axis_map, scheme)
    for name, size in manifest.sizes.items():
        try:
            axis_map.at(size.widths)  # one width per axis
            stored.require_edges(size.widths)
        except ShapeError as error:
            raise ShapeError(
                f"size {name!r} cannot be quantised to {scheme.format.name}: {error}. Widths are "
                "those of the run that made the family ([choices]); fp8-channel takes any"
            ) from None


def _calibration_source(
    path: Path, axis_map: AxisMap, scheme: Scheme, calibration: InputCalibration
) -> Source:
    if not calibration.files:
        raise ConfigError(
            f"{scheme.format.name} needs data to calibrate inputs on; name rows with --data, or "
            "use fp8-channel, whose inputs are scaled as they come"
        )
    return _rows(path, calibration, axis_map)


def _rows(path: Path, calibration: InputCalibration, axis_map: AxisMap) -> Source:
    files, tokenizer = tuple(map(str, calibration.files)), load_tokenizer(path)
    source = Source(files, tokenizer, num_embeddings=axis_map.num_embeddings)
    return source.hold_out(calibration.held_out, epochs_key(0, 0, 0))


def held_out_of(elastic: Path, calibration: InputCalibration) -> list[Document]:
    """The rows that a family is not calibrated on, to hold it against what it was."""
    if not calibration.files:
        return []
    rows = _rows(elastic, calibration, read_config(elastic).axis_map)
    return held_out_documents([rows], MAX_CONTEXT)


def calibrate_sizes(
    parent: PreTrainedModel,
    config: Config,
    axis_map: AxisMap,
    widths: Mapping[str, Widths],
    scheme: Scheme,
    sources: Sequence[Source],
    calibration: InputCalibration,
    progress: Progress,
) -> dict[str, dict[str, torch.Tensor]]:
    """Scales of the inputs of every size, by the weights' names in the parent; none where a format
    is not calibrated. Sources take turns, row by row. Raises as `first_documents`."""
    if not scheme.format.is_calibrated:
        return {}
    # Without padding, whose activations would count, too.
    documents = first_documents(sources, [1.0] * len(sources), calibration.samples)
    held = sum(len(source) for source in sources)
    progress.stage("read", min(calibration.samples, held))
    rows = []
    for document in documents:
        rows.append(document.fed[: calibration.context])
        progress.advance(len(rows))
    count = len(rows)
    widths = dict(widths)
    kept = {name for own in widths.values() for name in axis_map.names_at(own)}
    if scheme.quantised(axis_map).keys() - kept:  # in layers that no size has
        widths[""] = axis_map.full
    progress.stage("calibrate", count * len(widths))
    scales = {}
    for place, (name, own) in enumerate(widths.items()):
        found = calibrate_inputs(
            build_submodel(parent, config, own),
            axis_map.at(own),
            scheme.at(axis_map, own),
            _watched(rows, progress, place * count),
            percentile=calibration.percentile,
        )
        names = axis_map.names_at(own)
        scales[name] = {old: found[new] for old, new in names.items() if new in found}
    return scales


def shared_scales(
    scales: Mapping[str, Mapping[str, torch.Tensor]], scheme: Scheme, axis_map: AxisMap
) -> dict[str, torch.Tensor]:
    """The largest scale of any size, by weight."""
    shared = {}
    for name in scheme.quantised(axis_map):
        found = [own[name] for own in scales.values() if name in own]
        if found:
            shared[name] = torch.stack(found).amax(0)
    return shared


def _watched(
    rows: Iterable[Sequence[int]], progress: Progress, done: int
) -> Iterator[dict[str, torch.Tensor]]:
    for number, ids in enumerate(rows, start=1):
        yield {"input_ids": torch.tensor([list(ids)], dtype=torch.long)}
        progress.advance(done + number)
