"""Where a checkpoint is computed and in which dtype: by default, by name, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import star_elastic
from star_elastic.checkpoints.tensors import save_tensors
from star_elastic.cli import main
from star_elastic.cost.count import Workload
from star_elastic.errors import ConfigError
from star_elastic.generate import family as families
from star_elastic.generate.caches import MAMBA
from star_elastic.generate.decode import BatchDecoder
from star_elastic.models.placement import DTYPES, choose_device, choose_dtype, name_of

HERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def stored(request, trained, tmp_path_factory):
    """A family whose weights are stored in a dtype that its config.json does not name."""
    path = tmp_path_factory.mktemp(request.param)
    for file in trained.elastic.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = path / "model.safetensors"
    kept = {"e_score_correction_bias"}  # stays in fp32, as routers have it
    tensors = {
        name: value if any(part in name for part in kept) else value.to(DTYPES[request.param])
        for name, value in load_file(weights).items()
    }
    save_tensors(weights, tensors, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype", None), config.pop("torch_dtype", None)
    (path / "config.json").write_text(json.dumps(config))
    return path, DTYPES[request.param]


def test_a_family_is_loaded_in_the_dtype_that_it_is_stored_in(stored):
    path, dtype = stored
    for options in ({}, {"dtype": None, "device": None}, {"dtype": "auto", "device": "auto"}):
        family = star_elastic.load(path, **options)
        assert family.parent.dtype == family["small"].dtype == dtype
        assert family.parent.device.type == HERE
    (result,) = family.generate("add 1 2", think="small", answer="large", max_new_tokens=12)
    assert result.token_ids
    for name, own in DTYPES.items():
        assert star_elastic.load(path, name, "cpu")["small"].dtype == own
        assert star_elastic.load(path, own, torch.device("cpu")).parent.dtype == own
        assert name_of(own) == name


def test_most_bytes_tell_the_dtype_of_a_checkpoint(tmp_path):
    def store(**tensors):
        save_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
        return choose_dtype("auto", tmp_path)

    wide, narrow = torch.zeros(8), torch.zeros(64, dtype=torch.bfloat16)
    codes = torch.zeros(4096, dtype=torch.uint8)
    assert store(a=wide, b=narrow) == torch.bfloat16
    assert store(a=torch.zeros(64), b=narrow) == torch.float32
    assert store(a=wide, b=narrow, c=codes) == torch.bfloat16  # what is not quantised
    assert store(c=codes) == torch.float32
    assert store(c=torch.zeros(4, dtype=torch.float64)) == torch.float32


def test_a_gpu_is_the_default_where_there_is_one(monkeypatch):
    assert choose_device() == choose_device(None) == HERE
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == "cuda"
    assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == "cpu"


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99", "", "cpu:x"])
def test_a_device_that_cannot_be_used_is_one_line(trained, device):
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used here") as caught:
        star_elastic.load(trained.elastic, device=device)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def asked(trained, tmp_path_factory):
    """Every command that runs a model, with what it needs besides."""
    work = tmp_path_factory.mktemp("asked")
    rows, parent = trained.elastic.parents[1] / "rows.jsonl", trained.elastic.parents[1] / "parent"
    brief = ["--samples", "2", "--context", "32"]
    table = ["--seconds", "0", "--context", "8"]
    return work, {
        "generate": ["generate", trained.elastic, "add 1 2", "--max-new-tokens", "4"],
        "rank": ["rank", parent, "--data", rows, *brief, "--out", work / "s.safetensors"],
        "latency": ["latency", parent, *table, "--out", work / "t.json"],
        "latency --sizes": ["latency", trained.elastic, "--sizes", *table, "--out",
                            work / "l.json"],
        "quantize": ["quantize", trained.elastic, "--format", "fp8", "--data", rows, *brief,
                     "--out", work / "q"],
        "eval": ["eval", trained.elastic, "--problems", "1", "--validation", "1", "--budgets",
                 "none", "--dials", "none", "--sizes", "small", "--max-new-tokens", "9", "--out",
                 work / "e"],
    }  # fmt: skip


COMMANDS = ["generate", "rank", "latency", "latency --sizes", "quantize", "eval"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "value"), [("--device", "cuda:99"), ("--device", "moon"), ("--dtype", "int8")]
)
def test_every_command_refuses_what_cannot_be_in_one_line(asked, capsys, command, option, value):
    work, commands = asked
    before = set(work.iterdir())
    with pytest.raises(SystemExit) as ended:
        main([*map(str, commands[command]), option, value])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and not shown.out
    assert f"{option[2:]}={value!r}" in shown.err and shown.err.count("\n") == 1
    assert set(work.iterdir()) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_computes_in_the_dtype_that_is_asked_for(
    asked, monkeypatch, capsys, command, tmp_path
):
    """Seen where the model is put together."""
    from star_elastic.models import load as loading
    from star_elastic.rewrite import family as quantise

    used, load = [], loading.load_parent

    def watched(path, dtype=torch.float32, device="cpu", **more):
        used.append((dtype, device))
        return load(path, dtype, device, **more)

    for module in (loading, families, quantise):
        monkeypatch.setattr(module, "load_parent", watched)
    arguments = [str(part) for part in asked[1][command]]
    arguments = [str(tmp_path / "out") if "asked" in a else a for a in arguments]
    main([*arguments, "--dtype", "bfloat16", "--device", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    if command == "latency":  # which measures models without weights
        assert json.loads((tmp_path / "out").read_text())["dtype"] == "bfloat16"
    else:
        assert used and set(used) == {(torch.bfloat16, "cpu")}
    assert result


@torch.inference_mode()
def test_states_keep_their_dtypes_wherever_caches_go(tiny_checkpoint):
    """In a bf16 family all are bf16 but the SSM states, which transformers keeps in fp32."""
    family = star_elastic.load(tiny_checkpoint, "bfloat16", "cpu")
    for size in family:
        decoder = BatchDecoder(family[size])
        decoder.prefill([[5, 6, 7], [8, 9, 10, 11]])
        for token in (5, 6):
            decoder.step([token, token])
        row = decoder.take(0)
        decoder.resume([(row, 5, [7])])  # beside the rows that are there
        decoder.keep([2])
        for layer in (*row.layers, *decoder.take(0).layers):
            if layer is not None:
                assert layer.first.dtype == torch.bfloat16
                wide = torch.float32 if layer.kind == MAMBA else torch.bfloat16
                assert layer.second.dtype == wide
        work = Workload(context=6, batch=1, dtype_bytes=2)
        assert decoder.num_bytes == family.cost(size, work).state_bytes
