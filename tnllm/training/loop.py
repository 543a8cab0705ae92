"""The training run, start to end.

    train(load_recipe("tiny"), Path("runs/tiny"))
    train(config, Path("runs/tiny"), resume="auto")

A run folder holds config.resolved.yaml, env.json, metrics.jsonl, train.log, checkpoints/, latest and, at the end, weights/.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm import __version__
from tnllm.data.loader import Batch
from tnllm.errors import RunError, UserError
from tnllm.files import format_count, format_duration, write_text_atomic
from tnllm.modeling.flops import count_parameters, flops_per_token
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import TOKENIZER
from tnllm.tokenizer import Tokenizer
from tnllm.training.checkpoint import Saver, TrainState, find_checkpoint, list_checkpoints, load_checkpoint
from tnllm.training.config import RunConfig
from tnllm.training.corpus import AnyLoader, open_loaders, open_tokenizer
from tnllm.training.estimate import lora_parameters
from tnllm.training.metrics import MetricsLog, matmul_rate, memory_gib
from tnllm.training.optim import clip_and_step, make_optimizer
from tnllm.training.plan import fit_memory
from tnllm.training.schedule import learning_rate
from tnllm.training.setup import chat_template, make_model, publish
from tnllm.training.signals import StopSignals
from tnllm.training.validation import validate
from tnllm.training.view import View

# Under the policy `skip`, this many refused updates in a row end the run: it will not recover by itself.
_MAX_SKIPS_IN_A_ROW = 20


@dataclass
class Trainer:
    """What the steps of a run share. Nothing here knows how many ranks there are."""

    config: RunConfig
    model: LanguageModel
    optimizer: torch.optim.AdamW
    loader: AnyLoader
    device: torch.device
    loss_sum: Callable[[Batch], Tensor]
    compiled: bool = False


def train(config: RunConfig, out: Path, resume: str | None = None) -> None:
    """Train `config` into the run folder `out`.

    `resume`: None starts anew and refuses a folder that holds a run; "auto" goes on from the newest whole
    checkpoint of `out`, or starts; a folder names the checkpoint. Raises UserError for input that does not fit,
    RunError for failures while running, Terminated (exit 143) and KeyboardInterrupt after a signal, each once
    everything is saved.
    """
    device = pick_device(config.train.device)
    tokenizer = open_tokenizer(config)
    loader, validation = open_loaders(config, tokenizer)
    _open_folder(out, config, resume)
    with View(out / "train.log", config.total_steps) as view, StopSignals() as signals:
        config = fit_memory(config, device, view.say)
        trainer = make_trainer(config, loader, device)
        state = TrainState()
        checkpoint = find_checkpoint(out, resume, view.say) if resume else None
        if checkpoint is not None:
            keep_tokenizer(checkpoint, tokenizer)
            state = load_checkpoint(checkpoint, trainer.model, trainer.optimizer)
            view.say(f"resumed from {checkpoint} after step {state.step}")
        write_environment(out, config, device)
        saver = Saver(out, config.checkpoint.keep, config.checkpoint.async_save, tokenizer.path)
        metrics = MetricsLog(out / "metrics.jsonl", state.step, config.log.tensorboard)
        view.say(_opening(config, loader, device))
        if config.data.path is None:
            sample = "corpus that ships" if config.data.format == "text" else "conversations that ship"
            view.say(f"data: the sample {sample}; name your own with --set data.path=FOLDER_OR_FILE")
        if device.type == "cpu" and checkpoint is None:
            view.say(_forecast(trainer))
        if trainer.compiled:
            view.say("compiling the model: the first step takes a minute or so")
        meter = Meter(trainer, matmul_rate(device))
        saved = state.step
        while state.step < config.total_steps and not signals.stop:
            if not train_step(trainer, state, meter, signals):
                break
            last = state.step == config.total_steps
            if last or state.step == 1 or state.step % config.log.every_steps == 0 or signals.stop:
                row = meter.row(state, out)
                metrics.write(row)
                view.row(row)
            view.advance(state.step)
            if validation is not None and due(config.eval.every_steps, state.step, last) and not signals.stop:
                row = validation_row(trainer, state, validation)
                metrics.write(row)
                view.row(row)
                for line in sample_lines(trainer, tokenizer, state.step):
                    view.say(line)
                meter.restart()
            if due(config.checkpoint.every_steps, state.step, last):
                saver.save(state, trainer.model, trainer.optimizer)
                saved = state.step
                meter.restart()
        if signals.stop and saved < state.step:
            saver.save(state, trainer.model, trainer.optimizer)
            saved = state.step
        saver.wait()
        metrics.close()
        if signals.stop:
            view.say(f"stopped after step {state.step}, saved at step {saved}; go on with --resume auto")
            signals.leave()
        publish(trainer.model, out, config, tokenizer, compute_dtype(config, device))
        how = "--chat" if config.data.format == "chat" else "--prompt '...'"
        view.say(f"weights in {out / 'weights'}; try: tnllm generate --model {out} {how}")


def due(every: int, step: int, last: bool) -> bool:
    """Whether something done every so many steps (0: only at the end) is due after `step`."""
    return last or (every > 0 and step % every == 0)


def make_trainer(config: RunConfig, loader: AnyLoader, device: torch.device) -> Trainer:
    """Model, optimizer and loss of a run, on `device`; weights are fp32 unless asked, products in the recipe's dtype."""
    low = compute_dtype(config, device) == torch.bfloat16
    model = make_model(config, device, low)
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    optimizer = make_optimizer(model, config.optimizer, compiled)
    loss = torch.compile(model.loss, fullgraph=True) if compiled else model.loss

    def loss_sum(batch: Batch) -> Tensor:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return loss(batch.tokens, batch.labels, batch.cu_seqlens)

    return Trainer(config, model, optimizer, loader, device, loss_sum, compiled)


