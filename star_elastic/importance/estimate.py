"""Importance scores of every elastic axis, from forward passes over calibration text.

Where to look comes from the axis map (`AxisMap.probes` and `AxisMap.moe_layers`); this file knows
no family and no file. Scores of an activation a[b, t, c] follow NVIDIA's Model-Optimizer:
    score_c = sqrt( sum_b ( mean_t |a[b, t, c]| )^2 ),
the mean over the unmasked tokens of one sample. They are summed in float64 sample by sample, so
that a score does not depend on how samples are batched. What is measured on each axis:
    hidden                 output of every pre-norm and of the final norm; scores of the norms added
    ffn, shared_ffn        input of the down projection (after the activation)
    expert_ffn             the same, the mean over all (token, chosen expert) pairs of a sample
    ssm_heads, heads       norm of what a head writes to the residual stream, W_h y_h with its
                           columns W_h of out_proj or o_proj (the papers: the x part of in_proj's
                           output and the input of o_proj, L2 over a head's channels)
    experts                REAP (arXiv 2510.13999): mean over the tokens routed to the expert of
                           gate(x) * ||f(x)||_2, gates as the router gives them; 0 if no token is

Shapes: B samples, T tokens, N = B * T, C channels, D the experts' input, E experts, F neurons,
K experts per token, M tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from star_elastic.axes import AxisMap, MoeSpec, Probe, axis_keys, order_key
from star_elastic.errors import ConfigError, not_finite
from star_elastic.nesting.experts import expert_states

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and attention mask, both (B, T); samples are padded on the right."""

Progress = Callable[[int, int], None]
"""Called after every batch with (samples so far, unmasked tokens so far)."""


