"""The rows of the table: what a block of a model holds, remembers, computes and shows.

A `Block` is one decoder layer, with paths as seen from it (`self_attn.q_proj.weight`), or what
stands outside the layers. Its rows are tensors, decoding states, norms, work that is no product
with a parameter, and probes (places where importance is measured). Blocks are values: parts of an
architecture are added up to one, and cutting a model is cutting its blocks one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from star_elastic.axes.dims import Dim, cut, size_of

RMS, RMS_FP32, RMS_PLUS_ONE = "rms", "rms with an fp32 weight", "rms with an fp32 weight, plus one"
GATED_GROUPS = "gated groups"
"""Kinds of norm. All divide by the root mean square. Plain ones multiply with the weight after the
cast back to the input's dtype, the second before it, the third with 1 + weight. Mamba-2's works on
groups one by one, and takes a gate branch."""
SIGMOID_GROUPS = "sigmoid with groups"
"""Kind of router: sigmoid scores, a correction bias, experts chosen inside the best groups."""
SOFTMAX = "softmax"
"""Kind of router: a softmax over all experts, of which the best are chosen; whether what is chosen
is made to sum to 1 is the router's own matter."""
MAMBA2 = "mamba2"
"""Kind of mixer whose state has to be kept from crossing documents."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk: a box of one tensor in memory.

    `index` is a row of dimension 0 (one expert of a stack), which the tensor on disk lacks.
    `segment` is the number of one segment of the next dimension (the gate's or the up projection's
    half of a fused one). Without both, it is the whole tensor.
    """

    name: str
    index: int | None = None
    segment: int | None = None


