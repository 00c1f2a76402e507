"""Time and memory of quantising a checkpoint, and of cutting a quantised one, tensor by tensor.

    python benchmarks/quantize.py --out results/quantize.json    # a hybrid of 600 MB, minutes
    python benchmarks/quantize.py --smoke                        # the same on a tiny model

For every format, on random weights: seconds of quantising (inputs calibrated before) and of cutting
half of every axis, relative to cutting the same from the unquantised checkpoint; the growth of the
memory of a process of its own at its peak; bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import build_model
from resident import HYBRID, MB, STATELESS, TINY, make_checkpoints

from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.manifest import load_manifest
from star_elastic.cli.terminal import at_the_command_line, command_line, print_table
from star_elastic.files.writing import write_json
from star_elastic.quant.scheme import make_scheme
from star_elastic.rewrite.quantise import quantise_checkpoint
from star_elastic.rewrite.stream import slice_checkpoint

AXES = (*STATELESS, "ssm_heads", "heads")
UNQUANTISED = "unquantised"
FORMATS = ("fp8", "fp8-channel", "nvfp4")
"""Half of every axis does not end on the edges of fp8-block's 128."""
EDGES = {"hidden_size": 128, "mamba_head_dim": 16}
"""So that half of every axis of the tiny model ends on the edges of blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny model, one format")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--format", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.format:
        print(json.dumps(work(options.format, options.folder)))
        return
    config = {**TINY["nemotron_h"], **EDGES} if options.smoke else HYBRID
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = make_checkpoints(folder, config, AXES)
        formats = FORMATS[-1:] if options.smoke else FORMATS
        rows = {name: apart(name, folder) for name in (UNQUANTISED, *formats)}
    result = {
        "command": command_line("benchmarks/quantize.py"),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "parameters": made["parameters"],
        "megabytes": made["megabytes"],
        "formats": rows,
    }
    show(result)
    if options.out:
        write_json(options.out, result)


def apart(format_name: str, folder: Path) -> dict[str, Any]:
    """What the work takes in a process of its own."""
    command = [sys.executable, __file__, "--format", format_name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(format_name: str, folder: Path) -> dict[str, Any]:
    """Quantises (unless it is the unquantised checkpoint) and cuts the small size."""
    source = folder / "elastic"
    config = read_config(source)
    axis_map = architecture_of(config).axis_map(config)
    widths = load_manifest(source, axis_map).size("small").widths
    build_model(TINY["nemotron_h"])  # imports are done from here on
    found: dict[str, Any] = {}
    if format_name != UNQUANTISED:
        scheme = make_scheme(axis_map, format_name)
        scales = {name: torch.ones(1) for name in scheme.quantised(axis_map)}
        target = folder / format_name
        with measured(found, "quantise"):
            quantise_checkpoint(source, scheme, target, input_scales=scales)
        source = target
    with measured(found, "slice"):
        slice_checkpoint(source, widths, folder / f"{format_name}-small")
    found["bytes"] = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return found


class measured:
    """Seconds and growth of a block's own memory, put into a dictionary. Pages of mapped files do
    not count: the system takes them back when it needs them."""

    def __init__(self, into: dict[str, Any], name: str):
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.samples, self.done = [own_bytes()], threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        self.begin = time.perf_counter()

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.samples.append(own_bytes())

    def __exit__(self, *_: object) -> None:
        self.into[f"{self.name}_seconds"] = time.perf_counter() - self.begin
        self.done.set()
        self.watcher.join()
        self.into[f"{self.name}_peak_bytes"] = max(self.samples) - self.samples[0]


def own_bytes() -> int:
    """Anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def show(result: dict[str, Any]) -> None:
    whole = result["megabytes"]
    plain = result["formats"][UNQUANTISED]
    rows = []
    for name, row in result["formats"].items():
        quantised = "quantise_seconds" in row
        rows.append([
            name,
            f"{row['bytes'] / plain['bytes']:.3f}",
            f"{row['quantise_seconds'] / plain['slice_seconds']:.1f}" if quantised else "",
            f"{row['quantise_peak_bytes'] / MB:.0f}" if quantised else "",
            f"{row['slice_seconds'] / plain['slice_seconds']:.2f}",
            f"{row['slice_peak_bytes'] / MB:.0f}",
        ])  # fmt: skip
    columns = ["format", "bytes", "quantise: time / cut", "memory, MB", "cut: time / cut",
               "memory, MB"]  # fmt: skip
    print_table(f"{result['parameters']:,} parameters, {whole:.0f} MB in fp32", columns, rows)


if __name__ == "__main__":
    with at_the_command_line():
        main()
