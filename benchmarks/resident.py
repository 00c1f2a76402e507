"""What do three sizes of one family hold in memory, and does one copy cost time?

    python benchmarks/resident.py --out FILE    # three families of 600 MB, half an hour
    python benchmarks/resident.py --smoke       # the same on one tiny model, seconds

For each of three families with random weights (a hybrid with all axes cut, the same hybrid with
only those cut that no cache knows, a llama):
1. growth of memory (PSS and RSS, in processes of their own, from after all imports to after a
   prompt has been read and continued and every weight read once, freed memory given back) of the
   parent alone, of the family with all three sizes, of the same with gathered copies, and of three
   saved slices side by side; the family in two processes at once; after loading and at its peak;
2. decode and prefill time of each size of the family over its saved slice, and of that slice loaded
   twice (A/A: what the machine's noise alone does); interleaved, medians of the rounds' ratios;
3. how far logits and greedy tokens are from the saved slice's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import build_model, decode, in_turn, widths_at
from transformers import DynamicCache, PreTrainedModel

from star_elastic.architectures import architecture_of
from star_elastic.checkpoints.manifest import Manifest, Size, load_manifest, save_manifest
from star_elastic.cli.terminal import at_the_command_line, command_line, print_table
from star_elastic.cost.count import CostModel
from star_elastic.errors import Interrupted
from star_elastic.generate.family import ElasticFamily, load
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel
from star_elastic.rewrite.stream import save_model, slice_checkpoint

HYBRID = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "MEM*MEM*", "num_hidden_layers": 8,
    "hidden_size": 1536, "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 64,
    "mamba_num_heads": 48, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 64,
    "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 16, "num_experts_per_tok": 2,
    "moe_intermediate_size": 512, "moe_shared_expert_intermediate_size": 1024,
    "vocab_size": 8192, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16384,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "nemotron_h": {
        **HYBRID, "hidden_size": 96, "head_dim": 16, "mamba_head_dim": 8, "vocab_size": 128,
        "ssm_state_size": 8, "chunk_size": 16, "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
    },
    "llama": {
        **LLAMA, "hidden_size": 128, "intermediate_size": 128, "head_dim": 8, "vocab_size": 128,
    },
}  # fmt: skip
STATELESS = ("hidden", "ffn", "experts", "expert_ffn", "shared_ffn")
FAMILIES = {
    "hybrid": (HYBRID, (*STATELESS, "ssm_heads", "heads")),
    "hybrid, caches alike": (HYBRID, STATELESS),
    "llama": (LLAMA, ("hidden", "ffn", "heads")),
}
"""The parent's config and the axes that are cut."""
SHARES = {"large": 1.0, "medium": 0.75, "small": 0.5}
"""Share of every axis that a size keeps."""
LIMITS = {"hybrid": 1.05, "hybrid, caches alike": 1.005, "llama": 1.05}
"""What the three sizes may hold, relative to the parent alone."""
HOLDERS = ("parent", "family", "gathered", "slices")
BATCHES = (1, 16)
MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--decode-steps", type=int, default=24)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--only", choices=["memory", "times"], help="half of the work")
    parser.add_argument("--smoke", action="store_true", help="one tiny model, two rounds")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--hold", choices=HOLDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        print(json.dumps(hold(options.hold, options.folder, options.wait)))
        return
    families, holders = dict(FAMILIES), HOLDERS
    if options.smoke:
        options.rounds, options.decode_steps, options.prefill = 2, 2, 32
        families, holders = {"hybrid": FAMILIES["hybrid"]}, ("parent",)
    result: dict[str, Any] = {
        "command": command_line("benchmarks/resident.py"),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "families": {},
    }
    for name, (config, axes) in families.items():
        config = TINY[config["model_type"]] if options.smoke else config
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            row = result["families"][name] = make_checkpoints(folder, config, axes)
            if options.only != "times":
                row["memory"] = {holder: measure_memory(folder, holder) for holder in holders}
                row["memory"]["two processes"] = measure_together(folder)
                row["limit"] = LIMITS[name]
            if options.only != "memory":
                row["sizes"] = compare_sizes(folder, options)
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.smoke or options.only == "times":  # tiny models are all overhead
        return
    if over := [name for name, row in result["families"].items() if grows(row)]:
        raise Interrupted(f"over the limit: {', '.join(over)}")


