"""The computed bytes against those that the collectives of a model on an imaginary mesh are called with."""

import pytest
import torch
import torch.distributed as dist

from tnllm.modeling.model import build_model
from tnllm.parallel.mesh import close_mesh
from tnllm.parallel.parallelize import parallelize
from tnllm.parallel.sequence import cut
from tnllm.training.communication import communication
from tnllm.training.config import RunConfig, load_recipe
from tnllm.training.launch import config_mesh

SETS = ["data.seq_len=64", "train.micro_batch_size=2", "train.global_batch_tokens=512", "model.num_layers=3"]
SETS += ["data.packing=concat", "train.device=cpu"]


# Collective → which argument is the whole tensor, and how often a ring sends (n - 1) / n of it.
COLLECTIVES = {
    "all_reduce": (0, 2),
    "all_gather": (0, 1),
    "all_gather_single": (0, 1),
    "all_gather_into_tensor": (0, 1),
    "reduce_scatter_single": (1, 1),
    "reduce_scatter_tensor": (1, 1),
}


@pytest.fixture
def sent(monkeypatch) -> list[float]:
    """Bytes of each collective that is called from now on."""
    found: list[float] = []

    def watch(name: str) -> None:
        call, (place, rounds) = getattr(dist, name), COLLECTIVES[name]

        def wrapped(*args, **kwargs):
            whole = kwargs["input"] if place == 1 and "input" in kwargs else args[place]
            group = kwargs.get("group") or next(arg for arg in args if isinstance(arg, dist.ProcessGroup))
            nbytes = sum(t.nbytes for t in whole) if isinstance(whole, list) else whole.nbytes
            found.append(rounds * nbytes * (group.size() - 1) / group.size())
            return call(*args, **kwargs)

        monkeypatch.setattr(dist, name, wrapped)

    for name in COLLECTIVES:
        if hasattr(dist, name):
            watch(name)
    return found


def one_pass(config: RunConfig) -> None:
    """Forward and backward of one micro-batch as rank 0 of imaginary ranks."""
    mesh = config_mesh(config, "cpu", fake=config.world_size)
    try:
        model = build_model(config.model, "meta")
        sharded = parallelize(model, mesh, config.train.activation_checkpointing)
        sharded.materialize(torch.device("cpu"), seed=0)
        tokens = torch.ones(2, 64, dtype=torch.int64)
        model.loss(*cut(tokens, tokens, None, 0, mesh.sizes["sequence"])).backward()
        sharded.reduce()
    finally:
        close_mesh(mesh)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "axes", ["shard=4", "tensor=2", "sequence=4", "replicate=2", "replicate=2 shard=2", "shard=2 sequence=2 tensor=2"]
)
def test_bytes_sent_in_a_step(sent, axes, checkpointing):
    mesh = [f"parallel.{axis}" for axis in axes.split()]
    config = load_recipe("tiny", [*SETS, *mesh, f"train.activation_checkpointing={checkpointing}"])
    # Left out of the formulas: padding to equal parts, theta's own sum, the gradient's norm.
    one_pass(config)
    assert sum(communication(config).values()) == pytest.approx(sum(sent) * config.accumulation_steps, rel=0.01)
