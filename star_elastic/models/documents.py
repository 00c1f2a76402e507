"""Documents that share a row stay apart inside Mamba-2: neither the convolution's window nor the
state of the scan crosses a boundary.

`transformers` hands `seq_idx`, the number of each token's document, to the fused CUDA kernels and
refuses it where they are missing. Here is the same mixer with a PyTorch path of its own. The scan
is the chunked form of Mamba-2 (arXiv 2405.21060, section 6) of, per head and inside one document,
    state_t = exp(dt_t a) state_(t-1) + dt_t x_t b_t',    y_t = state_t c_t + d x_t.
With s the running sum of dt a within a chunk (a < 0, so s falls), token u reaches token t >= u of
the same chunk and document with the weight exp(s_t - s_u) <= 1. Its gradient needs no product of
its own: what t hears of the past carries exp(s_t), what it says to the future exp(-s_t), so
    grad s_t = grad y_t . past_t - x_t . grad x_t    (as for the row sums of an attention matrix).

Shapes: B batch, T tokens, Z chunks of L tokens, G groups, R heads per group, H = G R heads, P
channels of a head, Q = R P channels of a group, N state, C convolution channels, K taps.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from star_elastic.models.skeleton import without_memory

BLIND = ("GptOssModel",)
"""Models of transformers that make their masks without looking at positions."""


def mask_documents(model: Any) -> None:
    """Lets a model that would not (`BLIND`) tell documents apart by their `position_ids`."""
    body = getattr(model, "base_model", model)
    if type(body).__name__ not in BLIND or getattr(body, "masks_documents", False):
        return

    def with_masks(body: Any, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        places, ids = inputs.get("position_ids"), inputs.get("input_ids")
        given = any(inputs.get(name) is not None for name in ("attention_mask", "cache"))
        if places is None or ids is None or given:
            return args, inputs
        like = torch.empty(*ids.shape, 1, dtype=body.dtype, device=ids.device)
        asked = {
            "config": body.config, "inputs_embeds": like, "attention_mask": None, "cache": None,
            "position_ids": places,
        }  # fmt: skip
        masks = {
            "full_attention": create_causal_mask(**asked),
            "sliding_attention": create_sliding_window_causal_mask(**asked),
        }
        return args, {**inputs, "attention_mask": masks}

    body.register_forward_pre_hook(with_masks, with_kwargs=True)
    body.masks_documents = True


def keep_documents_apart(model: nn.Module) -> None:
    """Gives every Mamba-2 mixer of a nemotron_h model the class below, in place.

    The new mixers hold the very same parameters and submodules; models without Mamba layers are
    left as they are (attention tells documents apart by `position_ids` that restart at 0), but for
    those of `mask_documents`.
    """
    mask_documents(model)
    mixers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, NemotronHMamba2Mixer) and not isinstance(module, DocumentMamba2Mixer)
    ]
    for name, old in mixers:
        with without_memory():
            new = DocumentMamba2Mixer(old.config, old.layer_idx)
        for child, module in old.named_children():
            setattr(new, child, module)
        for parameter, value in old.named_parameters(recurse=False):
            setattr(new, parameter, value)
        model.set_submodule(name, new.train(old.training))


@functools.cache
def has_fused_kernels() -> bool:
    """Whether `transformers` has found both packages whose CUDA kernels take `seq_idx`."""
    try:
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        importlib.import_module("causal_conv1d")
    except Exception:  # whatever a broken build raises; transformers treats it alike
        return False
    return True


class DocumentMamba2Mixer(NemotronHMamba2Mixer):
    """The Mamba-2 mixer of nemotron_h with documents apart; same parameters, same names.

    `seq_idx` (B, T), integers: tokens of a row with equal numbers are one document, which is one
    unbroken run. Without it, with a cache, or where the fused CUDA kernels are installed, the
    forward is that of `transformers`; otherwise it computes what each document alone would give,
    the convolution and the scan in fp32 also under autocast.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Hidden states (B, T, hidden) to the same shape and dtype."""
        fused = hidden_states.is_cuda and has_fused_kernels()
        if seq_idx is None or cache is not None or fused:
            if seq_idx is not None:
                kwargs["seq_idx"] = seq_idx
            return super().forward(hidden_states, cache, attention_mask, **kwargs)
        assert seq_idx.shape == hidden_states.shape[:2], (seq_idx.shape, hidden_states.shape)
        dtype = hidden_states.dtype
        hidden_states = _without_padding(hidden_states, attention_mask)
        shared = self.n_groups * self.ssm_state_size
        gate, mixed_BTC, dt_BTH = self.in_proj(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        bias_C = self.conv1d.bias
        conv_BTC = document_conv(
            mixed_BTC.float(),
            self.conv1d.weight.squeeze(1).float(),
            None if bias_C is None else bias_C.float(),
            seq_idx,
        )
        conv_BTC = _without_padding(self.act(conv_BTC).to(mixed_BTC.dtype), attention_mask)
        x, b, c = conv_BTC.split([self.intermediate_size, shared, shared], dim=-1)
        # In fp32 like what follows, and like the fused kernels; transformers' own path rounds it.
        dt_BTH = F.softplus(dt_BTH.float() + self.dt_bias.float()).clamp(*self.time_step_limit)
        y_BTHP = document_scan(
            x.unflatten(-1, (self.num_heads, self.head_dim)).float(),
            dt_BTH,
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (self.n_groups, -1)).float(),
            c.unflatten(-1, (self.n_groups, -1)).float(),
            self.D,
            seq_idx,
            self.chunk_size,
        )
        return self.out_proj(self.norm(y_BTHP.flatten(-2), gate).to(dtype))


def _without_padding(x_BTC: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    return x_BTC if mask_BT is None else (x_BTC * mask_BT[..., None]).to(x_BTC.dtype)


def document_conv(
    x_BTC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    seq_idx_BT: torch.Tensor,
) -> torch.Tensor:
    """Causal convolution (B, T, C) of each channel with taps that stay inside the document.

    The last tap meets the token itself. All in one dtype, which is the result's.
    """
    bias_C = weight_CK.new_zeros(len(weight_CK)) if bias_C is None else bias_C
    y_BTC = _Conv.apply(x_BTC, weight_CK, bias_C, seq_idx_BT)
    assert isinstance(y_BTC, torch.Tensor)
    return y_BTC


class _Conv(torch.autograd.Function):
    """One shifted product per tap, added in place: several times less memory traffic than a
    convolution over transposed channels with its autograd graph."""

    @staticmethod
    def forward(ctx: Any, x_BTC, weight_CK, bias_C, seq_idx_BT):
        ctx.save_for_backward(x_BTC, weight_CK, seq_idx_BT)
        y_BTC = torch.addcmul(bias_C, x_BTC, weight_CK[:, -1])
        past_BTC = torch.empty_like(y_BTC)
        for lag in range(1, min(weight_CK.shape[1], x_BTC.shape[1])):
            same_BT1 = _same_document(seq_idx_BT, lag, x_BTC)
            torch.mul(x_BTC[:, :-lag], same_BT1, out=past_BTC[:, lag:])
            y_BTC[:, lag:].addcmul_(past_BTC[:, lag:], weight_CK[:, -1 - lag])
        return y_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        x_BTC, weight_CK, seq_idx_BT = ctx.saved_tensors
        (grad_BTC,) = grads
        grad_x_BTC = grad_BTC * weight_CK[:, -1]
        grad_weight_CK = torch.zeros_like(weight_CK)
        product_BTC = torch.mul(grad_BTC, x_BTC)
        grad_weight_CK[:, -1] = product_BTC.sum((0, 1))
        for lag in range(1, min(weight_CK.shape[1], x_BTC.shape[1])):
            same_BT1 = _same_document(seq_idx_BT, lag, x_BTC)
            product = torch.mul(grad_BTC[:, lag:], same_BT1, out=product_BTC[:, lag:])
            grad_x_BTC[:, :-lag].addcmul_(product, weight_CK[:, -1 - lag])
            grad_weight_CK[:, -1 - lag] = product.mul_(x_BTC[:, :-lag]).sum((0, 1))
        return grad_x_BTC, grad_weight_CK, grad_BTC.sum((0, 1)), None


def _same_document(seq_idx_BT: torch.Tensor, lag: int, like: torch.Tensor) -> torch.Tensor:
    """1 where a token and the one `lag` before it are of one document, else 0; (B, T - lag, 1)."""
    return (seq_idx_BT[:, lag:] == seq_idx_BT[:, :-lag]).to(like.dtype)[..., None]


def document_scan(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    a_H: torch.Tensor,
    b_BTGN: torch.Tensor,
    c_BTGN: torch.Tensor,
    d_H: torch.Tensor,
    seq_idx_BT: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """The state space model of the file's head: y (B, T, H, P), all in the dtype of x.

    dt > 0 are step sizes, a < 0 decay rates; head h reads b and c of group h // R. The result
    does not depend on `chunk_size`. What is kept for the gradient is of the size of x, y and the
    states at the ends of chunks; the weights inside chunks (T L per head) are computed again.
    """
    tokens, groups = x_BTHP.shape[1], b_BTGN.shape[2]
    length = min(chunk_size, tokens)
    pad = -tokens % length

    def chunks(value: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """(B, T, ...) as (B, Z, L, ...); heads as (G, R)."""
        value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, pad), value=fill) if pad else value
        return value.unflatten(1, (-1, length))

    dt_BZLGR = chunks(dt_BTH).unflatten(3, (groups, -1))
    y_BZLGRP = _Scan.apply(
        chunks(x_BTHP).unflatten(3, (groups, -1)),
        dt_BZLGR,
        (dt_BZLGR * a_H.unflatten(0, (groups, -1))).cumsum(2),
        chunks(b_BTGN),
        chunks(c_BTGN),
        d_H.unflatten(0, (groups, -1)).to(x_BTHP.dtype),
        _Edges.of(chunks(seq_idx_BT, fill=-1)),
    )
    assert isinstance(y_BZLGRP, torch.Tensor)
    return y_BZLGRP.flatten(3, 4).flatten(1, 2)[:, :tokens]


@dataclass(frozen=True, slots=True)
class _Edges:
    """Where documents begin and end in chunks. `deaf` (B, Z, 1, L, L): u is of another document
    than t, or not before it; `begins` (B, Z, L): t is of the document that the chunk before ended
    in; `ends` (B, Z, L): u is of the one that this chunk ends in; `spans` (B, Z): these are one."""

    deaf: torch.Tensor
    begins: torch.Tensor
    ends: torch.Tensor
    spans: torch.Tensor

    @staticmethod
    def of(seq_idx_BZL: torch.Tensor) -> _Edges:
        """The edges of document numbers; nothing stands before the first chunk."""
        length = seq_idx_BZL.shape[-1]
        late_LL = torch.ones(length, length, dtype=torch.bool, device=seq_idx_BZL.device).triu()
        last_BZ1 = seq_idx_BZL[..., -1:]
        begins_BZL = seq_idx_BZL == last_BZ1.roll(1, dims=1)
        begins_BZL[:, 0] = False
        return _Edges(
            ((seq_idx_BZL[..., :, None] != seq_idx_BZL[..., None, :]) | late_LL)[:, :, None],
            begins_BZL,
            seq_idx_BZL == last_BZ1,
            begins_BZL[..., -1],
        )

    def scores(self, c_BZGLN: torch.Tensor, b_BZGLN: torch.Tensor) -> torch.Tensor:
        """c_t . b_u where t hears u, else 0; (B, Z, G, L, L)."""
        return (c_BZGLN @ b_BZGLN.mT).masked_fill_(self.deaf, 0)

    def factors(self, sums_BZLGR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decay from the chunk's start to t and from u to its end, (B, Z, L, G, R, 1), and over the
        whole chunk, (B, Z, G, 1, R, 1); 0 across a boundary."""
        last_BZ1GR = sums_BZLGR[:, :, -1:]
        from_start = sums_BZLGR.exp() * self.begins[..., None, None]
        to_end = (last_BZ1GR - sums_BZLGR).exp() * self.ends[..., None, None]
        over = last_BZ1GR.squeeze(2).exp() * self.spans[..., None, None]
        return from_start[..., None], to_end[..., None], over[:, :, :, None, :, None]


