"""The parts that architectures are composed of: attention, MLPs, experts, Mamba-2, norms.

A part knows its own rows of the axis map and the axes that it brings along. It does not know in
which model it stands: the residual stream's layout is given to it, and its paths are seen from its
layer. What a part declares is what cannot be derived: which dimension of which tensor is laid out
along which axis, in which units and groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from star_elastic.axes import (
    GATED_GROUPS,
    RMS,
    SIGMOID_GROUPS,
    SOFTMAX,
    TOP_K,
    Axis,
    Block,
    Dim,
    Follow,
    Mixer,
    MoeSpec,
    NormSpec,
    Piece,
    Probe,
    Segment,
    StateSpec,
    TensorSpec,
    WorkSpec,
    along,
    fixed,
)


class Part(Protocol):
    """What a layer is composed of."""

    def rows(self, hidden: Dim) -> Block:
        """Its rows; `hidden` is the layout of the residual stream."""
        ...

    def axes(self) -> tuple[Axis, ...]:
        """The axes that its layers have, at full width. The decoder fills in which layers."""
        ...


def tensor(part: str, name: str, *dims: Dim, **options: Any) -> TensorSpec:
    """A tensor that is one tensor on disk, too."""
    return TensorSpec(name, part, dims, (Piece(name),), **options)


def linear(
    part: str, path: str, out: Dim, inner: Dim, *, bias: bool = False, gated: bool = False
) -> tuple[TensorSpec, ...]:
    """The weight (out, in) and perhaps the bias (out) of a linear layer. `gated`: the axis of its
    inputs is gated in its columns, because it writes the residual stream."""
    weight = tensor(part, f"{path}.weight", out, inner, gate_dim=1 if gated else None)
    return (weight, tensor(part, f"{path}.bias", out)) if bias else (weight,)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of the residual stream. `reader`: the module that reads it and nothing else; empty for
    one that stands behind a block and `writes` the stream. `stored`: how its values follow a width.
    """

    path: str
    eps: float
    reader: str = ""
    kind: str = RMS
    writes: bool = False
    stored: Follow | None = None

    def rows(self, hidden: Dim) -> Block:
        """See `Part`."""
        norm = NormSpec(
            self.path, (hidden,), self.eps, self.kind, reader=self.reader, writes=self.writes
        )
        # What a block writes tells nothing of what the stream holds.
        probes = () if self.writes else (Probe(self.path, "output", (hidden,)),)
        weight = tensor("norms", f"{self.path}.weight", hidden, follows=self.stored)
        return Block(tensors=(weight,), norms=(norm,), probes=probes)

    def axes(self) -> tuple[Axis, ...]:
        """None but the residual stream's own."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention. Query heads are cut inside the group that reads one key-value head,
    so that every kept head goes on reading its own keys; key-value heads stay.

    `bias` of the query, key and value projections, `output_bias` of the one that writes the
    residual stream. `head_norms`: the names of norms over each query and key head (`q_norm`,
    `k_norm`), if any. `window`: tokens that a token sees, itself among them (None: all before it).
    `sinks`: a number for each query head that takes part in the softmax.
    """

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    head_norms: tuple[str, ...] = ()
    window: int | None = None
    sinks: bool = False

    def rows(self, hidden: Dim) -> Block:
        """See `Part`."""
        part, path = "attention", self.path
        queries = along("heads", self.heads, self.head_dim, self.kv_heads)
        keys = fixed(self.kv_heads * self.head_dim)
        tensors: list[TensorSpec] = []
        for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            tensors += linear(part, f"{path}.{name}", out, hidden, bias=self.bias)
        tensors += linear(
            part, f"{path}.o_proj", hidden, queries, bias=self.output_bias, gated=True
        )
        tensors += [
            tensor("norms", f"{path}.{name}.weight", fixed(self.head_dim))
            for name in self.head_norms
        ]
        if self.sinks:
            sinks = along("heads", self.heads, 1, self.kv_heads)
            tensors.append(tensor(part, f"{path}.sinks", sinks))
        # The next token is the last one that its window shows, so the cache holds one fewer.
        held = self.window and self.window - 1
        return Block(
            tensors=tuple(tensors),
            states=(StateSpec("key_value", (fixed(2), keys), per_token=True, most=held),),
            probes=(Probe(f"{path}.o_proj", "input", (queries,), written=True),),
            work=(WorkSpec((queries,), flops=4, per_context=True, most=self.window),),
        )

    def axes(self) -> tuple[Axis, ...]:
        """The query heads."""
        return (Axis("heads", self.heads, self.kv_heads, minimum=self.kv_heads),)


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A feed-forward network, gated (`gate_proj` beside `up_proj`) or plain."""

    path: str
    neurons: int
    gated: bool
    bias: bool = False
    axis: str = "ffn"
    part: str = "mlp"

    def rows(self, hidden: Dim) -> Block:
        """See `Part`."""
        neurons = along(self.axis, self.neurons)
        into = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        weights = [
            linear(self.part, f"{self.path}.{name}", neurons, hidden, bias=self.bias)
            for name in into
        ]
        down = f"{self.path}.down_proj"
        weights.append(linear(self.part, down, hidden, neurons, bias=self.bias, gated=True))
        return Block(
            tensors=tuple(spec for specs in weights for spec in specs),
            probes=(Probe(down, "input", (neurons,)),),
        )

    def axes(self) -> tuple[Axis, ...]:
        """The neurons."""
        return (Axis(self.axis, self.neurons),)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts with a router of some `kind`, and perhaps a `shared` expert that every
    token uses.

    The experts' weights are stacked in memory, (experts, neurons, inputs), and lie apart on disk.
    `gated` experts have two matrices that read, [gate | up] in one stack. `groups`: groups of
    experts, of which a token chooses `selected_groups` first. `latent`: experts read and write a
    narrower space of that width, which projections (with a `latent_bias`) lead to and from.
    """

    path: str
    experts: int
    neurons: int
    top_k: int
    kind: str = SOFTMAX
    gated: bool = True
    shared: Mlp | None = None
    groups: int = 1
    selected_groups: int = 1
    latent: int | None = None
    latent_bias: bool = False

    @property
    def moe(self) -> MoeSpec:
        """Where the router and the stack are, seen from the layer."""
        return MoeSpec(
            f"{self.path}.gate", f"{self.path}.experts", self.selected_groups, kind=self.kind
        )

    def rows(self, hidden: Dim) -> Block:
        """See `Part`."""
        inner = fixed(self.latent) if self.latent else hidden
        own = Block(
            tensors=(*self.router(hidden), *self.stacks(inner), *self.ends(hidden, inner)),
            moe=(self.moe,),
        )
        return own if self.shared is None else own + self.shared.rows(hidden)

    def router(self, hidden: Dim) -> tuple[TensorSpec, ...]:
        """The router's own tensors."""
        path, experts = self.moe.router_path, along("experts", self.experts, 1, self.groups)
        exact = self.kind == SIGMOID_GROUPS
        weight = tensor("routers", f"{path}.weight", experts, hidden, keep_fp32=exact)
        if not exact:
            return (weight,)
        correction = f"{path}.e_score_correction_bias"
        return weight, tensor("routers", correction, experts, is_buffer=True, keep_fp32=True)

    def stacks(self, inner: Dim) -> tuple[TensorSpec, ...]:
        """The stacks of matrices; `inner` is what experts read and write."""
        neurons = along("expert_ffn", self.neurons)
        if self.gated:
            both = ("gate_proj", "up_proj")
            into = self._stack("gate_up_proj", both, (*neurons, *neurons), inner)
        else:
            into = self._stack("up_proj", ("up_proj",), neurons, inner)
        return into, self._stack("down_proj", ("down_proj",), inner, neurons, gate_dim=2)

    def _stack(self, name: str, stored: tuple[str, ...], *dims: Dim, **options: Any) -> TensorSpec:
        """A stack of matrices, each of them one or several tensors on disk."""
        path = self.moe.experts_path
        pieces = (
            Piece(f"{path}.{number}.{own}.weight", number, half if len(stored) > 1 else None)
            for number in range(self.experts)
            for half, own in enumerate(stored)
        )
        dims = (along("experts", self.experts, 1, self.groups), *dims)
        part = "routed experts"
        return TensorSpec(f"{path}.{name}", part, dims, tuple(pieces), routed=True, **options)

    def ends(self, hidden: Dim, inner: Dim) -> list[TensorSpec]:
        """The projections to what experts read and from what they write, if they are there."""
        if not self.latent:
            return []
        part, path, bias = "routed experts", self.path, self.latent_bias
        ends = (
            linear(part, f"{path}.fc1_latent_proj", inner, hidden, bias=bias),
            linear(part, f"{path}.fc2_latent_proj", hidden, inner, bias=bias),
        )
        # Weights first, as ever: the order in which files hold them.
        return [spec for specs in zip(*ends, strict=True) for spec in specs]

    def axes(self) -> tuple[Axis, ...]:
        """Experts, their neurons, those of the shared one, and how many experts a token uses."""
        fewest = self.moe.fewest_experts(self.top_k, self.groups, self.experts)
        return (
            Axis("experts", self.experts, self.groups, minimum=fewest),
            Axis("expert_ffn", self.neurons),
            *(self.shared.axes() if self.shared else ()),
            Axis(TOP_K, self.top_k, ranked=False),
        )


