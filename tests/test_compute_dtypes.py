"""Under autocast every large product has bf16 operands; what stays in fp32 is listed with a reason.

The trainer's own step is watched, below autograd and autocast: teacher, students, losses, forward
and backward.
"""

from __future__ import annotations

import pytest
import torch

from tests.products import Product, Products
from tests.tiny_trainer import MOE, VOCAB, make_config, make_trainer

LARGE = 30_000
"""Multiplications from which a product counts as large: below are rotary angles and the router's
small networks, above every product of a layer with more than a few tokens."""
TOKENS = 4 * 96
"""Of a step."""


def of_the_loss(product: Product) -> bool:
    """The head's product and its gradients, whose result is fp32: on a CPU the bf16 operands are
    widened for it."""
    return any(VOCAB in shape for shape in product.shapes)


def of_the_router(product: Product) -> bool:
    """Which experts a token goes to, in fp32 as in transformers: bf16 cannot tell close scores
    apart."""
    sizes = {size for shape in product.shapes for size in shape}
    return product.name == "aten::mm" and {TOKENS, MOE["n_routed_experts"]} <= sizes


def of_the_scan(product: Product) -> bool:
    """The Mamba state, whose decays are multiplied up over a whole document."""
    return product.name == "aten::bmm" and any(
        MOE["chunk_size"] in shape[1:] for shape in product.shapes
    )


EXCEPTIONS = {"moe": (of_the_loss, of_the_router, of_the_scan), "llama": (of_the_loss,)}
CASES = {
    "moe, slices": {},
    "moe, slices, recomputed": {"recompute": True},
    "moe, gated": {"committed": False},
    "moe, quantised": {"fake": "fp8-channel"},
    "moe, slices, experts one by one": {"experts": "eager"},
    "moe, gated, experts one by one": {"committed": False, "experts": "eager"},
    "llama, slices": {},
    "llama, gated": {"committed": False},
}


@pytest.mark.parametrize("case", CASES)
def test_large_products_are_bf16(tmp_path, case):
    kind, options = case.split(",")[0], dict(CASES[case])
    engine = {"autocast": True, "recompute": options.pop("recompute", False)}
    trainer = make_trainer(kind, make_config(tmp_path, engine=engine), **options)
    with Products() as products:
        trainer.train_step()
    wide = [p for p in products.large(LARGE) if set(p.dtypes) != {torch.bfloat16}]
    allowed = EXCEPTIONS[kind]
    assert not [p for p in wide if not any(is_one(p) for is_one in allowed)]
    for is_one in allowed:
        assert any(map(is_one, wide)), f"nothing is an exception any more: {is_one.__doc__}"
    narrow = [p for p in products.large(LARGE) if p not in wide]
    assert not any(map(of_the_router, narrow))
    assert any("attention" in p.name and "backward" in p.name for p in narrow)
    if kind == "moe":
        stacked = [p for p in narrow if any(MOE["moe_intermediate_size"] in s for s in p.shapes)]
        name = "aten::mm" if "one by one" in case else "aten::_grouped_mm"
        assert {p.name for p in stacked} == {name}
    gradients = [p.grad for p in trainer.student.parent.parameters() if p.grad is not None]
    assert gradients and {g.dtype for g in gradients} == {torch.float32}


@pytest.mark.parametrize("kind", ["moe", "llama"])
def test_without_autocast_every_product_is_fp32(tmp_path, kind):
    trainer = make_trainer(kind, make_config(tmp_path))
    with Products() as products:
        trainer.train_step()
    assert {d for p in products.seen for d in p.dtypes} == {torch.float32}


def test_mambas_step_sizes_are_not_rounded(tmp_path):
    """A bias of the time step that bf16 cannot tell from its neighbour still makes a difference."""
    student = make_trainer("moe", make_config(tmp_path)).student
    bias = student.parent.get_parameter("model.layers.0.mixer.dt_bias")
    ids = torch.arange(40)[None]
    inputs = {"input_ids": ids, "position_ids": ids, "seq_idx": torch.zeros_like(ids)}
    found = []
    for value in (-4.0, -4.003):
        assert torch.tensor(value).bfloat16() == -4
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            bias.fill_(value)
            found.append(student.hidden_states(student.axis_map.full, **inputs)[0])
    assert not torch.equal(*found)


def test_experts_learn_the_same_in_bf16(tmp_path):
    """Their gradients differ from those in fp32 by the rounding of bf16 and no more."""
    found = []
    for autocast in (False, True):
        trainer = make_trainer("moe", make_config(tmp_path, engine={"autocast": autocast}))
        trainer.train_step()
        found.append(trainer.student.parent.get_parameter("model.layers.2.mixer.experts.up_proj"))
    exact, rounded = (parameter.grad for parameter in found)
    assert (rounded - exact).norm() < 0.15 * exact.norm()
