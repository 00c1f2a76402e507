"""Time and memory of cutting, sorting and quantising a checkpoint larger than a small machine.

    python benchmarks/big_checkpoint.py --work /big/disk --out results/big_checkpoint.json
    python benchmarks/big_checkpoint.py --smoke        # the same on a tiny model, seconds

Writes a sharded hybrid of 12 GB with 128 experts per layer (random BF16 weights), then in turn:
1. *copy*: copies files of exactly the slice's bytes and waits until they are on the disk;
2. *slice*: `star-elastic slice`, which waits for the disk as well. *Its work* is the command
   without its imports.
Both find none of their input in the page cache. `--against PATH` lets the slice of another checkout
take turns with them and holds its bytes against this one's. Then `count`, `sizes`, a sort and
`quantize` once each. Every side is a process of its own, which tells its peak of resident memory,
mapped pages included, and its CPU seconds. Needs 25 GB of disk, which it gives back.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import TINY, widths_at

from star_elastic.architectures import architecture_of
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.checkpoints.tensors import Planned
from star_elastic.checkpoints.write import write_checkpoint
from star_elastic.cli.terminal import at_the_command_line, command_line, print_table
from star_elastic.files.writing import write_json

BIG = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEMEME",
    "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128,
    "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1024, "moe_shared_expert_intermediate_size": 2048,
    "vocab_size": 131072, "max_position_embeddings": 4096,
}  # fmt: skip
AXES = ("hidden", "experts", "expert_ffn", "shared_ffn", "ssm_heads", "heads")
SHARE = 0.75
"""Of every axis, what the small size keeps."""
POOL = 2**25
"""Random values that all tensors are pieces of."""
GB = 1e9
CHILD = """
import sys, time
begin = time.perf_counter()
{imports}
loaded = time.perf_counter()
{work}
end = time.perf_counter()
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(end - begin, end - loaded, used.ru_utime + used.ru_stime, peak, file=sys.stderr)
"""
"""A process that tells its seconds, those after its imports, those of CPUs, and its peak of
resident memory: VmHWM, since getrusage counts what its parent held before it, too."""
COPY = (
    "import os, shutil",
    """
for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    shutil.copyfile(source, target)
    os.fsync(os.open(target, os.O_RDWR))
""",
)
LIGHT = (
    "import star_elastic.cli",
    """
try:
    star_elastic.cli.main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
""",
)
COMMAND = (
    "import star_elastic.rewrite.family, star_elastic.router.files, star_elastic.cli",
    LIGHT[1],
)
"""The imports are those of the commands, which import late."""
SORT = (
    """
from pathlib import Path
from star_elastic.architectures import read_config
from star_elastic.importance.orders import random_orders
from star_elastic.rewrite.stream import sort_checkpoint
""",
    """
