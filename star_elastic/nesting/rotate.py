"""The residual stream in another basis: a rotation that the model cannot see.

A root-mean-square norm has the same norm in every orthonormal basis, so that with its weights
folded into the projections that read it, the whole stream can be rotated: everything that writes
it or reads it is, and the function stays (the invariance that SliceGPT, arXiv 2401.15024, uses).
In a basis whose first channels carry most of the stream, a cut loses far less than in any order of
the parent's own channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from star_elastic.axes import RMS_PLUS_ONE, AxisMap, NormSpec, TensorSpec
from star_elastic.errors import ShapeError

HIDDEN = "hidden"
ORTHONORMAL = 1e-6


def check_rotatable(axis_map: AxisMap) -> None:
    """Raises ShapeError if a norm's weights cannot be folded into what reads the norm."""
    for norm in axis_map.norms:
        if norm.axis == HIDDEN and not norm.reader:
            where = "a tied embedding"
            if norm.writes:
                where = "what reads them: they stand behind a block, in the stream's own channels"
            raise ShapeError(
                f"the weights of {norm.path} cannot be folded into {where}, so this "
                f"{axis_map.model_type} model keeps its own channels; use calibration.basis = "
                '"channels"'
            )


def check_basis(basis_HH: torch.Tensor, axis_map: AxisMap) -> None:
    """Raises ShapeError unless the columns of a basis (H, H) are orthonormal."""
    size = axis_map.axes[HIDDEN].size
    basis = basis_HH.double()
    identity = torch.eye(size, dtype=torch.float64, device=basis.device)
    # Written so that values that are no numbers fail too.
    if basis.shape != (size, size) or not (basis.mT @ basis - identity).abs().max() <= ORTHONORMAL:
        raise ShapeError(f"the basis is not orthonormal over {size} channels; estimate it again")


def readers(axis_map: AxisMap, path: str) -> list[TensorSpec]:
    """Matrices under a module that read the residual stream."""
    return [
        spec
        for name, spec in axis_map.tensors.items()
        if name.startswith(f"{path}.") and spec.is_matrix and _reads(spec) == HIDDEN
    ]


@torch.no_grad()
def rotate_state(
    state: Mapping[str, torch.Tensor], axis_map: AxisMap, basis_HH: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Every tensor of the table with the residual stream in a new basis, norm weights folded.

    `basis_HH` is orthonormal, its columns the new channels in terms of the old. Products are
    taken in float64; tensors keep their dtypes. The model's function is unchanged. Raises
    ShapeError if the basis is not orthonormal or a norm cannot be folded.
    """
    check_rotatable(axis_map)
    check_basis(basis_HH, axis_map)
    basis = basis_HH.double()
    folded: dict[str, torch.Tensor] = {}
    norms = [norm for norm in axis_map.norms if norm.axis == HIDDEN]
    for norm in norms:
        weight = state[f"{norm.path}.weight"].double() + _one(norm)
        folded |= {spec.name: weight for spec in readers(axis_map, norm.reader)}
    rotated = {}
    for name, spec in axis_map.tensors.items():
        value = state[name].double()
        if name in folded:
            assert spec.reads is not None, name
            value = (value.movedim(spec.reads, -1) * folded[name]).movedim(-1, spec.reads)
        for dim in range(len(spec.dims)):
            if spec.axis_of(dim) == HIDDEN:
                value = (value.movedim(dim, -1) @ basis.to(value.device)).movedim(-1, dim)
        rotated[name] = value.to(state[name].dtype).contiguous()
    for norm in norms:
        own = state[f"{norm.path}.weight"]
        rotated[f"{norm.path}.weight"] = torch.full_like(own, 1 - _one(norm))
    return rotated


def _reads(spec: TensorSpec) -> str | None:
    """The axis of a matrix's inputs."""
    return None if spec.reads is None else spec.axis_of(spec.reads)


def _one(norm: NormSpec) -> int:
    """What a norm adds to its weights."""
    return int(norm.kind == RMS_PLUS_ONE)