def train_step(trainer: Trainer, state: TrainState, meter: "Meter", signals: StopSignals) -> bool:
    """One update: gather the micro-batches, accumulate gradients, clip, step; `state` and `meter` move on.

    A signal between two micro-batches gives the update up: nothing has changed, and False comes back.
    """
    config = trainer.config
    rows, micro = config.global_batch_rows, config.train.micro_batch_size
    # All micro-batches first: the loss is divided by the true number of counted labels, whatever their lengths.
    started = time.perf_counter()
    batches = [trainer.loader.batch(state.samples + first, micro) for first in range(0, rows, micro)]
    labels = sum(batch.num_labels for batch in batches)
    waited = time.perf_counter() - started
    loss = torch.zeros((), device=trainer.device)
    for number, batch in enumerate(batches):
        if number and signals.stop:
            trainer.optimizer.zero_grad(set_to_none=True)
            return False
        part = trainer.loss_sum(batch) / max(labels, 1)
        part.backward()
        loss += part.detach()
    rate = learning_rate(config.schedule, config.optimizer.learning_rate, state.step)
    norm = clip_and_step(trainer.model, trainer.optimizer, rate, config.optimizer.grad_clip, loss)
    meter.add(loss, norm, rate, waited, state)
    state.step += 1
    state.samples += rows
    state.tokens += rows * config.data.seq_len
    return True


