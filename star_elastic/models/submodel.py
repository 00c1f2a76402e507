"""Submodels for inference: transformers models that hold slices of the (sorted) parent.

The slices are assigned, as views where possible, so that all sizes share one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from star_elastic.architectures import family_of, read_config
from star_elastic.architectures.base import Config
from star_elastic.axes import AxisMap
from star_elastic.checkpoints.companions import (
    BASIS,
    ORDERS,
    reading_files,
    require_reading_files,
)
from star_elastic.checkpoints.layouts import MODELOPT_FILE, read_scheme, stored_map
from star_elastic.checkpoints.quantised import model_state, read_input_scales
from star_elastic.checkpoints.stored import StoredModel
from star_elastic.checkpoints.tensors import CheckpointReader, load_tensors
from star_elastic.checkpoints.written_config import require_readable
from star_elastic.data.chat import render
from star_elastic.errors import CheckpointError, ConfigError, ShapeError, library_boundary
from star_elastic.files.paths import has_file, is_file
from star_elastic.models.model_config import buildable_config, model_config
from star_elastic.models.native import multiplies_fp8
from star_elastic.models.quantised_inputs import INPUTS, QuantisedInputs
from star_elastic.models.resident import nested_names, share_nested
from star_elastic.models.skeleton import (
    build_skeleton,
    build_skeleton_at,
    building_of,
    probe_positions,
)
from star_elastic.nesting.rotate import check_basis, rotate_state
from star_elastic.nesting.slice import Orders, check_orders, slice_state, sort_state
from star_elastic.widths import Width


def build_submodel(
    parent: PreTrainedModel,
    config: Config,
    widths: Mapping[str, Width],
    *,
    input_scales: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """A plain transformers model of `widths` that shares the (sorted) parent's memory.

    `config` is the parent's config.json. The parent's parameters are not copied where a prefix
    of each dimension survives, in nested order if the parent holds them so (`nest_in_place`).
    `input_scales`: of a quantised model, by the parent's weights, in place of the parent's. Raises
    ShapeError for widths the family cannot express.
    """
    axis_map = family_of(config).axis_map(config)
    complete = axis_map.complete(widths)
    inputs: QuantisedInputs | None = getattr(parent, INPUTS, None)
    if inputs is not None:
        stored_map(axis_map, inputs.scheme).require_edges(complete)
        inputs = inputs.with_scales(input_scales or {})
    submodel = build_skeleton_at(config, complete, parent)
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    sliced = slice_state(state, axis_map, complete, leave=nested_names(parent))
    missing = submodel.load_state_dict(sliced, strict=False, assign=True).missing_keys
    share_nested(parent, submodel, axis_map, complete)
    submodel.tie_weights()
    for name, buffer in submodel.named_buffers():  # those that no checkpoint holds
        if buffer.device != parent.device:
            owner, _, own = name.rpartition(".")
            submodel.get_submodule(owner)._buffers[own] = buffer.to(parent.device)
    left = [name for name, value in submodel.named_parameters() if value.is_meta]
    assert not left, (left, missing)
    submodel.generation_config = parent.generation_config
    if inputs is not None:
        quantise_inputs(submodel, inputs.at(axis_map, complete), axis_map.at(complete))
    return submodel.eval()


def quantise_inputs(model: PreTrainedModel, inputs: QuantisedInputs, axis_map: AxisMap) -> None:
    """Lets the layers of a model that are quantised read what their format knows of their inputs;
    its submodels will, too."""
    inputs = inputs.to(model.device)
    inputs.apply(model, axis_map)
    setattr(model, INPUTS, inputs)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. One that names no EOS has that of the model's settings, at
    which generation stops.

    Raises CheckpointError if it has none that can be read, ConfigError for a config.json that
    transformers does not take, which tells it the kind of tokenizer.
    """
    settings = read_config(path)
    config = model_config(settings, Path(path) / "config.json")
    if is_file(path):
        raise CheckpointError(f"{path} is a file; name the checkpoint directory that it lies in")
    require_reading_files(Path(path))
    with library_boundary(
        f"{path} holds no usable tokenizer", "put the parent's tokenizer files beside the weights"
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=True, trust_remote_code=False
        )
    if tokenizer.eos_token_id is None:
        known = set(tokenizer.get_vocab().values())
        named = (end for end in _ends_of(Path(path), settings) if end in known)
        if (end := next(named, None)) is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def _ends_of(path: Path, settings: Config) -> list[Any]:
    """The token ids at which the settings of a checkpoint let generation stop."""
    generation: Any = _generation_config(path)
    ends = generation.eos_token_id if generation else settings.get("eos_token_id")
    return ends if isinstance(ends, list) else [ends]


def stop_tokens(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """As `end_of_turn`, of the files of a checkpoint."""
    return _token_ids([tokenizer.eos_token_id, *_ends_of(Path(path), read_config(path))])


def _token_ids(ends: Iterable[object]) -> frozenset[int]:
    return frozenset(i for i in ends if isinstance(i, int))


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, models: Iterable[PreTrainedModel]
) -> frozenset[int]:
    """Token ids that end a turn: the tokenizer's and those of the models' own settings."""
    ends: list[object] = [tokenizer.eos_token_id]
    for model in models:
        settings = model.generation_config
        ids = settings.eos_token_id if settings is not None else None
        ends += ids if isinstance(ids, list) else [ids]
    return _token_ids(ends)


