"""Modules of the training skeleton: where a gate cannot be folded into a parameter, and where
autocast would round what transformers computes in fp32.

Exported sizes never contain them: they use transformers' own norms and routers. Shapes: B batch,
T tokens, D channels, G groups, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from star_elastic.axes import (
    GATED_GROUPS,
    MAMBA2,
    RMS,
    RMS_PLUS_ONE,
    SIGMOID_GROUPS,
    SOFTMAX,
    Mixer,
    MoeSpec,
    NormSpec,
)
from star_elastic.models.documents import DocumentMamba2Mixer
from star_elastic.models.linear import put_before


class _GatedInputNorm(nn.Module):
    """Holds what the functional call replaces: gate of the input, epsilon, output scale."""

    input_gate: torch.Tensor
    eps: torch.Tensor
    scale: torch.Tensor

    def __init__(self, num_channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels))
        self.register_buffer("input_gate", torch.ones(num_channels))
        self.register_buffer("eps", torch.tensor(eps))
        self.register_buffer("scale", torch.tensor(1.0))


class ElasticRMSNorm(_GatedInputNorm):
    """RMSNorm over partly closed channels, equal to the narrow norm when gates are 0 or 1."""

    def __init__(self, num_channels: int, eps: float, *, kind: str):
        super().__init__(num_channels, eps)
        self.kind = kind

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        dtype = x_BTD.dtype
        x_BTD = x_BTD.to(torch.float32) * self.input_gate
        mean_sq = x_BTD.pow(2).mean(-1, keepdim=True)
        x_BTD = x_BTD * torch.rsqrt(mean_sq + self.eps) * self.scale
        if self.kind == RMS:
            return self.weight * x_BTD.to(dtype)
        weight = self.weight.to(torch.float32)
        return ((weight + 1 if self.kind == RMS_PLUS_ONE else weight) * x_BTD).to(dtype)


class ElasticGroupedRMSNorm(_GatedInputNorm):
    """Mamba-2's norm: silu-gated by a branch, then RMS inside each group of channels."""

    def __init__(self, num_channels: int, eps: float, *, num_groups: int):
        super().__init__(num_channels, eps)
        self.num_groups = num_groups

    def forward(self, x_BTD: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        dtype = x_BTD.dtype
        x_BTD = x_BTD.to(torch.float32)
        if gate is not None:
            x_BTD = x_BTD * F.silu(gate.to(torch.float32))
        x_BTD = x_BTD * self.input_gate
        x_BTGD = x_BTD.unflatten(-1, (self.num_groups, -1))
        mean_sq = x_BTGD.pow(2).mean(-1, keepdim=True)
        x_BTD = (x_BTGD * torch.rsqrt(mean_sq + self.eps)).flatten(-2) * self.scale
        return self.weight * x_BTD.to(dtype)


class Fp32Router(nn.Module):
    """What `fp32_router` puts before a class of transformers that casts its operands to fp32:
    autocast would cast them back, and scores that differ by less than a bf16 can tell would choose
    other experts than in inference."""

    def forward(self, hidden_states: torch.Tensor):
        plain: Any = super()
        with torch.autocast(hidden_states.device.type, enabled=False):
            return plain.forward(hidden_states)


def fp32_router(plain: nn.Module) -> nn.Module:
    """A router of transformers that computes in fp32 under autocast, too; with its parameters."""
    return put_before(Fp32Router, plain)


class ElasticSigmoidRouter(nn.Module):
    """DeepSeek-style sigmoid router under soft gates of experts and of ranks (docs/paper_map.md).

    Selection score (sigma + bias) + log c, so that closing an expert never raises its chance and
    a closed one (c = 0) is never selected; combine weights proportional to c * g * sigma over the
    top-k, g the gate of an expert's rank in the selection (all 1 unless top_k is elastic). The
    correction bias never enters the weights.
    """

    expert_gate: torch.Tensor
    rank_gate: torch.Tensor
    e_score_correction_bias: torch.Tensor

    def __init__(self, router: Any):
        super().__init__()
        self.top_k = router.top_k
        self.num_experts = router.num_experts
        self.num_group = router.num_group
        self.topk_group = router.topk_group
        self.norm_topk_prob = router.norm_topk_prob
        self.routed_scaling_factor = router.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty_like(router.weight))
        self.register_buffer(
            "e_score_correction_bias", torch.empty_like(router.e_score_correction_bias)
        )
        self.register_buffer("expert_gate", torch.ones(self.num_experts))
        self.register_buffer("rank_gate", torch.ones(self.top_k))

    @torch.no_grad()
    def _select(self, scores_TE: torch.Tensor) -> torch.Tensor:
        choice_TE = scores_TE + self.e_score_correction_bias + self.expert_gate.log()
        by_group = choice_TE.unflatten(-1, (self.num_group, -1))
        group_scores = by_group.topk(2, dim=-1)[0].sum(-1)
        best = group_scores.topk(self.topk_group, dim=-1, sorted=False)[1]
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        choice_TE = by_group.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        return choice_TE.topk(self.top_k, dim=-1)[1]

    def forward(self, hidden_states: torch.Tensor):
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1]).to(torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):  # see Fp32Router
            logits_TE = F.linear(x_TD, self.weight.to(torch.float32))
        scores_TE = logits_TE.sigmoid()
        index_TK = self._select(scores_TE)
        weights_TK = (scores_TE * self.expert_gate).gather(1, index_TK) * self.rank_gate
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK * self.routed_scaling_factor, index_TK


