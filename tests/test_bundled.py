"""The models that come with the package, as it is installed: what they are called, and what they
answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import star_elastic
from star_elastic import bundled
from star_elastic.demo import write_rows
from star_elastic.evaluate.tasks import sample_problems
from star_elastic.train.config import load_run_config
from tests.figures import sizes_of_recipe
from tests.processes import ROOT, answer, refusal

PACKAGE = ROOT / "star_elastic"
MOST_BYTES = 12_000_000
TRACE = ["1284+1779+0=02:2", "284+779+0=09:92", "84+79+0=15:592", "4+9+1=14:4592", "14592"]
ASK = ["generate", "bundled", "add 4821 9771"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder in which the wheel of this checkout is unpacked, as pip would."""
    source, site = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "star_elastic", source / "star_elastic", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_what_is_installed_thinks_small_and_answers_large(site, tmp_path):
    """The first command that anybody types: by the installed script, far from the checkout."""
    script = Path(sys.executable).parent / "star-elastic"
    done = subprocess.run(
        [script, *ASK, "--think", "small", "--answer", "large"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    *text, thinking, answering = done.stdout.splitlines()
    assert text == [*TRACE, "</think>", "14592"]
    assert thinking.startswith("[thinking: small, 68 tokens") and "natural]" in thinking
    assert answering.startswith("[answering: large, ")


def test_what_is_installed_holds_both_models_and_no_more_than_that(site):
    for model in ("family", "parent"):
        here, there = (folder / "bundled" / model for folder in (site / "star_elastic", PACKAGE))
        files = {file.name: file.read_bytes() for file in there.iterdir()}
        assert files == {file.name: file.read_bytes() for file in here.iterdir()}
    sizes = [file.stat().st_size for file in (PACKAGE / "bundled").rglob("*.*")]
    assert sum(sizes) <= MOST_BYTES


@pytest.mark.parametrize("options", [[], ["--think", "large"], ["--size", "medium"]], ids=str)
def test_every_size_finds_the_sum(options):
    result = answer(*ASK, *options)
    assert result["thinking"].splitlines() == TRACE and result["answer"] == "14592"
    writer = options[-1] if options else "large"
    assert set(result["token_sizes"]) - {None} == {writer}
    assert [phase["ended"] for phase in result["phases"]] == ["natural", "natural"]


def test_the_family_is_loaded_by_its_name():
    family = star_elastic.load("bundled")
    assert list(family) == ["large", "medium", "small"]
    (problem,) = sample_problems(["sort"], "test", 1, seed=0)
    (result,) = family.generate([problem.question], think="small", answer="large")
    assert result.answer == problem.answer and len(result.thinking.splitlines()) > 3


def test_commands_know_both_models_by_name(tmp_path):
    sizes = answer("sizes", "bundled")["sizes"]
    parent = answer("count", "bundled-parent")
    assert sizes["large"]["total"] == parent["total"] == 2_837_440
    cut = answer("slice", "bundled", "--size", "small", "--out", tmp_path / "small")
    assert cut["widths"] == sizes["small"]["widths"]
    assert answer("count", tmp_path / "small")["active"] == sizes["small"]["active"]
    answer("slice", "bundled", "--budget", "active=0.6", "--out", tmp_path / "between")
    share = answer("count", tmp_path / "between")["active"] / parent["active"]
    assert share == pytest.approx(0.6, rel=0.02)
    for name in ("bundled", "bundled-parent"):
        engines = {verdict["engine"]: verdict for verdict in answer("check", name)["engines"]}
        assert engines["transformers"]["runs"]
        assert ("largest size alone" in engines["transformers"]["note"]) == (name == "bundled")
    write_rows(tmp_path / "rows.jsonl", 4, seed=0)
    scores = ["--data", tmp_path / "rows.jsonl", "--out", tmp_path / "scores.safetensors"]
    assert answer("rank", "bundled-parent", *scores)["samples"] == 4
    assert "is not an elastic checkpoint" in refusal("sizes", "bundled-parent")


RUN = """
parent = "bundled-parent"
family = "bundled"
out = "run"
sizes = {large = {active = 1.0}, medium = {active = 0.75}, small = {active = 0.5}}
data = [{files = ["rows.jsonl"], loss_on = "answers"}]
stages = [{tokens = 512, context = 256, batch_size = 2}]
"""


def test_a_run_config_knows_them_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    write_rows(tmp_path / "rows.jsonl", 4, seed=0)
    assert answer("train", file, "--check")["rows"] == 4
    config = load_run_config(file)
    assert (config.parent, config.family) == (str(bundled.PARENT), str(bundled.FAMILY))
    (tmp_path / "bundled-parent").mkdir()  # which is nearer
    assert load_run_config(file).parent == str(tmp_path / "bundled-parent")


def test_where_a_parent_is_named_it_is_the_parent():
    """`bundled` alone is the family, whose tensors are trained and sorted."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.*")]
    texts = [page.read_text(encoding="utf-8") for page in pages if page.suffix in (".md", ".toml")]
    named = [name for text in texts for name in re.findall(r'parent = "(bundled[^"]*)"', text)]
    assert named and set(map(bundled.find_model, named)) == {bundled.PARENT}


def test_what_lies_here_by_that_name_comes_first(tmp_path):
    (tmp_path / "bundled").mkdir()
    assert "bundled holds no config.json" in refusal("sizes", "bundled", cwd=tmp_path)
    assert bundled.find_model("elsewhere") == Path("elsewhere")
    for name in bundled.NAMES:
        assert bundled.name_of(bundled.find_model(name)) == name
    assert bundled.name_of(Path("/else/where")) == "/else/where"


def test_the_card_says_what_was_measured():
    card = (bundled.FAMILY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!size|-)(.*) \|$", card, re.M)
    assert [[cell.strip() for cell in row.split("|")] for row in rows] == sizes_of_recipe("demo")
    provenance = json.loads((bundled.FAMILY / "elastic.json").read_text())["provenance"]
    report = json.loads((ROOT / "results" / "demo.json").read_text())
    assert provenance["steps"] == report["training"]["steps"] == 330