class _Scan(torch.autograd.Function):
    """Forward and gradient of the chunked scan, each large product made once, in fp32 even under
    autocast. What a token hears of itself, d x_t + dt_t (c_t . b_t) x_t, does not decay and is kept
    apart from the sums: it would cancel in the gradient of s and leave only its rounding."""

    @staticmethod
    def forward(ctx: Any, x_BZLGRP, dt_BZLGR, sums_BZLGR, b_BZLGN, c_BZLGN, d_GR, edges):
        with torch.autocast(x_BZLGRP.device.type, enabled=False):
            own_BZLGR = d_GR + dt_BZLGR * (c_BZLGN * b_BZLGN).sum(-1, keepdim=True)
            b_BZGLN, c_BZGLN = (v.transpose(2, 3).contiguous() for v in (b_BZLGN, c_BZLGN))
            mix_BZGRLL = _weights(sums_BZLGR)
            mix_BZGRLL *= edges.scores(c_BZGLN, b_BZGLN)[:, :, :, None]
            past_BZLGRP = mix_BZGRLL @ _by_head(x_BZLGRP, dt_BZLGR[..., None])
            past_BZLGRP = past_BZLGRP.movedim(4, 2).contiguous()
            del mix_BZGRLL
            from_start, to_end, over = edges.factors(sums_BZLGR)
            source_BZGLQ = _by_group(x_BZLGRP[:, :-1] * (dt_BZLGR[..., None] * to_end)[:, :-1])
            states_BZGNQ = b_BZGLN[:, :-1].mT @ source_BZGLQ
            _carry(states_BZGNQ, over)
            heard_BZLGRP = _from_group(c_BZGLN[:, 1:] @ states_BZGNQ, x_BZLGRP)
            past_BZLGRP[:, 1:].addcmul_(heard_BZLGRP, from_start[:, 1:])
        ctx.edges = edges
        ctx.save_for_backward(
            x_BZLGRP, dt_BZLGR, sums_BZLGR, b_BZGLN, c_BZGLN, own_BZLGR, states_BZGNQ, past_BZLGRP
        )
        return torch.addcmul(past_BZLGRP, own_BZLGR[..., None], x_BZLGRP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_scan_gradients(grads[0], ctx.edges, *ctx.saved_tensors), None


def _scan_gradients(grad_y, edges: _Edges, x, dt, sums, b, c, own, states, past):
    """Gradients of x, dt, sums, b, c and d, from what `_Scan.forward` saves, in its layouts."""
    # Inside chunks.
    weights = _weights(sums)
    grad_y_head = _by_head(grad_y)
    grad_mix = grad_y_head @ _by_head(x, dt[..., None]).mT
    grad_scores = grad_mix.mul_(weights).sum(3).masked_fill_(edges.deaf, 0)
    weights *= edges.scores(c, b)[:, :, :, None]
    grad_source = (weights.mT @ grad_y_head).movedim(4, 2).contiguous()
    del weights, grad_mix, grad_y_head
    grad_b, grad_c = grad_scores.mT @ c, grad_scores @ b
    # Between chunks: states[:, z] is what chunk z leaves to the next.
    from_start, to_end, over = edges.factors(sums)
    grad_heard = _by_group(grad_y[:, 1:] * from_start[:, 1:])
    grad_states = c[:, 1:].mT @ grad_heard
    _carry(grad_states, over, back=True)
    grad_c[:, 1:] += grad_heard @ states.mT
    grad_b[:, :-1] += _by_group(x[:, :-1] * (dt[..., None] * to_end)[:, :-1]) @ grad_states.mT
    left = _from_group(b[:, :-1] @ grad_states, x)
    grad_source[:, :-1].addcmul_(left, to_end[:, :-1])
    # What is heard at t carries exp(s_t), what u says exp(-s_u), a state exp(s_last).
    grad_dt = (grad_source * x).sum(-1)
    grad_sums = (grad_y * past).sum(-1) - dt * grad_dt
    grad_last = (grad_states * states).sum(3)
    grad_sums[:, :-1, -1] += grad_last.unflatten(-1, (-1, x.shape[-1])).sum(-1)
    # What a token hears of itself.
    grad_own = (grad_y * x).sum(-1)
    grad_x = grad_source.mul_(dt[..., None]).addcmul_(grad_y, own[..., None])
    grad_b, grad_c, b, c = (v.transpose(2, 3) for v in (grad_b, grad_c, b, c))
    grad_product = (grad_own * dt).sum(-1, keepdim=True)
    grad_dt += grad_own * (c * b).sum(-1, keepdim=True)
    grad_b, grad_c = grad_b + grad_product * c, grad_c + grad_product * b
    return grad_x, grad_dt, grad_sums, grad_b, grad_c, grad_own.sum((0, 1, 2))


def _weights(sums_BZLGR: torch.Tensor) -> torch.Tensor:
    """exp(s_t - s_u) for t >= u, (B, Z, G, R, L, L); 1 above the diagonal, where it is not used and
    would overflow."""
    sums_BZGRL = sums_BZLGR.movedim(2, -1).contiguous()
    return (sums_BZGRL[..., :, None] - sums_BZGRL[..., None, :]).clamp_(max=0).exp_()


def _carry(states_BZGNQ: torch.Tensor, over: torch.Tensor, *, back: bool = False) -> None:
    """Adds to each state, in place, what its neighbour hands on over the chunk between them: from
    the first to the last, or from the last `back` to the first."""
    heads, count = over.shape[4], states_BZGNQ.shape[1]
    states = states_BZGNQ.unflatten(-1, (heads, -1))
    for z in range(1, count) if not back else range(count - 1, 0, -1):
        target, source = (z, z - 1) if not back else (z - 1, z)
        states[:, target].addcmul_(over[:, z], states[:, source])


def _by_head(x_BZLGRP: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """(B, Z, G, R, L, P), contiguous, times a factor of x's layout."""
    x_BZGRLP = x_BZLGRP.movedim(2, 4)
    if factor is None:
        return x_BZGRLP.contiguous()
    out = torch.empty_like(x_BZGRLP, memory_format=torch.contiguous_format)
    return torch.mul(x_BZGRLP, factor.movedim(2, 4), out=out)


def _by_group(x_BZLGRP: torch.Tensor) -> torch.Tensor:
    """(B, Z, G, L, Q): all channels of a group side by side."""
    return x_BZLGRP.transpose(2, 3).flatten(-2)


def _from_group(x_BZGLQ: torch.Tensor, like_BZLGRP: torch.Tensor) -> torch.Tensor:
    """The inverse view of `_by_group`."""
    return x_BZGLQ.unflatten(-1, like_BZLGRP.shape[-2:]).transpose(2, 3)
