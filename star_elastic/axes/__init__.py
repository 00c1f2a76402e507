"""The axis map: what every dimension of every tensor of a model is. Integers only."""

from star_elastic.axes.axis_map import TOP_K, Axis, AxisMap, axis_keys, order_key
from star_elastic.axes.dims import Dim, Segment, along, fixed, size_of
from star_elastic.axes.table import (
    GATED_GROUPS,
    MAMBA2,
    RMS,
    RMS_FP32,
    RMS_PLUS_ONE,
    SIGMOID_GROUPS,
    SOFTMAX,
    Block,
    ConstantSpec,
    Follow,
    Laid,
    Mixer,
    MoeSpec,
    NormSpec,
    Piece,
    Probe,
    StateSpec,
    TensorSpec,
    WorkSpec,
)
from star_elastic.axes.widths import LAYERS, Width, Widths

__all__ = [
    "GATED_GROUPS", "LAYERS", "MAMBA2", "RMS", "RMS_FP32", "RMS_PLUS_ONE", "SIGMOID_GROUPS",
    "SOFTMAX", "TOP_K", "Axis", "AxisMap", "Block", "ConstantSpec", "Dim", "Follow", "Laid",
    "Mixer", "MoeSpec", "NormSpec", "Piece", "Probe", "Segment", "StateSpec", "TensorSpec",
    "Width", "Widths", "WorkSpec", "along", "axis_keys", "fixed", "order_key", "size_of",
]  # fmt: skip
