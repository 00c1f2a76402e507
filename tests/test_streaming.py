"""Large checkpoints on small machines: what is read, held and written, and headers that lie."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.architectures import read_config
from star_elastic.checkpoints import tensors
from star_elastic.checkpoints.tensors import SINGLE_NAME, CheckpointReader
from star_elastic.cli import main
from star_elastic.errors import CheckpointError
from star_elastic.files import writing
from star_elastic.importance.orders import random_orders
from star_elastic.models.load import load_parent
from star_elastic.quant.scheme import make_scheme
from star_elastic.rewrite.quantise import quantise_checkpoint
from star_elastic.rewrite.stream import slice_checkpoint, sort_checkpoint
from tests.architectures import ROWS, fixed_config
from tests.checkpoints import everything_under, nothing_changes_in
from tests.laws.parents import examples, make_parent

KINDS = list(ROWS)


def rewritten(source: Path, kind: str, out: Path) -> dict[str, bytes]:
    """A slice, a sorted and a quantised checkpoint: every file's bytes."""
    axis_map = read_config(source).axis_map
    slice_checkpoint(source, ROWS[kind].wide_cut, out / "slice", max_shard_bytes=20_000)
    sort_checkpoint(source, random_orders(axis_map, 0), out / "sorted")
    quantise_checkpoint(source, make_scheme(axis_map, "fp8-channel"), out / "quantised")
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_the_same_whatever_the_blocks(kind, dtype, tmp_path, monkeypatch):
    """Down to one row, written back at once, and where a system takes no advice."""
    source = make_parent(dict(ROWS[kind].wide), 0, dtype).save(tmp_path)
    whole = rewritten(source, kind, tmp_path / "whole")
    for number, (block, back, advice) in enumerate(
        [(1, 1, True), (500, 100, True), (64, 1, False)]
    ):
        monkeypatch.setattr(tensors, "BLOCK_BYTES", block)
        monkeypatch.setattr(writing, "WRITE_BACK", back)
        monkeypatch.setattr(writing, "CAN_ADVISE", advice and writing.CAN_ADVISE)
        assert rewritten(source, kind, tmp_path / str(number)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_follow_each_other(kind, tmp_path, monkeypatch):
    source = make_parent(fixed_config(kind), 0, torch.float32).save(tmp_path)
    reader = CheckpointReader(source)
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 100)
    for name in reader.names:
        whole = reader.read(name)
        assert torch.equal(torch.cat([block.clone() for block in reader.blocks(name)]), whole)
        rows = [(len(whole) - 1, len(whole)), (0, len(whole)), (0, 1)]
        wanted = torch.cat([whole[start:stop] for start, stop in rows])
        assert torch.equal(reader.read(name, rows), wanted)
        blocks = [block.clone() for block in reader.blocks(name, rows)]
        assert torch.equal(torch.cat(blocks), wanted)
        assert all(block.nbytes <= 100 or len(block) == 1 for block in blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_reads_no_row_that_it_drops_and_maps_no_file(kind, tmp_path, monkeypatch):
    source = make_parent(dict(ROWS[kind].wide), 0, torch.float32).save(tmp_path)
    axis_map = read_config(source).axis_map
    widths = axis_map.complete(ROWS[kind].wide_cut)
    needed = 0
    for spec in axis_map.tensors.values():
        if spec.name in axis_map.names_at(widths):
            here = axis_map.seen_by(spec.layer, widths)
            cut, full = axis_map.at(widths).tensors[axis_map.names_at(widths)[spec.name]], spec
            pieces = zip(cut.pieces, full.pieces[: len(cut.pieces)], strict=True)
            for new, old in pieces:
                small, large = cut.on_disk(new).dims, full.on_disk(old).dims
                rows = sum(segment.length(here) for segment in large[0]) if large else 1
                assert not small or rows == sum(segment.size for segment in small[0])
                row_bytes = 4
                for dim in large[1:]:
                    row_bytes *= sum(segment.size for segment in dim)
                needed += rows * row_bytes
    read: list[int] = []
    plain = tensors._read
    monkeypatch.setattr(tensors, "_read", lambda *given: note(read, plain(*given)))

    def watch(*_: int) -> None:
        assert str(source) not in Path("/proc/self/maps").read_text(encoding="utf-8")

    slice_checkpoint(source, widths, tmp_path / "slice", progress=watch)
    assert sum(read) == needed


def note(sizes: list[int], tensor: torch.Tensor) -> torch.Tensor:
    sizes.append(tensor.nbytes)
    return tensor


def test_memory_follows_the_block_and_not_the_tensor(tmp_path):
    """A table of 77 MB of embeddings."""
    config = {**fixed_config("llama"), "vocab_size": 800_000}
    source = make_parent(config, 0, torch.float32).save(tmp_path)
    axis_map = read_config(source).axis_map
    orders = random_orders(axis_map, 0)
    work: dict[str, Callable[[Path], Any]] = {
        "slice": lambda out: slice_checkpoint(source, {"hidden": 16}, out),
        "sort": lambda out: sort_checkpoint(source, orders, out),
        "quantise": lambda out: quantise_checkpoint(
            source, make_scheme(axis_map, "fp8-channel"), out
        ),
    }
    for name, run in work.items():
        run(tmp_path / f"{name}-first")  # what is imported late is imported now
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = peak_bytes()
        run(tmp_path / name)
        assert peak_bytes() - before < 2e7, name


def peak_bytes() -> int:
    """The most that was resident, mapped pages included."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_a_file_that_becomes_shorter_is_one_line(tmp_path):
    source = make_parent(fixed_config("llama"), 0, torch.float32).save(tmp_path)
    reader = CheckpointReader(source)
    file = source / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:-10])
    last = max(reader.names, key=lambda name: reader.place(name).start)
    with pytest.raises(CheckpointError, match="cannot be read .*shorter.*; restore the file"):
        reader.read(last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_stand_at_odd_bytes_are_read(dtype, tmp_path):
    """Other writers do not pad the header."""
    source = make_parent(fixed_config("moe"), 0, dtype).save(tmp_path)
    # Copies: what was loaded is the mapped file, which is about to change.
    wanted = {n: value.clone() for n, value in load_parent(source)[0].state_dict().items()}
    file = source / SINGLE_NAME
    header, data = split(file)
    for spaces in range(1, 4):
        join(file, header + b" " * spaces, data)
        for name, value in load_parent(source)[0].state_dict().items():
            assert torch.equal(value, wanted[name]), name


# Headers


def split(file: Path) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def join(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def changed(header: bytes, **keys: Any) -> bytes:
    """With these keys of one tensor."""
    content = json.loads(header)
    name = next(name for name in content if name != "__metadata__")
    content[name].update(keys)
    return json.dumps(content).encode()


DAMAGE: dict[str, Callable[[bytes, bytes], tuple]] = {
    "empty": lambda h, d: (b"", b"", 0),
    "length cut": lambda h, d: (b"", b"", 2**40),
    "header cut": lambda h, d: (h[:40], b"", len(h)),
    "data cut": lambda h, d: (h, d[:-1]),
    "data longer": lambda h, d: (h, d + b"0"),
    "huge length": lambda h, d: (h, d, 2**63),
    "length beyond the file": lambda h, d: (h, d, len(h) + len(d) + 1),
    "not UTF-8": lambda h, d: (b"\xff" + h[1:], d),
    "no JSON": lambda h, d: (h[:-20], d),
    "a list": lambda h, d: (b"[]", d),
    "deep": lambda h, d: (b"[" * 100_000, d),
    "no dtype": lambda h, d: (changed(h, dtype="F7"), d),
    "unknown dtype": lambda h, d: (changed(h, dtype="F8_E5M2"), d),
    "overlapping": lambda h, d: (changed(h, data_offsets=[0, len(d)]), d),
    "beyond the file": lambda h, d: (changed(h, data_offsets=[len(d), len(d) + 4]), d),
    "backwards": lambda h, d: (changed(h, data_offsets=[8, 0]), d),
    "negative": lambda h, d: (changed(h, data_offsets=[-8, 0]), d),
    "shape of other bytes": lambda h, d: (changed(h, shape=[1]), d),
    "overflowing shape": lambda h, d: (changed(h, shape=[2**62, 2**62]), d),
    "shape of fractions": lambda h, d: (changed(h, shape=[1.5]), d),
    "no offsets": lambda h, d: (changed(h, data_offsets=None), d),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header_is_one_line_and_exit_code_2(damage, tmp_path, capsys):
    source = make_parent(fixed_config("llama"), 0, torch.float32).save(tmp_path)
    axis_map = read_config(source).axis_map
    join(source / SINGLE_NAME, *DAMAGE[damage](*split(source / SINGLE_NAME)))
    with nothing_changes_in(tmp_path), pytest.raises(CheckpointError) as caught:
        sort_checkpoint(source, random_orders(axis_map, 0), tmp_path / "sorted")
    assert "\n" not in str(caught.value)
    (source / "elastic.json").write_text(
        json.dumps({"format_version": 1, "family": "llama", "choices": {}, "sizes": {"a": {
            "widths": {"hidden": 16}, "budgets": {}}}})
    )  # fmt: skip
    before = everything_under(tmp_path)
    for command in (["slice", "--size", "a"], ["quantize", "--format", "fp8-channel"]):
        words = [command[0], str(source), *command[1:], "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as ended:
            main(words)
        shown = capsys.readouterr()
        assert ended.value.code == 2, shown
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
        assert "; " in shown.err and everything_under(tmp_path) == before


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> tuple[Path, bytes, bytes]:
    """A small checkpoint, and its one file as header and data."""
    source = make_parent(fixed_config("qwen3"), 0, torch.float32).save(tmp_path_factory.mktemp("f"))
    return source, *split(source / SINGLE_NAME)


@examples(100)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_any_header_is_read_or_refused_in_one_line(fuzzed, seed, count):
    """Bytes changed, dropped, doubled or swapped with other digits at random."""
    source, header, data = fuzzed
    chosen, content = random.Random(seed), bytearray(header)
    for _ in range(count):
        place = chosen.randrange(len(content))
        kind = chosen.randrange(4)
        if kind == 0:
            content[place] = chosen.randrange(256)
        elif kind == 1:
            del content[place : place + chosen.randrange(1, 40)]
        elif kind == 2:
            content[place:place] = content[place : place + chosen.randrange(1, 200)]
        else:
            digits = [n for n, byte in enumerate(content) if chr(byte).isdigit()]
            content[chosen.choice(digits)] = ord(chosen.choice("0123456789"))
    join(source / SINGLE_NAME, bytes(content), data)
    try:
        reader = CheckpointReader(source)
        for name in reader.names:
            assert tuple(reader.read(name).shape) == reader.shape(name)
    except CheckpointError as error:
        assert "\n" not in str(error) and "; " in str(error)
