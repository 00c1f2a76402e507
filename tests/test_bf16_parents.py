"""Parents stored in BF16, as most are: trained in fp32, stored in BF16 again."""

from __future__ import annotations

import pytest
import torch

from star_elastic.architectures import read_config
from star_elastic.checkpoints.tensors import CheckpointReader, load_tensors
from star_elastic.generate.family import load
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.load import load_parent
from star_elastic.rewrite.stream import save_model
from star_elastic.train.distributed import World
from star_elastic.train.run import train
from tests.tiny_run import build_trainer, config_in

RATE = 1e-5
"""A step of this size is lost in the rounding of BF16, whose steps are 4e-3 of a weight."""
FEW_STEPS = {
    "tokens = 15360": "tokens = 1536",
    "learning_rate = 2e-3\nwarmup_steps = 2": (
        f"learning_rate = {RATE}\nfinal_learning_rate = {RATE}\nwarmup_steps = 0"
    ),
    "autocast = false": "autocast = true",
    "[router]": '[router.fixed]\nlarge = "hidden=48"\nsmall = "hidden=32,top_k=1"\n[router]',
    "active = 0.7": "active = 0.6356",
}


@pytest.fixture(scope="module")
def config(run_folder):
    """A run of four steps on the tiny parent, stored in BF16."""
    parent, model_config = load_parent(run_folder / "parent")
    out = run_folder / "bf16"
    state = ElasticModel(parent, model_config).state()
    save_model(state, model_config, run_folder / "parent", out, dtype=torch.bfloat16)
    return config_in(run_folder, "of-bf16", **{'"parent"': '"bf16"'}, **FEW_STEPS)


def dtypes(path) -> set[str]:
    reader = CheckpointReader(path)
    fp32 = "e_score_correction_bias"
    return {str(reader.read(name).dtype) for name in reader.names if not name.endswith(fp32)}


def test_steps_below_the_rounding_of_bf16_add_up(config, tmp_path):
    """In fp32 masters: weights, gradients and both moments."""
    trainer = build_trainer(config, tmp_path / "run", World())
    before = {name: value.detach().clone() for name, value in trainer._parameters()}
    for _ in range(trainer.curriculum.num_steps):
        trainer.train_step()
    moved = torch.cat(
        [
            (value.detach() - before[name]).abs().flatten()
            for name, value in trainer._parameters()
            if name.startswith("student")
        ]
    )
    assert {tensor.dtype for tensor in trainer.tensors().values()} == {torch.float32}
    assert (moved > 0).float().mean() > 0.7  # all but rows of the embeddings that no token reads
    assert moved.max() > 2 * RATE


def test_the_family_is_stored_as_its_parent_was(config):
    assert dtypes(config.parent) == {"torch.bfloat16"}
    result = train(config)
    assert dtypes(result.elastic) == {"torch.bfloat16"}
    assert read_config(result.elastic)["dtype"] == "bfloat16"
    (saved,) = (result.elastic.parent / "state").glob("*.safetensors")
    masters = load_tensors(saved)
    name = "model.layers.1.mixer.q_proj.weight"
    master = masters[f"student.{name}"]
    assert master.dtype == torch.float32 and (master != master.bfloat16()).any()
    family = load(result.elastic)
    assert torch.equal(family.parent.get_parameter(name), master.bfloat16().float())
