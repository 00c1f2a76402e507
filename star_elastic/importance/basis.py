"""Principal components of the residual stream, from forward passes over calibration text.

Shapes: B samples, T tokens, N unmasked tokens, H channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from star_elastic.axes import AxisMap
from star_elastic.errors import ConfigError, not_finite

Batch = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def principal_basis(
    model: PreTrainedModel, axis_map: AxisMap, batches: Iterable[Batch]
) -> torch.Tensor:
    """Orthonormal basis (H, H) of the residual stream in float64, strongest direction first.

    Eigenvectors of the second moment of the norms' inputs, each token scaled to unit mean square
    as the norm does, averaged over tokens and over the norms. `batches` are ids and mask (B, T).
    Raises ConfigError without a token, CheckpointError for activations that are not finite.
    """
    size = axis_map.axes["hidden"].size
    moment_HH = torch.zeros(size, size, dtype=torch.float64)
    mask_BT = torch.zeros(0, 0, dtype=torch.bool)
    num_tokens = 0

    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x_NH = args[0].reshape(*mask_BT.shape, -1)[mask_BT.to(args[0].device)].double()
        x_NH = x_NH / x_NH.square().mean(-1, keepdim=True).clamp(min=1e-30).sqrt()
        moment_HH.add_((x_NH.mT @ x_NH).cpu())

    norms = [norm.path for norm in axis_map.norms if norm.axis == "hidden"]
    handles = [model.get_submodule(path).register_forward_pre_hook(see) for path in norms]
    try:
        for input_ids, attention_mask in batches:
            mask_BT = attention_mask.bool()
            num_tokens += int(mask_BT.sum())
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            model.base_model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not num_tokens:
        raise ConfigError("the calibration data has no tokens; name a file with text in it")
    if not moment_HH.isfinite().all():
        raise not_finite("the residual stream is")
    _, vectors_HH = torch.linalg.eigh(moment_HH)
    basis_HH = vectors_HH.flip(1)
    largest = basis_HH.gather(0, basis_HH.abs().argmax(0, keepdim=True))
    return basis_HH * largest.sign()
