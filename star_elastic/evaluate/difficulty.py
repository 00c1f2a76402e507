"""Choice by difficulty, calibrated: how unsure the small size must be for the large one to help.

A dial goes from 0 (the small size writes everything) to 1 (the large one does). The large size
writes texts; both sizes read them, once, and what they would have written at every token is
compared. From the small size's entropies follow the thresholds of the dial, and how many of the
tokens at which the sizes differ the large one would write. These labels cost nothing: every size
lives in the one model. N tokens, T tokens of a text, B texts, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from star_elastic.errors import ConfigError
from star_elastic.evaluate.budgets import Thought
from star_elastic.evaluate.tasks import Problem
from star_elastic.generate.decode import entropies
from star_elastic.generate.engine import DEFAULT_BATCH_SIZE, Generator
from star_elastic.generate.phases import TAG, THINKING, Generation, think_and_answer

Look = Literal["token", "line"]
MAX_LOGITS_BYTES = 64 * 1024**2
MAX_TOKENS = 16_384
"""Of all texts that are read together, padding included."""
ALWAYS_SMALL, ALWAYS_LARGE = math.inf, -1.0
"""Thresholds at the ends of the dial: no entropy is above the one or below the other."""


@dataclass(frozen=True, slots=True)
class Text:
    """A finished sequence: all its ids, and the places at which tokens were chosen by a model.

    `turns` are those at which the small size begins anew whatever comes before: the first tokens of
    the trace and of the answer. `num_trace` tokens are the trace, `thought` its first stretch and
    whether there are others.
    """

    ids: tuple[int, ...]
    chosen: tuple[int, ...]
    turns: frozenset[int]
    num_trace: int
    thought: Thought


@dataclass(frozen=True, slots=True)
class Readings:
    """Tokens of several texts one after the other (N,), as the small size reads them.

    `entropy` of its prediction of the token, nats; `differs` whether the two sizes would write
    different ones; `begins_line` whether a line begins with it; `begins_stretch` whether the small
    size takes over there, as it does at the beginning of lines and of phases.
    """

    entropy: np.ndarray
    differs: np.ndarray
    begins_line: np.ndarray
    begins_stretch: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """One position of the dial, on the tokens it was calibrated on.

    Above `threshold` (nats) the large size takes over. It would write `token_share` of the tokens
    and a part at least of `line_share` of the lines. `recall` is the share that it would write of
    the tokens at which the sizes differ; None if they never do.
    """

    position: float
    look: Look
    threshold: float
    token_share: float
    line_share: float
    recall: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, which has no infinity: an infinite threshold is None."""
        return {**asdict(self), "threshold": None if math.isinf(self.threshold) else self.threshold}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Dial:
        """The dial that `to_json` wrote."""
        endless = content["threshold"] is None
        return cls(**{**content, "threshold": ALWAYS_SMALL if endless else content["threshold"]})


def dials_by_pair(
    policies: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], list[Dial]]:
    """The dials of every (small, large) pair, from the plain data of a calibration."""
    return {
        (policy["small"], policy["large"]): [Dial.from_json(dial) for dial in policy["dials"]]
        for policy in policies
    }


def calibrate(readings: Readings, positions: Sequence[float], look: Look = "token") -> list[Dial]:
    """The dial at these positions: the share of tokens that the large size would write, or of lines
    where the small one looks only at their beginning. Raises ConfigError outside of 0 to 1."""
    deciding = deciding_entropies(readings, look)
    units = deciding if look == "token" else readings.entropy[readings.begins_line]
    falling = np.sort(units)[::-1]
    is_line = readings.begins_line[readings.begins_stretch]
    num_differing = readings.differs.sum()
    dials = []
    for position in positions:
        threshold = _threshold(falling, position)
        is_large = deciding > threshold
        helped = np.maximum.reduceat(is_large, np.flatnonzero(readings.begins_stretch))
        written = (is_large & readings.differs).sum()
        dials.append(
            Dial(
                position=float(position),
                look=look,
                threshold=threshold,
                token_share=float(is_large.mean()),
                line_share=float(helped[is_line].mean()) if is_line.any() else 0.0,
                recall=float(written / num_differing) if num_differing else None,
            )
        )
    return dials