sort_checkpoint(sys.argv[1], random_orders(read_config(Path(sys.argv[1])).axis_map, 0), sys.argv[2])
""",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, whose slice takes turns")
    parser.add_argument("--smoke", action="store_true", help="tiny model, one round")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    config, rounds = (TINY, 1) if options.smoke else (BIG, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        folder = Path(scratch)
        made = make_checkpoint(folder, config)
        result = {
            "command": command_line("benchmarks/big_checkpoint.py"),
            "machine": machine(),
            **made,
            **turns(folder, rounds, options.against),
            "alone": alone(folder),
        }
    show(result)
    if options.out:
        write_json(options.out, result)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.machine(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "memory_bytes": memory,
    }  # fmt: skip


def make_checkpoint(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Writes an elastic checkpoint of random weights, one tensor at a time."""
    axis_map = architecture_of(config).axis_map(config)
    torch.manual_seed(0)
    pool = torch.randn(POOL).mul_(0.02).bfloat16()
    plan = [
        Planned(piece.name, axis_map.shape(spec.on_disk(piece), axis_map.full), torch.bfloat16)
        for spec in axis_map.tensors.values()
        for piece in spec.pieces
    ]
    sizes = {entry.name: entry for entry in plan}

    def value_of(name: str) -> torch.Tensor:
        number = sizes[name].num_bytes // 2
        start = hash_of(name) % max(POOL - number, 1)
        values = pool.repeat(-(-number // POOL)) if number > POOL else pool
        return values[start : start + number].view(sizes[name].shape)

    (folder / "none").mkdir()
    write_checkpoint(folder / "elastic", config, folder / "none", plan, value_of)
    small = widths_at(axis_map, SHARE, AXES)
    family = {"large": Size(axis_map.full), "small": Size(small)}
    save_manifest(Manifest(axis_map.model_type, {}, family), folder / "elastic")
    return {
        "bytes": size_of(folder / "elastic"), "tensors": len(plan), "widths": dict(small),
        "largest_tensor_bytes": max(entry.num_bytes for entry in plan),
    }  # fmt: skip


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def size_of(folder: Path) -> int:
    """Bytes of its weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# In turn


def turns(folder: Path, rounds: int, against: Path | None) -> dict[str, Any]:
    """Copy and slice in turn, each from a disk whose pages are not in memory."""
    family, out, whole = folder / "elastic", folder / "out", folder / "whole"
    slicing = ["slice", family, "--size", "small", "--out", out]
    run(COMMAND, "slice", family, "--size", "small", "--out", whole)
    digests = digests_of(whole)
    shards = sorted(whole.glob("*.safetensors"))
    copying = [path for shard in shards for path in (shard, out / shard.name)]
    sides: dict[str, tuple[Any, ...]] = {
        "copy": (COPY, copying, None),
        "slice": (COMMAND, slicing, None),
    }
    if against:
        sides["against"] = (COMMAND, slicing, against)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            kind, arguments, checkout = sides[name]
            if name == "copy":
                out.mkdir()
            forget(family, whole)
            found[name].append(run(kind, *arguments, checkout=checkout))
            assert name == "copy" or digests_of(out) == digests, "other bytes were written"
            shutil.rmtree(out)
    slice_bytes = size_of(whole)
    shutil.rmtree(whole)
    return {"slice_bytes": slice_bytes, "rounds": rounds, "turns": found, "sides": summary(found)}


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of each side, the largest peak, and the median of its seconds over the copy's of the
    same round."""
    sides = {}
    for name, own in found.items():
        pairs = list(zip(own, found["copy"], strict=True))
        sides[name] = {
            "seconds": statistics.median(row["seconds"] for row in own),
            "cpu_seconds": statistics.median(row["cpu_seconds"] for row in own),
            "over_copy": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
            "work_over_copy": statistics.median(a["work_seconds"] / b["seconds"] for a, b in pairs),
            "peak_bytes": max(row["peak_bytes"] for row in own),
        }
    return sides


def forget(*folders: Path) -> None:
    """Takes files out of the page cache."""
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(kind: tuple[str, str], *arguments: object, checkout: Path | None = None) -> dict[str, Any]:
    """What a process of its own takes."""
    imports, work = kind
    code = CHILD.format(imports=imports, work=work)
    path = {"PYTHONPATH": str(checkout.resolve())} if checkout else {}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **path},
    )  # fmt: skip
    assert not done.returncode, done.stderr
    seconds, work_seconds, cpu_seconds, peak = map(float, done.stderr.splitlines()[-1].split())
    return {
        "seconds": seconds, "work_seconds": work_seconds, "cpu_seconds": cpu_seconds,
        "peak_bytes": int(peak),
    }  # fmt: skip


def digests_of(folder: Path) -> dict[str, str]:
    """The bytes of every file."""
    found = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as content:
            found[file.name] = hashlib.file_digest(content, "blake2b").hexdigest()
    return found


def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """The other commands, once each."""
    family, out = folder / "elastic", folder / "out"
    quantising = ("quantize", family, "--format", "fp8-channel", "--out", out)
    work = {
        "count": (LIGHT, ("count", family)),
        "sizes": (LIGHT, ("sizes", family)),
        "sort": (SORT, (family, out)),
        "quantize": (COMMAND, quantising),
    }
    found = {}
    for name, (kind, arguments) in work.items():
        forget(family)
        found[name] = run(kind, *arguments)
        shutil.rmtree(out, ignore_errors=True)
    return found


def show(result: dict[str, Any]) -> None:
    rows = [
        [
            name, f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['over_copy']:.2f}",
            f"{row['work_over_copy']:.2f}", f"{row['peak_bytes'] / GB:.2f}",
        ]
        for name, row in result["sides"].items()
    ]  # fmt: skip
    rows += [
        [name, f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", "", "",
         f"{row['peak_bytes'] / GB:.2f}"]
        for name, row in result["alone"].items()
    ]  # fmt: skip
    title = f"{result['bytes'] / GB:.1f} GB, of which {result['slice_bytes'] / GB:.1f} GB are cut"
    columns = ["", "seconds", "of CPUs", "/ copy", "its work / copy", "peak GB"]
    print_table(title, columns, rows)


if __name__ == "__main__":
    with at_the_command_line():
        main()
