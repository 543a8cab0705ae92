"""One update of a run: its model, optimizer and data, on one device or as a rank of a mesh.

trainer = make_trainer(config, loader, torch.device("cuda"))
update = train_step(trainer, state, signals)      # None: a stop signal arrived and nothing changed
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnllm.data.loader import IGNORE, Batch
from tnllm.modeling.model import LanguageModel
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.ranks import Distributed, SingleProcess
from tnllm.parallel.sequence import shard_sequence
from tnllm.training.checkpoint import TrainState
from tnllm.training.config import RunConfig
from tnllm.training.loaders import AnyLoader
from tnllm.training.loss_spikes import SpikeGuard
from tnllm.training.optim import clip_and_step, learning_rate, make_optimizer
from tnllm.training.run_model import fill_shards, make_meta_model, make_model, weights_dtype
from tnllm.training.sections import TrainSection
from tnllm.training.signals import StopSignals

if TYPE_CHECKING:
    from tnllm.training.checkpoint import AnyModel


@dataclass
class Trainer:
    """What the steps of a run share. Nothing here depends on the number of ranks.

    `parameters`: what the optimizer updates, the model's own or this rank's shards of them. `loss_sum`: the sum of the
    losses of a batch's counted labels. `gradient_norm`: reduces the gradients over all ranks and returns their norm.
    """

    config: RunConfig
    model: LanguageModel
    parameters: "AnyModel"
    optimizer: torch.optim.AdamW
    loader: AnyLoader
    device: torch.device
    loss_sum: Callable[[Batch], Tensor]
    compiled: bool = False
    ranks: SingleProcess = field(default_factory=SingleProcess)
    gradient_norm: Callable[[], Tensor] | None = None
    guard: SpikeGuard | None = None


@dataclass(frozen=True)
class Update:
    """One update. `loss`, `norm` and `skipped` (a spike; scalars) stay on the device: no step waits for the host."""

    step: int
    first_sample: int
    loss: Tensor
    norm: Tensor
    skipped: Tensor
    learning_rate: float
    data_wait_s: float
    rank_wait_s: float


def make_trainer(config: RunConfig, loader: AnyLoader, device: torch.device, mesh: Mesh | None = None) -> Trainer:
    """Model, optimizer and loss of a run, on `device` or as this process's shard of `mesh` (on mesh.device).

    Weights are kept in fp32 unless train.weights says otherwise; products run in train.dtype.
    """
    device = device if mesh is None else mesh.device
    low = compute_dtype(config.train, device) == torch.bfloat16
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    ranks, gradient_norm = SingleProcess(), None
    parameters: AnyModel
    if mesh is None:
        model = parameters = make_model(config.model, config.lora, config.train, config.init_folder, device, low)
        if compiled:
            model.compile_blocks()
    else:
        from tnllm.parallel.parallelize import parallelize

        model = make_meta_model(config.model, config.lora, weights_dtype(config.train, config.lora, low))
        parameters = parallelize(model, mesh, config.train.activation_checkpointing, compiled, low)
        parameters.materialize(device, config.train.seed)
        if config.init_folder is not None:
            fill_shards(parameters, config.init_folder)
        ranks, gradient_norm = Distributed(mesh), parameters.reduce_gradients
    optimizer = make_optimizer(parameters, config.optimizer, compiled)

    def loss_sum(batch: Batch) -> Tensor:
        # Each empty sequence costs softmax attention kernel blocks.
        batch, counted = batch.trimmed() if config.model.num_softmax else batch, None
        if mesh is None and 2 * batch.num_labels < batch.labels.numel():
            # Found on the host, which needs not wait for the device.
            counted = (batch.labels.flatten() != IGNORE).nonzero()[:, 0].to(device)
        batch = batch.to(device)
        inputs = (batch.tokens, batch.labels, batch.cu_seqlens)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            if mesh is None:
                return model.loss(*inputs, longest=batch.longest, counted=counted)
            part = shard_sequence(*inputs, mesh.index["sequence"], mesh.sizes["sequence"])
            return model.loss(*part, longest=batch.longest)

    guard = SpikeGuard(device) if config.train.spikes == "skip" else None
    return Trainer(
        config, model, parameters, optimizer, loader, device, loss_sum, compiled, ranks, gradient_norm, guard
    )


def train_step(trainer: Trainer, state: TrainState, signals: StopSignals) -> Update | None:
    """Load the micro-batches of an update, accumulate gradients, clip, step; advances `state`.

    Returns None, with nothing changed, if a stop signal arrives between micro-batches.
    """
    config = trainer.config
    rows, micro = config.global_batch_rows, config.train.micro_batch_size
    # All micro-batches first: the loss is divided by the step's number of counted labels, whatever their lengths.
    started = time.perf_counter()
    batches = [trainer.loader.batch(first, micro) for first in trainer.loader.rank_samples(state.samples)[::micro]]
    loaded = time.perf_counter()
    labels = trainer.ranks.start_step(sum(batch.num_labels for batch in batches), signals)
    if labels is None:
        return None
    rank_wait_s = time.perf_counter() - loaded
    loss = torch.zeros((), device=trainer.device)
    for index, batch in enumerate(batches):
        if index and signals.stop:
            trainer.optimizer.zero_grad(set_to_none=True)
            return None
        micro_loss = trainer.loss_sum(batch) / max(labels, 1)
        micro_loss.backward()
        loss += micro_loss.detach()
    rate = learning_rate(config.schedule, config.optimizer.learning_rate, state.step)
    loss = trainer.ranks.sum_loss(loss)
    norm = trainer.gradient_norm() if trainer.gradient_norm else None
    guard = trainer.guard
    norm = clip_and_step(trainer.parameters, trainer.optimizer, rate, config.optimizer.grad_clip, loss, norm, guard)
    skipped = torch.zeros_like(loss) if guard is None else guard.skipped
    update = Update(state.step + 1, state.samples, loss, norm, skipped, rate, loaded - started, rank_wait_s)
    state.step += 1
    state.samples += rows
    state.tokens += rows * config.data.seq_len
    return update


def compute_dtype(train: TrainSection, device: torch.device) -> torch.dtype:
    """The dtype of products: train.dtype, where `auto` is bf16 on a GPU and fp32 on CPU; bf16 if the weights are bf16."""
    low = train.weights == "bf16" or train.dtype == "bf16" or (train.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if low else torch.float32
