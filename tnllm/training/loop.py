"""The training run, start to end.

    train(load_recipe("tiny"), Path("runs/tiny"))
    train(config, Path("runs/tiny"), resume="auto")

A run folder holds config.resolved.yaml, env.json, metrics.jsonl, train.log, checkpoints/, latest and, at the end, weights/.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm import __version__
from tnllm.data.loader import Batch
from tnllm.device import pick_device
from tnllm.errors import RunError, UserError
from tnllm.files import format_count, format_duration, write_text_atomic
from tnllm.modeling.flops import count_parameters, flops_per_token, lora_parameters
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import TOKENIZER, load_model
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.ranks import Distributed, SingleProcess
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
from tnllm.training.run_model import chat_template, fill_shards, init_folder, make_meta_model, make_model, publish
from tnllm.training.schedule import learning_rate
from tnllm.training.signals import StopSignals
from tnllm.training.validation import validate

# Under the policy `skip`, this many refused updates in a row end the run: it will not recover by itself.
_MAX_SKIPS_IN_A_ROW = 20


@dataclass
class Trainer:
    """What the steps of a run share. Nothing here knows how many ranks there are.

    `parameters` are what the optimizer updates: the model's, or this rank's parts of them.
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
) -> None:
    """Train `config` into the run folder `out`.

    `resume`: None starts anew and refuses a folder that holds a run; "auto" goes on from the newest whole
    checkpoint of `out`, or starts; a folder names the checkpoint. `mesh`: this process is one of its ranks, which
    all call this alike. `score` scores eval.tasks (evaluation.during_training.task_scorer). Raises UserError for input that
    does not fit, RunError for failures while running, Terminated (exit 143) and KeyboardInterrupt after a signal, each
    once everything is saved.
    """
    if config.eval.tasks and score is None and mesh is None:
        raise UserError("eval.tasks are set, and nothing to score them with was given; train with `tnllm train`")
    device = pick_device(config.train.device, "train.device") if mesh is None else mesh.device
    ranks = SingleProcess() if mesh is None else Distributed(mesh)
    tokenizer = ranks.main_first(lambda: open_tokenizer(config))
    loader, validation = ranks.main_first(lambda: open_loaders(config, tokenizer, ranks.data_rank, ranks.data_size))
    ranks.broadcast_from_main(lambda: _open_folder(out, config, resume))
    view = RunDisplay(out / "train.log", config.total_steps, quiet=not ranks.main)
    with view, StopSignals(shared=ranks.size > 1) as signals:
        config = fit_memory(config, device, view.say, ranks.all_reduce_min(free_bytes(device) / _sharing(device)))
        trainer = make_trainer(config, loader, device, mesh)
        state = TrainState()
        checkpoint = ranks.broadcast_from_main(lambda: _usable_checkpoint(out, resume, tokenizer, view))
        if checkpoint is not None:
            state = load(checkpoint, trainer)
            view.say(f"resumed from {checkpoint} after step {state.step}")
        saver = make_saver(config, out, tokenizer, trainer)
        if ranks.main:
            write_environment(out, config, device)
        metrics = MetricsLog(out / "metrics.jsonl" if ranks.main else None, state.step, config.log.tensorboard)
        view.say(_opening(config, loader, device))
        if config.data.path is None:
            sample = "corpus that ships" if config.data.format == "text" else "conversations that ship"
            view.say(f"data: the sample {sample}; name your own with --set data.path=FOLDER_OR_FILE")
        if device.type == "cpu" and checkpoint is None and ranks.size == 1:
            view.say(_forecast(trainer))
        if trainer.compiled:
            view.say("compiling the model: the first step takes a little longer")
        meter = Meter(trainer, matmul_rate(device))
        if ranks.size > 1 and config.eval.sample_prompts:
            view.say("eval.sample_prompts are left out: text is sampled by one rank alone; use tnllm generate")
        if ranks.size > 1 and config.eval.tasks:
            view.say("eval.tasks are left out: one device scores them; use tnllm eval on a step folder")
        profile = (
            Profile(out / "profile", config.log.profile_steps, device, view.say)
            if config.log.profile_steps and ranks.main
            else None
        )
        saved = state.step
        while state.step < config.total_steps and not signals.stop:
            if not train_step(trainer, state, meter, signals):
                break
            if profile is not None:
                profile.step()
            last = state.step == config.total_steps
            if last or state.step == 1 or state.step % config.log.every_steps == 0 or signals.stop:
                row = meter.row(state, out)
                metrics.write(row)
                view.row(row)
                for row, line in meter.take_spikes():
                    metrics.write(row)
                    view.say(line)
            view.advance(state.step)
            if validation is not None and due(config.eval.every_steps, state.step, last) and not signals.stop:
                row = validation_row(trainer, state, validation)
                metrics.write(row)
                view.row(row)
                for line in sample_lines(trainer, tokenizer, state.step):
                    view.say(line)
                meter.restart()
            if score and due(config.eval.tasks_every_steps, state.step, last) and not signals.stop:
                row = {
                    "step": state.step,
                    "tokens": state.tokens,
                    **score(trainer.model, tokenizer),
                    "time": time.time(),
                }
                metrics.write(row)
                view.row(row)
                meter.restart()
            if due(config.checkpoint.every_steps, state.step, last):
                saver.save(state, trainer.parameters, trainer.optimizer)
                saved = state.step
                meter.restart()
        if signals.stop and saved < state.step:
            saver.save(state, trainer.parameters, trainer.optimizer)
            saved = state.step
        if profile is not None:
            profile.close()
        saver.wait()
        metrics.close()
        if signals.stop:
            view.say(f"stopped after step {state.step}, saved at step {saved}; go on with --resume auto")
            signals.leave()
        if ranks.main:
            model = trainer.model
            if ranks.size > 1:
                # The last checkpoint holds whole tensors; no rank does.
                model = load_model(out / "checkpoints" / step_name(state.step), "cpu", merge=False)
            publish(model, out, config, tokenizer, compute_dtype(config, device))
        how = "--chat" if config.data.format == "chat" else "--prompt '...'"
        view.say(f"weights in {out / 'weights'}; try: tnllm generate --model {out} {how}")