def grows(row: dict) -> bool:
    """Whether a family of three sizes holds more than its limit, relative to the parent alone."""
    memory = row["memory"]
    return memory["family"]["pss"] > row["limit"] * memory["parent"]["pss"]


def make_checkpoints(folder: Path, config: Mapping[str, Any], axes: tuple[str, ...]) -> dict:
    """Writes an elastic checkpoint of random weights and the slices of its sizes."""
    axis_map = architecture_of(dict(config)).axis_map(dict(config))
    sizes = {name: Size(widths_at(axis_map, share, axes)) for name, share in SHARES.items()}
    model = build_model(config)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    (folder / "none").mkdir()
    save_model(state, dict(config), folder / "none", folder / "elastic", dtype=torch.float32)
    save_manifest(Manifest(axis_map.model_type, {}, sizes), folder / "elastic")
    for name, size in sizes.items():
        slice_checkpoint(folder / "elastic", size.widths, folder / name)
    files = (folder / "elastic").glob("*.safetensors")
    return {
        "parameters": CostModel(axis_map).full.total,
        "megabytes": sum(file.stat().st_size for file in files) / MB,
        "widths": {name: dict(size.widths) for name, size in sizes.items()},
    }


# Memory


def hold(holder: str, folder: Path, wait: bool) -> dict:
    """Loads what is asked for, lets it generate, and tells by how much this process has grown."""
    tiny = json.loads((folder / "elastic" / "config.json").read_text())["model_type"]
    generate(build_model(TINY[tiny]))  # imports and threads are there from now on
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    floor = peak_bytes()
    held: Any = None
    if holder == "slices":
        held = {name: load_parent(folder / name)[0] for name in SHARES}
    elif holder == "family":
        held = load(folder / "elastic", "float32", "cpu")
    else:
        parent, config = load_parent(folder / "elastic")
        held = {"parent": parent}
        if holder == "gathered":
            manifest = load_manifest(folder / "elastic", architecture_of(config).axis_map(config))
            for name, size in manifest.sizes.items():
                held[name] = build_submodel(parent, config, size.widths)
    loaded, peak = memory(), peak_bytes() - floor
    for name in held:
        generate(held[name])
        read_every_weight(held[name])
    if wait:
        print("ready", flush=True)
        sys.stdin.readline()
    after = memory()
    result: dict[str, Any] = {"peak_of_loading": peak}
    result |= {f"{kind.lower()}_loaded": loaded[kind] - before[kind] for kind in before}
    result |= {kind.lower(): after[kind] - before[kind] for kind in before}
    if isinstance(held, ElasticFamily):
        counted = held.resident_bytes()
        result["counted"] = {"shared": counted.shared, "copies": dict(counted.copies)}
    if wait:
        print("measured", flush=True)
        sys.stdin.readline()
    return result


@torch.no_grad()
def generate(model: PreTrainedModel) -> list[int]:
    """Sixteen greedy tokens after a prompt of 64."""
    ids = torch.arange(64)[None] % model.config.vocab_size
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 64:].tolist()


@torch.no_grad()
def read_every_weight(model: PreTrainedModel) -> None:
    """Makes resident what no token has happened to use: embeddings and experts."""
    for parameter in model.parameters():
        parameter.max()


