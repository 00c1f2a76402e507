"""How long texts may be: up to where a model has positions, and reads a text alike whatever is read
beside it and before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from star_elastic.errors import ConfigError
from star_elastic.models.model_config import depends_on_neighbours, longest_context
from star_elastic.train.check import beyond_positions, check
from star_elastic.train.config import CalibrationConfig
from tests.processes import refusal
from tests.tiny_run import config_in, make_folder, random_model

SCALED = {
    "longrope": {"short_factor": [1.0, 1.0], "long_factor": [4.0, 8.0],
                 "original_max_position_embeddings": 32, "factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
}  # fmt: skip
CONTEXTS = {"longrope": 32, "dynamic": 64, "yarn": 64}


def llama(kind: str) -> dict:
    return {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 30,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]},
    }  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_up_to_its_context_a_text_is_read_alike_whatever_is_read_with_it(kind):
    made = AutoConfig.for_model(**llama(kind))
    most = longest_context(made)
    assert most == CONTEXTS[kind]
    ids = torch.randint(0, 30, (2, most + 2), generator=torch.Generator().manual_seed(0))
    differences = []
    for longer in (most, most + 2):
        model = random_model(llama(kind))
        positions = torch.stack([torch.arange(longer), torch.arange(longer) % 9])
        with torch.no_grad():
            alone = model(ids[1:, :9]).logits
            beside = model(ids[:, :longer], position_ids=positions).logits[1:, :9]
            after = model(ids[1:, :9]).logits
        differences.append(max(float((other - alone).abs().max()) for other in (beside, after)))
    assert differences[0] < 1e-4
    assert (differences[1] > 1e-2) == depends_on_neighbours(made) == (kind != "yarn"), differences


@pytest.mark.parametrize("kind", SCALED)
def test_lengths_that_change_how_other_texts_are_read_are_refused(tmp_path, kind):
    """Else, to read beyond the positions is told and not refused."""
    folder, most = make_folder(tmp_path / kind, llama(kind)), CONTEXTS[kind]

    def config(stage: int, ranking: int):
        config = config_in(folder, **{"\ncontext = 96\nbatch": f"\ncontext = {stage}\nbatch"})
        ranked = CalibrationConfig(context=ranking)
        choices = {"hidden": (16, 12), "ffn": tuple(range(32, 3, -1))}
        return replace(config, choices=choices, calibration=ranked)

    check(config(most, most))
    check(config(most, CalibrationConfig().context))  # a default is cut to what the parent reads
    for name, given in (
        (f"stages[0].context={most + 1}", config(most + 1, most)),
        (f"calibration.context={most + 1}", config(most, most + 1)),
    ):
        line = f"{name} is beyond the {most} "
        if kind == "yarn":
            (told,) = beyond_positions(given, check(given).model_config)
            assert told.startswith(line)
        else:
            with pytest.raises(ConfigError) as refused:
                check(given)
            assert str(refused.value).startswith(line)
    if kind != "yarn":
        rank = ["rank", folder / "parent", "--data", folder / "rows.jsonl"]
        told = refusal(*rank, "--out", tmp_path / "scores.safetensors", "--context", most + 1)
        assert f"context={most + 1} is beyond the {most} tokens" in told
