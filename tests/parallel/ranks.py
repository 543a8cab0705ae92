"""What four processes do for test_meshes.py: every mesh trains as one process does, and reads what another wrote.

results = run_all(folder)      # by rank, then by case
"""

import json
import os
from pathlib import Path

import torch
from torch import multiprocessing
from torch.distributed import TCPStore

from tnllm.modeling.config import LoraConfig, ModelConfig, get_preset
from tnllm.modeling.lora import add_lora
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import load_model
from tnllm.parallel.mesh import Mesh, close_mesh, open_mesh
from tnllm.parallel.parallelize import ShardedModel, parallelize
from tnllm.parallel.ranks import Distributed
from tnllm.parallel.sequence import shard_sequence
from tnllm.training.checkpoint import Saver, TrainState, load_checkpoint
from tnllm.training.optim import clip_and_step, make_optimizer
from tnllm.training.run_model import fill_shards
from tnllm.training.sections import OptimizerSection

STEPS = 10
SIZE = {"vocab_size": 64, "model_dim": 32, "num_heads": 4, "num_layers": 2, "glu_dim": 48, "pad_token_id": None}
V3 = {"gate": "low-rank", "gate_dim": 4, "value_activation": "silu", "norm": "rmsnorm"}
OUTPUT_NORM = {"norm_position": "output", "norm": "layernorm"}
UNTIED = {"norm": "layernorm", "tie_embeddings": False, "position": "lrpe-d"}
# name → ranks, (replicate, shard, sequence, tensor), model, packed, activation checkpointing
CASES = {
    "fsdp 2": (2, (1, 2, 1, 1), {}, False, "selective"),
    "tp 2": (2, (1, 1, 1, 2), {}, True, "none"),
    "sp 2": (2, (1, 1, 2, 1), {}, True, "none"),
    "replicate 2": (2, (2, 1, 1, 1), {}, False, "none"),
    "tp 2, low-rank gate": (2, (1, 1, 1, 2), V3, True, "none"),
    "tp 2, untied, layernorm": (2, (1, 1, 1, 2), UNTIED, False, "full"),
    "tp 2, norm of the output": (2, (1, 1, 1, 2), OUTPUT_NORM, True, "none"),
    "tp 2, softmax": (2, (1, 1, 1, 2), {"kind": "transformer"}, True, "none"),
    "tp 2, hybrid": (2, (1, 1, 1, 2), {"softmax_every": 2}, True, "none"),
    "fsdp 2, hybrid": (2, (1, 2, 1, 1), {"softmax_every": 2, "qk_norm": True}, False, "selective"),
    "sp 2, lrpe in every layer": (2, (1, 1, 2, 1), {"position": "lrpe-d"}, False, "none"),
    "sp 4": (4, (1, 1, 4, 1), {}, True, "none"),
    "sp 4, rows": (4, (1, 1, 4, 1), {}, False, "full"),
    "tp 2 x sp 2": (4, (1, 1, 2, 2), {}, True, "selective"),
    "fsdp 2 x sp 2": (4, (1, 2, 2, 1), {}, False, "full"),
    "fsdp 2 x tp 2": (4, (1, 2, 1, 2), V3, False, "selective"),
    "replicate 2 x fsdp 2": (4, (2, 2, 1, 1), {}, False, "none"),
    "fsdp 2, adapter": (2, (1, 2, 1, 1), {}, False, "selective"),
    "replicate 2, adapter": (2, (2, 1, 1, 1), UNTIED, False, "none"),
    "sp 2, adapter": (2, (1, 1, 2, 1), {}, True, "full"),
    "replicate 2 x fsdp 2, adapter": (4, (2, 2, 1, 1), {}, False, "none"),
    "fsdp 2 x sp 2, adapter": (4, (1, 2, 2, 1), {}, False, "none"),
}
# Three rows of A on two ranks and on four: shards differ in size, and one is empty.
ADAPTER = LoraConfig(rank=3, alpha=6)
# Each group of processes has a rendezvous port of its own.
HAND_OVER = [f"hand over {number}" for number in range(4)]


def model_config(choices: dict) -> ModelConfig:
    return get_preset("tiny", **{**SIZE, **choices})