def memory() -> dict[str, int]:
    """PSS and RSS of this process in bytes, after freed memory has been given back.

    The program's code is left out: its share changes when other processes of this machine end.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    sums, counts = {"Pss": 0, "Rss": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the first line of a mapping, which may name a file
            file = words[5] if len(words) > 5 else ""
            counts = not file.startswith("/") or file.endswith(".safetensors")
        elif counts and words[0][:-1] in sums:
            sums[words[0][:-1]] += int(words[1]) * 1024
    return sums


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def start(folder: Path, holder: str, *extra: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--hold", holder, "--folder", str(folder), *extra]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure_memory(folder: Path, holder: str) -> dict:
    """What one process holds."""
    gc.collect()  # pages that this process maps too would count half
    process = start(folder, holder)
    output, _ = process.communicate()
    assert process.returncode == 0, holder
    return json.loads(output.splitlines()[-1])


def measure_together(folder: Path) -> dict:
    """What each of two processes with the same family holds, on average."""
    processes = [start(folder, "family", "--wait") for _ in range(2)]
    for said in ("ready", "measured"):
        for process in processes:
            assert process.stdin and process.stdout
            while process.stdout.readline().strip() != said:
                assert process.poll() is None, "a measured process has died"
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
    results = [json.loads(p.communicate()[0].splitlines()[-1]) for p in processes]
    return {kind: statistics.mean(r[kind] for r in results) for kind in ("pss", "rss")}


# Time and outputs


def compare_sizes(folder: Path, options: argparse.Namespace) -> dict:
    """Every size against its saved slice: times, and how far outputs are apart."""
    family = load(folder / "elastic", "float32", "cpu")
    result = {}
    for name in family:
        models = {
            "family": family[name],
            "slice": load_parent(folder / name)[0],
            "slice again": load_parent(folder / name)[0],
        }
        row = result[name] = compare_outputs(models["family"], models["slice"])
        works = {
            f"decode, batch {batch}": (decode, batch, options.decode_steps) for batch in BATCHES
        }
        works[f"prefill of {options.prefill}"] = (prefill, options.prefill, 1)
        for work, (make, amount, repeats) in works.items():
            sides = {side: make(model, amount, repeats) for side, model in models.items()}
            seconds = in_turn(sides, options.rounds)
            row[work] = {
                f"{side} over slice": statistics.median(
                    a / b for a, b in zip(seconds[side], seconds["slice"], strict=True)
                )
                for side in ("family", "slice again")
            }
    return result


@torch.no_grad()
def compare_outputs(model: PreTrainedModel, expected: PreTrainedModel) -> dict:
    ids = torch.randint(0, model.config.vocab_size, (2, 48))
    ours, theirs = (m(input_ids=ids).logits for m in (model, expected))
    return {
        "logits_max_difference": (ours - theirs).abs().max().item(),
        "logits_max": theirs.abs().max().item(),
        "greedy_tokens_equal": generate(model) == generate(expected),
    }


def prefill(model: PreTrainedModel, tokens: int, repeats: int) -> Callable[[], None]:
    """Reads a prompt into a cache."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))

    @torch.inference_mode()
    def run() -> None:
        for _ in range(repeats):
            cache = DynamicCache(config=model.config)
            model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)

    return run


def show(result: dict) -> None:
    for name, row in result["families"].items():
        title = f"{name}: {row['parameters']:,} parameters, {row['megabytes']:.0f} MB on disk"
        if "memory" in row:
            show_memory(title, row)
        if "sizes" in row:
            show_sizes(title, row["sizes"])


def show_memory(title: str, row: dict) -> None:
    """Growth of each holder's memory, relative to the parent's."""
    parent = row["memory"]["parent"]
    rows = []
    for holder, grown in row["memory"].items():
        peak = grown.get("peak_of_loading")
        rows.append([
            holder,
            f"{grown['pss'] / MB:,.1f}",
            f"{grown['pss'] / parent['pss']:.4f}",
            f"{grown['rss'] / MB:,.1f}",
            f"{grown['rss'] / parent['rss']:.4f}",
            "" if peak is None else f"{grown['rss_loaded'] / MB:,.1f}",
            "" if peak is None else f"{peak / MB:,.1f}",
        ])  # fmt: skip
    columns = ["held", "PSS MB", "of parent", "RSS MB", "of parent", "RSS loaded", "peak loading"]
    print_table(f"{title}; limit {row['limit']}", columns, rows)


def show_sizes(title: str, sizes: dict) -> None:
    """Times over those of the saved slice, and differences of outputs."""
    works = [work for work, value in next(iter(sizes.values())).items() if isinstance(value, dict)]
    rows = [
        [
            name,
            *(
                f"{size[work][f'{side} over slice']:.3f}"
                for work in works
                for side in ("family", "slice again")
            ),
            f"{size['logits_max_difference'] / size['logits_max']:.1e}",
            "equal" if size["greedy_tokens_equal"] else "differ",
        ]
        for name, size in sizes.items()
    ]
    columns = ["size", *(c for work in works for c in (work, "A/A")), "logits", "greedy tokens"]
    print_table(f"{title}; time over the saved slice's", columns, rows)


if __name__ == "__main__":
    with at_the_command_line():
        main()
