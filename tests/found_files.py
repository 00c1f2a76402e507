"""Checkpoints as they are found: what people, hubs, trainers and older libraries make of one.

Each function changes a family on disk (a folder with one weights file, tokenizer and sizes). `READ`
must work in every command, as in transformers; `REFUSED` must end in one line that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from star_elastic.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from tests.checkpoints import HEAD, edit_json, rewrite

Change = Callable[[Path], Any]
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE, NAMED = "chat_template.jinja", "additional_chat_templates"
CODE = "raise RuntimeError('the code of others')"
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 96},
}  # fmt: skip


def shard(folder: Path, *names: str, index: bool = True, keep: int = 2) -> None:
    """Two files and their index, of which some may be absent."""
    tensors, places = load_file(folder / SINGLE_NAME), {}
    (folder / SINGLE_NAME).unlink()
    for number, name in enumerate(names or [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]):
        part = sorted(tensors)[number::2]
        (folder / name).parent.mkdir(exist_ok=True)
        if number < keep:
            save_file({n: tensors[n] for n in part}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def link(folder: Path) -> None:
    """Links to blobs, as in a hub's cache."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / blobs.name / str(number))


def store(folder: Path, dtype: torch.dtype, named: object, least_dims: int = 0) -> None:
    """Weights in a dtype, of which the config says something or nothing."""
    rewrite(folder, lambda tensors: tensors.update(
        {n: t.to(dtype) for n, t in tensors.items() if t.dim() >= least_dims}
    ))  # fmt: skip
    edit_json(folder / CONFIG, dtype=named)


def head_of(folder: Path, *, equal: bool) -> None:
    """A config that ties the head, and a file that has one."""
    edit_json(folder / CONFIG, tie_word_embeddings=True)
    if equal:
        rewrite(folder, lambda t: t.update({HEAD: next(
            v.clone() for n, v in t.items() if "embed" in n
        )}))  # fmt: skip


def spell_rope(folder: Path, kind: str, key: str) -> None:
    """Scaled positions as written before transformers 5 (by either name of their kind), or now."""
    if key == "now":
        own = {"rope_type": kind, "rope_theta": 5e5, **ROPE[kind]}
        edit_json(folder / CONFIG, rope_parameters=own)
    else:
        own = {key: kind, **ROPE[kind]}
        edit_json(folder / CONFIG, rope_parameters=..., rope_theta=5e5, rope_scaling=own)


def template_in_config(folder: Path, *, several: bool) -> None:
    """Chat templates inside the tokenizer's config."""
    text = (folder / TEMPLATE).read_text()
    (folder / TEMPLATE).unlink()
    own = [{"name": n, "template": t} for n, t in (("default", text), ("tool_use", "T" + text))]
    edit_json(folder / TOKENIZER, chat_template=own if several else text)


def more_templates(folder: Path) -> None:
    """Templates in a folder of their own."""
    (folder / NAMED).mkdir()
    for name in ("rag", "tool_use"):
        (folder / NAMED / f"{name}.jinja").write_text(name + (folder / TEMPLATE).read_text())


def bring_code(folder: Path) -> None:
    """Configs that point to code beside them."""
    own = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    edit_json(folder / CONFIG, auto_map=own)
    edit_json(folder / TOKENIZER, auto_map={"AutoTokenizer": ["tokenization_x.T", None]})
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (folder / name).write_text(CODE)