def batch(step: int, packed: bool, rank: int = 0, size: int = 1):
    """Shard `rank` of `size` of a step's four rows of 48; or all 192 tokens packed, one document covering a slice."""
    text = (torch.arange(193) + 7 * step) ** 2 % 61
    tokens, labels = text[:-1].view(4, 48), text[1:].view(4, 48).clone()
    cu_seqlens = torch.tensor([0, 7, 40, 40, 110, 111, 190, 192, 192], dtype=torch.int32)
    if packed:
        assert size == 1, "documents span any cut between data ranks here"
        tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
        labels[0, cu_seqlens[1:-2].long() - 1] = -100
        return tokens, labels, cu_seqlens
    rows = slice(rank * 4 // size, (rank + 1) * 4 // size)
    return tokens[rows], labels[rows], None


def counted(step: int, packed: bool) -> int:
    return int((batch(step, packed)[1] != -100).sum())


class Alone:
    """One process: the reference."""

    def __init__(self, config: ModelConfig, packed: bool, lora: LoraConfig | None = None) -> None:
        self.model, self.packed = build_model(config, seed=0), packed
        if lora is not None:
            add_lora(self.model, lora, seed=0)
        self.optimizer = make_optimizer(self.model, OptimizerSection())

    def step(self, step: int) -> tuple[float, float]:
        loss = self.model.loss(*batch(step, self.packed)) / counted(step, self.packed)
        loss.backward()
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.requires_grad}
        norm = clip_and_step(self.model, self.optimizer, 1e-2, 1.0, loss.detach())
        return loss.item(), norm.item()


class Together:
    """The same on a mesh."""

    def __init__(
        self, config: ModelConfig, packed: bool, mesh: Mesh, checkpointing: str = "none", lora: LoraConfig | None = None
    ) -> None:
        self.mesh, self.packed, self.ranks = mesh, packed, Distributed(mesh)
        model = build_model(config, "meta")
        if lora is not None:
            add_lora(model, lora)
        self.sharded = parallelize(model, mesh, checkpointing)
        self.sharded.materialize(torch.device("cpu"), seed=0)
        self.optimizer = make_optimizer(self.sharded, OptimizerSection())

    def step(self, step: int) -> tuple[float, float]:
        mine = batch(step, self.packed, self.mesh.data_rank, self.mesh.data_size)
        local_batch = shard_sequence(*mine, self.mesh.index["sequence"], self.mesh.sizes["sequence"])
        loss = self.sharded.model.loss(*local_batch) / counted(step, self.packed)
        loss.backward()
        total = self.ranks.sum_loss(loss.detach())
        norm = self.sharded.reduce_gradients()
        self.gradients = {name: p.grad.clone() for name, p in self.sharded.named_parameters() if p.requires_grad}
        clip_and_step(self.sharded, self.optimizer, 1e-2, 1.0, total, norm)
        return total.item(), norm.item()


def difference(local: dict, sharded: ShardedModel, full: dict) -> float:
    """The largest relative difference of any parameter's shard from the same elements of the full one."""
    worst = 0.0
    for name in full:
        for mine, slices in sharded.shards[name].layout.slices():
            if not local[name][mine].any() and not full[name].any():
                continue  # an adapter's A has no gradient before its B has a value
            # Relative to the full tensor's size: a shard may be nearly zero.
            scale = full[name].norm() * (local[name][mine].numel() / full[name].numel()) ** 0.5
            worst = max(worst, float((local[name][mine] - full[name][slices]).norm() / scale))
    return worst


def compare(name: str) -> dict:
    """Ten steps of both."""
    _, axes, choices, packed, checkpointing = CASES[name]
    config = model_config(choices)
    mesh = open_mesh(*axes, "cpu", timeout_s=60)
    lora = ADAPTER if "adapter" in name else None
    alone, together = Alone(config, packed, lora), Together(config, packed, mesh, checkpointing, lora)
    started = difference(
        {name: p.detach() for name, p in together.sharded.named_parameters()},
        together.sharded,
        {name: p.detach() for name, p in alone.model.named_parameters()},
    )
    rows = []
    for step in range(STEPS):
        rows.append((*alone.step(step), *together.step(step)))
        if step == 0:
            first = difference(together.gradients, together.sharded, alone.gradients)
    weights = {name: p.detach() for name, p in together.sharded.named_parameters()}
    last = difference(weights, together.sharded, {name: p.detach() for name, p in alone.model.named_parameters()})
    kept = sum(p.numel() for p in together.sharded.parameters())
    close_mesh(mesh)
    return {"rows": rows, "gradient": first, "started": started, "weights": last, "kept": kept}


