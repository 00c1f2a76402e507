"""The numbers: FP8 E4M3 and NVFP4 values, their scales, and how they are packed.

A weight (..., out, in) becomes codes and scales; everything is computed in fp32, by division where
a library may multiply by a reciprocal (which moves exact ties). Scales are those of the full
width: a slice keeps them, so that quantising a slice with the parent's scales and slicing what was
quantised agree bit for bit wherever a cut ends on the edge of a block.

NVFP4 (arXiv 2605.07182, NVIDIA's NVFP4 description): codes E2M1, a scale E4M3 for every 16 elements
of a row, and one scale fp32 for the tensor, s2 = amax / (6 * 448).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from star_elastic.errors import ConfigError, ShapeError

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E4M3 = torch.float8_e4m3fn
SMALLEST_SCALE = 2.0**-9
"""The smallest positive E4M3 number: a block of zeros has a scale, too."""
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Half way between neighbours; a tie goes to the even code, so every other one goes up."""
SIGN = 8
CHUNK = 2**21
"""Elements that are quantised at once."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight is stored: `block` (rows, columns) that share a scale, 0 for all of them;
    `packed` codes of 4 bits; `activations`: how a layer's input is quantised when it is used.

    `static` activations have a scale that calibration has set for all tokens, `token` one for each
    token, `group` one for every so many channels of it as a block has columns, `block` the same in
    E4M3 under a calibrated global scale.
    """

    name: str
    block: tuple[int, int]
    packed: bool
    activations: str

    @property
    def has_global_scale(self) -> bool:
        return self.packed

    @property
    def has_one_scale(self) -> bool:
        """Whether one scale is shared by a whole weight."""
        return self.packed or self.block == (0, 0)

    @property
    def is_calibrated(self) -> bool:
        """Whether inputs have a scale that data has set."""
        return self.activations in ("static", "block")


FORMATS = {
    "fp8": Format("fp8", (0, 0), False, "static"),
    "fp8-channel": Format("fp8-channel", (1, 0), False, "token"),
    "fp8-block": Format("fp8-block", (128, 128), False, "group"),
    "nvfp4": Format("nvfp4", (1, 16), True, "block"),
}


def format_of(name: str) -> Format:
    """A format by its name. Raises ConfigError naming those that there are."""
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is unknown; use {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight (..., out, in) in a format.

    `codes` E4M3 (..., out, in), or two E2M1 codes in each byte (..., out, in / 2), the first in the
    low half. `scales` per tensor (..., 1), channel (..., out, 1) or block (..., out / rows,
    in / columns): fp32, for NVFP4 E4M3. `global_scale` fp32 (..., 1) for NVFP4, else None.
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None = None


def largest_of(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The magnitudes that the outermost scales of a weight (..., out, in) come from, fp32: of each
    matrix (..., 1), row (..., out, 1) or block (..., out / rows, in / columns)."""
    if format.has_one_scale:
        return _magnitude(weight, (-2, -1))[..., None]
    return _magnitude(_blocks(weight, format), (-3, -1))


def _magnitude(values: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The largest magnitudes along dimensions, fp32, with no copy of the values on the way."""
    return torch.maximum(values.amax(dims), -values.amin(dims)).float()


def global_scale_of(largest: torch.Tensor) -> torch.Tensor:
    """NVFP4's s2 for tensors of these largest magnitudes; 1 where all is zero."""
    scale = largest.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale > 0, scale, 1.0)


def quantise(
    weight: torch.Tensor, format: Format, largest: torch.Tensor | None = None
) -> Quantised:
    """A weight (..., out, in) in a format, with the scales of its own full width.

    `largest` takes the place of `largest_of` the weight: that of all weights that share a scale, or
    of the parent that this is a slice of. Raises ShapeError if blocks do not divide the weight.
    """
    largest = largest_of(weight, format) if largest is None else largest
    if format.has_global_scale:
        global_scale = global_scale_of(largest)
        scales = _nvfp4_scales(weight, format, global_scale)
        return requantise(weight, Quantised(format, weight, scales, global_scale))
    return requantise(weight, Quantised(format, weight, fp8_scales(largest)))


def requantise(weight: torch.Tensor, like: Quantised) -> Quantised:
    """A weight of the same shape with the scales of another; what is beyond their range is cut.

    Works through a large weight some rows at a time: codes are small, what they are found with is
    not.
    """
    format, codes = like.format, []
    for part in _parts(weight):
        scaled = weight[..., part, :].float() / _spread(like, weight.shape, part)
        if format.packed:
            codes.append(pack(e2m1_codes(scaled)))
        else:
            codes.append(scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3))
    whole = codes[0] if len(codes) == 1 else torch.cat(codes, -2)
    return Quantised(format, whole, like.scales, like.global_scale)


