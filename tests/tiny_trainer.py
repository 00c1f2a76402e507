"""A trainer of a tiny random parent, put together in memory: nothing is ranked, sorted or written
but some rows. For what one step does; whole runs are in `tiny_run.py`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from star_elastic import bundled
from star_elastic.architectures import architecture_of
from star_elastic.cost.count import CostModel
from star_elastic.data.source_config import SourceConfig
from star_elastic.data.sources import Source
from star_elastic.demo import write_rows
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.quant.scheme import make_scheme
from star_elastic.router.commit import Commitment
from star_elastic.router.grid import make_grid
from star_elastic.router.router import Router
from star_elastic.train.config import (
    EngineConfig,
    OptimizerConfig,
    RouterConfig,
    RunConfig,
    StageConfig,
)
from star_elastic.train.loop import Trainer

VOCAB = 320
"""The bundled tokenizer's."""
MOE = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "M*E-", "vocab_size": VOCAB,
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
    "ssm_state_size": 8, "conv_kernel": 4, "chunk_size": 20, "n_routed_experts": 10,
    "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "vocab_size": VOCAB, "hidden_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS = {"moe": MOE, "llama": LLAMA}
SIZES = {"large": {"active": 1.0}, "small": {"active": 0.7}}
SMALL = {"moe": {"hidden": 32, "expert_ffn": 24}, "llama": {"hidden": 24}}
"""Widths of the small size."""


def make_model(config: dict[str, Any], *, seed: int = 0, **kinds: str) -> PreTrainedModel:
    """A random transformers model in fp32 whose logits are of order 1."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model_config = AutoConfig.for_model(config["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(model_config, **kinds)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    return model.eval()


def make_config(
    folder: Path, *, stage=None, engine=None, optimizer=None, router=None, **changes
) -> RunConfig:
    """The config of a run of ten steps of 4 windows of 96 tokens, in fp32; `stage`, `engine`,
    `optimizer` and `router` change single fields of these parts."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, 64, seed=0)
    shape = {"tokens": 3840, "context": 96, "batch_size": 4, "warmup_steps": 0}
    config = RunConfig(
        parent="parent",
        out="out",
        sizes=SIZES,
        data=(SourceConfig(files=(str(rows),)),),
        stages=(StageConfig(**{**shape, **(stage or {})}),),
        engine=EngineConfig(**{"autocast": False, **(engine or {})}),
        optimizer=OptimizerConfig(**(optimizer or {})),
        router=RouterConfig(**(router or {})),
    )
    return replace(config, **changes)


def make_trainer(
    kind: str,
    run: RunConfig,
    *,
    committed: bool = True,
    fake: str = "",
    experts: str = "",
    **fields: Any,
) -> Trainer:
    """A trainer whose sizes are fixed, or (not `committed`) whose router learns.

    `kind` names one of `CONFIGS`, in which `fields` change; `fake` is the format of a quantised
    forward, `experts` how transformers runs experts (default: grouped products).
    """
    config = {**CONFIGS[kind], **fields}
    kinds: dict[str, Any] = {"experts_implementation": experts} if experts else {}
    parent, original = (make_model(config, **kinds) for _ in range(2))
    axis_map = architecture_of(config).axis_map(config)
    quantised = None
    if fake:
        state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
        quantised = FakeQuantisation.of(state, axis_map, make_scheme(axis_map, fake, ()), {})
    small = axis_map.full.replace(**SMALL[kind])
    choices = {name: (axis_map.axes[name].size, width) for name, width in SMALL[kind].items()}
    trainer = Trainer(
        run,
        ElasticModel(parent, config, recompute=run.engine.recompute, fake=quantised),
        ElasticModel(original, config),
        Router(make_grid(choices, axis_map), len(SIZES), run.seed),
        [Source(run.data[0].files, AutoTokenizer.from_pretrained(bundled.PARENT), "all")],
        SIZES,
        CostModel(axis_map),
    )
    if committed:
        widths = {"large": axis_map.full, "small": small}
        trainer.committed = {name: Commitment(widths[name], 0.0) for name in SIZES}
        trainer.router.requires_grad_(False)
    return trainer
