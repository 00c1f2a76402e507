"""What config.json must hold beside written weights, for engines to run them as they are."""

from __future__ import annotations

from pathlib import Path

import torch

from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap
from star_elastic.checkpoints.companions import without_pointers
from star_elastic.checkpoints.layouts import (
    CONFIG_KEY,
    MODELOPT_FILE,
)
from star_elastic.errors import ConfigError
from star_elastic.files.paths import has_file
from star_elastic.quant.scheme import Scheme

GROUPED_BYTES, GROUPED_MULTIPLE, KERNEL_MULTIPLE = 16, 8, 128
"""PyTorch's grouped products want strides of whole 16 bytes, so widths of experts that are
multiples of 8 in BF16; FlashInfer's NVFP4 experts want 128."""
DTYPE, OLD_DTYPE, EXPERTS = "dtype", "torch_dtype", "experts_implementation"
EAGER = "eager"


def grouped_products_fit(axis_map: AxisMap, itemsize: int = 2) -> bool:
    """Whether the experts of a model (if it has any) can run as grouped matrix products, in a dtype
    of so many bytes."""
    shapes = [axis_map.shape(s, axis_map.full) for s in axis_map.tensors.values() if s.routed]
    fused = [shape[1:] for shape in shapes if len(shape) == 3]
    return all(size * itemsize % GROUPED_BYTES == 0 for shape in fused for size in shape)


def written_config(
    config: Config, axis_map: AxisMap, stored: torch.dtype, scheme: Scheme | None
) -> Config:
    """A config.json as it is written beside weights that are `stored` so, for engines to run them.

    It names the dtype: of NVFP4 weights BF16, to which engines unpack them whatever the others are,
    since transformers does not run a model of two dtypes. Experts that do not fit grouped products
    run one by one. Nothing points to files that are not written.
    """
    packed = scheme is not None and scheme.format.packed
    dtype = str(torch.bfloat16 if packed else stored).removeprefix("torch.")
    spellings = [DTYPE, *([OLD_DTYPE] if OLD_DTYPE in config else [])]
    written = without_pointers(config) | dict.fromkeys(spellings, dtype)
    if scheme is None:
        written.pop(CONFIG_KEY, None)  # null or empty, which transformers stumbles over
    return written if grouped_products_fit(axis_map) else {**written, EXPERTS: EAGER}


def require_readable(path: Path) -> None:
    """Raises ConfigError for a checkpoint in ModelOpt's layout, which is for engines."""
    if has_file(path / MODELOPT_FILE):
        raise ConfigError(
            f"{path} is in ModelOpt's layout, which star-elastic writes for engines and does not "
            "read; name the quantised family, or a slice in the layout of compressed-tensors"
        )