def due(every: int, step: int, last: bool) -> bool:
    """Whether something done every so many steps (0: only at the end) is due after `step`."""
    return last or (every > 0 and step % every == 0)


def make_trainer(config: RunConfig, loader: AnyLoader, device: torch.device, mesh: Mesh | None = None) -> Trainer:
    """Model, optimizer and loss of a run, on `device`; weights are fp32 unless asked, products in the recipe's dtype."""
    if mesh is not None:
        return _make_sharded_trainer(config, loader, mesh)
    low = compute_dtype(config, device) == torch.bfloat16
    model = make_model(config, device, low)
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    optimizer = make_optimizer(model, config.optimizer, compiled)
    if compiled:
        model.compile_blocks()

    def loss_sum(batch: Batch) -> Tensor:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return model.loss(batch.tokens, batch.labels, batch.cu_seqlens)

    return Trainer(config, model, model, optimizer, loader, device, loss_sum, compiled)


def _make_sharded_trainer(config: RunConfig, loader: AnyLoader, mesh: Mesh) -> Trainer:
    from tnllm.parallel.parallelize import parallelize
    from tnllm.parallel.sequence import shard_sequence

    device, low = mesh.device, compute_dtype(config, mesh.device) == torch.bfloat16
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    model = make_meta_model(config, low)
    sharded = parallelize(model, mesh, config.train.activation_checkpointing, compiled, low)
    sharded.materialize(device, config.train.seed)
    folder = init_folder(config)
    if folder is not None:
        fill_shards(sharded, folder)
    optimizer = make_optimizer(sharded, config.optimizer)

    def loss_sum(batch: Batch) -> Tensor:
        batch = batch.to(device)
        piece = shard_sequence(
            batch.tokens, batch.labels, batch.cu_seqlens, mesh.index["sequence"], mesh.sizes["sequence"]
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return model.loss(*piece)

    return Trainer(
        config,
        model,
        sharded,
        optimizer,
        loader,
        device,
        loss_sum,
        compiled,
        Distributed(mesh),
        sharded.reduce_gradients,
    )


def train_step(trainer: Trainer, state: TrainState, meter: "Meter", signals: StopSignals) -> bool:
    """One update: gather the micro-batches, accumulate gradients, clip, step; `state` and `meter` move on.

    A signal between two micro-batches gives the update up: nothing has changed, and False comes back.
    """
    config = trainer.config
    rows, micro = config.global_batch_rows, config.train.micro_batch_size
    # All micro-batches first: the loss is divided by the true number of counted labels, whatever their lengths.
    started = time.perf_counter()
    batches = [trainer.loader.batch(first, micro) for first in trainer.loader.rank_samples(state.samples)[::micro]]
    waited = time.perf_counter() - started
    labels = trainer.ranks.start_step(sum(batch.num_labels for batch in batches), signals)
    if labels is None:
        return False
    meter.waited_for_ranks(time.perf_counter() - started - waited)
    loss = torch.zeros((), device=trainer.device)
    for number, batch in enumerate(batches):
        if number and signals.stop:
            trainer.optimizer.zero_grad(set_to_none=True)
            return False
        part = trainer.loss_sum(batch) / max(labels, 1)
        part.backward()
        loss += part.detach()
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
    """Keeps what steps produced on the device until a row is wanted, so that steps need not wait for the host."""

    def __init__(self, trainer: Trainer, peak: float | None) -> None:
        self.config, self.device, self.ranks = trainer.config, trainer.device, trainer.ranks
        self.peak = peak * trainer.ranks.size if peak else None
        self.flops = flops_per_token(trainer.config.model, trainer.config.data.seq_len)
        self._pending: list[tuple[Tensor, Tensor, int, int]] = []
        self._in_a_row = 0
        self._rate = 0.0
        self._watch = SpikeDetector()
        self._spikes: list[tuple[Spike, int]] = []
        self.restart()

    def restart(self) -> None:
        """Start timing again, after work that is no training step."""
        self._started, self._steps, self._waited, self._for_ranks = time.perf_counter(), 0, 0.0, 0.0

    def waited_for_ranks(self, seconds: float) -> None:
        """Note how long this rank waited for the slowest one before a step."""
        self._for_ranks += seconds

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
            "mem_gib": peak_memory_gib(self.device),
            "data_wait_s": self._waited,
            **_straggler(self.ranks, self._for_ranks),
            "skipped": state.skipped,
            "time": time.time(),
        }
        self.restart()
        return row

    def take_spikes(self) -> list[tuple[dict[str, Any], str]]:
        """Spikes of the loss since the last call: a row of metrics.jsonl and a line for each."""
        found, self._spikes = self._spikes, []
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
            for spike, samples in found
        ]

    def _check(self, loss: float, norm: float, step: int, samples: int, state: TrainState, out: Path) -> None:
        if abs(loss) < float("inf") and abs(norm) < float("inf"):
            self._in_a_row = 0
            spike = self._watch.check(step, loss)
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
    """Which rank the others waited for before steps, and how long at most; nothing for one rank."""
    if ranks.size == 1:
        return {}
    waits = ranks.all_gather(waited)
    return {"rank_wait_s": max(waits), "straggler": waits.index(min(waits))}


