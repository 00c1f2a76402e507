"""On which device and in which dtype a checkpoint is computed: as somebody says, or by default.

Knows weights files and torch's devices; nothing of models.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch

from star_elastic.checkpoints.tensors import CheckpointReader
from star_elastic.errors import ConfigError, library_boundary

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device | None = AUTO) -> str:
    """A device that can be used here; by default ("auto") the GPU if there is one, else the CPU.

    Raises ConfigError for a device that torch does not know or that this machine does not have.
    """
    if device is None or device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    with library_boundary(
        f"device={str(device)!r} cannot be used here", f"use {_there()}", ConfigError
    ):
        torch.ones(1, device=device).item()  # a meta device has no values
    return str(device)


def _there() -> str:
    """The devices of this machine, as a user names them."""
    return "cpu, cuda or auto" if torch.cuda.is_available() else "cpu or auto"


def choose_dtype(dtype: str | torch.dtype | None, path: str | Path) -> torch.dtype:
    """A dtype to compute in: named, or ("auto") the one that the checkpoint at `path` stores.

    So BF16 weights stay BF16, on the CPU too, where they would otherwise take twice the memory, and
    fp32 weights stay fp32. Of a quantised checkpoint it is the dtype of what is not quantised.
    Raises ConfigError for other dtypes.
    """
    if dtype is None or dtype == AUTO:
        return _stored_dtype(Path(path))
    known = {**DTYPES, **{own: own for own in DTYPES.values()}}
    if dtype not in known:
        raise ConfigError(f"dtype={dtype!r} is not supported; use auto, {', '.join(DTYPES)}")
    return known[dtype]


def name_of(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16` or `float16`."""
    return next(name for name, own in DTYPES.items() if own == dtype)


def _stored_dtype(path: Path) -> torch.dtype:
    """The dtype that most bytes of the weights are stored in; fp32 if it is none of these."""
    reader = CheckpointReader(path)
    num_bytes: Counter[torch.dtype] = Counter()
    for name in reader.names:
        dtype = reader.dtype(name)
        num_bytes[dtype] += math.prod(reader.shape(name)) * dtype.itemsize
    known = {dtype: num_bytes[dtype] for dtype in DTYPES.values() if num_bytes[dtype]}
    return max(known, key=lambda dtype: known[dtype], default=torch.float32)
