"""A chunked Mamba-2 scan for training on CPU: transformers' reference scan, with less to move.

Same function as `transformers.models.nemotron_h.modeling_nemotron_h.mamba2_chunk_scan` (`install`
checks that on a small case), but the products of B and C are formed once per group instead of once
per head, as batched matrix products. Shapes: B batch, T time, H heads, P head dimension, G groups,
N state, C chunks, L and S positions within a chunk, K heads per group.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.models.nemotron_h import modeling_nemotron_h

CHUNK = 16


def chunk_scan(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    a_H: torch.Tensor,
    b_BTGN: torch.Tensor,
    c_BTGN: torch.Tensor,
    *,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
) -> torch.Tensor:
    """The scan's output (B, T, H, P) from a zero state, without the final state."""
    batch, num_tokens, num_heads, head_dim = x_BTHP.shape
    groups, state = b_BTGN.shape[2:]
    per_group = num_heads // groups
    pad = -num_tokens % CHUNK
    chunks = (num_tokens + pad) // CHUNK

    dt_BTH = F.softplus(dt_BTH.float() + dt_bias).clamp(min=dt_limit[0])
    u_BTHP = x_BTHP * dt_BTH[..., None].to(x_BTHP.dtype)
    if pad:
        dt_BTH = F.pad(dt_BTH, (0, 0, 0, pad))
        u_BTHP = F.pad(u_BTHP, (0, 0, 0, 0, 0, pad))
        b_BTGN, c_BTGN = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (b_BTGN, c_BTGN))
    split = (batch, chunks, CHUNK, groups)
    u_BCGLQ = u_BTHP.reshape(*split, per_group * head_dim).transpose(2, 3)  # Q = K * P
    b_BCGLN = b_BTGN.reshape(*split, state).transpose(2, 3)
    c_BCGLN = c_BTGN.reshape(*split, state).transpose(2, 3)
    log_decay_BCHL = (dt_BTH * a_H).view(batch, chunks, CHUNK, num_heads).transpose(2, 3)
    sums_BCHL = log_decay_BCHL.cumsum(-1)

    # Within a chunk: a masked, decayed product of scores and inputs, like attention.
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=a_H.device).triu(1)
    decay_BCHLS = (sums_BCHL[..., :, None] - sums_BCHL[..., None, :]).masked_fill(
        future, -torch.inf
    )
    decay_BCGKLS = decay_BCHLS.exp().view(batch, chunks, groups, per_group, CHUNK, CHUNK)
    scores_BCGLS = torch.matmul(c_BCGLN, b_BCGLN.transpose(-1, -2))
    u_BCGKLP = u_BCGLQ.unflatten(-1, (per_group, head_dim)).transpose(3, 4)
    mixed = torch.matmul((scores_BCGLS[:, :, :, None] * decay_BCGKLS).to(u_BCGKLP.dtype), u_BCGKLP)

    # Across chunks: each chunk's own contribution, then a short recurrence over chunks.
    to_end_BCHL = (sums_BCHL[..., -1:] - sums_BCHL).exp()
    weights_BCGLK1 = to_end_BCHL.view(batch, chunks, groups, per_group, CHUNK, 1).transpose(3, 4)
    late_BCGLQ = (
        u_BCGLQ.unflatten(-1, (per_group, head_dim)) * weights_BCGLK1.to(u_BCGLQ.dtype)
    ).flatten(-2)
    own_BCGNQ = torch.matmul(b_BCGLN.transpose(-1, -2), late_BCGLQ).float()
    chunk_decay_BCGK = sums_BCHL[..., -1].exp().view(batch, chunks, groups, per_group)
    chunk_decay_BCG1Q = chunk_decay_BCGK.repeat_interleave(head_dim, -1).unsqueeze(3)
    carried_BGNQ = torch.zeros_like(own_BCGNQ[:, 0])
    starts = []
    for own_BGNQ, decay_BG1Q in zip(own_BCGNQ.unbind(1), chunk_decay_BCG1Q.unbind(1), strict=True):
        starts.append(carried_BGNQ)
        carried_BGNQ = torch.addcmul(own_BGNQ, carried_BGNQ, decay_BG1Q)
    carried = torch.matmul(c_BCGLN, torch.stack(starts, 1).to(c_BCGLN.dtype))
    since_start_BCGLK1 = (
        sums_BCHL.exp().view(batch, chunks, groups, per_group, CHUNK, 1).transpose(3, 4)
    )
    carried = carried.unflatten(-1, (per_group, head_dim)) * since_start_BCGLK1
    y_BCLGKP = (carried + mixed.transpose(3, 4)).transpose(2, 3)
    y_BTHP = y_BCLGKP.reshape(batch, chunks * CHUNK, num_heads, head_dim)[:, :num_tokens]
    return y_BTHP + D[:, None] * x_BTHP


def install() -> None:
    """Use `chunk_scan` in this process wherever NemotronH runs without a cache."""
    reference = modeling_nemotron_h.mamba2_chunk_scan
    _check(reference)

    def scan(hidden_states, dt, A, B, C, *, return_final_states=False, **kwargs):
        if return_final_states or kwargs.get("initial_states") is not None:
            return reference(
                hidden_states, dt, A, B, C, return_final_states=return_final_states, **kwargs
            )
        names = ("D", "dt_bias", "dt_limit")
        return chunk_scan(hidden_states, dt, A, B, C, **{name: kwargs[name] for name in names})

    modeling_nemotron_h.mamba2_chunk_scan = scan


def _check(reference: Callable[..., torch.Tensor]) -> None:
    """Assert that outputs and gradients equal the reference's on a small random case."""
    random = torch.Generator().manual_seed(0)
    batch, num_tokens, heads, head_dim, groups, state = 2, 2 * CHUNK + 5, 4, 3, 2, 5
    shapes = [(batch, num_tokens, heads, head_dim), (batch, num_tokens, heads), (heads,)]
    shapes += [(batch, num_tokens, groups, state)] * 2 + [(heads,), (heads,)]
    tensors = [torch.randn(shape, generator=random) for shape in shapes]
    tensors[2] = -tensors[2].abs()
    results = []
    for function, options in (
        (reference, {"chunk_size": CHUNK, "dt_softplus": True}),
        (chunk_scan, {}),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        *inputs, skip, dt_bias = leaves
        out = function(*inputs, D=skip, dt_bias=dt_bias, dt_limit=(1e-3, torch.inf), **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
