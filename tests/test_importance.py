"""Importance: scores against plain loops, orders, baselines, files, and the road to a cut."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from star_elastic.architectures import architecture_of
from star_elastic.axes import Axis, AxisMap, Block, axis_keys
from star_elastic.cost.count import CostModel
from star_elastic.data.sources import Batch
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.importance.depth import rank_layers
from star_elastic.importance.estimate import estimate_scores
from star_elastic.importance.files import ScoreInfo, load_scores, save_scores
from star_elastic.importance.orders import magnitude_scores, orders_from_scores, random_orders
from star_elastic.models.submodel import build_submodel
from star_elastic.nesting.slice import check_orders, slice_state, sort_state
from star_elastic.progress import Silent
from tests.architectures import fixed_config
from tests.laws.parents import Parent, assert_equal, make_parent, precision
from tests.processes import ROOT, run_script

HYBRID = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*-",
    "num_hidden_layers": 4,
    "vocab_size": 20,
    "hidden_size": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 9,
    "mamba_num_heads": 6,
    "mamba_head_dim": 3,
    "n_groups": 2,
    "ssm_state_size": 4,
    "conv_kernel": 3,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 7,
    "moe_shared_expert_intermediate_size": 5,
}
LATENT = {
    **HYBRID,
    "hybrid_override_pattern": "EM*E",
    "moe_latent_size": 5,
    "mlp_bias": True,
    "use_bias": True,
    "norm_topk_prob": False,
    "topk_group": 1,
}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "vocab_size": 20,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 10,
    "tie_word_embeddings": True,
    "mlp_bias": True,
}
CONFIGS = {"hybrid": HYBRID, "latent": LATENT, "llama": LLAMA}


@pytest.fixture(params=CONFIGS, scope="module")
def parent(request) -> Parent:
    """A random float64 parent of each kind. Tests must leave it as it is."""
    return make_parent(CONFIGS[request.param], 0, torch.float64)


def random_samples(lengths: tuple[int, ...], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, (length,), generator=generator) for length in lengths]


def padded(samples: list[torch.Tensor], *, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples side by side, padded on the right."""
    length = max(map(len, samples))
    ids = torch.full((len(samples), length), fill)
    mask = torch.zeros(len(samples), length, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
    return ids, mask


def scores_of(parent: Parent, *batches: tuple[torch.Tensor, torch.Tensor]):
    with precision(torch.float64):
        return estimate_scores(parent.model, parent.axis_map, batches)


def assert_same_scores(found, expected, *, rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(
            found[key], expected[key], rtol=rtol, atol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


def written(heads: torch.Tensor, project: torch.nn.Linear, size: int) -> torch.Tensor:
    """Norms (T, heads) of what each head of `size` channels adds to the projection's output."""
    pairs = zip(heads.split(size, -1), project.weight.split(size, 1), strict=True)
    return torch.stack([(y @ w.T).norm(dim=-1) for y, w in pairs], -1)


class Naive:
    """The scores' definition in plain loops: each sample, token, head and expert by itself."""

    def __init__(self, parent: Parent):
        self.parent = parent
        self.model = parent.model.model
        self.samples: list[dict[str, list[list[float]]]] = []
        self.routed: dict[int, dict[int, list[float]]] = {}

    def see(self, place: str, rows: torch.Tensor) -> None:
        self.samples[-1].setdefault(place, []).extend(rows.abs().tolist())

    def attention(self, q, k, v, num_heads: int, num_kv: int) -> torch.Tensor:
        """Causal attention, head by head and token by token; q (T, heads * P)."""
        tokens, size = len(q), q.shape[1] // num_heads
        out = torch.zeros_like(q)
        for head in range(num_heads):
            mine = slice(head * size, (head + 1) * size)
            kv = head // (num_heads // num_kv)
            theirs = slice(kv * size, (kv + 1) * size)
            for t in range(tokens):
                weights = torch.softmax(k[: t + 1, theirs] @ q[t, mine] / math.sqrt(size), 0)
                out[t, mine] = weights @ v[: t + 1, theirs]
        return out

    def hybrid(self, ids: torch.Tensor) -> None:
        h = self.model.embeddings(ids)[None]
        for layer, letter in enumerate(self.parent.config["hybrid_override_pattern"]):
            block = self.model.layers[layer]
            normed = block.norm(h)
            x = normed[0]
            self.see(f"hidden/{layer}", x)
            mixer = block.mixer
            if letter == "M":
                seen: list[torch.Tensor] = []
                hook = mixer.out_proj.register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
                mixer(normed)
                hook.remove()
                size = self.parent.config["mamba_head_dim"]
                self.see(f"layers.{layer}.ssm_heads", written(seen[0][0], mixer.out_proj, size))
            elif letter == "*":
                q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
                heads = self.attention(q, k, v, 6, 2)
                self.see(f"layers.{layer}.heads", written(heads, mixer.o_proj, mixer.head_dim))
            elif letter == "E":
                self.see(f"layers.{layer}.shared_ffn", F.relu(mixer.shared_experts.up_proj(x)) ** 2)
                _, gates, chosen = mixer.gate(x)
                inner = mixer.fc1_latent_proj(x)
                for t in range(len(x)):
                    for gate, expert in zip(gates[t].tolist(), chosen[t].tolist(), strict=True):
                        act = F.relu(mixer.experts.up_proj[expert] @ inner[t]) ** 2
                        self.see(f"layers.{layer}.expert_ffn", act[None])
                        norm = (mixer.experts.down_proj[expert] @ act).norm().item()
                        self.routed.setdefault(layer, {}).setdefault(expert, []).append(gate * norm)
            else:
                self.see(f"layers.{layer}.ffn", F.relu(mixer.up_proj(x)) ** 2)
            h = h + (mixer(normed)[0] if letter == "*" else mixer(normed))
        self.see("hidden/last", self.model.norm_f(h)[0])

    def llama(self, ids: torch.Tensor) -> None:
        h = self.model.embed_tokens(ids)
        cos, sin = self.model.rotary_emb(h[None], torch.arange(len(ids))[None])
        for layer, block in enumerate(self.model.layers):
            x = block.input_layernorm(h)
            self.see(f"hidden/{layer}/in", x)
            attn = block.self_attn
            q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
            split = (x.unflatten(1, (-1, attn.head_dim)).transpose(0, 1)[None] for x in (q, k))
            rotated = apply_rotary_pos_emb(*split, cos, sin)
            q, k = (x[0].transpose(0, 1).flatten(1) for x in rotated)
            heads = self.attention(q, k, v, 6, 2)
            self.see(f"layers.{layer}.heads", written(heads, attn.o_proj, attn.head_dim))
            h = h + attn.o_proj(heads)
            x = block.post_attention_layernorm(h)
            self.see(f"hidden/{layer}/post", x)
            act = F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
            self.see(f"layers.{layer}.ffn", act)
            h = h + block.mlp.down_proj(act)
        self.see("hidden/last", self.model.norm(h))

    @torch.no_grad()
    def scores(self, samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        for ids in samples:
            self.samples.append({})
            self.llama(ids) if self.parent.axis_map.model_type == "llama" else self.hybrid(ids)
        found: dict[str, list[float]] = {}
        for place in self.samples[0]:
            columns = [list(zip(*sample[place], strict=True)) for sample in self.samples]
            channel = [
                math.sqrt(sum((sum(one[c]) / len(one[c])) ** 2 for one in columns))
                for c in range(len(columns[0]))
            ]
            key = place.split("/")[0]
            axis = self.parent.axis_map.axes[key.rsplit(".", 1)[-1]]
            unit = len(channel) // axis.size
            units = [
                math.sqrt(sum(s**2 for s in channel[i * unit : (i + 1) * unit]))
                for i in range(axis.size)
            ]
            found[key] = [
                a + b for a, b in zip(found.get(key, [0.0] * axis.size), units, strict=True)
            ]
        for layer, experts in self.routed.items():
            means = {e: sum(values) / len(values) for e, values in experts.items()}
            found[f"layers.{layer}.experts"] = [means.get(e, 0.0) for e in range(8)]
        return {key: torch.tensor(v, dtype=torch.float64) for key, v in found.items()}


def test_scores_equal_plain_loops(parent: Parent) -> None:
    samples = random_samples((9, 4, 7))
    with precision(torch.float64):
        expected = Naive(parent).scores(samples)
    assert expected.keys() == axis_keys(parent.axis_map).keys()
    assert_same_scores(scores_of(parent, padded(samples)), {k: expected[k] for k in expected})


def test_scores_do_not_depend_on_batching(parent: Parent) -> None:
    samples = random_samples((9, 1, 7, 5))
    one_by_one = scores_of(parent, *(padded([sample]) for sample in samples))
    together = scores_of(parent, padded(samples))
    reversed_pairs = scores_of(parent, padded(samples[:1:-1]), padded(samples[1::-1]))
    assert_same_scores(together, one_by_one)
    assert_same_scores(reversed_pairs, one_by_one)


def test_masked_tokens_are_ignored(parent: Parent) -> None:
    samples = random_samples((9, 4))
    expected = scores_of(parent, padded(samples, fill=0))
    assert_same_scores(scores_of(parent, padded(samples, fill=13)), expected)
    nothing = (torch.full((2, 5), 3), torch.zeros(2, 5, dtype=torch.int64))
    assert_same_scores(scores_of(parent, padded(samples), nothing), expected)
    ids, mask = padded(samples)
    other = scores_of(parent, (ids, torch.ones_like(mask)))
    assert any(not torch.allclose(other[key], expected[key]) for key in expected)


def test_progress_counts_samples_and_unmasked_tokens(parent: Parent) -> None:
    seen: list[tuple[int, int]] = []
    batches = [padded(random_samples((4, 2))), padded(random_samples((3,)))]
    with precision(torch.float64):
        estimate_scores(parent.model, parent.axis_map, batches, lambda *now: seen.append(now))
    assert seen == [(2, 6), (3, 9)]


def is_unit_row(key: str, name: str) -> bool:
    """Whether row u of a tensor alone makes unit u of the axis what it is."""
    if name == "hidden":
        return "norm" in key and ".mixer." not in key
    if name == "ffn":
        return ("up_proj" in key or "gate_proj" in key) and "expert" not in key
    return name == "shared_ffn" and "shared_experts.up_proj" in key


def kill(parent: Parent, name: str, unit: int) -> None:
    """Makes one unit of an axis useless in every layer that has it."""
    axis = parent.axis_map.axes[name]
    with torch.no_grad():
        for key, tensor in parent.state.items():
            if is_unit_row(key, name):
                tensor[unit] = 0
            elif name == "expert_ffn" and key.endswith("experts.up_proj"):
                tensor[:, unit] = 0
            elif name == "experts" and key.endswith("e_score_correction_bias"):
                tensor.zero_()  # or another expert may never be chosen either
                tensor[unit] = -100
            elif name == "ssm_heads" and key.endswith("out_proj.weight"):
                size = parent.config["mamba_head_dim"]
                tensor[:, unit * size : (unit + 1) * size] = 0
            elif name == "heads" and key.endswith("q_proj.weight"):
                # It looks everywhere at once and averages to nothing; the others pick one token.
                size = tensor.shape[0] // axis.size
                tensor *= 100
                tensor[unit * size : (unit + 1) * size] = 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[("hybrid", axis) for axis in ("hidden", "ffn", "experts", "expert_ffn", "shared_ffn")],
        *[("hybrid", axis) for axis in ("ssm_heads", "heads")],
        *[("llama", axis) for axis in ("hidden", "ffn", "heads")],
    ],
)
def test_planted_dead_unit_is_ranked_last(kind: str, name: str) -> None:
    parent = make_parent(CONFIGS[kind], 3, torch.float64)
    axis = parent.axis_map.axes[name]
    batch = padded(random_samples((60, 50)))
    keys = [key for key, (axis_name, _) in axis_keys(parent.axis_map).items() if axis_name == name]
    before = orders_from_scores(scores_of(parent, batch), parent.axis_map)
    unit = before[keys[0]][0].item()  # the best of the first group
    kill(parent, name, unit)
    scores = scores_of(parent, batch)
    orders = orders_from_scores(scores, parent.axis_map)
    last = axis.size // axis.num_groups - 1
    assert all(orders[key][last] == unit for key in keys), [orders[key].tolist() for key in keys]
    if name != "heads":
        assert all(scores[key][unit] == 0 for key in keys)


def test_sorting_by_every_kind_of_order_is_invisible(parent: Parent) -> None:
    scores = scores_of(parent, padded(random_samples((9, 7))))
    every = {
        "importance": orders_from_scores(scores, parent.axis_map),
        "magnitude": orders_from_scores(
            magnitude_scores(parent.state, parent.axis_map), parent.axis_map
        ),
        "random": random_orders(parent.axis_map, 5),
    }
    with precision(torch.float64), torch.no_grad():
        expected = parent.model(input_ids=parent.ids).logits
        for name, orders in every.items():
            assert orders.keys() == axis_keys(parent.axis_map).keys()
            check_orders(orders, parent.axis_map)
            assert any(not torch.equal(o, torch.arange(len(o))) for o in orders.values())
            sorted_state = sort_state(parent.state, parent.axis_map, orders)
            logits = torch.func.functional_call(parent.model, sorted_state, (parent.ids,)).logits
            assert_equal(logits, expected, what=name)


def test_scores_move_with_the_units(parent: Parent) -> None:
    """The scores of a sorted parent are the sorted scores, so ranking twice changes nothing."""
    batch = padded(random_samples((9, 7)))
    scores = scores_of(parent, batch)
    orders = orders_from_scores(scores, parent.axis_map)
    moved = make_parent(parent.config, 0, torch.float64)
    state = sort_state(parent.state, parent.axis_map, orders)
    moved.model.load_state_dict(state, strict=False)
    assert_same_scores(scores_of(moved, batch), {key: scores[key][orders[key]] for key in scores})


def test_scores_of_a_submodel_use_the_sliced_table(parent: Parent) -> None:
    """`AxisMap.at` cuts the probes too."""
    ranked = {name: a for name, a in parent.axis_map.axes.items() if a.ranked}
    widths = {name: a.size - a.num_groups for name, a in ranked.items()}
    widths["hidden"] = parent.axis_map.axes["hidden"].size // 2
    complete = parent.axis_map.complete(widths)
    sliced = parent.axis_map.at(complete)
    own = parent.architecture.axis_map(parent.architecture.config_at(parent.config, complete))
    assert sliced.probes == own.probes
    submodel = build_submodel(parent.model, parent.config, complete)
    with precision(torch.float64):
        scores = estimate_scores(submodel, sliced, [padded(random_samples((9, 7)))])
    assert {key: len(score) for key, score in scores.items()} == {
        key: complete[name] for key, (name, _) in axis_keys(parent.axis_map).items()
    }


def num_hooks(parent: Parent) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parent.model.modules())


def test_the_model_is_left_as_it_was(parent: Parent) -> None:
    before = num_hooks(parent)
    parent.model.train()
    try:
        scores_of(parent, padded(random_samples((4,))))
        assert parent.model.training
    finally:
        parent.model.eval()
    scores_of(parent, padded(random_samples((4,))))
    assert not parent.model.training
    assert num_hooks(parent) == before
    assert all(p.grad is None and p.requires_grad for p in parent.model.parameters())

    def broken():
        yield padded(random_samples((4,)))
        assert num_hooks(parent) > before
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        estimate_scores(parent.model.float(), parent.axis_map, broken())
    parent.model.double()
    assert num_hooks(parent) == before


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.down_proj"),
        ("hybrid", "model.layers.1.mixer.experts.down_proj", r"model\.layers\.[12]\."),
    ],
)
def test_activations_that_are_not_finite_are_refused(kind: str, name: str, place: str) -> None:
    parent = make_parent(CONFIGS[kind], 0, torch.float32)
    with torch.no_grad():
        parent.state[name].fill_(math.nan)
    with pytest.raises(CheckpointError, match=f"activations at {place}.* not finite") as error:
        estimate_scores(parent.model, parent.axis_map, [padded(random_samples((6,)))])
    assert "\n" not in str(error.value)
    assert num_hooks(parent) == num_hooks(make_parent(CONFIGS[kind], 0, torch.float32))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no tokens"),
        ([(torch.zeros(1, 3).long(), torch.zeros(1, 3).long())], "no tokens"),
        ([(torch.tensor([[1, 20]]), torch.ones(1, 2).long())], "ids 1 to 20 .* vocabulary of 20"),
        ([(torch.tensor([[1, 2]]), torch.ones(2).long())], r"ids \(1, 2\) and mask \(2,\)"),
    ],
)
def test_calibration_data_that_cannot_be_used(parent: Parent, batches, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate_scores(parent.model, parent.axis_map, batches)


@given(st.data())
def test_orders_fall_inside_each_group(data) -> None:
    groups, per_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    axis = Axis("heads", groups * per_group, groups, layers=(0,))
    axis_map = AxisMap("any", {"heads": axis}, Block(), (), Block())
    few = st.sampled_from([0.0, 0.25, 1.0, 7.0])
    values = data.draw(st.lists(few, min_size=axis.size, max_size=axis.size))
    (order,) = orders_from_scores({"layers.0.heads": torch.tensor(values)}, axis_map).values()
    check_orders({"layers.0.heads": order}, axis_map)
    for group in order.reshape(groups, per_group).tolist():
        ranks = [(-values[unit], unit) for unit in group]
        assert ranks == sorted(ranks), "falling scores, equal ones in their old sequence"


def test_random_orders_depend_on_the_seed_alone(parent: Parent) -> None:
    torch.manual_seed(1)
    first = random_orders(parent.axis_map, 7)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again, other = random_orders(parent.axis_map, 7), random_orders(parent.axis_map, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    check_orders(first, parent.axis_map)


def test_magnitude_is_what_a_cut_takes_away(parent: Parent) -> None:
    """Cutting one axis removes exactly the squares of the units that it drops."""
    axis_map = parent.axis_map
    scores = magnitude_scores(parent.state, axis_map)
    orders = orders_from_scores(scores, axis_map)
    sorted_state = sort_state(parent.state, axis_map, orders)

    def squares(state) -> float:
        specs = axis_map.tensors
        return sum(state[n].square().sum().item() for n in specs if not specs[n].is_buffer)

    for name, axis in axis_map.axes.items():
        if not axis.ranked:
            continue
        # Not `complete`: transformers' rule hidden % heads == 0 is no matter here.
        widths = axis_map.full.replace(**{name: axis.size - axis.num_groups})
        kept = slice_state(sorted_state, axis_map, widths)
        dropped = 0.0
        for key, (axis_name, _) in axis_keys(axis_map).items():
            if axis_name == name:
                lowest = scores[key].reshape(axis.num_groups, -1).min(dim=1).values
                dropped += lowest.square().sum().item()
        assert dropped == pytest.approx(squares(sorted_state) - squares(kept), rel=1e-9), name


def some_scores(axis_map: AxisMap) -> dict[str, torch.Tensor]:
    return {
        key: torch.rand(axis_map.axes[name].size, dtype=torch.float64)
        for key, (name, _) in axis_keys(axis_map).items()
    }


INFO = ScoreInfo(num_samples=3, num_tokens=20, source="some text", weights="0123456789abcdef")


def test_scores_survive_the_disk(parent: Parent, tmp_path: Path) -> None:
    scores = some_scores(parent.axis_map)
    save_scores(tmp_path / "scores.safetensors", scores, parent.axis_map, INFO)
    loaded, info = load_scores(tmp_path / "scores.safetensors", parent.axis_map)
    assert info == INFO
    assert list(loaded) == list(axis_keys(parent.axis_map))
    assert all(torch.equal(loaded[key], scores[key]) for key in scores)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]
    # Files of before digests were kept, which runs that were stopped go on with.
    with safe_open(tmp_path / "scores.safetensors", framework="pt") as handle:
        metadata = {k: v for k, v in handle.metadata().items() if k != "weights"}
    save_file(scores, tmp_path / "earlier.safetensors", metadata)
    loaded, info = load_scores(tmp_path / "earlier.safetensors", parent.axis_map)
    assert info == replace(INFO, weights="") and list(loaded) == list(axis_keys(parent.axis_map))


def test_scores_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    hybrid = make_parent(HYBRID, 0, torch.float32).axis_map
    llama = make_parent(LLAMA, 0, torch.float32).axis_map
    wider = make_parent({**LLAMA, "intermediate_size": 12}, 0, torch.float32).axis_map
    deeper = make_parent({**LLAMA, "num_hidden_layers": 3}, 0, torch.float32).axis_map
    file, scores = tmp_path / "scores.safetensors", some_scores(llama)

    def refused(message: str, call, *arguments) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            call(*arguments)
        assert "\n" not in str(error.value)

    refused("does not exist", load_scores, file, llama)
    save_scores(file, scores, llama, INFO)
    refused("scores of a llama model, this one is nemotron_h", load_scores, file, hybrid)
    refused(r"'layers.0.ffn' has shape \(10,\) but the model has 12", load_scores, file, wider)
    refused("lacks the score 'layers.2.ffn'", load_scores, file, deeper)
    bad = {**scores, "hidden": scores["hidden"] * math.nan}
    refused("'hidden' holds values that are negative or not finite", orders_from_scores, bad, llama)
    refused("negative", orders_from_scores, {"hidden": -scores["hidden"]}, llama)
    refused("'layers.0.experts' belongs to no axis", orders_from_scores,
            {"layers.0.experts": scores["hidden"]}, llama)  # fmt: skip
    refused("lacks the score 'hidden'", save_scores, file, {}, llama, INFO)
    refused("cannot be written", save_scores, tmp_path / "no" / "where", scores, llama, INFO)
    save_file({"hidden": torch.ones(2)}, file)
    refused("holds no importance scores", load_scores, file, llama)
    file.write_bytes(b"no safetensors file")
    refused("cannot be read", load_scores, file, llama)


@pytest.mark.long
def test_the_recipe_runs_on_a_tiny_model(tmp_path: Path) -> None:
    script = "recipes/smollm2/rank_and_cut.py"
    result = run_script(script, "--work", tmp_path, "--smoke", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "smollm2_cuts.json").read_text())
    assert report["calibration"]["tokens"] == 640
    assert all(error <= 1e-5 for error in report["checks"].values()) and len(report["checks"]) == 2
    cuts = report["cuts"]
    assert {cut["order"] for cut in cuts} == {"importance", "magnitude", "random 0", "random 1"}
    removed = [
        cut["removed"] for cut in cuts if cut["axes"] == "ffn" and cut["order"] == "magnitude"
    ]
    assert removed == pytest.approx([0.1, 0.2, 0.3], abs=0.03)
    assert len({cut["nats"] for cut in cuts if cut["axes"] == "heads"}) == 8
    assert (tmp_path / "smollm2_cuts.png").stat().st_size > 10_000
    assert "| ffn | ffn " in result.stdout
    assert str(tmp_path) not in (tmp_path / "smollm2_cuts.json").read_text()


