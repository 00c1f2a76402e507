"""Perplexity of a causal language model on fixed windows of tokens.

Nats per token = the mean of -ln p(token | tokens before it in the same window) over all tokens of
a window but its first, which has nothing before it; perplexity = exp(nats per token). Both depend
on the tokenizer, the window length and the text, so state all three beside a number.
Shapes: W windows, T tokens, B windows run together, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.errors import ConfigError, not_finite


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Nats per token of each window (W,); every window weighs the same, having equal length."""

    window_nats: tuple[float, ...]
    num_tokens: int

    @property
    def nats_per_token(self) -> float:
        return sum(self.window_nats) / len(self.window_nats)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def standard_error(self) -> float:
        """Standard error of `nats_per_token` over windows; nan for a single window."""
        count = len(self.window_nats)
        if count < 2:
            return math.nan
        mean = self.nats_per_token
        variance = sum((nats - mean) ** 2 for nats in self.window_nats) / (count - 1)
        return math.sqrt(variance / count)


def token_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_tokens: int,
    max_tokens: int,
    separator_id: int | None,
) -> torch.Tensor:
    """Windows (W, T) int64 cut from the texts end to end, each text followed by the separator.

    Takes the first `max_tokens // window_tokens` windows and reads no further; an incomplete
    last window is dropped. The tokenizer adds no special tokens of its own. Raises ConfigError if
    the texts do not fill one window.
    """
    if window_tokens < 2 or max_tokens < window_tokens:
        raise ConfigError(
            f"window_tokens={window_tokens} and max_tokens={max_tokens} leave no window to "
            "predict in; use at least 2 tokens per window and one window"
        )
    wanted = max_tokens // window_tokens * window_tokens
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        if separator_id is not None:
            ids.append(separator_id)
        if len(ids) >= wanted:
            break
    kept = min(len(ids), wanted) // window_tokens * window_tokens
    if not kept:
        raise ConfigError(
            f"the texts hold {len(ids)} tokens, less than one window of {window_tokens}; "
            "give more text or shorter windows"
        )
    return torch.tensor(ids[:kept]).reshape(-1, window_tokens)


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel, windows_WT: torch.Tensor, *, batch_size: int = 1
) -> Perplexity:
    """Perplexity of the model on the windows; the result does not depend on `batch_size`.

    Log-probabilities are taken in float32 from logits of the model's dtype. Raises
    CheckpointError if they are not finite.
    """
    assert windows_WT.dim() == 2 and windows_WT.shape[1] > 1, windows_WT.shape
    was_training = model.training
    model.eval()
    nats: list[float] = []
    try:
        for ids_BT in windows_WT.split(batch_size):
            ids_BT = ids_BT.to(model.device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
                loss_T = F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
                nats.append(loss_T.mean(dtype=torch.float64).item())
    finally:
        if was_training:
            model.train()
    if not all(map(math.isfinite, nats)):
        raise not_finite("the model's log-probabilities are")
    return Perplexity(tuple(nats), windows_WT.shape[0] * (windows_WT.shape[1] - 1))
