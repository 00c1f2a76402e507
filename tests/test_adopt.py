"""Adopting: a checkpoint with known widths is a family that does what a trained one does."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import star_elastic
from star_elastic import bundled
from star_elastic.architectures import read_config
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.companions import INPUT_SCALES, MANIFEST
from star_elastic.checkpoints.elastic import CARRIED, ElasticCheckpoint
from star_elastic.checkpoints.layouts import MODELOPT_FILE
from star_elastic.checkpoints.manifest import load_manifest
from star_elastic.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from star_elastic.cli import main
from star_elastic.cost.count import CostModel
from star_elastic.errors import CheckpointError, Interrupted
from star_elastic.models.load import load_parent
from star_elastic.progress import Silent
from star_elastic.rewrite.adopt import adopt_checkpoint
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.router.grid import grid_holding, make_grid
from star_elastic.train.check import check
from star_elastic.train.config import load_run_config
from tests.architectures import ROWS, fixed_config
from tests.checkpoints import (
    edit_json,
    everything_under,
    file_size_limit,
    nothing_changes_in,
    plain_checkpoint,
    rewrite,
    write_rows,
)
from tests.laws.parents import make_parent
from tests.processes import answer, refusal
from tests.tiny_family import PROMPTS, WIDTHS
from tests.tiny_run import config_in

IDS = torch.tensor([[3, 7, 1, 9, 4, 2]])


def without_family(family: Path, out: Path) -> Path:
    """The plain checkpoint that lies in a family."""
    own = shutil.ignore_patterns(MANIFEST, INPUT_SCALES, "verdict.json", *CARRIED)
    return shutil.copytree(family, out, ignore=own)


def sizes_of(family: Path) -> list[str]:
    """The options that name a family's sizes, the smallest one first; its full size is large."""
    axis_map = read_config(family).axis_map
    cut = {n: s.widths for n, s in load_manifest(family, axis_map).sizes.items() if n != "large"}
    named = [f"--size={name}:{widths}" for name, widths in reversed(cut.items())]
    return [*named, "--full", "large"]


def contents(folder: Path) -> dict[str, bytes]:
    """What every file of a folder holds."""
    return {name: (folder / name).read_bytes() for name in everything_under(folder)}


# What comes of it


def test_slices_are_those_of_the_family_that_was_trained(blocks, tmp_path):
    plain, adopted = without_family(blocks, tmp_path / "plain"), tmp_path / "adopted"
    told = answer("adopt", plain, *sizes_of(blocks), "--out", adopted)
    assert list(told["sizes"]) == ["large", "small"] and told["adopted"] is True
    assert contents(adopted) == {**contents(plain), MANIFEST: (adopted / MANIFEST).read_bytes()}
    trained, own = (load_manifest(p, read_config(p).axis_map) for p in (blocks, adopted))
    for name, size in own.sizes.items():
        assert size.widths == trained.sizes[name].widths and size.widths_from == "adopt"
        told_cost = {k: v for k, v in trained.sizes[name].cost.items() if "miss" not in k}
        assert size.cost == told_cost
        for source in (blocks, adopted):
            slice_checkpoint(source, size.widths, tmp_path / source.name / name)
        cut = [contents(tmp_path / source.name / name) for source in (blocks, adopted)]
        assert cut[0] == cut[1] and SINGLE_NAME in cut[0]


