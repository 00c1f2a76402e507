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
    TOP_K,
    Axis,
    Block,
    Dim,
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
    fewest_experts,
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
    """A norm of the residual stream. `reader`: the module that reads it and nothing else."""

    path: str
    eps: float
    reader: str
    kind: str = RMS

    def rows(self, hidden: Dim) -> Block:
        """See `Part`."""
        return Block(
            tensors=(tensor("norms", f"{self.path}.weight", hidden),),
            norms=(NormSpec(self.path, (hidden,), self.eps, self.kind, reader=self.reader),),
            probes=(Probe(self.path, "output", (hidden,)),),
        )

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
    """

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    head_norms: tuple[str, ...] = ()
    window: int | None = None

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
    """A mixture of experts with a sigmoid router and a shared expert that every token uses.

    The experts' weights are stacked in memory, (experts, neurons, inputs), and lie apart on disk.
    `groups`: groups of experts, of which a token chooses `selected_groups` first. `latent`: experts
    read and write a narrower space of that width, which projections lead to and from.
    """

    path: str
    experts: int
    neurons: int
    shared: Mlp
    top_k: int
    groups: int
    selected_groups: int
    latent: int | None
    bias: bool

    def rows(self, hidden: Dim) -> Block:
        """See `Part`."""
        path, part = self.path, "routed experts"
        experts = along("experts", self.experts, num_groups=self.groups)
        neurons = along("expert_ffn", self.neurons)
        inner = fixed(self.latent) if self.latent else hidden

        def stack(name: str, *dims: Dim, **options: Any) -> TensorSpec:
            names = (f"{path}.experts.{i}.{name}.weight" for i in range(self.experts))
            pieces = tuple(Piece(piece, i) for i, piece in enumerate(names))
            dims = (experts, *dims)
            return TensorSpec(f"{path}.experts.{name}", part, dims, pieces, routed=True, **options)

        router = f"{path}.gate"
        correction = f"{router}.e_score_correction_bias"
        tensors = [
            tensor("routers", f"{router}.weight", experts, hidden, keep_fp32=True),
            tensor("routers", correction, experts, is_buffer=True, keep_fp32=True),
            stack("up_proj", neurons, inner),
            stack("down_proj", inner, neurons, gate_dim=2),
        ]
        if self.latent:
            ends = (
                linear(part, f"{path}.fc1_latent_proj", inner, hidden, bias=self.bias),
                linear(part, f"{path}.fc2_latent_proj", hidden, inner, bias=self.bias),
            )
            # Weights first, as ever: the order in which files hold them.
            tensors += [spec for specs in zip(*ends, strict=True) for spec in specs]
        own = Block(
            tensors=tuple(tensors),
            moe=(MoeSpec(router, f"{path}.experts", self.selected_groups),),
        )
        return own + self.shared.rows(hidden)

    def axes(self) -> tuple[Axis, ...]:
        """Experts, their neurons, those of the shared one, and how many experts a token uses."""
        fewest = fewest_experts(self.top_k, self.selected_groups, self.groups, self.experts)
        return (
            Axis("experts", self.experts, self.groups, minimum=fewest),
            Axis("expert_ffn", self.neurons),
            *self.shared.axes(),
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
