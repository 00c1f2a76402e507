"""Records the products that really run, below autograd and autocast, with their dtypes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCT = re.compile(r"(mm|mv|dot|linear|attention|convolution|grouped_mm_fallback)(_backward)?_?$")
"""Names of operators that multiply matrices, whatever their namespace."""


@dataclass(frozen=True)
class Product:
    """One product: the operator, and shape and dtype of its two (attention: three) operands."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def multiplications(self) -> int:
        """How many, for plain and batched matrices; attention counts as large."""
        if "attention" in self.name:
            return 1 << 62
        left, right = self.shapes[:2]
        return math.prod(left) * right[-1]


class Products(TorchDispatchMode):
    """Remembers every product while it is active, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if PRODUCT.search(name.replace("_for_cpu", "")):
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            if "addmm" in name or "addmv" in name or "baddbmm" in name or "addbmm" in name:
                tensors = tensors[1:]  # the first is what is added to
            operands = tensors[: 3 if "attention" in name else 2]
            self.seen.append(
                Product(
                    name,
                    tuple(tuple(value.shape) for value in operands),
                    tuple(value.dtype for value in operands),
                )
            )
        return func(*args, **(kwargs or {}))

    def large(self, least: int) -> Iterator[Product]:
        """Those of at least so many multiplications."""
        return (product for product in self.seen if product.multiplications >= least)