class ElasticSoftmaxRouter(nn.Module):
    """A softmax router under soft gates of experts and of ranks (docs/paper_map.md).

    Probabilities proportional to c * exp(logit), as if a closed expert (c = 0) were not there; the
    weights of the best K are multiplied with the gates of their ranks, and where the router makes
    weights sum to 1, they still do.
    """

    weight: nn.Parameter
    expert_gate: torch.Tensor
    rank_gate: torch.Tensor

    def __init__(self, router: Any):
        super().__init__()
        self.top_k, self.num_experts = router.top_k, router.num_experts
        self.norm_topk_prob = getattr(router, "norm_topk_prob", True)
        for name, value in router.named_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty_like(value)))
        self.register_buffer("expert_gate", torch.ones(self.num_experts))
        self.register_buffer("rank_gate", torch.ones(self.top_k))

    def forward(self, hidden_states: torch.Tensor):
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = F.linear(x_TD, self.weight, self._parameters.get("bias"))
        scores_TE = logits_TE.float()
        open_TE = scores_TE.masked_fill(self.expert_gate == 0, float("-inf"))
        odds_TE = (scores_TE - open_TE.amax(-1, keepdim=True)).exp() * self.expert_gate
        # A closed expert that is far ahead overflows; what it weighs is 0 all the same.
        odds_TE = odds_TE.masked_fill(self.expert_gate == 0, 0)
        weights_TK, index_TK = (odds_TE / odds_TE.sum(-1, keepdim=True)).topk(self.top_k, dim=-1)
        weights_TK = weights_TK * self.rank_gate
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), index_TK


def elastic_norm(norm: NormSpec, widths: Mapping[str, int]) -> nn.Module:
    """The norm that can be half open, of the kind that a row names, at `widths`."""
    ((segment,),) = norm.dims
    size = segment.length(widths)
    if norm.kind == GATED_GROUPS:
        return ElasticGroupedRMSNorm(size, norm.eps, num_groups=segment.num_groups)
    return ElasticRMSNorm(size, norm.eps, kind=norm.kind)


def training_router(moe: MoeSpec, plain: nn.Module, *, gated: bool) -> nn.Module:
    """The router of training in place of transformers' own, `plain`: with gates or without."""
    if moe.kind == SOFTMAX:
        return ElasticSoftmaxRouter(plain) if gated else plain
    assert moe.kind == SIGMOID_GROUPS, moe
    return ElasticSigmoidRouter(plain) if gated else fp32_router(plain)


def document_mixer(mixer: Mixer, plain: Any, layer: int) -> nn.Module:
    """The mixer that keeps documents of a row apart, in place of transformers' own, `plain`."""
    assert mixer.kind == MAMBA2, mixer
    return DocumentMamba2Mixer(plain.config, layer)