def dequantise(quantised: Quantised) -> torch.Tensor:
    """The weight as the format knows it, fp32 (..., out, in)."""
    codes, packed = quantised.codes, quantised.format.packed
    shape = torch.Size((*codes.shape[:-1], codes.shape[-1] * (2 if packed else 1)))
    weight = torch.empty(shape, device=codes.device)
    for part in _parts(weight):
        own = codes[..., part, :]
        values = e2m1_values(unpack(own)) if packed else own.float()
        weight[..., part, :] = values * _spread(quantised, shape, part)
    return weight


def _parts(weight: torch.Tensor) -> Iterator[slice]:
    """Some rows of a weight (..., out, in) at a time, whole blocks of them."""
    rows = weight.shape[-2]
    step = max(CHUNK // max(weight[..., :1, :].numel(), 1) // 128, 1) * 128
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def fp8_scales(largest: torch.Tensor) -> torch.Tensor:
    scale = largest.float() / E4M3_MAX
    return torch.where(scale > 0, scale, 1.0)


def _nvfp4_scales(weight: torch.Tensor, format: Format, global_scale: torch.Tensor) -> torch.Tensor:
    """Block scales E4M3 (..., out, in / 16)."""
    largest = _magnitude(_blocks(weight, format), (-3, -1))
    scales = largest / (E2M1_MAX * global_scale[..., None])
    return scales.clamp(SMALLEST_SCALE, E4M3_MAX).to(E4M3)


def _blocks(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """(..., out, in) as (..., out / rows, rows, in / columns, columns)."""
    rows, columns = _block_shape(format, weight.shape[-2], weight.shape[-1])
    return weight.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _block_shape(format: Format, out: int, inner: int) -> tuple[int, int]:
    rows, columns = format.block[0] or out, format.block[1] or inner
    for length, block, what in ((out, rows, "rows"), (inner, columns, "columns")):
        if length % block:
            raise ShapeError(
                f"{length} {what} are not a multiple of {block}, which {format.name} quantises "
                "together; leave this weight as it is"
            )
    return rows, columns


def _spread(quantised: Quantised, shape: torch.Size, rows: slice) -> torch.Tensor:
    """The scale of every element in some rows of a weight of this shape (..., out, in), broadcast
    where it is shared. The rows begin and end on edges of blocks, or at the weight's end."""
    by_rows, by_columns = quantised.format.block
    scales = quantised.scales
    if (by_rows, by_columns) != (0, 0):
        scales = scales[..., rows.start // by_rows : -(-rows.stop // by_rows), :]
    scales = scales.float()
    if quantised.global_scale is not None:
        scales = scales * quantised.global_scale.float()[..., None]
    if (by_rows, by_columns) == (0, 0):
        return scales[..., None]
    if by_columns:
        scales = scales.repeat_interleave(shape[-1] // scales.shape[-1], -1)
    if by_rows > 1:
        scales = scales.repeat_interleave(by_rows, -2)
    return scales


# E2M1


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest codes, uint8 0 to 15 (8 is the sign); magnitudes above 6 become 6."""
    magnitude = torch.bucketize(values.abs(), _edges(values.device), out_int32=True).to(torch.uint8)
    return magnitude | (torch.signbit(values).to(torch.uint8) * SIGN)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 values of codes."""
    return _values(codes.device)[codes.long()]


@functools.cache
def _edges(device: torch.device) -> torch.Tensor:
    """The largest magnitude of every code but the last."""
    edges = torch.tensor(E2M1_TIES, device=device)
    edges[1::2] = torch.nextafter(edges[1::2], torch.zeros_like(edges[1::2]))
    return edges


@functools.cache
def _values(device: torch.device) -> torch.Tensor:
    """The value of every code."""
    return torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=device)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of a row in each byte, the first in the low half: (..., n) to (..., n / 2)."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


# Activations


def fake_activation(
    values: torch.Tensor, format: Format, scale: torch.Tensor | None
) -> torch.Tensor:
    """A layer's input (..., channels) as a layer in this format sees it, in its own dtype.

    `scale`: of calibrated inputs, largest / 448 for FP8 and largest / (6 * 448) for NVFP4.
    """
    if format.activations in ("token", "group"):
        size = values.shape[-1] if format.activations == "token" else format.block[1]
        blocks = values.unflatten(-1, (-1, size))
        shared = fp8_scales(blocks.abs().amax(-1, keepdim=True))
        return _through_fp8(blocks, shared).flatten(-2)
    assert scale is not None, format
    if format.activations == "static":
        return _through_fp8(values, scale.float())
    blocks = values.float().unflatten(-1, (-1, format.block[1]))
    largest = blocks.abs().amax(-1, keepdim=True)
    shared = (largest / (E2M1_MAX * scale)).clamp(SMALLEST_SCALE, E4M3_MAX).to(E4M3).float() * scale
    return (e2m1_values(e2m1_codes(blocks / shared)) * shared).flatten(-2).to(values.dtype)


def _through_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scaled = (values.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return (scaled.to(E4M3).float() * scale).to(values.dtype)


def straight_through(values: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """`changed`, with the gradient of `values`: a cast to FP8 would cast the gradient, too."""
    return values + (changed.to(values.dtype) - values).detach()