def load_parent(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    native: bool | None = None,
) -> tuple[PreTrainedModel, Config]:
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
    family = family_of(config)
    axis_map = family.axis_map(config)
    scheme = read_scheme(config, axis_map)
    # transformers would stack experts beside the mapped pages they come from.
    source = StoredModel(path, stored_map(axis_map, scheme), family)
    source.require_whole()
    weight_scales = None
    if scheme is None:
        native = False
    elif native is None:
        experts = any(spec.routed for spec in scheme.quantised(axis_map).values())
        native = multiplies_fp8(device, dtype, scheme.format, experts=experts)
    if native:
        assert scheme is not None
        state, weight_scales = model_state(source, axis_map, scheme, dtype, codes=True)
        model, info = _assign(build_skeleton(config), state)
    else:
        if scheme is None:
            state = source.state(dtype)
        else:
            state, _ = model_state(source, axis_map, scheme, dtype, codes=False)
        made, kernels = buildable_config(config, file=path / "config.json")
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
        with building_of(config, path / "config.json"):
            model, info = kind.from_pretrained(
                None, config=made, state_dict=state, dtype=dtype, output_loading_info=True,
                **kernels,
            )  # fmt: skip
            probe_positions(model)
    # transformers only warns here, and fills what is missing with random values.
    for problem, names in (("lacks", "missing_keys"), ("also holds", "unexpected_keys")):
        if info[names]:
            raise CheckpointError(
                f"{path} {problem} the tensor {min(info[names])} ({len(info[names])} such) of "
                f"transformers' model, which the {axis_map.family} table does not know; use a "
                "parent without"
            )
    model.generation_config = _generation_config(path) or model.generation_config
    model.name_or_path = model.config.name_or_path = str(path)
    model = model.to(device).eval()
    if scheme is not None:
        scales = read_input_scales(source, axis_map, scheme)
        quantise_inputs(model, QuantisedInputs(scheme, scales, weight_scales), axis_map)
    return model, config


def require_loadable(path: Path, config: Config) -> None:
    """Raises ConfigError or CheckpointError for what `load_parent` would refuse beside the weights,
    without reading those."""
    build_skeleton(config, file=path / "config.json")
    _generation_config(path)


def require_checkpoint(path: str | Path) -> None:
    """Raises ConfigError or CheckpointError for what keeps a checkpoint from being loaded, as far
    as the files' headers show it: its config and weights, and its tokenizer if it has one.
    A path to a config.json names no checkpoint, and there is no more to say of it."""
    path = Path(path)
    if is_file(path):
        return
    config = read_config(path)
    family = family_of(config)
    axis_map = family.axis_map(config)
    if has_file(path / MODELOPT_FILE):  # whose tensors have other names
        CheckpointReader(path)
    else:
        stored = stored_map(axis_map, read_scheme(config, axis_map))
        StoredModel(path, stored, family).require_whole()
    require_loadable(path, config)
    if any("template" not in file.name.lower() for file in reading_files(path)):
        _require_template(load_tokenizer(path))


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for a chat template that cannot be parsed. Which messages it takes is
    another matter."""
    try:
        render(tokenizer, [{"role": "user", "content": "1"}])
    except ConfigError:
        raise
    except Exception:
        return


def _generation_config(path: Path) -> GenerationConfig | None:
    file = path / GENERATION_CONFIG_NAME
    if not has_file(file):
        return None
    with library_boundary(f"{file} cannot be read", "correct the file or remove it"):
        return GenerationConfig.from_pretrained(path, local_files_only=True)


def _assign(model: Any, state: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, list[str]]]:
    """A model without memory with these tensors, and the names that do not match."""
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    model.requires_grad_(False)
    return model, {"missing_keys": missing, "unexpected_keys": unexpected}


def load_sorting(
    family: Path, axis_map: AxisMap
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """How the parent of a family was sorted, as far as the family says: the order of every axis
    (empty if it does not say) and the basis (H, H) of the residual stream.

    Raises CheckpointError for files that are damaged or another model's.
    """
    orders: dict[str, torch.Tensor] = {}
    if has_file(file := family / ORDERS):
        orders = load_tensors(file)
        with _one_of(file, axis_map):
            check_orders(orders, axis_map)
    if not has_file(file := family / BASIS):
        return orders, None
    found = load_tensors(file)
    with _one_of(file, axis_map):
        if "hidden" not in found:
            raise ShapeError("it holds no basis of the residual stream")
        check_basis(found["hidden"], axis_map)
    return orders, found["hidden"]


@contextmanager
def _one_of(file: Path, axis_map: AxisMap) -> Iterator[None]:
    try:
        yield
    except ShapeError as error:
        raise CheckpointError(
            f"{file} does not fit this {axis_map.family} model ({error}); restore the file"
        ) from None


def sort_in_place(
    parent: PreTrainedModel,
    axis_map: AxisMap,
    orders: Orders,
    basis: torch.Tensor | None = None,
) -> None:
    """Permutes a model's own weights, best units first, in another basis of the residual stream
    if one is given (which then takes the place of an order of `hidden`). Its function is unchanged.
    """
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    changed: Mapping[str, torch.Tensor] = state
    if basis is not None:
        changed = rotate_state(state, axis_map, basis)
        orders = {key: order for key, order in orders.items() if key != "hidden"}
    with torch.no_grad():
        for name, value in sort_state(changed, axis_map, orders).items():
            state[name].copy_(value)
