"""How far a model is from another one on the same rows: KL, equal top-1 tokens, perplexity of both.

Models are read one after the other, so that one is in memory at a time: of each only the last
hidden states at the counted positions are kept, and its head.
Shapes: N counted positions of all rows, R rows, C positions of a chunk, V vocabulary, H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from star_elastic.data.sources import Document
from star_elastic.measure.chunks import CHUNK_BYTES, chunks


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model makes of some rows: hidden states (N, H) that its head (V, H) reads."""

    states_NH: torch.Tensor
    head_VH: torch.Tensor

    def apart(self) -> Reading:
        """The same with a head of its own, whatever happens to the model's."""
        return Reading(self.states_NH, self.head_VH.clone())

    def log_probs(self, chunk: slice) -> torch.Tensor:
        """Log-probabilities (C, V) in fp32, or in float64 of float64 models."""
        logits_CV = self.states_NH[chunk] @ self.head_VH.T
        precision = torch.promote_types(logits_CV.dtype, torch.float32)
        return logits_CV.to(precision).log_softmax(-1)


@torch.no_grad()
def read(
    model: PreTrainedModel,
    documents: Sequence[Document],
    advance: Callable[[], None] = lambda: None,
) -> Reading:
    """A model's reading of the counted positions of documents, each by itself. `advance` is called
    after each."""
    body, head = model.base_model, model.get_output_embeddings()
    assert isinstance(head, nn.Linear) and head.bias is None, head
    found = []
    for document in documents:
        ids = torch.tensor([document.ids[:-1]], device=model.device)
        states_BTH = body(input_ids=ids, use_cache=False).last_hidden_state
        found.append(states_BTH[0, document.first :])
        advance()
    return Reading(torch.cat(found), head.weight.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A model beside its reference, over all counted tokens.

    `kl` is KL(reference || model) in nats per token, `equal_top1` the share of positions at which
    both find the same token likeliest. `nats` and `reference_nats` are cross-entropies per token
    (perplexity: their exponential), `worse_by` the difference with its standard error over rows
    (infinite for a single row).
    """

    tokens: int
    kl: float
    equal_top1: float
    nats: float
    reference_nats: float
    worse_by: float
    standard_error: float

    @property
    def perplexity(self) -> float:
        return _exp(self.nats)

    @property
    def reference_perplexity(self) -> float:
        return _exp(self.reference_nats)

    @property
    def is_worse(self) -> bool:
        """Whether the model predicts the rows worse than its reference, beyond their noise."""
        return self.worse_by > 2 * self.standard_error

    def to_json(self) -> dict[str, Any]:
        """As plain data, perplexities included; None for what is not finite."""
        found = {
            **{name: getattr(self, name) for name in self.__slots__},
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
        }
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


@torch.no_grad()
def compare(
    reference: Reading,
    model: Reading,
    documents: Sequence[Document],
    chunk_bytes: int = CHUNK_BYTES,
) -> Divergence:
    """How far `model` is from `reference`; both have read the documents. At most `chunk_bytes` of
    log-probabilities exist at once (but at least one token's)."""
    device = reference.states_NH.device
    targets_N = torch.tensor(
        [token for d in documents for token in d.ids[d.first + 1 :]], device=device
    )
    row_N = torch.tensor(
        [row for row, d in enumerate(documents) for _ in d.ids[d.first + 1 :]], device=device
    )
    count = len(targets_N)
    assert count == len(reference.states_NH) == len(model.states_NH), "both read the same tokens"
    kl = same = 0.0
    nats_N2 = torch.empty(count, 2, dtype=torch.float64, device=device)
    for chunk in chunks(count, 4 * 4 * len(reference.head_VH), chunk_bytes):
        log_p_CV, log_q_CV = reference.log_probs(chunk), model.log_probs(chunk)
        kl += float((log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dtype=torch.float64))
        same += float((log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).sum())
        for side, log_CV in enumerate((log_p_CV, log_q_CV)):
            nats_N2[chunk, side] = -log_CV.gather(1, targets_N[chunk, None])[:, 0].double()
    reference_nats, nats = nats_N2.mean(0).tolist()
    return Divergence(
        tokens=count,
        kl=kl / count,
        equal_top1=same / count,
        nats=nats,
        reference_nats=reference_nats,
        worse_by=nats - reference_nats,
        standard_error=_ratio_error(nats_N2[:, 1] - nats_N2[:, 0], row_N, len(documents)),
    )


def _ratio_error(value_N: torch.Tensor, row_N: torch.Tensor, rows: int) -> float:
    """Standard error of the mean over tokens when rows, not tokens, are drawn independently."""
    if rows < 2:
        return math.inf
    sum_R = value_N.new_zeros(rows).index_add_(0, row_N, value_N)
    count_R = value_N.new_zeros(rows).index_add_(0, row_N, torch.ones_like(value_N))
    rest_R = sum_R - value_N.mean() * count_R
    return float((rest_R.square().sum() * rows / (rows - 1)).sqrt() / len(value_N))


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, ids: Sequence[int], ends: Collection[int], count: int
) -> list[int]:
    """The likeliest next tokens, up to `count` of them or to one of `ends`."""
    found: list[int] = []
    unread, cache = list(ids), None
    while len(found) < count:
        text = torch.tensor([unread], device=model.device)
        output: Any = model(input_ids=text, cache=cache, use_cache=True, logits_to_keep=1)
        token = int(output.logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        unread, cache = [token], output.cache
    return found
