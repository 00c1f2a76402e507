"""What is counted is what is computed: the LM head in prefill and decoding, the SSM state."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_elastic.architectures import architecture_of
from star_elastic.cli import main
from star_elastic.cost.count import CostModel, Workload
from star_elastic.errors import ConfigError
from star_elastic.evaluate.accuracy import SizeCost
from star_elastic.generate.decode import BatchDecoder
from star_elastic.strict import parse
from star_elastic.train.config import RunConfig
from tests.architectures import fixed_config

ROWS = ([5, 6, 7, 8, 9, 10, 11], [6, 7, 8], [9, 10, 11, 5, 6])


def head_flops(run) -> int:
    """Operations of the LM head, as PyTorch counts them."""
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        run()
    counts = counter.get_flop_counts()
    return sum(sum(own.values()) for name, own in counts.items() if name.endswith(".lm_head"))


@pytest.mark.parametrize("size", ["large", "small"])
def test_only_the_last_token_of_a_prompt_goes_through_the_head(family, size):
    """Generation computes it so, and operations are counted so."""
    model, cost = family[size], family.cost(size)
    one_token = 2 * model.config.vocab_size * model.config.hidden_size
    assert cost.head_flops == one_token == cost.flops_per_token - cost.prefill_flops_per_token
    decoder = BatchDecoder(model)
    assert head_flops(lambda: decoder.prefill(ROWS)) == len(ROWS) * one_token
    assert head_flops(lambda: decoder.step([5, 6, 7])) == len(ROWS) * one_token
    kept = [decoder.take(0), decoder.take(1)]
    again = BatchDecoder(model)
    missed = [(kept[0], 8, [5, 6, 7]), (kept[1], 4, [8, 9, 10])]
    assert head_flops(lambda: again.resume(missed)) == len(missed) * one_token
    counted = SizeCost.of(family, size)
    whole = counted.count_flops(0, 7, at_once=True)
    assert counted.count_flops(0, 7, at_once=False) - whole == 6 * one_token
    # In two pieces, the head is there once for each.
    pieces = counted.count_flops(0, 3, at_once=True) + counted.count_flops(3, 4, at_once=True)
    assert pieces - whole == one_token
    assert counted.count_flops(7, 0, at_once=True) == 0
    steps = sum(counted.count_flops(start, 1, at_once=False) for start in range(7))
    assert steps == counted.count_flops(0, 7, at_once=False)
    assert counted.count_flops(3, 1, at_once=False) == counted.count_flops(3, 1, at_once=True)


def test_a_tied_embedding_is_the_head():
    config = fixed_config("llama")
    for tied in (True, False):
        table = architecture_of(config).axis_map({**config, "tie_word_embeddings": tied})
        cost = CostModel(table).count(table.full)
        assert cost.head_flops == 2 * config["vocab_size"] * config["hidden_size"]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_ssm_state_has_a_dtype_of_its_own(kind):
    """2 bytes an element save half of its memory and nothing else."""
    config = fixed_config(kind)
    table = architecture_of(config).axis_map(config)
    num_mamba = len(table.axes["ssm_heads"].layers)
    state = config["mamba_num_heads"] * config["mamba_head_dim"] * config["ssm_state_size"]
    bytes_of = {
        (own, ssm): CostModel(table, Workload(7, 3, own, ssm)).count(table.full).state_bytes
        for own in (2, 4)
        for ssm in (2, 4)
    }
    assert bytes_of[2, 4] - bytes_of[2, 2] == 3 * num_mamba * state * 2
    assert bytes_of[4, 4] - bytes_of[4, 2] == 3 * num_mamba * state * 2
    assert bytes_of[4, 2] - bytes_of[2, 2] == bytes_of[4, 4] - bytes_of[2, 4] > 0
    assert CostModel(table, Workload(7, 3)).count(table.full).state_bytes == bytes_of[2, 4]


def test_the_run_config_says_the_dtype_of_the_ssm_state():
    run = {
        "parent": "p", "out": "o", "sizes": {"large": {"active": 1.0}},
        "data": [{"files": ["f"]}],
        "stages": [{"tokens": 64, "context": 8, "batch_size": 1}],
    }  # fmt: skip
    workload = {"context": 8, "batch": 2, "ssm_dtype_bytes": 2}
    config = parse(RunConfig, {**run, "workload": workload}, "")
    assert config.workload == Workload(8, 2, 2, 2)
    with pytest.raises(ConfigError, match="ssm_dtype_bytes=0; give tokens >= 0"):
        parse(RunConfig, {**run, "workload": {"ssm_dtype_bytes": 0}}, "")


def test_count_tells_both_kinds_of_token_and_the_state(tmp_path, capsys):
    file = tmp_path / "config.json"
    config = fixed_config("moe")
    file.write_text(json.dumps(config))
    options = ["count", str(file), "--context", "16", "--batch", "2", "--ssm-dtype-bytes", "2"]
    main([*options, "--json"])
    counted = json.loads(capsys.readouterr().out)
    table = architecture_of(config).axis_map(config)
    cost = CostModel(table, Workload(16, 2, 2, 2)).count(table.full)
    names = ("state_bytes", "weight_bytes", "flops_per_token", "prefill_flops_per_token", "total")
    assert {name: counted[name] for name in names} == {n: getattr(cost, n) for n in names}
    main(options)
    shown = capsys.readouterr().out
    assert f"states  {cost.state_bytes:,} bytes at context 16 x batch 2" in shown
    assert f"{cost.flops_per_token:,} per decoded token at context 16, " in shown
    assert f"{cost.prefill_flops_per_token:,} per token of a prompt but the last" in shown
    assert f"weights {cost.weight_bytes:,} bytes" in shown
