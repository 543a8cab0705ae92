"""A training run from start to end.

    train(load_recipe("tiny"), Path("runs/tiny"))
    train(config, Path("runs/tiny"), resume="auto")

A run folder holds config.resolved.yaml, env.json, metrics.jsonl, train.log, checkpoints/, latest and, at the end, weights/.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm import __version__
from tnllm.chat_template import render
from tnllm.data.loader import Batch
from tnllm.device import pick_device
from tnllm.errors import RunError, UserError
from tnllm.files import format_count, format_duration, write_text_atomic
from tnllm.modeling.flops import count_parameters, flops_per_token, lora_parameters
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import TOKENIZER, load_model
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.ranks import Distributed, SingleProcess
from tnllm.parallel.sequence import shard_sequence
from tnllm.tokenizer import Tokenizer
from tnllm.training.checkpoint import (
    Saver,
    TrainState,
    check_same_model,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    step_name,
)
from tnllm.training.config import RunConfig
from tnllm.training.display import RunDisplay
from tnllm.training.loaders import AnyLoader, open_loaders, open_tokenizer
from tnllm.training.loss_spikes import Spike, SpikeDetector
from tnllm.training.memory import fit_memory, free_bytes, peak_memory_gib
from tnllm.training.metrics import MetricsLog, matmul_rate
from tnllm.training.optim import Parameters, clip_and_step, make_optimizer
from tnllm.training.profile import Profile
from tnllm.training.run_model import chat_template, fill_shards, make_meta_model, make_model, publish
from tnllm.training.schedule import learning_rate
from tnllm.training.signals import StopSignals
from tnllm.training.validation import validate

# Under the policy `skip`, this many refused updates in a row end the run: it will not recover by itself.
_MAX_SKIPS_IN_A_ROW = 20


@dataclass
class Trainer:
    """What the steps of a run share. Nothing here depends on the number of ranks.

    `parameters`: what the optimizer updates, the model's own or this rank's shards of them. `loss_sum`: the sum of the
    losses of a batch's counted labels. `gradient_norm`: reduces the gradients over all ranks and returns their norm.
    """

    config: RunConfig
    model: LanguageModel
    parameters: Parameters
    optimizer: torch.optim.AdamW
    loader: AnyLoader
    device: torch.device
    loss_sum: Callable[[Batch], Tensor]
    compiled: bool = False
    ranks: SingleProcess = field(default_factory=SingleProcess)
    gradient_norm: Callable[[], Tensor] | None = None


def train(
    config: RunConfig,
    out: Path,
    resume: str | None = None,
    mesh: Mesh | None = None,
    score: Callable[[LanguageModel, Tokenizer], dict[str, float]] | None = None,
    outer_command: bool = False,
) -> None:
    """Train `config` into the run folder `out`.

    `resume`: None starts a new run and refuses a folder that holds one; "auto" resumes from the newest complete
    checkpoint of `out`, or starts; a folder names the checkpoint. `mesh`: this process is one of its ranks, all of which
    make the same call. `score` scores eval.tasks (tnllm.evaluation.during_training). `outer_command`: training is a part
    of another command, so no message names an option of `tnllm train`. Raises UserError for input that does not fit,
    RunError for failures while running, Terminated (exit 143) and KeyboardInterrupt after a signal, each once everything
    is saved.
    """
    if config.eval.tasks and score is None and mesh is None:
        raise UserError("eval.tasks are set, and nothing to score them with was given; train with `tnllm train`")
    device = pick_device(config.train.device, "train.device") if mesh is None else mesh.device
    ranks = SingleProcess() if mesh is None else Distributed(mesh)
    tokenizer = ranks.main_first(lambda: open_tokenizer(config))
    loader, validation = ranks.main_first(lambda: open_loaders(config, tokenizer, ranks.data_rank, ranks.data_size))
    ranks.broadcast_from_main(lambda: _open_folder(out, config, resume))
    display = RunDisplay(out / "train.log", config.total_steps, quiet=not ranks.main)
    with display, StopSignals(shared=ranks.size > 1) as signals:
        config = fit_memory(config, device, display.log, ranks.all_reduce_min(free_bytes(device) / _sharing(device)))
        trainer = make_trainer(config, loader, device, mesh)
        checkpoint = ranks.broadcast_from_main(lambda: _usable_checkpoint(out, resume, tokenizer, display))
        state = TrainState() if checkpoint is None else load(checkpoint, trainer)
        saver = make_saver(config, out, tokenizer, trainer)
        if ranks.main:
            write_environment(out, config, device)
        metrics = MetricsLog(out / "metrics.jsonl" if ranks.main else None, state.step, config.log.tensorboard)
        for line in _opening_lines(trainer, checkpoint, state):
            display.log(line)
        meter = Meter(trainer, matmul_rate(device))
        profile = Profile(out / "profile", config.log.profile_steps if ranks.main else 0, device, display.log)

        def report(row: dict[str, Any]) -> None:
            metrics.write(row)
            display.row(row)

        saved = state.step
        while state.step < config.total_steps and not signals.stop:
            if not train_step(trainer, state, meter, signals):
                break
            profile.step()
            last = state.step == config.total_steps
            if state.step == 1 or signals.stop or due(config.log.every_steps, state.step, last):
                report(meter.row(state, out))
                for row, line in meter.take_spikes():
                    metrics.write(row)
                    display.log(line)
            display.advance(state.step)
            if validation is not None and due(config.eval.every_steps, state.step, last) and not signals.stop:
                report(validation_row(trainer, state, validation))
                log_samples(trainer, tokenizer, state.step, display.log)
                meter.restart()
            if score and due(config.eval.tasks_every_steps, state.step, last) and not signals.stop:
                scores = score(trainer.model, tokenizer)
                report({"step": state.step, "tokens": state.tokens, **scores, "time": time.time()})
                meter.restart()
            if due(config.checkpoint.every_steps, state.step, last):
                saver.save(state, trainer.parameters, trainer.optimizer)
                saved = state.step
                meter.restart()
        if signals.stop and saved < state.step:
            saver.save(state, trainer.parameters, trainer.optimizer)
            saved = state.step
        profile.close()
        saver.wait()
        metrics.close()
        if signals.stop:
            how = "run the same command again to resume" if outer_command else "resume with --resume auto"
            display.log(f"stopped after step {state.step}, saved at step {saved}; {how}")
            signals.leave(how)
        if ranks.main:
            advice = _publish(trainer, out, tokenizer, state)
            display.log(f"weights in {out / 'weights'}{'' if outer_command else advice}")


def _publish(trainer: Trainer, out: Path, tokenizer: Tokenizer, state: TrainState) -> str:
    """Write weights/ after the last step; returns how to use them."""
    config, model = trainer.config, trainer.model
    if trainer.ranks.size > 1:
        # The last checkpoint holds full tensors; each rank has only its shards.
        model = load_model(out / "checkpoints" / step_name(state.step), "cpu", merge=False)
    publish(model, out, config, tokenizer, compute_dtype(config, trainer.device))
    how = "--chat" if config.data.format == "chat" else "--prompt '...'"
    return f"; try: tnllm generate --model {out} {how}"


def due(every: int, step: int, last: bool) -> bool:
    """Whether something done every so many steps (0: only at the end) is due after `step`."""
    return last or (every > 0 and step % every == 0)


def make_trainer(config: RunConfig, loader: AnyLoader, device: torch.device, mesh: Mesh | None = None) -> Trainer:
    """Model, optimizer and loss of a run, on `device` or as this process's shard of `mesh` (on mesh.device).

    Weights are kept in fp32 unless train.weights says otherwise; products run in train.dtype.
    """
    device = device if mesh is None else mesh.device
    low = compute_dtype(config, device) == torch.bfloat16
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    ranks, gradient_norm = SingleProcess(), None
    parameters: Parameters
    if mesh is None:
        model = parameters = make_model(config, device, low)
        optimizer = make_optimizer(model, config.optimizer, compiled)
        if compiled:
            model.compile_blocks()
    else:
        from tnllm.parallel.parallelize import parallelize

        model = make_meta_model(config, low)
        sharded = parallelize(model, mesh, config.train.activation_checkpointing, compiled, low)
        sharded.materialize(device, config.train.seed)
        if config.init_folder is not None:
            fill_shards(sharded, config.init_folder)
        optimizer = make_optimizer(sharded, config.optimizer)
        parameters, ranks, gradient_norm = sharded, Distributed(mesh), sharded.reduce_gradients

    def loss_sum(batch: Batch) -> Tensor:
        # Each empty sequence costs softmax attention kernel blocks.
        batch = (batch.trimmed() if config.model.kind == "transformer" else batch).to(device)
        inputs = (batch.tokens, batch.labels, batch.cu_seqlens)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            if mesh is None:
                return model.loss(*inputs, longest=batch.longest)
            part = shard_sequence(*inputs, mesh.index["sequence"], mesh.sizes["sequence"])
            return model.loss(*part, longest=batch.longest)

    return Trainer(config, model, parameters, optimizer, loader, device, loss_sum, compiled, ranks, gradient_norm)


def train_step(trainer: Trainer, state: TrainState, meter: "Meter", signals: StopSignals) -> bool:
    """One update: load the micro-batches, accumulate gradients, clip, step; advances `state` and `meter`.

    Returns False, with nothing changed, if a stop signal arrives between micro-batches.
    """
    config = trainer.config
    rows, micro = config.global_batch_rows, config.train.micro_batch_size
    # All micro-batches first: the loss is divided by the step's number of counted labels, whatever their lengths.
    started = time.perf_counter()
    batches = [trainer.loader.batch(first, micro) for first in trainer.loader.rank_samples(state.samples)[::micro]]
    waited = time.perf_counter() - started
    labels = trainer.ranks.start_step(sum(batch.num_labels for batch in batches), signals)
    if labels is None:
        return False
    meter.waited_for_ranks(time.perf_counter() - started - waited)
    loss = torch.zeros((), device=trainer.device)
    for index, batch in enumerate(batches):
        if index and signals.stop:
            trainer.optimizer.zero_grad(set_to_none=True)
            return False
        micro_loss = trainer.loss_sum(batch) / max(labels, 1)
        micro_loss.backward()
        loss += micro_loss.detach()
    rate = learning_rate(config.schedule, config.optimizer.learning_rate, state.step)
    loss = trainer.ranks.sum_loss(loss)
    norm = trainer.gradient_norm() if trainer.gradient_norm else None
    norm = clip_and_step(trainer.parameters, trainer.optimizer, rate, config.optimizer.grad_clip, loss, norm)
    meter.add(loss, norm, rate, waited, state)
    state.step += 1
    state.samples += rows
    state.tokens += rows * config.data.seq_len
    return True


class Meter:
    """Keeps losses and norms on the device until a row is due, so that steps never wait for the host."""

    def __init__(self, trainer: Trainer, peak: float | None) -> None:
        self.config, self.device, self.ranks = trainer.config, trainer.device, trainer.ranks
        self.peak = peak * trainer.ranks.size if peak else None
        self.flops = flops_per_token(trainer.config.model, trainer.config.data.seq_len)
        self._pending: list[tuple[Tensor, Tensor, int, int]] = []
        self._in_a_row = 0
        self._rate = 0.0
        self._spike_detector = SpikeDetector()
        self._spikes: list[tuple[Spike, int]] = []
        self.restart()

    def restart(self) -> None:
        """Restart the clock after work that is not a training step."""
        self._started, self._steps, self._waited, self._for_ranks = time.perf_counter(), 0, 0.0, 0.0

    def waited_for_ranks(self, seconds: float) -> None:
        """Add the time this rank waited for the slowest one before a step."""
        self._for_ranks += seconds

    def add(self, loss: Tensor, norm: Tensor, rate: float, waited: float, state: TrainState) -> None:
        """Record the step that `state` is about to count."""
        self._pending.append((loss, norm, state.step + 1, state.samples))
        self._rate, self._waited, self._steps = rate, self._waited + waited, self._steps + 1

    def row(self, state: TrainState, out: Path) -> dict[str, Any]:
        """The row of metrics.jsonl for the newest step. Applies train.nonfinite to updates that were refused."""
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
            "mem_gib": peak_memory_gib(self.device),
            "data_wait_s": self._waited,
            **_straggler(self.ranks, self._for_ranks),
            "skipped": state.skipped,
            "time": time.time(),
        }
        self.restart()
        return row

    def take_spikes(self) -> list[tuple[dict[str, Any], str]]:
        """Loss spikes since the last call: a row of metrics.jsonl and a log line for each."""
        spikes, self._spikes = self._spikes, []
        rows = self.config.global_batch_rows
        return [
            (
                {
                    "step": spike.step,
                    "tokens": (samples + rows) * self.config.data.seq_len,
                    "spike_loss": spike.loss,
                    "usual_loss": spike.usual,
                    "first_sample": samples,
                    "last_sample": samples + rows - 1,
                    "time": time.time(),
                },
                f"loss spike at step {spike.step}: {spike.loss:.4f}, usually {spike.usual:.4f} "
                f"(global samples {samples} to {samples + rows - 1})",
            )
            for spike, samples in spikes
        ]

    def _check(self, loss: float, norm: float, step: int, samples: int, state: TrainState, out: Path) -> None:
        if abs(loss) < float("inf") and abs(norm) < float("inf"):
            self._in_a_row = 0
            spike = self._spike_detector.check(step, loss)
            if spike is not None:
                self._spikes.append((spike, samples))
            return
        last = samples + self.config.global_batch_rows - 1
        report = {"step": step, "samples": [samples, last], "loss": str(loss), "grad_norm": str(norm)}
        if self.ranks.main:
            with open(out / "nonfinite.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(report) + "\n")
        what = f"step {step}: loss {loss}, gradient norm {norm} (global samples {samples} to {last})"
        state.skipped += 1
        self._in_a_row += 1
        if self.config.train.nonfinite == "stop":
            advice = "the update was refused. Lower optimizer.learning_rate or set train.nonfinite=skip"
            raise self.ranks.as_shared_error(RunError(f"{what}; {advice}"))
        if self._in_a_row >= _MAX_SKIPS_IN_A_ROW:
            raise self.ranks.as_shared_error(
                RunError(f"{what}; {self._in_a_row} updates in a row were refused, so the run stops")
            )


def _straggler(ranks: SingleProcess, waited: float) -> dict[str, float]:
    """The slowest rank and the longest time another one waited for it before steps; empty for one rank."""
    if ranks.size == 1:
        return {}
    waits = ranks.all_gather(waited)
    return {"rank_wait_s": max(waits), "straggler": waits.index(min(waits))}


def validation_row(trainer: Trainer, state: TrainState, loader: AnyLoader) -> dict[str, Any]:
    """Validate and return the row for metrics.jsonl."""
    rows = trainer.config.train.micro_batch_size
    loss, bpb = validate(trainer.loss_sum, loader, rows, trainer.config.eval.tokens, trainer.ranks)
    return {"step": state.step, "tokens": state.tokens, "val_loss": loss, "val_bpb": bpb, "time": time.time()}


def log_samples(trainer: Trainer, tokenizer: Tokenizer, step: int, log: Callable[[str], None]) -> None:
    """Log a sample for each of eval.sample_prompts from the current weights; the run's random state is untouched."""
    for prompt in trainer.config.eval.sample_prompts if trainer.ranks.size == 1 else ():
        from tnllm.generation.decoder import generate_text

        count = trainer.config.eval.sample_tokens
        asked = prompt
        if trainer.config.data.format == "chat":
            asked = render(chat_template(trainer.config), [("user", prompt)])[0].text
            prompt = f"{prompt} -> "
        text = generate_text(trainer.model, tokenizer, asked, max_tokens=count, seed=trainer.config.train.seed)
        log(f"sample at step {step}: {prompt}{text}")


def compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of products: train.dtype, where `auto` is bf16 on a GPU and fp32 on CPU; bf16 if the weights are bf16."""
    if config.train.weights == "bf16":
        return torch.bfloat16
    if config.train.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.dtype == "bf16" else torch.float32


def load(checkpoint: Path, trainer: Trainer) -> TrainState:
    """Load model and optimizer from a checkpoint of any mesh; returns where the run was."""
    if trainer.ranks.size == 1:
        return load_checkpoint(checkpoint, trainer.model, trainer.optimizer)
    from tnllm.parallel.parallelize import ShardedModel
    from tnllm.training.sharded import load_sharded

    assert isinstance(trainer.parameters, ShardedModel)
    trainer.ranks.broadcast_from_main(lambda: check_same_model(checkpoint, trainer.model))
    return load_sharded(checkpoint, trainer.parameters, trainer.optimizer)


def make_saver(config: RunConfig, out: Path, tokenizer: Tokenizer, trainer: Trainer) -> Any:
    """The checkpoint writer of this run: for one process, or for this rank."""
    keep, background = config.checkpoint.keep, config.checkpoint.async_save
    if trainer.ranks.size == 1:
        return Saver(out, keep, background, tokenizer.path)
    from tnllm.parallel.parallelize import ShardedModel
    from tnllm.training.sharded import ShardedSaver

    assert isinstance(trainer.parameters, ShardedModel)
    return ShardedSaver(out, keep, background, tokenizer.path, trainer.parameters)


def _usable_checkpoint(out: Path, resume: str | None, tokenizer: Tokenizer, display: RunDisplay) -> Path | None:
    checkpoint = find_checkpoint(out, resume, display.log) if resume else None
    if checkpoint is not None:
        keep_tokenizer(checkpoint, tokenizer)
    return checkpoint


def _sharing(device: torch.device) -> int:
    """Processes that share the memory of `device`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def keep_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError if `tokenizer` is not the one that the checkpoint was trained with."""
    ours = checkpoint / TOKENIZER
    if ours.is_file() and Tokenizer.load(ours).sha256 != tokenizer.sha256:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer this run was trained with ({ours}); a resumed run keeps its tokenizer"
        )


def write_environment(out: Path, config: RunConfig, device: torch.device) -> None:
    """Write config.resolved.yaml and env.json: what runs, and on what."""
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
        raise UserError(f"{out} holds a run already; add --resume auto to resume it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def _opening_lines(trainer: Trainer, checkpoint: Path | None, state: TrainState) -> Iterator[str]:
    """What a run says before its first step."""
    config, device, several = trainer.config, trainer.device, trainer.ranks.size > 1
    if checkpoint is not None:
        yield f"resumed from {checkpoint} after step {state.step}"
    tokens = config.total_steps * config.global_batch_rows * config.data.seq_len
    passes = config.total_steps * config.global_batch_rows / trainer.loader.num_rows
    size = f"{format_count(count_parameters(config.model))} parameters"
    if config.lora.rank:
        size += f", frozen, with an adapter of {format_count(lora_parameters(config.model, config.lora))}"
    yield (
        f"{config.model.kind} {size} on {device}; "
        f"{config.total_steps} steps of {format_count(config.train.global_batch_tokens)} tokens = "
        f"{format_count(tokens)} tokens, {passes:.2f} passes over the data"
    )
    if config.data.path is None:
        sample = "corpus that ships" if config.data.format == "text" else "conversations that ship"
        yield f"data: the sample {sample}; name your own with --set data.path=FOLDER_OR_FILE"
    if device.type == "cpu" and checkpoint is None and not several:
        yield _forecast(trainer, tokens)
    if trainer.compiled:
        yield "compiling the model: the first step takes a little longer"
    if several and config.eval.sample_prompts:
        yield "eval.sample_prompts are left out: sampling runs on one rank only; use tnllm generate"
    if several and config.eval.tasks:
        yield "eval.tasks are left out: one device scores them; use tnllm eval on a step folder"


def _forecast(trainer: Trainer, tokens: int) -> str:
    """Estimate the duration of `tokens` on this CPU from a short timed pass, before training starts."""
    text = trainer.loader.batch(0, 1).tokens[:, :256]
    repeats = 3
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first pass warms up
            started = time.perf_counter()
        trainer.model.loss(text, text).backward()
    rate = repeats * text.numel() / (time.perf_counter() - started)
    trainer.optimizer.zero_grad(set_to_none=True)
    return (
        f"this CPU does about {format_count(rate)} tokens/s: about {format_duration(tokens / rate)} for the whole run"
    )
