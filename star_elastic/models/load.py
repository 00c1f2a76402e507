"""Loading a parent: a checkpoint as a transformers model, or one line about why it is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedModel,
)

from star_elastic.architectures import ModelConfig, read_config
from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap
from star_elastic.checkpoints.layouts import MODELOPT_FILE, read_scheme, stored_map
from star_elastic.checkpoints.quantised import model_state, read_input_scales
from star_elastic.checkpoints.stored import StoredModel
from star_elastic.checkpoints.tensors import CheckpointReader
from star_elastic.checkpoints.written_config import require_readable
from star_elastic.errors import CheckpointError
from star_elastic.files.paths import has_file, is_file
from star_elastic.models.model_config import buildable_config
from star_elastic.models.native import multiplies_fp8
from star_elastic.models.quantised_inputs import QuantisedInputs
from star_elastic.models.skeleton import (
    build_skeleton,
    building_of,
    probe_positions,
)
from star_elastic.models.tokenizer import generation_config, require_beside
from star_elastic.quant.scheme import Scheme


def load_parent(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    native: bool | None = None,
) -> tuple[PreTrainedModel, ModelConfig]:
    """A parent (or elastic) checkpoint as a transformers model, and its config.json.

    On the CPU, parameters that have the stored dtype and shape stay in the mapped file: the files
    may be replaced by others while the model is in use, but not be overwritten or shortened.
    FP8 weights stay as they are where the device multiplies them (`native`; default: if it can);
    else quantised weights are dequantised once, here, because a product with codes would unpack
    them every time. Raises ConfigError or CheckpointError with one line for anything that cannot be
    loaded, before anything is read if the headers show it.
    """
    path = Path(path)
    config = read_config(path)
    require_readable(path)
    axis_map = config.axis_map
    scheme = read_scheme(config, axis_map)
    source = StoredModel(path, stored_map(axis_map, scheme), config.architecture)
    source.require_whole()
    weight_scales = None
    if scheme is None:
        model = _filled(config, source.state(dtype), dtype, path)
    elif _multiplies(scheme, axis_map, device, dtype) if native is None else native:
        state, weight_scales = model_state(source, axis_map, scheme, dtype, codes=True)
        model = _holding(config, state, path)
    else:
        state, _ = model_state(source, axis_map, scheme, dtype, codes=False)
        model = _filled(config, state, dtype, path)
    model.generation_config = generation_config(path) or model.generation_config
    model.name_or_path = model.config.name_or_path = str(path)
    model = model.to(device).eval()
    if scheme is not None:
        scales = read_input_scales(source, axis_map, scheme)
        QuantisedInputs(scheme, scales, weight_scales).install(model, axis_map)
    return model, config


def _multiplies(scheme: Scheme, axis_map: AxisMap, device: str, dtype: torch.dtype) -> bool:
    """Whether a device multiplies the codes of a scheme as they are."""
    experts = any(spec.routed for spec in scheme.quantised(axis_map).values())
    return multiplies_fp8(device, dtype, scheme.format, experts=experts)


def _filled(
    config: ModelConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype, path: Path
) -> Any:
    """transformers' model with these tensors. They are read before: transformers would stack
    experts beside the mapped pages they come from."""
    made, kernels = buildable_config(config, file=path / "config.json")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
    with building_of(config, path / "config.json"):
        model, info = kind.from_pretrained(
            None, config=made, state_dict=state, dtype=dtype, output_loading_info=True, **kernels
        )
        probe_positions(model)
    _require_same_names(info, path, config.axis_map)
    return model


def _require_same_names(info: Mapping[str, Any], path: Path, axis_map: AxisMap) -> None:
    """Raises CheckpointError for tensors that do not match: transformers only warns, and fills what
    is missing with random values."""
    for problem, names in (("lacks", "missing_keys"), ("also holds", "unexpected_keys")):
        if info[names]:
            raise CheckpointError(
                f"{path} {problem} the tensor {min(info[names])} ({len(info[names])} such) of "
                f"transformers' model, which the {axis_map.model_type} table does not know; use a "
                "parent without"
            )


def require_loadable(path: Path, config: Config) -> None:
    """Raises ConfigError or CheckpointError for what `load_parent` would refuse beside the weights,
    without reading those."""
    build_skeleton(config, file=path / "config.json")
    require_beside(path)


def require_checkpoint(path: str | Path) -> None:
    """Raises ConfigError or CheckpointError for what keeps a checkpoint from being loaded, as far
    as the files' headers show it: its config and weights, and its tokenizer if it has one.
    A path to a config.json names no checkpoint, and there is no more to say of it."""
    path = Path(path)
    if is_file(path):
        return
    config = read_config(path)
    axis_map = config.axis_map
    if has_file(path / MODELOPT_FILE):  # whose tensors have other names
        CheckpointReader(path)
    else:
        stored = stored_map(axis_map, read_scheme(config, axis_map))
        StoredModel(path, stored, config.architecture).require_whole()
    require_loadable(path, config)


def _holding(config: ModelConfig, state: Mapping[str, torch.Tensor], path: Path) -> Any:
    """A model without memory of its own that holds these tensors: codes, which transformers would
    not load."""
    model = build_skeleton(config)
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    info = {"missing_keys": missing, "unexpected_keys": unexpected}
    _require_same_names(info, path, config.axis_map)
    return model.requires_grad_(False)