def full_weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).state_dict())


def hand_over(folder: Path, ports: list[int]) -> dict:
    """Three steps on tensor x sequence, three on shard x sequence, three on replicate x shard, one alone; and one."""
    config, losses = model_config({}), []
    reference = Alone(config, False)
    expected = [reference.step(step)[0] for step in range(STEPS)]
    state, rank = TrainState(), int(os.environ["RANK"])
    for count, axes in ((3, (1, 1, 2, 2)), (3, (1, 2, 2, 1)), (3, (2, 2, 1, 1))):
        os.environ["MASTER_PORT"] = str(ports.pop())
        mesh = open_mesh(*axes, "cpu", timeout_s=60)
        run = Together(config, False, mesh)
        if state.step:
            state = load_checkpoint(folder / f"checkpoints/step-{state.step:08d}", run.sharded, run.optimizer)
        for _ in range(count):
            losses.append(run.step(state.step)[0])
            state.step, state.samples = state.step + 1, state.samples + 4
        saver = Saver(folder, keep=2, background=True, tokenizer=None, ranks=run.ranks)
        saver.save(state, run.sharded, run.optimizer)
        saver.wait()
        full = full_weights(folder)
        local = {name: p.detach() for name, p in run.sharded.named_parameters()}
        same = difference(local, run.sharded, full)
        close_mesh(mesh)
    if rank == 0:
        alone = Alone(config, False)
        state = load_checkpoint(folder / "checkpoints/step-00000009", alone.model, alone.optimizer)
        losses.append(alone.step(state.step)[0])
        back = Saver(folder / "back", keep=1, background=False, tokenizer=None)
        back.save(TrainState(10, 40), alone.model, alone.optimizer)
    os.environ["MASTER_PORT"] = str(ports.pop())
    mesh = open_mesh(1, 1, 4, 1, "cpu", timeout_s=120)
    run = Together(config, False, mesh)
    torch.distributed.barrier()
    fill_shards(run.sharded, folder / "back/checkpoints/step-00000010")
    started = {name: p.detach().clone() for name, p in run.sharded.named_parameters()}
    state = load_checkpoint(folder / "back/checkpoints/step-00000010", run.sharded, run.optimizer)
    same += difference(started, run.sharded, full_weights(folder / "back"))
    losses.append(run.step(9)[0])
    close_mesh(mesh)
    files = sorted(str(path.relative_to(folder)) for path in (folder / "checkpoints").glob("*/*/*"))
    return {"losses": losses, "expected": expected, "same": same, "files": files, "state": state.samples}


def rank_main(rank: int, ports: dict[str, int], folder: Path) -> None:
    """One of four processes: a member of one of two worlds of two ranks side by side, then of one world of four."""
    torch.set_num_threads(1)
    pairs, fours = ([name for name, case in CASES.items() if case[0] == size] for size in (2, 4))
    results = {}
    for name in [*pairs[rank // 2 :: 2], *fours]:
        size = CASES[name][0]
        os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank % size), "MASTER_PORT": str(ports[name])}
        results[name] = compare(name)
    results["hand over"] = hand_over(folder, [ports[name] for name in HAND_OVER])
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))


def run_all(folder: Path) -> list[dict]:
    """Start the four processes; their results by rank."""
    # The stores live here, so that no port can be taken between being chosen and being used.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    names = [*CASES, *HAND_OVER]
    stores = {name: TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in names}
    ports = {name: store.port for name, store in stores.items()}
    try:
        multiprocessing.spawn(rank_main, (ports, folder), nprocs=4)
    finally:
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"], os.environ["MASTER_ADDR"]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]
