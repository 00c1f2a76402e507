"""Write a training checkpoint as a plain Hugging Face directory in bfloat16.

The routers' correction biases stay fp32, as transformers keeps them. The config names its layers
by `hybrid_override_pattern`, which every engine reads.

    python recipes/parent/export.py --run RUN_DIR --out star_elastic/bundled/parent
"""

import argparse
import json
import os
from pathlib import Path

import torch
from tokenizer import train_tokenizer
from train_parent import MODEL, RouterLoad, build_model, load_checkpoint
from transformers import GenerationConfig


def export(run: Path, out: Path) -> dict[str, float]:
    """Export the run's checkpoint; returns its position (step, tokens, seconds)."""
    tokenizer = train_tokenizer()
    model = build_model(tokenizer, seed=0)
    position = load_checkpoint(run / "checkpoint.safetensors", model)
    gates = RouterLoad(model).gates
    biases = [gate.e_score_correction_bias.clone() for gate in gates]
    model.to(torch.bfloat16)
    for gate, bias in zip(gates, biases, strict=True):
        gate.e_score_correction_bias = bias
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_length=MODEL["max_position_embeddings"],
    )
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
    rewrite_config(out / "config.json")
    return position


def rewrite_config(path: Path) -> None:
    """Name the layers by pattern and count instead of by one library's list."""
    config = json.loads(path.read_text())
    for name in ("layers_block_type", "layer_types", "mtp_layers_block_type"):
        config.pop(name, None)
    # transformers clamps the time step in prefill but not in decoding; without a floor both agree.
    config["time_step_min"] = 1e-9
    config["hybrid_override_pattern"] = MODEL["hybrid_override_pattern"]
    config["num_hidden_layers"] = len(MODEL["hybrid_override_pattern"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the training run's directory")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(json.dumps(export(args.run, args.out)))


if __name__ == "__main__":
    main()
