"""transformers' LlamaForCausalLM trained as `tnllm train` would train the project's own softmax baseline.

    python -m tnllm.sweep.llama recipes/evidence/15m-transformer.yaml --set optimizer.learning_rate=1e-3 --out runs/llama

Data, batches, packing, step, optimizer, schedule, clipping, validation and the run folder's files are those of the recipe;
only the model is the library's. Sizes come from the recipe's `model` section, which must be of kind transformer and without
qk_norm, as Llama is. It has no checkpoints: a run that is stopped starts again. `trainer: llama` in a sweep file runs it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.convert.llama import config_values
from tnllm.data.loader import IGNORE, Batch
from tnllm.device import pick_device
from tnllm.errors import RunError, UserError, optional_import
from tnllm.modeling.config import ModelConfig
from tnllm.training.checkpoint import TrainState
from tnllm.training.config import RunConfig, load_recipe
from tnllm.training.hooks import due
from tnllm.training.loaders import fingerprint, open_loaders, open_tokenizer
from tnllm.training.memory import peak_memory_gib
from tnllm.training.meter import StepTimer
from tnllm.training.metrics import METRICS, MetricsLog, write_metrics
from tnllm.training.optim import make_optimizer
from tnllm.training.run import write_environment
from tnllm.training.signals import StopSignals
from tnllm.training.trainer import Trainer, compute_dtype, train_step
from tnllm.training.validation import validate


def train_llama(config: RunConfig, out: Path) -> None:
    """Train LlamaForCausalLM with `config` and write metrics.jsonl, env.json and config.resolved.yaml into `out`.

    Raises UserError for a model that Llama is not, MissingExtra without transformers, RunError if the loss is not finite.
    """
    device = pick_device(config.train.device, "train.device")
    tokenizer = open_tokenizer(config.tokenizer.path, config.data, None, config.model.vocab_size)
    loader, validation = open_loaders(config.data, tokenizer, config.global_batch_rows, config.train.seed)
    config = config.with_epochs(loader.num_rows)
    model = make_llama(config.model, config.train.seed).to(device)
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    loss_sum = summed_loss(model, config.data.seq_len, compute_dtype(config.train, device), device, compiled)
    optimizer = make_optimizer(model, config.optimizer)
    trainer = Trainer(config, model, model, optimizer, loader, device, loss_sum, compiled)
    out.mkdir(parents=True, exist_ok=True)
    write_environment(out, config.to_yaml(), device, 0, fingerprint(loader))
    write_metrics(out / METRICS, [])
    metrics = MetricsLog(out / METRICS)
    state, signals, timer = TrainState(), StopSignals(), StepTimer()
    while state.step < config.total_steps:
        update = train_step(trainer, state, signals)
        assert update is not None, "no signal is caught here"
        timer.add(update)
        step, last = state.step, state.step == config.total_steps
        row: dict[str, Any] = {"step": step, "tokens": state.tokens, "time": time.time()}
        if step == 1 or due(config.log.every_steps, step, last):
            loss = float(update.loss)
            if not abs(loss) < float("inf"):
                raise RunError(f"step {step}: loss {loss}; lower optimizer.learning_rate")
            row |= {"loss": loss, "grad_norm": float(update.norm), "lr": update.learning_rate}
            row |= {"tokens_per_s": timer.steps_per_s() * config.train.global_batch_tokens}
            metrics.write({**row, "mem_gib": peak_memory_gib(device), "skipped": 0})
            timer.restart()
        if validation is not None and due(config.eval.every_steps, step, last):
            loss, bits = validate(loss_sum, validation, config.train.micro_batch_size, config.eval.tokens)
            metrics.write(
                {"step": step, "tokens": state.tokens, "val_loss": loss, "val_bpb": bits, "time": time.time()}
            )
            timer.restart()
    metrics.close()


def make_llama(config: ModelConfig, seed: int) -> Any:
    """The library's model of the sizes of `config`, with new weights of standard deviation `init_std`."""
    if config.kind != "transformer" or config.qk_norm or config.scale_embedding:
        raise UserError(
            "trainer llama needs model.kind transformer without qk_norm and scale_embedding, which Llama does not have"
        )
    with optional_import("hf", "transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    own = config_values(config, torch.float32, {}, config.max_position)
    # The library never trains the row of padding.
    own |= {"pad_token_id": None, "use_cache": False, "attn_implementation": "sdpa"}
    return LlamaForCausalLM(LlamaConfig(**own))


def summed_loss(
    model: Any, length: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> Callable[[Batch], Tensor]:
    """The sum of cross entropies over the counted labels of rows of `length` tokens, documents kept apart as packed."""
    forward = torch.compile(model) if compiled else model

    def loss_sum(batch: Batch) -> Tensor:
        batch = batch.to(device)
        tokens = batch.tokens.view(-1, length)
        mask, positions = document_mask(batch.cu_seqlens, tokens)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = forward(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    return loss_sum


def document_mask(cu_seqlens: Tensor | None, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Rows [B, T] of a batch packed as `cu_seqlens` → the mask [B, 1, T, T] (True: attends) and positions [B, T].

    None without packing: the library's own causal mask. No sequence crosses the end of a row.
    """
    if cu_seqlens is None:
        return None, None
    index = torch.arange(tokens.numel(), device=tokens.device)
    # Empty sequences at the end of cu_seqlens start past the last token.
    sequence = torch.searchsorted(cu_seqlens, index, right=True) - 1
    positions = (index - cu_seqlens[sequence]).view_as(tokens)
    sequence = sequence.view_as(tokens)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    return ((sequence[:, :, None] == sequence[:, None, :]) & causal)[:, None], positions


def main() -> None:
    """Command line: a recipe, `--set` overrides and `--out`. Errors are one line, as in `tnllm`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        train_llama(load_recipe(arguments.recipe, arguments.sets), arguments.out)
    except UserError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