class Meter:
    """Keeps what steps produced on the device until a row is wanted, so that steps need not wait for the host."""

    def __init__(self, trainer: Trainer, peak: float | None) -> None:
        self.config, self.peak, self.device = trainer.config, peak, trainer.device
        self.flops = flops_per_token(trainer.config.model, trainer.config.data.seq_len)
        self._pending: list[tuple[Tensor, Tensor, int, int]] = []
        self._in_a_row = 0
        self._rate = 0.0
        self.restart()

    def restart(self) -> None:
        """Start timing again, after work that is no training step."""
        self._started, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def add(self, loss: Tensor, norm: Tensor, rate: float, waited: float, state: TrainState) -> None:
        """Note the step that `state` is about to count."""
        self._pending.append((loss, norm, state.step + 1, state.samples))
        self._rate, self._waited, self._steps = rate, self._waited + waited, self._steps + 1

    def row(self, state: TrainState, out: Path) -> dict[str, Any]:
        """The row of metrics.jsonl for the newest step; applies the policy for updates that were refused."""
        values = torch.stack([torch.stack([loss, norm]) for loss, norm, _, _ in self._pending]).tolist()
        elapsed = time.perf_counter() - self._started
        for (loss, norm), (_, _, step, samples) in zip(values, self._pending, strict=True):
            self._check(loss, norm, step, samples, state, out)
        self._pending.clear()
        loss, norm = values[-1]
        batch_tokens = self.config.global_batch_rows * self.config.data.seq_len
        rate = self._steps * batch_tokens / elapsed if self._steps else 0.0
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            "grad_norm": norm,
            "lr": self._rate,
            "tokens_per_s": rate,
            "tokens_per_step": batch_tokens,
            "mfu": rate * self.flops / self.peak if self.peak else None,
            "mem_gib": memory_gib(self.device),
            "data_wait_s": self._waited,
            "skipped": state.skipped,
            "time": time.time(),
        }
        self.restart()
        return row

    def _check(self, loss: float, norm: float, step: int, samples: int, state: TrainState, out: Path) -> None:
        if abs(loss) < float("inf") and abs(norm) < float("inf"):
            self._in_a_row = 0
            return
        last = samples + self.config.global_batch_rows - 1
        report = {"step": step, "samples": [samples, last], "loss": str(loss), "grad_norm": str(norm)}
        with open(out / "nonfinite.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
        what = f"step {step}: loss {loss}, gradient norm {norm} (global samples {samples} to {last})"
        state.skipped += 1
        self._in_a_row += 1
        if self.config.train.nonfinite == "stop":
            raise RunError(f"{what}; the update was refused. Lower optimizer.learning_rate or set train.nonfinite=skip")
        if self._in_a_row >= _MAX_SKIPS_IN_A_ROW:
            raise RunError(f"{what}; {self._in_a_row} updates in a row were refused, so the run stops")


def validation_row(trainer: Trainer, state: TrainState, loader: AnyLoader) -> dict[str, Any]:
    """Validate and return the row for metrics.jsonl."""
    rows = trainer.config.train.micro_batch_size
    loss, bpb = validate(trainer.loss_sum, loader, rows, trainer.config.eval.tokens)
    return {"step": state.step, "tokens": state.tokens, "val_loss": loss, "val_bpb": bpb, "time": time.time()}


def sample_lines(trainer: Trainer, tokenizer: Tokenizer, step: int) -> list[str]:
    """Each prompt of the recipe, continued by the current weights; the random state of the run is untouched."""
    lines = []
    for prompt in trainer.config.eval.sample_prompts:
        from tnllm.generation.decoder import generate_text

        count = trainer.config.eval.sample_tokens
        asked = prompt
        if trainer.config.data.format == "chat":
            asked = chat_template(trainer.config).replace("{prompt}", prompt)
            prompt = f"{prompt} -> "
        text = generate_text(trainer.model, tokenizer, asked, max_tokens=count, seed=trainer.config.train.seed)
        lines.append(f"sample at step {step}: {prompt}{text}")
    return lines


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device is 'cuda', but torch sees no CUDA device; set train.device=cpu or run tnllm doctor"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on a GPU, fp32 on CPU; bf16 wherever the weights are."""
    if config.train.weights == "bf16":
        return torch.bfloat16
    if config.train.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.dtype == "bf16" else torch.float32


def keep_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError where a run would go on with another tokenizer than it began with."""
    kept = checkpoint / TOKENIZER
    if kept.is_file() and Tokenizer.load(kept).sha256 != tokenizer.sha256:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer this run was trained with ({kept}); a resumed run keeps its tokenizer"
        )


def write_environment(out: Path, config: RunConfig, device: torch.device) -> None:
    """config.resolved.yaml and env.json: what runs, and where."""
    write_text_atomic(out / "config.resolved.yaml", config.to_yaml())
    environment = {
        "tnllm": __version__,
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text_atomic(out / "env.json", json.dumps(environment, indent=2) + "\n")


def _open_folder(out: Path, config: RunConfig, resume: str | None) -> None:
    if resume is None and ((out / "metrics.jsonl").exists() or list_checkpoints(out)):
        raise UserError(f"{out} holds a run already; add --resume auto to go on with it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def _forecast(trainer: Trainer) -> str:
    """How long a run will take on this CPU, from one short piece of text, while there is time to think again."""
    config = trainer.config
    tokens = trainer.loader.batch(0, 1).tokens[:, :256]
    pieces = 3
    for repeat in range(pieces + 1):
        if repeat == 1:
            started = time.perf_counter()
        trainer.model.loss(tokens, tokens).backward()
    rate = pieces * tokens.numel() / (time.perf_counter() - started)
    trainer.optimizer.zero_grad(set_to_none=True)
    total = config.total_steps * config.global_batch_rows * config.data.seq_len
    return f"this CPU does about {format_count(rate)} tokens/s: about {format_duration(total / rate)} for the whole run"


def _opening(config: RunConfig, loader: AnyLoader, device: torch.device) -> str:
    tokens = config.total_steps * config.global_batch_rows * config.data.seq_len
    passes = config.total_steps * config.global_batch_rows / loader.num_rows
    size = f"{format_count(count_parameters(config.model))} parameters"
    if config.lora.rank:
        size += f", frozen, with an adapter of {format_count(lora_parameters(config))}"
    return (
        f"{config.model.kind} {size} on {device}; "
        f"{config.total_steps} steps of {format_count(config.train.global_batch_tokens)} tokens = "
        f"{format_count(tokens)} tokens, {passes:.2f} passes over the data"
    )