def validation_row(trainer: Trainer, state: TrainState, loader: AnyLoader) -> dict[str, Any]:
    """Validate and return the row for metrics.jsonl."""
    rows = trainer.config.train.micro_batch_size
    loss, bpb = validate(trainer.loss_sum, loader, rows, trainer.config.eval.tokens, trainer.ranks)
    return {"step": state.step, "tokens": state.tokens, "val_loss": loss, "val_bpb": bpb, "time": time.time()}


def sample_lines(trainer: Trainer, tokenizer: Tokenizer, step: int) -> list[str]:
    """Each prompt of the recipe, continued by the current weights; the random state of the run is untouched."""
    lines = []
    for prompt in trainer.config.eval.sample_prompts if trainer.ranks.size == 1 else ():
        from tnllm.generation.decoder import generate_text

        count = trainer.config.eval.sample_tokens
        asked = prompt
        if trainer.config.data.format == "chat":
            asked = chat_template(trainer.config).replace("{prompt}", prompt)
            prompt = f"{prompt} -> "
        text = generate_text(trainer.model, tokenizer, asked, max_tokens=count, seed=trainer.config.train.seed)
        lines.append(f"sample at step {step}: {prompt}{text}")
    return lines


def compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on a GPU, fp32 on CPU; bf16 wherever the weights are."""
    if config.train.weights == "bf16":
        return torch.bfloat16
    if config.train.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.dtype == "bf16" else torch.float32


def load(checkpoint: Path, trainer: Trainer) -> TrainState:
    """Fill model and optimizer from a checkpoint of any mesh."""
    if trainer.ranks.size == 1:
        return load_checkpoint(checkpoint, trainer.model, trainer.optimizer)
    from tnllm.parallel.parallelize import ShardedModel
    from tnllm.training.sharded import load_sharded

    assert isinstance(trainer.parameters, ShardedModel)
    trainer.ranks.broadcast_from_main(lambda: check_same_model(checkpoint, trainer.model))
    return load_sharded(checkpoint, trainer.parameters, trainer.optimizer)


def make_saver(config: RunConfig, out: Path, tokenizer: Tokenizer, trainer: Trainer) -> Any:
    """What writes checkpoints of this run."""
    keep, background = config.checkpoint.keep, config.checkpoint.async_save
    if trainer.ranks.size == 1:
        return Saver(out, keep, background, tokenizer.path)
    from tnllm.parallel.parallelize import ShardedModel
    from tnllm.training.sharded import ShardedSaver

    assert isinstance(trainer.parameters, ShardedModel)
    return ShardedSaver(out, keep, background, tokenizer.path, trainer.parameters)


def _usable_checkpoint(out: Path, resume: str | None, tokenizer: Tokenizer, view: RunDisplay) -> Path | None:
    checkpoint = find_checkpoint(out, resume, view.say) if resume else None
    if checkpoint is not None:
        keep_tokenizer(checkpoint, tokenizer)
    return checkpoint


def _sharing(device: torch.device) -> int:
    """Processes that share the memory of `device`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


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
        size += f", frozen, with an adapter of {format_count(lora_parameters(config.model, config.lora))}"
    return (
        f"{config.model.kind} {size} on {device}; "
        f"{config.total_steps} steps of {format_count(config.train.global_batch_tokens)} tokens = "
        f"{format_count(tokens)} tokens, {passes:.2f} passes over the data"
    )