@dataclass(frozen=True, kw_only=True)
class Mamba2:
    """A Mamba-2 mixer (arXiv 2405.21060). Rows of `in_proj` are [z | x | B | C | dt], channels of
    the convolution [x | B | C]. Heads are cut inside each of `groups`, so that every kept head goes
    on reading its own B and C. `state` and `kernel`: elements of a channel's state, and taps."""

    path: str
    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    bias: bool
    conv_bias: bool
    eps: float

    def rows(self, hidden: Dim) -> Block:
        """See `Part`."""
        part, path = "mamba", self.path
        inner = along("ssm_heads", self.heads, self.head_dim, self.groups)
        per_head = along("ssm_heads", self.heads, 1, self.groups)
        shared = Segment(self.groups * self.state)
        conv, state = (*inner, shared, shared), fixed(self.state)
        vectors = [tensor(part, f"{path}.{name}", per_head) for name in ("dt_bias", "A_log", "D")]
        weights = [
            tensor(part, f"{path}.conv1d.weight", conv, fixed(1), fixed(self.kernel)),
            *([tensor(part, f"{path}.conv1d.bias", conv)] if self.conv_bias else []),
            *linear(part, f"{path}.in_proj", (*inner, *conv, *per_head), hidden, bias=self.bias),
            tensor(part, f"{path}.norm.weight", inner),
            # Not gated: a head's gate is where the norm reads it.
            *linear(part, f"{path}.out_proj", hidden, inner, bias=self.bias),
        ]
        return Block(
            tensors=(*vectors, *weights),
            states=(
                StateSpec("ssm", (inner, state), own_dtype=True),
                StateSpec("conv", (conv, fixed(self.kernel))),
            ),
            norms=(NormSpec(f"{path}.norm", (inner,), self.eps, GATED_GROUPS),),
            probes=(Probe(f"{path}.out_proj", "input", (inner,), written=True),),
            # Per element of the state: decay, two for the outer product and its sum, two to read.
            work=(WorkSpec((inner, state), flops=5),),
            mixers=(Mixer(path),),
        )

    def axes(self) -> tuple[Axis, ...]:
        """The heads of the state space model."""
        return (Axis("ssm_heads", self.heads, self.groups, minimum=self.groups),)