@pytest.mark.parametrize("kind", ROWS)
def test_every_architecture(kind, tmp_path):
    parent = make_parent(fixed_config(kind), 0, torch.float32)
    plain, adopted = parent.save(tmp_path), tmp_path / "adopted"
    cut = ROWS[kind].cut
    one = {next(iter(cut)): next(iter(cut.values()))}
    manifest = adopt_checkpoint(plain, {"small": cut, "middle": one}, adopted)
    assert load_manifest(adopted, parent.axis_map) == manifest
    assert list(manifest.sizes) == ["full", "middle", "small"]
    assert (adopted / SINGLE_NAME).read_bytes() == (plain / SINGLE_NAME).read_bytes()
    assert manifest.choices == make_grid(manifest.choices, parent.axis_map).choices
    cost = CostModel(parent.axis_map)
    for size in manifest.sizes.values():
        share = cost.count(size.widths).active / cost.full.active
        assert size.budgets == {"active": share}
    family = star_elastic.load(adopted, "float32", "cpu")
    slice_checkpoint(plain, cut, tmp_path / "slice")
    alone, _ = load_parent(tmp_path / "slice")
    with torch.inference_mode():
        logits = family["small"](input_ids=IDS).logits
        assert torch.allclose(logits, alone(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        full = family["full"](input_ids=IDS).logits
        assert torch.allclose(full, parent.model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_bundled_sizes_adopted_again_write_the_same(tmp_path):
    plain, adopted = without_family(bundled.FAMILY, tmp_path / "plain"), tmp_path / "adopted"
    answer("adopt", plain, *sizes_of(bundled.FAMILY), "--out", adopted)
    both = [
        answer("generate", family, "--think", "small", "--answer", "large", "add 4821 9771")
        for family in ("bundled", adopted)
    ]
    assert both[0]["token_ids"] == both[1]["token_ids"] and both[1]["answer"] == "14592"
    assert both[0]["token_sizes"] == both[1]["token_sizes"]
    said = refusal("slice", adopted, "--budget", "active=0.6", "--out", tmp_path / "x")
    assert "has no router, so it has only the sizes large, medium, small; name one" in said
    answer("slice", adopted, "--widths", "hidden=96", "--out", tmp_path / "own")
    assert answer("check", adopted)["engines"][0]["runs"]
    assert answer("sizes", adopted)["adopted"] and not answer("sizes", "bundled")["adopted"]


def test_everything_else_takes_an_adopted_family(tmp_path):
    """quantize (calibrated for each size), eval, report, latency, and training on."""
    plain, adopted = plain_checkpoint(tmp_path / "plain"), tmp_path / "adopted"
    adopt_checkpoint(plain, {"small": WIDTHS["llama"]}, adopted)
    rows = write_rows(tmp_path / "rows.jsonl")
    data = ["--data", rows]
    answer("quantize", adopted, "--format", "fp8", *data, "--out", tmp_path / "fp8")
    assert answer("sizes", tmp_path / "fp8")["adopted"]
    quantised = ElasticCheckpoint(tmp_path / "fp8")
    assert quantised.input_scales("small") and not quantised.input_scales("full")
    problems = [{"prompt": prompt, "answer": "9"} for prompt in PROMPTS * 3]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    few = ["--problems", 2, "--validation", 1, "--budgets", "none", "--dials", "none"]
    answer("eval", adopted, *few, "--data", tmp_path / "problems.jsonl", "--max-new-tokens", 4,
           "--out", tmp_path / "eval")  # fmt: skip
    answer("report", tmp_path / "eval")
    table = ["--seconds", 0, "--context", 8, "--out", tmp_path / "table.json"]
    assert len(answer("latency", adopted, "--sizes", *table)["sizes"]) == 2


def test_a_run_trains_on_from_an_adopted_family(run_folder, tmp_path):
    """At the widths that were adopted, and with budgets that say so."""
    adopted = tmp_path / "adopted"
    small = {"hidden": 32, "expert_ffn": 16}
    adopt_checkpoint(run_folder / "parent", {"small": small}, adopted, full="large")
    share = ElasticCheckpoint(adopted).manifest.sizes["small"].budgets["active"]
    file = config_in(run_folder, "adopted").out + ".toml"
    text = re.sub(r"\[choices\].*?\n\n", "", Path(file).read_text(), flags=re.S)
    text = text.replace("active = 0.7", f"active = {share:.4f}")
    Path(file).write_text(f'family = "{adopted}"\n{text}')
    spec = check(load_run_config(file))
    assert spec.fixed["small"].widths == spec.axis_map.complete(small)
    assert spec.fixed["small"].widths_from == "adopt"
    assert spec.grid.choices == {"hidden": (48, 32), "expert_ffn": (32, 16)}


def test_sharded_weights_and_whatever_else_lies_there(tmp_path):
    """All shards are read; what is not the model's stays behind."""
    plain, adopted = plain_checkpoint(tmp_path / "plain"), tmp_path / "adopted"
    whole = load_file(plain / SINGLE_NAME)
    model, _ = load_parent(plain)
    (plain / SINGLE_NAME).unlink()
    model.save_pretrained(plain, max_shard_size="20KB")
    assert (plain / INDEX_NAME).is_file()
    for name in ("modeling_own.py", "README.md", "orders.safetensors"):
        (plain / name).write_text("x")
    adopt_checkpoint(plain, {"small": WIDTHS["llama"]}, adopted)
    found = load_file(adopted / SINGLE_NAME)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert (adopted / "PARENT_README.md").read_text() == "x"
    assert not {"modeling_own.py", "orders.safetensors"} & everything_under(adopted)


# Quantised parents


def test_a_quantised_parent_stays_as_it_is(blocks, tmp_path):
    answer("quantize", blocks, "--format", "fp8-channel", "--out", tmp_path / "fp8")
    plain, adopted = without_family(tmp_path / "fp8", tmp_path / "plain"), tmp_path / "adopted"
    answer("adopt", plain, *sizes_of(blocks), "--out", adopted)
    before, after = (load_file(path / SINGLE_NAME) for path in (plain, adopted))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(*(t[name].reshape(-1).view(torch.uint8) for t in (before, after))), name
    for family, out in ((tmp_path / "fp8", "one"), (adopted, "other")):
        answer("slice", family, "--size", "small", "--out", tmp_path / out)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    again = refusal("quantize", adopted, "--format", "fp8-channel", "--out", tmp_path / "x")
    assert "is quantised already" in again


def test_sizes_of_a_quantised_parent_end_on_edges(blocks, run_folder, tmp_path):
    answer("quantize", blocks, "--format", "nvfp4", "--data", run_folder / "rows.jsonl",
           "--samples", 2, "--out", tmp_path / "q")  # fmt: skip
    plain = without_family(tmp_path / "q", tmp_path / "plain")
    adopt_checkpoint(plain, {"small": {"hidden": 32}}, tmp_path / "adopted")
    family = star_elastic.load(tmp_path / "adopted")
    slice_checkpoint(tmp_path / "adopted", {"hidden": 32}, tmp_path / "slice")
    alone, _ = load_parent(tmp_path / "slice", family["small"].dtype)
    with torch.inference_mode():
        one, other = (m(input_ids=IDS).logits for m in (family["small"], alone))
    assert torch.allclose(one, other, rtol=1e-2, atol=1e-2)
    said = refusal("adopt", plain, "--size", "odd:hidden=40", "--out", tmp_path / "x")
    assert "size 'odd': hidden=40 ends inside a block of 16" in said and "use 32 or 48" in said
    (plain / MODELOPT_FILE).write_text("{}")
    assert "ModelOpt's layout" in refusal(
        "adopt", plain, "--size", "a:hidden=32", "--out", tmp_path / "x"
    )


# The grid


def test_the_grid_holds_all_sizes():
    axis_map = ROWS["moe"].axis_map
    one, other = ({"layers": kept, "hidden": 8} for kept in ((1, 1, 0, 1, 1), (1, 0, 0, 1, 0)))
    sizes = [axis_map.complete(Widths(widths)) for widths in (other, one, {"top_k": 1})]
    grid = grid_holding(sizes, axis_map)
    assert grid.choices == {"hidden": (12, 8), "layers": (5, 4, 2), "top_k": (2, 1)}
    for widths in sizes:
        chosen = {**widths, "layers": len(axis_map.kept_layers(widths))}
        found = grid.widths([chosen[place.axis] for place in grid.places])
        assert axis_map.complete(found) == widths
    assert grid_holding([axis_map.full], axis_map).choices == {}


def test_what_no_grid_holds_is_left_whole():
    """Layers that do not nest; hidden channels that are no multiple of another size's heads."""
    axis_map = ROWS["moe"].axis_map
    apart = [(1, 1, 0, 1, 1), (1, 1, 1, 1, 0)]
    sizes = [axis_map.complete(Widths({"layers": kept, "hidden": 8})) for kept in apart]
    grid = grid_holding(sizes, axis_map)
    assert (grid.choices, grid.depth) == ({"hidden": (12, 8)}, ())
    llama = ROWS["llama"].axis_map
    cut = {"hidden": 18, "heads": 2, "ffn": 4}  # 18 is no multiple of the parent's 4 heads
    assert grid_holding([llama.complete(Widths(cut))], llama).choices == {"ffn": (7, 4)}


# What is told


def test_people_are_told_that_nothing_was_trained(copied, tmp_path, capsys):
    out, size = tmp_path / "out", "--size=small:hidden=16,heads=2"
    main(["adopt", str(copied), size, "--out", str(out)])
    shown = capsys.readouterr()
    assert "note: nothing was trained" in shown.err and "star-elastic train" in shown.err
    main(["sizes", str(out)])
    text = capsys.readouterr().out
    assert f"adopted from {copied.name}: nothing was trained since" in text
    assert "widths from adopt: star-elastic adopt was told them" in text


def test_with_rows_every_size_is_held_against_the_checkpoint(copied, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    size = "--size=small:hidden=16,heads=2"
    told = answer("adopt", copied, size, "--data", rows, "--out", tmp_path / "out")
    verdict = told["verdict"]
    assert verdict == json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["held_out_rows"] == len(rows.read_text().splitlines())
    assert verdict["sizes"]["full"]["kl"] == pytest.approx(0, abs=1e-6)
    assert verdict["sizes"]["small"]["kl"] > 0.1
    assert verdict["reference"] == "its parent"


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["a"], "--size 'a' is not of the form name:widths; write for example --size 12b:hid"),
        (["a:"], "is not of the form name:widths"),
        ([":hidden=16"], "is not of the form name:widths"),
        (["a:hidden"], "--size a: widths 'hidden' is not of the form axis=number"),
        (["a:hidden=16,hidden=8"], "--size a: widths name hidden twice"),
        (["a:ffn=16", "a:ffn=8"], "--size names a twice; rename one"),
        (["a:colour=3"], "size 'a': axis 'colour' does not exist in this llama model; use hidden"),
        (["a:ffn=16", "b:ffn=99"], "size 'b': ffn=99 is outside 1 to 32; choose"),
        (["a:heads=3"], "size 'a': heads=3 is not a multiple of its 2 groups; use 2 or 4"),
        (["a:hidden=18"], "size 'a': hidden=18 is not a multiple of heads=4"),
        (["a:ffn=16/8"], "size 'a': ffn differs between layers, which llama's config.json cannot"),
        (["a:layers=0"], "size 'a': layers keeps none of the layers"),
        (["a:ffn=16", "b:ffn=16"], "sizes 'a' and 'b' have the same widths; leave one of them"),
        (["a:ffn=16", "b:ffn=16/16"], "sizes 'a' and 'b' have the same widths"),
        (["a:ffn=32"], "size 'a' has the parent's own widths, which are a size already, 'full'"),
        (["a/b:ffn=16"], "sizes has the name 'a/b'; use letters, digits"),
        (["full:ffn=16"], "size 'full' has the name that the parent's own widths go by"),
        (["a:ffn=16", "--full", "a"], "size 'a' has the name that the parent's own widths go by"),
        (["a:ffn=16", "--full", "x/y"], "sizes has the name 'x/y'"),
        (["a:ffn=16", "--data", "none.jsonl"], "none.jsonl"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(plain, tmp_path, options, said):
    sizes = [o for n, o in enumerate(options) if ":" in o or n == 0]
    more = [o for o in options if o not in sizes]
    given = [word for size in sizes for word in ("--size", size)]
    with nothing_changes_in(tmp_path):
        line = refusal("adopt", plain, *given, *more, "--out", tmp_path / "out")
    assert line.startswith("error: ") and "; " in line and said in line, line


def test_places_that_hold_no_parent_or_too_much(copied, tmp_path):
    size = ["--size", "a:ffn=16"]
    assert "is no directory here" in refusal("adopt", "x", *size, "--out", tmp_path / "out")
    config_alone = refusal("adopt", copied / "config.json", *size, "--out", tmp_path / "out")
    assert "is a file; name the checkpoint directory" in config_alone
    taken = refusal("adopt", copied, *size, "--out", copied)
    assert "exists already" in taken
    family = refusal("adopt", "bundled", "--size", "a:hidden=96", "--out", tmp_path / "out")
    assert "is a family already; cut widths of your own from it with star-elastic sl" in family
    edit_json(copied / "config.json", intermediate_size=40)
    apart = refusal("adopt", copied, *size, "--out", tmp_path / "out")
    assert "config.json" in apart and "restore the config.json that was saved with" in apart
    edit_json(copied / "config.json", intermediate_size=32, quantization_config={"bits": 4})
    assert "is quantised in a way" in refusal("adopt", copied, *size, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Nothing half written


class StopWhileWriting(Silent):
    """Whoever watches stops the work when some of it is written."""

    def advance(self, done: int, note: str = "") -> None:
        raise Interrupted("stopped")


def test_nothing_is_left_of_what_fails_or_is_stopped(copied, tmp_path):
    size, out = {"small": {"ffn": 16}}, tmp_path / "out"
    with nothing_changes_in(tmp_path):
        with pytest.raises(Interrupted):
            adopt_checkpoint(copied, size, out, progress=StopWhileWriting())
        with file_size_limit(20_000), pytest.raises(CheckpointError, match="cannot be written"):
            adopt_checkpoint(copied, size, out)
    rewrite(copied, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with nothing_changes_in(tmp_path), pytest.raises(CheckpointError, match="not finite"):
        adopt_checkpoint(copied, size, out)


def test_a_size_says_what_it_costs(plain, tmp_path):
    """What is recorded of a size is counted; another number is a damaged file."""
    manifest = adopt_checkpoint(plain, {"small": {"ffn": 16}}, tmp_path / "out")
    small = manifest.sizes["small"]
    wrong = replace(small, cost={**small.cost, "active": small.cost["active"] + 1}).to_json()
    edit_json(tmp_path / "out" / MANIFEST, sizes={"small": wrong})
    with pytest.raises(CheckpointError, match="is damaged"):
        load_manifest(tmp_path / "out", read_config(plain).axis_map)
