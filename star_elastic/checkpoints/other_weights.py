"""What a folder holds in place of safetensors weights that are read, and what to do with it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from star_elastic.files.paths import exists, names_in

SAVE_ANEW = "load it in transformers and write it with save_pretrained, which writes safetensors"
OTHERS = (
    (
        "model-*-of-*.safetensors",
        "shards without their index; put model.safetensors.index.json beside them",
    ),
    (
        "consolidated*",
        "weights in their maker's own layout; name a folder in transformers' layout (many models "
        "come in both)",
    ),
    ("*.safetensors.index.json", "an index by another name; call it model.safetensors.index.json"),
    ("pytorch_model*", f"weights in PyTorch's format; {SAVE_ANEW}"),
    (
        "adapter_model*",
        "an adapter; merge it into its base model (merge_and_unload of peft), and name that",
    ),
    ("*.gguf", "weights for llama.cpp; name the model that they were made of"),
    (
        "*.safetensors",
        "weights by another name; call one file model.safetensors, or put their index beside them",
    ),
    ("*.bin", f"weights in PyTorch's format; {SAVE_ANEW}"),
    ("*.pt*", f"weights in PyTorch's format; {SAVE_ANEW}"),
    ("*.msgpack", f"weights of Flax; {SAVE_ANEW}"),
    ("*.h5", f"weights of TensorFlow; {SAVE_ANEW}"),
)
"""Patterns of files that people have, and what is to be said of them; the first that fits counts.
Nothing is ever read from pickled files."""
BESIDE = ("training_args.bin", "*optimizer*", "*scheduler*", "rng_state*")
"""What a trainer leaves, which is no model."""


def why_no_weights(path: Path, wanted: str) -> str:
    """What is wrong with a folder without the file `wanted`, and what to do."""
    plain = f"{path} holds no {wanted}; name a directory with safetensors weights"
    if not exists(path):
        return plain
    names = [
        name for name in names_in(path) if not any(fnmatchcase(name, other) for other in BESIDE)
    ]
    for pattern, said in OTHERS:
        for name in names:
            if fnmatchcase(name, pattern):
                return f"{path} holds no {wanted} but {name}: {said}"
    return plain