def _threshold(falling: np.ndarray, position: float) -> float:
    """What lies below a share of entropies, which fall."""
    if not 0 <= position <= 1:
        raise ConfigError(f"dial={position!r} does not lie between 0 and 1; use 0.25, for example")
    count = round(position * len(falling))
    if position == 1 or 0 < count == len(falling):
        return ALWAYS_LARGE
    # Midway, so that rounding in other batches moves no token across it.
    return float(falling[count - 1] + falling[count]) / 2 if count else ALWAYS_SMALL


def deciding_entropies(readings: Readings, look: Look) -> np.ndarray:
    """For every token the threshold below which the large size would write it (N,), -inf for never.

    The large size writes from the token at which the small one is unsure to the end of the line, so
    the highest entropy since the small one took over decides.
    """
    places = np.flatnonzero(readings.begins_stretch)
    if look == "token":
        stretches = np.split(readings.entropy, places[1:])
        return np.concatenate([np.maximum.accumulate(stretch) for stretch in stretches])
    first = np.where(readings.begins_line, readings.entropy, -np.inf)[places]
    return np.repeat(first, np.diff(np.append(places, len(readings.entropy))))


def write_texts(
    generator: Generator,
    problems: Sequence[Problem],
    size: str,
    *,
    max_new_tokens: int,
    thinks: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> list[Text]:
    """Greedy traces (ended by the size itself; none without `thinks`) and answers of one size."""
    tokens = None if thinks else 0
    plan = think_and_answer(size, size, thinking_budget=tokens, max_new_tokens=max_new_tokens)
    prompts = [problem.question for problem in problems]
    generations = generator.generate(prompts, plan, batch_size=batch_size)
    return [
        _text(generator.tags.encode_prompt(prompt, thinking=thinks).ids, generation)
        for prompt, generation in zip(prompts, generations, strict=True)
    ]


def _text(prompt_ids: tuple[int, ...], generation: Generation) -> Text:
    start, parts = len(prompt_ids), generation.token_parts
    chosen = (place for place, size in enumerate(generation.token_sizes, start) if size is not None)
    behind_tags = (n for n, (tag, after) in enumerate(pairwise(parts), 1) if tag == TAG != after)
    answer = start + next(behind_tags, len(parts))
    ids = prompt_ids + generation.token_ids
    num_trace = parts.count(THINKING)
    first = next((n for n, part in enumerate(parts) if part != THINKING), len(parts))
    thought = Thought(generation.token_ids[:first], is_reopened=num_trace > first)
    return Text(ids, tuple(chosen), frozenset({start, answer}), num_trace, thought)


def read_texts(
    generator: Generator,
    texts: Sequence[Text],
    small: str,
    large: str,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Readings:
    """Reads the texts with both sizes, each token once."""
    entropy, best_of_small = _predict(generator.model(small), texts, batch_size)
    _, best_of_large = _predict(generator.model(large), texts, batch_size)
    ends_line = generator.tags.ends_line
    begins_line = [ends_line(text.ids[place - 1]) for text in texts for place in text.chosen]
    begins_turn = [place in text.turns for text in texts for place in text.chosen]
    return Readings(
        entropy,
        best_of_small != best_of_large,
        np.array(begins_line),
        np.array(begins_line) | np.array(begins_turn),
    )


@torch.inference_mode()
def _predict(
    model: PreTrainedModel, texts: Sequence[Text], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Entropy and likeliest token at every chosen place (N,), in order.

    Texts are padded on the right, where nothing that is read before can see the padding. Logits are
    made for a part of the tokens at a time.
    """
    body, head = model.base_model, model.get_output_embeddings()
    assert head is not None
    at_once = max(MAX_LOGITS_BYTES // (8 * model.config.vocab_size), 1)
    longest = max(len(text.ids) for text in texts)
    step = max(min(batch_size, MAX_TOKENS // longest), 1)
    entropy, best = [], []
    for start in range(0, len(texts), step):
        batch = texts[start : start + step]
        padded = [[*text.ids, *[0] * (longest - len(text.ids))] for text in batch]
        ids_BT = torch.tensor(padded, device=model.device)
        hidden_BTD = body(input_ids=ids_BT, use_cache=False).last_hidden_state
        before = [(row, place - 1) for row, text in enumerate(batch) for place in text.chosen]
        rows_N, places_N = torch.tensor(before, device=model.device).unbind(1)
        for hidden_ND in hidden_BTD[rows_N, places_N].split(at_once):
            logits_NV = head(hidden_ND).float()
            entropy += entropies(logits_NV)
            best += logits_NV.argmax(-1).tolist()
    return np.array(entropy), np.array(best)