SMOLLM2 = {
    "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 49152, "hidden_size": 576,
    "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "tie_word_embeddings": True,
}  # fmt: skip
"""SmolLM2-135M's published shape."""


def test_the_committed_result_counts_as_the_table_does() -> None:
    report = json.loads((ROOT / "results" / "smollm2_cuts.json").read_text())
    assert "recipes/smollm2/rank_and_cut.py --work WORK" in report["command"]
    axis_map = architecture_of(SMOLLM2).axis_map(SMOLLM2)
    full = CostModel(axis_map).full.total
    assert report["parent"]["parameters"] == full
    assert len(report["cuts"]) > 20
    for cut in report["cuts"]:
        counted = CostModel(axis_map).count(axis_map.complete(cut["widths"])).total
        assert cut["parameters"] == counted < full
        assert cut["removed"] == pytest.approx(1 - counted / full)
        above = cut["nats"] - report["parent"]["nats"]
        assert cut["nats_above_parent"] == pytest.approx(above)


# Whole layers


def plain_ranking(parent: Parent, ids: torch.Tensor) -> tuple[int, ...]:
    """The ranking by its definition: remove the layer whose loss changes the logits least."""

    def logits(kept):
        mask = tuple(int(layer in kept) for layer in every)
        return build_submodel(parent.model, parent.config, {"layers": mask})(input_ids=ids).logits

    every = list(parent.axis_map.axes["layers"].layers)
    attention = {state.layer for state in parent.axis_map.states if state.per_token}
    whole, kept, removed = logits(every), list(every), []
    while len(kept) > 1:
        changes = {}
        for layer in kept:
            rest = [other for other in kept if other != layer]
            if attention & set(rest):
                changes[layer] = (whole - logits(rest)).square().sum() / whole.square().sum()
        least = min(changes, key=changes.__getitem__)
        kept.remove(least)
        removed.append(least)
    return (*kept, *reversed(removed))