def leave_adapter(folder: Path, *, alone: bool = False) -> None:
    """What peft leaves beside merged weights, or writes alone."""
    own = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(own))
    save_file(
        {"base_model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors"
    )
    if alone:
        (folder / CONFIG).unlink()
        (folder / SINGLE_NAME).unlink()


def more_tokens(folder: Path) -> None:
    """Tokens that the embeddings have no rows for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "<x>"])
    tokenizer.save_pretrained(folder)


def more_rows(folder: Path) -> None:
    """Embeddings padded beyond the tokenizer."""
    size = json.loads((folder / CONFIG).read_text())["vocab_size"]
    edit_json(folder / CONFIG, vocab_size=size + 31)
    rewrite(folder, lambda tensors: tensors.update({
        n: torch.cat([t, torch.zeros(31, t.shape[1])])
        for n, t in tensors.items() if "embed" in n or n == HEAD
    }))  # fmt: skip


def add_tensor(folder: Path, name: str) -> None:
    """A tensor that the model does not have."""
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(4)}))


def add_files(folder: Path, *names: str, instead: bool = False) -> None:
    """Files beside the weights, or in their place."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"layers.0.wq.weight": torch.ones(2, 2)}, folder / name)
        else:
            (folder / name).write_text("{}")
    if instead:
        (folder / SINGLE_NAME).unlink()


def stack_experts(folder: Path) -> None:
    """Experts as they lie in memory."""
    tensors, stacks = load_file(folder / SINGLE_NAME), {}
    for name in sorted(tensors):
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            stacks.setdefault(f"{found[1]}.{found[3]}", []).append(tensors.pop(name))
    tensors |= {name: torch.stack(own) for name, own in stacks.items()}
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


READ: dict[str, Change] = {
    "one file": lambda folder: None,
    "sharded": shard,
    "shards in a folder": lambda folder: shard(folder, "a.safetensors", "more/b.safetensors"),
    "cache": link,
    "sharded cache": lambda folder: (shard(folder), link(folder)),
    "bf16 unnamed": partial(store, dtype=torch.bfloat16, named=...),
    "fp16": partial(store, dtype=torch.float16, named="float16"),
    "fp32 named bf16": partial(store, dtype=torch.float32, named="bfloat16"),
    "mixed": partial(store, dtype=torch.float16, named="float16", least_dims=2),
    "theta on top": lambda f: edit_json(f / CONFIG, rope_parameters=..., rope_theta=5e5),
    **{
        f"{kind} {key}": partial(spell_rope, kind=kind, key=key)
        for kind in ROPE
        for key in ("type", "rope_type", "now")
    },
    "template in config": partial(template_in_config, several=False),
    "templates in config": partial(template_in_config, several=True),
    "more templates": more_templates,
    "code": bring_code,
    "adapter left": leave_adapter,
    "pad -1": lambda f: edit_json(f / CONFIG, pad_token_id=-1),
    "pad far off in settings": lambda f: edit_json(f / GENERATION, pad_token_id=9999),
    "more tokens": more_tokens,
    "more rows": more_rows,
    "pickle too": lambda f: add_files(f, "pytorch_model.bin"),
    "mistral": lambda f: (shard(f), add_files(f, "consolidated.safetensors", "params.json")),
    "original": lambda f: add_files(f, "original/params.json", "original/consolidated.00.pth"),
    "ends": lambda f: edit_json(f / GENERATION, eos_token_id=[2, 9999]),
    "no settings": lambda f: (f / GENERATION).unlink(),
    "images": lambda f: (
        add_files(f, "preprocessor_config.json", "processor_config.json"),
        edit_json(f / TOKENIZER, processor_class="XProcessor"),
    ),
    "old buffers": lambda f: add_tensor(f, "model.layers.0.self_attn.rotary_emb.inv_freq"),
    "tied, equal head": partial(head_of, equal=True),
}  # fmt: skip
SAVE = "and write it with save_pretrained"
REFUSED: dict[str, tuple[Change, str]] = {
    "tied, other head": (partial(head_of, equal=False), "tie_word_embeddings=false"),
    "pad beyond": (
        lambda f: edit_json(f / CONFIG, pad_token_id=9999), "correct pad_token_id=9999 in config",
    ),
    "only pickle": (
        lambda f: add_files(f, "pytorch_model.bin", instead=True), f"but pytorch_.*{SAVE}",
    ),
    "only pickled shards": (
        lambda f: add_files(f, "pytorch_model-00001-of-00002.bin", "training_args.bin",
                            "pytorch_model.bin.index.json", instead=True), SAVE,
    ),
    "only Mistral's": (
        lambda f: add_files(f, "consolidated.safetensors", "params.json", instead=True),
        "but consolidated.safetensors: .*name a folder in transformers' layout",
    ),
    "gguf": (lambda f: add_files(f, "q4.gguf", instead=True), "q4.gguf: .*name the model"),
    "adapter alone": (
        partial(leave_adapter, alone=True), "holds an adapter and no model; merge it",
    ),
    "variant": (
        lambda f: (f / SINGLE_NAME).rename(f / "model.fp16.safetensors"),
        "but model.fp16.safetensors: .*call one file model.safetensors",
    ),
    "trainer's files": (
        lambda f: add_files(f, "optimizer.pt", "rng_state.pth", instead=True),
        "holds no model.safetensors; name a directory",
    ),
    "no index": (
        partial(shard, index=False), "but model-00001-of-00002.safetensors: shards without their",
    ),
    "absent shard": (partial(shard, keep=1), "model-00002-of-00002.safetensors cannot be read"),
    "vision": (
        lambda f: add_tensor(f, "vision_tower.x.weight"), "vision_tower.x.weight .*remove it from",
    ),
    "stacked experts": (stack_experts, "holds its experts stacked in one tensor .*from_config"),
}  # fmt: skip
ONLY: dict[str, str] = {
    "stacked experts": "nemotron_h", "old buffers": "llama", "tied, equal head": "llama",
    "pad beyond": "llama",
}  # fmt: skip
"""Kinds that one of the two model types alone has."""
