"""Checkpoints on disk: sharding, damage, and outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.companions import copy_companions
from star_elastic.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    Size,
    load_manifest,
    save_manifest,
)
from star_elastic.checkpoints.tensors import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointReader,
    Planned,
    load_tensors,
    save_tensors,
    write_tensors,
)
from star_elastic.cost.count import CostModel
from star_elastic.errors import CheckpointError, ConfigError, ShapeError
from star_elastic.files.writing import (
    new_directory,
    require_folder,
    require_writable,
    write_json,
    write_text,
)
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel
from star_elastic.rewrite.stream import slice_checkpoint, sort_checkpoint
from tests.architectures import DISTINCT, ROWS, fixed_config
from tests.checkpoints import everything_under, file_size_limit, nothing_changes_in, rewrite
from tests.laws.parents import Parent, make_parent, reload
from tests.tiny_family import make_tokenizer


@pytest.fixture(params=DISTINCT)
def kind(request) -> str:
    return request.param


@pytest.fixture
def embedding(kind) -> str:
    """The table of embeddings on disk."""
    return ROWS[kind].embedding


@pytest.fixture
def parent(kind) -> Parent:
    return make_parent(fixed_config(kind), 0, torch.float32)


@pytest.fixture
def saved(parent, tmp_path) -> Path:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    return parent.save(tmp_path)


# Writing


@pytest.mark.parametrize("max_shard_bytes", [1, 500, 10**9])
def test_shards_of_any_size_reload_equal(kind, parent, saved, tmp_path, max_shard_bytes):
    out = tmp_path / "slice"
    slice_checkpoint(saved, ROWS[kind].cut, out, max_shard_bytes=max_shard_bytes)
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 1) == (out / INDEX_NAME).is_file() == (max_shard_bytes < 10**9)
    if len(shards) > 1:
        index = json.loads((out / INDEX_NAME).read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        stored = sum(t.numel() * t.itemsize for s in shards for t in load_file(s).values())
        assert index["metadata"]["total_size"] == stored
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    expected = build_submodel(parent.model, parent.config, ROWS[kind].cut).state_dict()
    state = reload(out, torch.float32).state_dict()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    # A sharded slice is itself a source.
    slice_checkpoint(out, {}, tmp_path / "again", max_shard_bytes=300)
    for name in CheckpointReader(out).names:
        again = CheckpointReader(tmp_path / "again").read(name)
        assert torch.equal(again, CheckpointReader(out).read(name)), name


def test_what_lies_beside_the_weights_comes_along(saved, tmp_path):
    make_tokenizer().save_pretrained(saved)
    for name in ("README.md", "modeling_custom.py", "old.bin", ".hidden"):
        (saved / name).write_text("{}")
    write_json(saved / MANIFEST, {})
    save_tensors(saved / "router.safetensors", {"w": torch.ones(1)})
    (saved / "folder").mkdir()
    slice_checkpoint(saved, {}, tmp_path / "slice")
    assert everything_under(tmp_path / "slice") == {
        "config.json", SINGLE_NAME, "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json", "PARENT_README.md",
    }  # fmt: skip


def test_progress_ends_at_the_total(saved, tmp_path):
    seen = []
    slice_checkpoint(saved, {}, tmp_path / "slice", progress=lambda *now: seen.append(now))
    done = [written for written, _ in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_finish_may_add_files_before_the_directory_appears(saved, tmp_path):
    out = tmp_path / "slice"

    def finish(directory: Path) -> None:
        assert not out.exists()
        write_json(directory / "card.json", {"of": "parent"})

    slice_checkpoint(saved, {}, out, finish=finish)
    assert json.loads((out / "card.json").read_text()) == {"of": "parent"}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_tensors_of_every_dtype_come_back(tmp_path, dtype):
    values = {"a": torch.randn(3, 4).to(dtype), "empty": torch.zeros(0, 2).to(dtype)}
    values["scalar"] = torch.tensor(2.5).to(dtype)
    plan = [Planned(name, tuple(value.shape), dtype) for name, value in values.items()]
    write_tensors(tmp_path, plan, values.__getitem__)
    reader, plain = CheckpointReader(tmp_path), load_file(tmp_path / SINGLE_NAME)
    for name, value in values.items():
        assert reader.dtype(name) == dtype and reader.shape(name) == tuple(value.shape)
        for stored in (reader.read(name), plain[name]):
            assert torch.equal(stored.float(), value.float())
    rows = reader.read("a", [(1, 3)])
    assert torch.equal(rows.float(), values["a"][1:3].float())


def test_values_that_break_the_plan_are_a_bug(tmp_path):
    with pytest.raises(AssertionError):
        write_tensors(tmp_path, [Planned("a", (2,), torch.float32)], lambda _: torch.ones(3))
    with pytest.raises(AssertionError):
        write_tensors(tmp_path, [Planned("a", (2,), torch.float32)], lambda _: torch.ones(2).half())


# Outputs that are taken or fail half way


@pytest.mark.parametrize("command", ["slice", "sort"])
def test_an_output_that_is_taken_stays_as_it_is(command, parent, saved, tmp_path):
    out = tmp_path / "taken"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for taken in (out, file, saved):
        with nothing_changes_in(tmp_path), pytest.raises(CheckpointError, match="exists already"):
            if command == "slice":
                slice_checkpoint(saved, {}, taken)
            else:
                sort_checkpoint(saved, parent.orders(0), taken)


def test_an_empty_directory_may_be_filled(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    slice_checkpoint(saved, {}, tmp_path / "empty")
    reload(tmp_path / "empty", torch.float32)


def test_a_link_to_an_empty_directory_is_that_directory(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    slice_checkpoint(saved, {}, tmp_path / "link")
    reload(tmp_path / "link", torch.float32)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("out", [".", "", "../here"])
def test_the_folder_that_one_is_in_is_not_replaced(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="is the folder you are in; name a new one"):
        require_writable(out)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/proc/x", "/proc cannot be written in"), ("/dev/null", "exists already"),
        ("/dev/null/x", "cannot be written in"), ("a" * 250, "too long"), ("a" * 300, "too long"),
        ("a\0b", "cannot be written"),
    ],
)  # fmt: skip
def test_places_where_nothing_can_be_written(tmp_path, monkeypatch, out, said):
    monkeypatch.chdir(tmp_path)
    with nothing_changes_in(tmp_path), pytest.raises(CheckpointError, match=said):
        require_writable(out)


def test_asking_for_a_place_leaves_nothing_there(tmp_path):
    with nothing_changes_in(tmp_path):
        assert require_writable(tmp_path / "a/b/c") == tmp_path / "a/b/c"
        assert require_writable(tmp_path / "a.json", as_file=True) == tmp_path / "a.json"
        assert require_folder(tmp_path / "a/b") == tmp_path / "a/b"
        assert require_folder(tmp_path) == tmp_path
        with pytest.raises(CheckpointError, match="a is not a directory; make it"):
            require_writable(tmp_path / "a/b.json", as_file=True)


def test_a_disk_error_half_way_leaves_nothing_behind(saved, tmp_path):
    size = (saved / SINGLE_NAME).stat().st_size
    refused = pytest.raises(CheckpointError, match="cannot be written")
    with nothing_changes_in(tmp_path), refused, file_size_limit(size // 2):
        slice_checkpoint(saved, {}, tmp_path / "slice")
    slice_checkpoint(saved, {}, tmp_path / "slice")


def test_any_other_failure_half_way_leaves_nothing_behind(saved, tmp_path):
    def full_disk(written: int, total: int) -> None:
        if written > total / 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(written: int, total: int) -> None:
        raise KeyboardInterrupt

    with nothing_changes_in(tmp_path):
        with pytest.raises(CheckpointError, match="No space left on device"):
            slice_checkpoint(saved, {}, tmp_path / "slice", progress=full_disk)
        with pytest.raises(KeyboardInterrupt):
            slice_checkpoint(saved, {}, tmp_path / "slice", progress=interrupted)
        with pytest.raises(CheckpointError, match="cannot be written"):
            slice_checkpoint(saved, {}, saved / SINGLE_NAME / "below" / "a_file")
        with pytest.raises(ShapeError):
            slice_checkpoint(saved, {"hidden": 10**6}, tmp_path / "slice")


def test_text_files_are_replaced_whole(tmp_path):
    file = tmp_path / "notes.json"
    write_json(file, {"a": 1})
    with nothing_changes_in(tmp_path), pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with nothing_changes_in(tmp_path), pytest.raises(CheckpointError), file_size_limit(4):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}


def test_new_directory_appears_only_at_the_end(tmp_path):
    out = tmp_path / "deep" / "down"
    with new_directory(out) as directory:
        (directory / "file").write_text("x")
        assert not out.exists() and directory.parent == out.parent
    assert everything_under(out) == {"file"}


# Damage


def refuse_slice(saved: Path, tmp_path: Path, reason: str) -> None:
    with nothing_changes_in(tmp_path), pytest.raises(CheckpointError, match=reason):
        slice_checkpoint(saved, {}, tmp_path / "slice")


def test_a_missing_tensor_is_named(embedding, saved, tmp_path):
    rewrite(saved, lambda tensors: tensors.pop(embedding))
    refuse_slice(saved, tmp_path, f"lacks the tensor {embedding}, which its .* asks for; restore")


def test_a_wrong_shape_is_named(embedding, saved, tmp_path):
    rewrite(saved, lambda tensors: tensors.update({embedding: torch.ones(19, 12)}))
    refuse_slice(saved, tmp_path, r"has shape \(19, 12\) but config.json says \(20, ")


def test_an_unknown_tensor_is_named(saved, tmp_path):
    rewrite(saved, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    refuse_slice(saved, tmp_path, r"holds the tensor model.extra.weight \(1 such\), which the")


def test_an_unknown_dtype_is_named(embedding, saved, tmp_path):
    rewrite(
        saved,
        lambda t: t.update({embedding: t[embedding].to(torch.float8_e5m2)}),
    )
    refuse_slice(saved, tmp_path, f"{embedding} has dtype F8_E5M2, which is not supported")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, tmp_path, keep):
    file = saved / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:keep])
    refuse_slice(saved, tmp_path, f"{SINGLE_NAME} cannot be read .*restore the file")


def test_a_directory_without_weights_is_refused(saved, tmp_path):
    (saved / SINGLE_NAME).unlink()
    refuse_slice(saved, tmp_path, "holds no model.safetensors; name a directory with")


def test_a_directory_without_config_is_refused(saved, tmp_path):
    (saved / "config.json").unlink()
    with nothing_changes_in(tmp_path), pytest.raises(ConfigError, match="holds no config.json"):
        slice_checkpoint(saved, {}, tmp_path / "slice")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'],
)
def test_a_damaged_index_is_refused(saved, tmp_path, text):
    (saved / SINGLE_NAME).unlink()
    (saved / INDEX_NAME).write_text(text)
    refuse_slice(saved, tmp_path, f"{INDEX_NAME} is damaged .*; restore the file")


def test_the_single_file_is_read_where_both_layouts_are_present(saved, tmp_path):
    """As in transformers, which an index left over from elsewhere does not mislead."""
    write_json(saved / INDEX_NAME, {"weight_map": {"other": "elsewhere.safetensors"}})
    slice_checkpoint(saved, {}, tmp_path / "slice")
    reload(saved, torch.float32)


def test_an_index_that_promises_too_much_is_refused(kind, saved, tmp_path):
    whole = saved.rename(tmp_path / "whole")
    slice_checkpoint(whole, {}, saved, max_shard_bytes=500)
    index = json.loads((saved / INDEX_NAME).read_text())
    shards = sorted(saved.glob("*.safetensors"))
    rewritten = load_file(shards[0])
    name = next(iter(rewritten))
    del rewritten[name]
    save_file(rewritten, shards[0])
    refuse_slice(saved, tmp_path, f"lacks the tensor {name} that the index promises; restore")
    shards[0].unlink()
    refuse_slice(saved, tmp_path, f"{shards[0].name} cannot be read")
    assert index["weight_map"][name] == shards[0].name


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "truncated", "config"])
def test_loading_a_damaged_parent_says_so_in_one_line(embedding, saved, damage):
    if damage == "missing":
        rewrite(saved, lambda tensors: tensors.pop(embedding))
    elif damage == "extra":
        rewrite(saved, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    elif damage == "shape":
        rewrite(saved, lambda tensors: tensors.update({embedding: torch.ones(19, 12)}))
    elif damage == "truncated":
        (saved / SINGLE_NAME).write_bytes(b"\0" * 20)
    else:
        (saved / "config.json").write_text("{}")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_parent(saved)
    assert "\n" not in str(caught.value)


def test_loading_a_whole_parent(parent, saved):
    model, config = load_parent(saved)
    assert {**config, **parent.config} == config
    for name, value in model.state_dict().items():
        if name in parent.state:
            assert torch.equal(value, parent.state[name]), name
    bfloat16, _ = load_parent(saved, dtype=torch.bfloat16)
    assert next(bfloat16.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("moe", "mtp.layers.0.norm.weight"),
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_layers_for_speculation_and_old_buffers_are_left_behind(kind, name, tmp_path):
    saved = make_parent(fixed_config(kind), 0, torch.float32).save(tmp_path)
    rewrite(saved, lambda tensors: tensors.update({name: torch.ones(3)}))
    load_parent(saved)
    slice_checkpoint(saved, {}, tmp_path / "slice")
    assert name not in CheckpointReader(tmp_path / "slice").names


# Small files


def test_small_tensor_files(tmp_path):
    file = tmp_path / "orders.safetensors"
    save_tensors(file, {"hidden": torch.arange(6).flip(0)}, {"seed": "1"})
    assert torch.equal(load_tensors(file)["hidden"], torch.arange(6).flip(0))
    with pytest.raises(CheckpointError, match="does not exist; name an existing safetensors file"):
        load_tensors(tmp_path / "none.safetensors")
    file.write_bytes(b"\0" * 12)
    with pytest.raises(CheckpointError, match="cannot be read .*restore the file"):
        load_tensors(file)
    assert everything_under(tmp_path) == {"orders.safetensors"}


def test_copying_nothing(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    copy_companions(tmp_path / "from", tmp_path / "to")
    assert everything_under(tmp_path / "to") == set()


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        *((dtype, bad) for dtype in FLOATS for bad in (math.nan, math.inf, -math.inf)),
        (torch.float8_e4m3fn, math.nan),
    ],
)
def test_values_that_are_no_numbers_are_not_written(tmp_path, dtype, bad):
    value = torch.tensor([[1.0, -448.0], [bad, 0.0]]).to(dtype)
    for tensor in (value, value.flip(0)):
        plan = [Planned("w", (2, 2), dtype)]
        with pytest.raises(CheckpointError, match="w holds values that are not finite; restore"):
            write_tensors(tmp_path, plan, lambda _, t=tensor: t)
    good = torch.tensor([-448.0, 448.0, 0.0]).to(dtype)
    write_tensors(tmp_path, [Planned("w", (3,), dtype)], lambda _: good)
    empty = torch.empty(0, dtype=dtype)
    write_tensors(tmp_path, [Planned("w", (0,), dtype)], lambda _: empty)


# The manifest


def manifest_of(parent: Parent, widths: dict) -> Manifest:
    small = parent.axis_map.complete(widths)
    cost = CostModel(parent.axis_map).count(small)
    known = {"total": cost.total, "active": cost.active, "budget_miss": 0.1}
    return Manifest(
        family=parent.axis_map.model_type,
        choices={"hidden": (12, 8), "ffn": (7, 4)},
        sizes={
            "large": Size(parent.axis_map.full, {"active": 1.0}),
            "small": Size(small, {"active": 0.5}, known, {"ffn": 1}),
        },
        provenance={"seed": 1},
    )


def test_the_manifest_comes_back(tmp_path):
    parent = make_parent(fixed_config("dense"), 0, torch.float32)
    manifest = manifest_of(parent, ROWS["dense"].cut)
    save_manifest(manifest, tmp_path)
    loaded = load_manifest(tmp_path, parent.axis_map)
    assert loaded == manifest and list(loaded.sizes) == ["large", "small"]
    assert isinstance(loaded.size("small").widths, Widths)
    with pytest.raises(CheckpointError, match="size 'tiny' is not in this family; it has large, s"):
        loaded.size("tiny")


def with_size(content: dict, widths: dict) -> dict:
    """With one size of these widths."""
    return {**content, "sizes": {"a": {"widths": widths}}}


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (lambda c: None, CheckpointError, "holds no elastic.json, so it is not an elastic"),
        (lambda c: "{", CheckpointError, "cannot be read"),
        (lambda c: [], CheckpointError, "is damaged"),
        (lambda c: {**c, "format_version": 2}, CheckpointError, "has format version 2, this pac"),
        (
            lambda c: {**c, "format_version": "1"},
            CheckpointError,
            "format_version='1' is not a whole",
        ),
        (lambda c: {**c, "sizes": {"../x": c["sizes"]["small"]}}, CheckpointError, "has the name"),
        (
            lambda c: {**c, "sizes": {"a": {"widths": {}, "budgets": {"active": -1}}}},
            CheckpointError,
            "sizes.a.budgets.active=-1 is no share of the parent; give",
        ),
        (
            lambda c: {**c, "sizes": {"a": {"widths": {}, "budgets": {"speed": 0.5}}}},
            CheckpointError,
            "sizes.a.budgets.speed is no budget; use",
        ),
        (lambda c: {**c, "family": "llama"}, CheckpointError, "2 sizes of a llama model, but"),
        (lambda c: {**c, "sizes": {}}, CheckpointError, "describes 0 sizes"),
        (lambda c: {**c, "sizes": {"a": 3}}, CheckpointError, "is damaged"),
        (lambda c: {**c, "sizes": {"a": {"widths": 3}}}, CheckpointError, "is damaged"),
        (lambda c: {**c, "sizes": {"a": {"colour": 3}}}, CheckpointError, "is damaged"),
        (lambda c: {**c, "choices": {"hidden": 3}}, CheckpointError, "is damaged"),
        (lambda c: with_size(c, {"hidden": 99}), CheckpointError, "sizes.a.widths: hidden=99 is o"),
        (lambda c: with_size(c, {"wings": 2}), CheckpointError, "sizes.a.widths: axis 'wings' d"),
        (lambda c: with_size(c, {"ffn": "2"}), CheckpointError, "widths: ffn='2' is not a"),
        (
            lambda c: {**c, "sizes": dict(reversed(c["sizes"].items()))},
            CheckpointError,
            r"damaged \(size 'large' has a larger budget than 'small' before it; name",
        ),
        (
            lambda c: {
                **c,
                "sizes": {**c["sizes"], "small": {**c["sizes"]["small"], "widths": {}}},
            },
            CheckpointError,
            r"sizes.small.widths have [\d,]+ total .*, and sizes.small.cost says",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, change, kind, reason):
    parent = make_parent(fixed_config("dense"), 0, torch.float32)
    save_manifest(manifest_of(parent, ROWS["dense"].cut), tmp_path)
    file = tmp_path / MANIFEST
    changed = change(json.loads(file.read_text()))
    if changed is None:
        file.unlink()
    else:
        file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(kind, match=reason):
        load_manifest(tmp_path, parent.axis_map)


def test_sizes_are_in_the_order_of_their_budgets(tmp_path):
    """Which may be others than parameters: a size that takes less time may have more of them."""
    parent = make_parent(fixed_config("dense"), 0, torch.float32)
    manifest = manifest_of(parent, ROWS["dense"].cut)
    large, small = (manifest.size(name) for name in ("large", "small"))
    slow = replace(small, budgets={"flops": 0.9}), replace(large, budgets={"flops": 0.5})
    mixed = replace(small, budgets={"flops": 0.5}), replace(large, budgets={"active": 1.0})
    for first, second in (slow, mixed):
        sizes = {"first": first, "second": second}
        save_manifest(replace(manifest, sizes=sizes), tmp_path)
        assert list(load_manifest(tmp_path, parent.axis_map).sizes) == ["first", "second"]


@pytest.mark.parametrize(
    "value",
    [
        {"budgets": None}, {"budgets": {"active": "x"}}, {"repair": 3}, {"cost": []},
        {"widths_from": []}, {"data_free_steps": "1"}, {"argmax": 3},
    ],
)  # fmt: skip
def test_values_of_a_manifest_have_their_types(tmp_path, value):
    parent = make_parent(fixed_config("llama"), 0, torch.float32)
    save_manifest(manifest_of(parent, {}), tmp_path)
    content = json.loads((tmp_path / "elastic.json").read_text())
    next(iter(content["sizes"].values())).update(value)
    (tmp_path / "elastic.json").write_text(json.dumps(content))
    (key,) = value
    with pytest.raises(CheckpointError, match=rf"is damaged \(sizes\..*{key}.*; restore the file"):
        load_manifest(tmp_path, parent.axis_map)


def test_only_the_disks_errors_ask_for_room(tmp_path):
    """A mistake of ours is no want of room."""
    nothing: Any = None
    with nothing_changes_in(tmp_path), pytest.raises(TypeError):
        write_text(tmp_path / "x.json", nothing)