@torch.no_grad()
def estimate_scores(
    model: PreTrainedModel,
    axis_map: AxisMap,
    batches: Iterable[Batch],
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Scores (units,) in float64 on the CPU for every order of the axis map, larger is better.

    Runs forward passes only and leaves the model as it was. Raises ConfigError if there is no
    token to measure or an id is outside the vocabulary, and CheckpointError if an activation is
    not finite.
    """
    recorder = _Recorder(axis_map)
    handles: list[RemovableHandle] = []
    was_training = model.training
    num_samples = num_tokens = 0
    model.eval()
    try:
        recorder.attach(model, handles)
        for input_ids, attention_mask in batches:
            _check_batch(input_ids, attention_mask, model)
            recorder.mask = attention_mask.bool()
            if not recorder.mask.any():
                continue
            model.base_model(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                use_cache=False,
            )
            recorder.check_finite()
            num_samples += int(recorder.mask.any(1).sum())
            num_tokens += int(recorder.mask.sum())
            if progress:
                progress(num_samples, num_tokens)
    finally:
        for handle in handles:
            handle.remove()
        if was_training:
            model.train()
    if not num_tokens:
        raise ConfigError("the calibration data has no tokens; name a file with text in it")
    return recorder.scores()


def _check_batch(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, model: PreTrainedModel
) -> None:
    if input_ids.shape != attention_mask.shape or input_ids.dim() != 2:
        raise ConfigError(
            f"calibration batch has ids {tuple(input_ids.shape)} and mask "
            f"{tuple(attention_mask.shape)}; both must be (samples, tokens)"
        )
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), type(embedding)
    if not input_ids.numel():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= embedding.num_embeddings:
        raise ConfigError(
            f"calibration ids {low} to {high} leave the model's vocabulary of "
            f"{embedding.num_embeddings}; use the tokenizer that belongs to the model"
        )


class _ExpertSums:
    """Running sums of one MoE layer."""

    def __init__(self, num_experts: int, num_neurons: int, device: torch.device):
        double = {"dtype": torch.float64, "device": device}
        self.output_E = torch.zeros(num_experts, **double)
        self.tokens_E = torch.zeros(num_experts, **double)
        self.squares_F = torch.zeros(num_neurons, **double)


class _Recorder:
    """Watches a model through hooks that only read, and sums what the scores need."""

    def __init__(self, axis_map: AxisMap):
        self.axis_map = axis_map
        self.mask: torch.Tensor = torch.zeros(0, 0, dtype=torch.bool)
        self._squares: dict[Probe, torch.Tensor] = {}
        self._experts: dict[MoeSpec, _ExpertSums] = {}

    def attach(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        """Hooks every probe; each handle is in `handles` as soon as its hook exists."""
        for probe in self.axis_map.probes:
            module = model.get_submodule(probe.path)
            if probe.side == "input":
                hook = module.register_forward_pre_hook(partial(self._see_input, probe))
            else:
                assert probe.side == "output", probe
                hook = module.register_forward_hook(partial(self._see_output, probe))
            handles.append(hook)
        for moe in self.axis_map.moe_layers:
            experts = model.get_submodule(moe.experts_path)
            handles.append(experts.register_forward_pre_hook(partial(self._see_experts, moe)))

    def _see_input(self, probe: Probe, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._see(probe, module, args[0])

    def _see_output(self, probe: Probe, module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        self._see(probe, module, output)

    def _norms_written(self, probe: Probe, module: nn.Module, a_BTC: torch.Tensor) -> torch.Tensor:
        """Norms (B, T, U) of each unit's share of the module's output: sqrt(a_u' W_u' W_u a_u)."""
        units = self.axis_map.axes[probe.axis].size
        weight_DC = module.get_parameter("weight").float()
        weight_UDP = weight_DC.unflatten(1, (units, -1)).transpose(0, 1)
        gram_UPP = weight_UDP.mT @ weight_UDP
        a_BTUP = a_BTC.float().unflatten(-1, (units, -1))
        squares_BTU = torch.einsum("btup,upq,btuq->btu", a_BTUP, gram_UPP, a_BTUP)
        return squares_BTU.clamp(min=0).sqrt()

    def _see(self, probe: Probe, module: nn.Module, activation: torch.Tensor) -> None:
        """Adds the squared mean magnitudes of a batch at one probe."""
        a_BTC = activation.reshape(*self.mask.shape, -1)
        if probe.written:
            a_BTC = self._norms_written(probe, module, a_BTC)
        mask_BT = self.mask.to(a_BTC.device)
        if probe not in self._squares:
            self._squares[probe] = a_BTC.new_zeros(a_BTC.shape[-1], dtype=torch.float64)
        for a_TC, mask_T in zip(a_BTC, mask_BT, strict=True):
            if mask_T.any():
                mean_C = a_TC[mask_T].abs().mean(0, dtype=torch.float64)
                self._squares[probe] += mean_C.square()

    def _see_experts(
        self, moe: MoeSpec, experts: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> None:
        """Recomputes each expert on its own tokens: the fused module shows none of its insides."""
        x_ND, index_NK, gate_NK = args
        num_experts = self.axis_map.axes["experts"].size
        num_neurons = self.axis_map.axes["expert_ffn"].size
        if moe not in self._experts:
            self._experts[moe] = _ExpertSums(num_experts, num_neurons, x_ND.device)
        sums = self._experts[moe]
        num_samples, length = self.mask.shape
        mask_NK = self.mask.to(x_ND.device).reshape(-1, 1).expand_as(index_NK)
        magnitude_BF = x_ND.new_zeros(num_samples, num_neurons, dtype=torch.float64)
        for expert in range(num_experts):
            token_M, choice_M = torch.where((index_NK == expert) & mask_NK)
            if not len(token_M):
                continue
            h_MF, output_MD = expert_states(experts, expert, x_ND[token_M])
            magnitude_BF.index_add_(0, token_M // length, h_MF.abs().double())
            norm_M = torch.linalg.vector_norm(output_MD, dim=-1, dtype=torch.float64)
            sums.output_E[expert] += (gate_NK[token_M, choice_M].double() * norm_M).sum()
            sums.tokens_E[expert] += len(token_M)
        pairs_B = self.mask.sum(1).to(x_ND.device) * index_NK.shape[1]
        mean_BF = magnitude_BF / pairs_B.clamp(min=1)[:, None]
        sums.squares_F += mean_BF.square().sum(0)

    def check_finite(self) -> None:
        """Raises CheckpointError naming the first place whose activations are not finite."""
        places = [(probe.path, total) for probe, total in self._squares.items()]
        for moe, sums in self._experts.items():
            places += [(moe.experts_path, sums.squares_F), (moe.experts_path, sums.output_E)]
        for path, total in places:
            if not total.isfinite().all():
                raise not_finite(f"activations at {path} are")

    def scores(self) -> dict[str, torch.Tensor]:
        """The scores of every order."""
        keys = axis_keys(self.axis_map)
        scores: dict[str, torch.Tensor] = {}
        for probe, squares in self._squares.items():
            axis = self.axis_map.axes[probe.axis]
            key = order_key(axis.name, None if axis.is_global else probe.layer)
            scores[key] = scores.get(key, 0) + squares.cpu().sqrt()
        for moe, sums in self._experts.items():
            reap_E = sums.output_E / sums.tokens_E.clamp(min=1)
            scores[order_key("experts", moe.layer)] = reap_E.cpu()
            scores[order_key("expert_ffn", moe.layer)] = sums.squares_F.sqrt().cpu()
        assert scores.keys() == keys.keys(), scores.keys() ^ keys.keys()
        return {key: scores[key] for key in keys}