class Redundant:
    """A model of three layers of which the first two say the same, and the third half as much."""

    device = torch.device("cpu")

    def __init__(self, kept):
        self.said = torch.tensor([float(bool({0, 1} & set(kept))), 0.5 * (2 in kept)])

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.said.expand(*input_ids.shape, 2))


def test_a_layer_counts_anew_when_what_stood_in_for_it_is_gone():
    config = {**fixed_config("llama"), "num_hidden_layers": 3}
    ids = torch.ones(1, 4, dtype=torch.long)
    model: Any = Redundant(range(3))
    found = rank_layers(model, config, [Batch(ids, ids)], Silent(), Redundant)
    # Without each alone the first two change nothing, and both would go before the third.
    assert found == (0, 2, 1)


@torch.no_grad()
def test_layers_are_ranked_by_what_their_loss_changes(parent):
    ids = torch.randint(20, (2, 10), generator=torch.Generator().manual_seed(5))
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long)], dim=1)
    batches = [Batch(padded[:1], mask[:1]), Batch(padded[1:], mask[1:])]
    every = parent.axis_map.axes["layers"].layers

    def without(kept):
        mask = tuple(int(layer in kept) for layer in every)
        return build_submodel(parent.model, parent.config, {"layers": mask})

    with precision(torch.float64):
        found = rank_layers(parent.model, parent.config, batches, Silent(), without)
        assert found == plain_ranking(parent, ids)
    assert sorted(found) == list(every)
    nothing = [Batch(padded, torch.zeros_like(mask))]
    with pytest.raises(ConfigError, match="the calibration data has no tokens"):
        rank_layers(parent.model, parent.config, nothing, Silent(), without)
