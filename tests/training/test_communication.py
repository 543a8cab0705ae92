"""The computed bytes against those that the collectives of a model on an imaginary mesh are called with."""

import pytest
import torch

from tnllm.parallel.mesh import close_mesh
from tnllm.parallel.parallelize import parallelize
from tnllm.parallel.sequence import shard_sequence
from tnllm.parallel.traffic import Traffic
from tnllm.training.config import RunConfig, load_recipe
from tnllm.training.estimate import communication
from tnllm.training.launch import config_mesh
from tnllm.training.run_model import make_meta_model, weights_dtype

SETS = ["data.seq_len=64", "train.micro_batch_size=2", "train.global_batch_tokens=512", "model.num_layers=3"]
SETS += ["data.packing=concat", "train.device=cpu"]


def one_pass(config: RunConfig) -> dict[str, float]:
    """Bytes by axis of forward and backward of one micro-batch as rank 0 of imaginary ranks."""
    mesh = config_mesh(config.parallel, "cpu", fake=config.parallel.num_ranks)
    try:
        model = make_meta_model(config.model, config.lora, weights_dtype(config.train, config.lora, low=False))
        sharded = parallelize(model, mesh, config.train.activation_checkpointing)
        sharded.materialize(torch.device("cpu"), seed=0)
        tokens = torch.ones(2, 64, dtype=torch.int64)
        with Traffic() as traffic:
            model.loss(*shard_sequence(tokens, tokens, None, 0, mesh.sizes["sequence"])).backward()
            sharded.reduce_gradients()
        return traffic.by_axis(mesh)
    finally:
        close_mesh(mesh)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "axes",
    [
        "shard=4",
        "tensor=2",
        "sequence=4",
        "replicate=2",
        "replicate=2 shard=2",
        "shard=2 sequence=2 tensor=2",
        "shard=4 lora",
        "replicate=2 shard=2 lora",
    ],
)
def test_bytes_sent_in_a_step(axes, checkpointing):
    mesh = ["lora.rank=8" if axis == "lora" else f"parallel.{axis}" for axis in axes.split()]
    config = load_recipe("tiny", [*SETS, *mesh, f"train.activation_checkpointing={checkpointing}"])
    # Left out of the formulas: padding to equal parts, theta's own sum, the gradient's norm.
    sent = one_pass(config)
    sections = config.model, config.lora, config.data, config.train, config.parallel
    for axis, computed in communication(*sections, config.accumulation_steps).items():
        assert computed == pytest.approx(sent[axis] * config.accumulation_steps, rel=0.01), axis
    assert sent["other"] < 0.01 * sum(sent.values())