@dataclass(frozen=True, slots=True)
class Follow:
    """How the stored values of a tensor follow the width of an axis, where a model multiplies by
    the square root of its own width: at width w of W, with f = sqrt(W) / sqrt(w), a value v is
    stored as (v + offset) f - offset, or `inverse` with 1 / f. In memory sizes share the parent's
    values, and its root.
    """

    axis: str
    inverse: bool = False
    offset: float = 0.0

    def factor(self, width: int, whole: int) -> float:
        """f, or 1 / f."""
        return (width / whole if self.inverse else whole / width) ** 0.5


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter or buffer of the model in memory.

    `part` names the kind of part that it belongs to, for tables. `gate_dim` is the dimension whose
    axis gate multiplies the parameter while the router learns (the inputs of a projection that
    writes the residual stream). A matrix has its inputs in the dimension `reads` (None: it is a
    stack of biases). `routed` marks weights of which a token uses only `top_k` experts along
    dimension 0. `lookup` is an embedding table, read one row per token. Buffers count in bytes, not
    in parameters. `keep_fp32` tensors are fp32 in a model of any smaller dtype. `coded` ones hold
    codes or scales of a format, in dtypes of their own. Stored values may `follow` a width. `layer`
    is the number of its layer in the view of a whole model.
    """

    name: str
    part: str
    dims: tuple[Dim, ...]
    pieces: tuple[Piece, ...]
    layer: int | None = None
    gate_dim: int | None = None
    reads: int | None = -1
    routed: bool = False
    lookup: bool = False
    is_buffer: bool = False
    keep_fp32: bool = False
    coded: bool = False
    follows: Follow | None = None

    def axis_of(self, dim: int) -> str | None:
        """The axis of a dimension that one axis cuts (None if it is fixed)."""
        names = {segment.axis for segment in self.dims[dim]} - {None}
        assert len(names) <= 1, (self.name, dim, names)
        return next(iter(names), None)

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with: a matrix, or a stack of matrices."""
        return len(self.dims) > 1 and self.reads is not None

    @property
    def is_head(self) -> bool:
        """Whether it makes logits of hidden states: the LM head, or the embedding tied to it."""
        return self.part == "head" or (self.part == "embeddings" and not self.lookup)

    @property
    def is_stacked(self) -> bool:
        """Whether dimension 0 counts tensors that are files' own (experts)."""
        return self.pieces[0].index is not None

    def on_disk(self, piece: Piece) -> TensorSpec:
        """The tensor on disk as a row of the table of its own."""
        first, *rest = self.dims[1:] if self.is_stacked else self.dims
        if piece.segment is not None:
            first = (first[piece.segment],)
        return replace(self, name=piece.name, dims=(first, *rest), pieces=(Piece(piece.name),))

    def box(self, piece: Piece) -> tuple[int | slice, ...]:
        """Where a piece lies in the tensor in memory, at full width, as an index of it."""
        box: tuple[int | slice, ...] = () if piece.index is None else (piece.index,)
        if piece.segment is None:
            return box
        dim = self.dims[len(box)]
        start = size_of(dim[: piece.segment])
        return *box, slice(start, start + dim[piece.segment].size)

    def pieces_of(self, rows: Sequence[int]) -> tuple[Piece, ...]:
        """The pieces that hold these rows of a stack, row by row."""
        each = len(self.pieces) // size_of(self.dims[0])
        return tuple(self.pieces[row * each + n] for row in rows for n in range(each))

    def at(self, widths: Mapping[str, Any]) -> TensorSpec:
        """The tensor of the model that is cut to `widths`: of a stack, as many pieces as are kept,
        whichever they are."""
        dims, pieces = tuple(cut(dim, widths) for dim in self.dims), self.pieces
        if self.is_stacked:
            pieces = self.pieces_of(range(size_of(dims[0])))
        return replace(self, dims=dims, pieces=pieces)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A decoding state of one sequence (KV cache, SSM state, conv state), as dimensions.

    `per_token` states grow by one copy per token of context, up to `most` copies (None: without
    end). A state has the dtype of the model, or with `own_dtype` one that engines choose by itself
    (the SSM state's, `Workload`).
    """

    name: str
    dims: tuple[Dim, ...]
    layer: int | None = None
    per_token: bool = False
    most: int | None = None
    own_dtype: bool = False

    def copies(self, context: int) -> int:
        """How many copies a sequence of `context` tokens holds."""
        return tokens_seen(context, self.most) if self.per_token else 1


@dataclass(frozen=True, slots=True)
class ConstantSpec:
    """A buffer of the model in memory that no checkpoint holds, because it follows from the config
    (rotary frequencies): `size` elements whatever the widths, in `fp32` whatever the model's dtype,
    or in that."""

    name: str
    size: int
    fp32: bool = True


@dataclass(frozen=True, slots=True)
class WorkSpec:
    """Arithmetic per token that is not a product with a parameter.

    `flops` operations per element of `dims`; `per_context`: once per token of context (attention),
    of the last `most` tokens (None: of all).
    """

    dims: tuple[Dim, ...]
    flops: int
    layer: int | None = None
    per_context: bool = False
    most: int | None = None

    def times(self, context: int) -> int:
        """How often it is done for a token after `context` tokens."""
        return tokens_seen(context, self.most) if self.per_context else 1


def tokens_seen(context: int, most: int | None) -> int:
    """Tokens of a context of which at most the last `most` count (None: all do)."""
    return context if most is None else min(context, most)


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm over an elastic axis: where it sits, the layout of its channels, its epsilon and kind.

    `reader`: path of the module whose weights read the norm's output along their last dimension;
    empty where they do more than that (a tied embedding), or where the norm `writes` the residual
    stream, behind a block.
    """

    path: str
    dims: tuple[Dim, ...]
    eps: float
    kind: str = RMS
    layer: int | None = None
    reader: str = ""
    writes: bool = False

    @property
    def axis(self) -> str:
        """The axis that cuts its channels."""
        return _only_axis(self.dims)


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts: the paths of its router and of its fused experts module.

    A token chooses its experts inside `selected_groups` of the routing groups.
    """

    router_path: str
    experts_path: str
    selected_groups: int = 1
    kind: str = SIGMOID_GROUPS
    layer: int | None = None

    def fewest_experts(self, top_k: int, num_groups: int, size: int) -> int:
        """Of `size` experts in `num_groups` routing groups, the fewest that can be routed to: as
        many as a token uses inside the selected groups, and where groups are chosen two in each,
        whose score is the sum of its two best."""
        if self.kind == SOFTMAX:
            return top_k
        per_group = max(-(-top_k // self.selected_groups), 2)
        return min(per_group * num_groups, size)


@dataclass(frozen=True, slots=True)
class Probe:
    """Where the importance of an axis is measured: a module's input or output (`side`).

    `dims` holds one dimension of one segment: the layout of what passes there. With `written`, the
    module is a linear one and a unit is measured by the norm of what the module makes of it.
    """

    path: str
    side: str
    dims: tuple[Dim, ...]
    layer: int | None = None
    written: bool = False

    @property
    def axis(self) -> str:
        """The axis that is measured here."""
        return _only_axis(self.dims)


def _only_axis(dims: tuple[Dim, ...]) -> str:
    axis = dims[0][0].axis
    assert axis is not None, dims
    return axis


Laid = TensorSpec | StateSpec | WorkSpec | NormSpec | Probe
"""Rows that have dimensions."""


@dataclass(frozen=True, slots=True)
class Mixer:
    """A mixer that needs an adapter in training: its path and kind."""

    path: str
    kind: str = MAMBA2
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one decoder layer, or of what stands outside the layers."""

    tensors: tuple[TensorSpec, ...] = ()
    states: tuple[StateSpec, ...] = ()
    norms: tuple[NormSpec, ...] = ()
    probes: tuple[Probe, ...] = ()
    work: tuple[WorkSpec, ...] = ()
    moe: tuple[MoeSpec, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    constants: tuple[ConstantSpec, ...] = ()

    @staticmethod
    def sum(parts: Iterable[Block]) -> Block:
        """All rows of several blocks as one."""
        parts = list(parts)
        names = (field.name for field in fields(Block))
        return Block(*(tuple(s for part in parts for s in getattr(part, n)) for n in names))

    def __add__(self, other: Block) -> Block:
        return Block.sum((self, other))

    def at(self, widths: Mapping[str, Any]) -> Block:
        """The block of the model that is cut to `widths`: one width for each axis."""

        def cut_all(specs: tuple) -> tuple:
            return tuple(replace(s, dims=tuple(cut(d, widths) for d in s.dims)) for s in specs)

        return replace(
            self,
            tensors=tuple(spec.at(widths) for spec in self.tensors),
            states=cut_all(self.states),
            norms=cut_all(self.norms),
            probes=cut_all(self.probes),
            work=cut_all(self.work),
        )

    def in_model(self, layer: int | None, path: str, disk_path: str) -> Block:
        """The same rows with the layer's number, and with names as the whole model has them:
        `path` stands before those in memory, `disk_path` before those on disk."""

        def named(specs: tuple, *labels: str) -> tuple:
            return tuple(
                replace(spec, layer=layer, **{n: _joined(path, getattr(spec, n)) for n in labels})
                for spec in specs
            )

        tensors = (
            replace(spec, pieces=tuple(replace(p, name=disk_path + p.name) for p in spec.pieces))
            for spec in named(self.tensors, "name")
        )
        return Block(
            tensors=tuple(tensors),
            states=named(self.states),
            norms=named(self.norms, "path", "reader"),
            probes=named(self.probes, "path"),
            work=named(self.work),
            moe=named(self.moe, "router_path", "experts_path"),
            mixers=named(self.mixers, "path"),
            constants=self.constants,
        )


def _joined(path: str, name: str) -> str:
    """A name behind a path; no name stays none."""
    return name and path + name
