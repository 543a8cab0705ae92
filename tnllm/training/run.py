"""An open run: its folder, its ranks and its data, from the first check to the published weights.

with open_run(config, Path("runs/tiny"), resume="auto") as run:
    ...                                                          # training steps, see tnllm/training/loop.py
    finish(run)
"""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tnllm import __version__
from tnllm.data.loader import Loader
from tnllm.device import data_sheet, pick_device
from tnllm.errors import UserError
from tnllm.files import format_count, format_duration, free_name, only_writer, write_text_atomic
from tnllm.modeling.flops import count_parameters, flops_per_token, lora_parameters
from tnllm.modeling.weights import TOKENIZER, load_model
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.ranks import Distributed, SingleProcess
from tnllm.tokenizer import Tokenizer
from tnllm.training.checkpoint import (
    Saver,
    TrainState,
    check_same_model,
    list_checkpoints,
    load_checkpoint,
    read_state,
    step_name,
)
from tnllm.training.config import RunConfig
from tnllm.training.display import RunDisplay
from tnllm.training.history import Log, check_changes, check_folder, choose_checkpoint, roll_back
from tnllm.training.loaders import AnyLoader, describe, fingerprint, open_loaders, open_tokenizer
from tnllm.training.loss_spikes import Spike, SpikeDetector
from tnllm.training.memory import fit_memory, free_bytes
from tnllm.training.meter import NonFinitePolicy, StepTimer
from tnllm.training.metrics import METRICS, MetricsLog, matmul_rate, repair_metrics
from tnllm.training.profile import Profile
from tnllm.training.run_model import publish
from tnllm.training.signals import StopSignals
from tnllm.training.trackers import Trackers, check_trackers
from tnllm.training.trainer import Trainer, Update, compute_dtype, make_trainer


@dataclass
class Run:
    """A run that can take steps.

    `peak_tokens_per_s`, `sheet_tokens_per_s`: at the measured matrix product rate of all ranks, and at that of the cards'
    data sheet (None: unknown).
    """

    out: Path
    trainer: Trainer
    state: TrainState
    tokenizer: Tokenizer
    validation: AnyLoader | None
    saver: Saver
    metrics: MetricsLog
    trackers: Trackers | None  # None: not on this rank
    display: RunDisplay
    signals: StopSignals
    profile: Profile
    nonfinite: NonFinitePolicy
    spikes: SpikeDetector
    saved_step: int  # -1: none in this folder
    peak_tokens_per_s: float | None
    sheet_tokens_per_s: float | None
    timer: StepTimer = field(default_factory=StepTimer)
    learning_rate: float = 0.0
    _unread: list[Update] = field(default_factory=list)

    def add(self, update: Update) -> None:
        """Count an update. Its loss stays on the device until `check_updates`."""
        self._unread.append(update)
        self.timer.add(update)
        self.learning_rate = update.learning_rate
        self.profile.step()
        self.display.advance(update.step)

    def report(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl and its line of the log."""
        self.write(row)
        self.display.row(row)

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl, also for the trackers."""
        self.metrics.write(row)
        if self.trackers is not None:
            self.trackers.write(row)

    def check_updates(self) -> tuple[float, float]:
        """Read the updates since the last call, which waits for the device; returns loss and norm of the newest.

        Applies train.nonfinite to those that were refused, and reports spikes of the loss.
        """
        updates, rows = self._unread, self.trainer.config.global_batch_rows
        self._unread = []
        values = torch.stack([torch.stack([u.loss, u.norm, u.skipped]) for u in updates]).tolist()
        for update, (loss, norm, skipped) in zip(updates, values, strict=True):
            last = update.first_sample + rows - 1
            if not abs(loss) < float("inf") or not abs(norm) < float("inf") or skipped:
                if skipped:
                    usual = median(self.state.recent_losses or [loss])
                    self._report_spike(
                        Spike(update.step, loss, usual), update.first_sample, last, "; the update was skipped"
                    )
                self.nonfinite.refused(update, last, loss, norm, self.state, spike=bool(skipped))
                continue
            self.state.skipped_in_a_row = 0
            spike = self.spikes.check(update.step, loss)
            if spike is not None:
                self._report_spike(spike, update.first_sample, last)
        if self.trainer.guard is not None:
            self.state.guard = self.trainer.guard.to_lists()
        loss, norm, _ = values[-1]
        return loss, norm

    def _report_spike(self, spike: Spike, first: int, last: int, what: str = "") -> None:
        tokens = (last + 1) * self.trainer.config.data.seq_len
        losses = {"spike_loss": spike.loss, "usual_loss": spike.usual}
        samples = {"first_sample": first, "last_sample": last}
        self.write({"step": spike.step, "tokens": tokens, **losses, **samples, "time": time.time()})
        self.display.log(
            f"loss spike at step {spike.step}: {spike.loss:.4f}, usually {spike.usual:.4f} "
            f"(global samples {first} to {last}){what}"
        )

    def save(self) -> None:
        """Write a checkpoint of the current step, in the background if so configured."""
        if self._unread:
            self.check_updates()
        if isinstance(self.trainer.loader, Loader):
            self.state.streams = self.trainer.loader.positions(self.state.samples)
        self.saver.save(self.state, self.trainer.parameters, self.trainer.optimizer)
        self.saved_step = self.state.step


@contextmanager
def open_run(
    config: RunConfig,
    out: Path,
    resume: str | None,
    mesh: Mesh | None = None,
    allow_data_change: bool = False,
    force_unlock: bool | None = None,
) -> Iterator[Run]:
    """Lock the run folder `out`, check everything, build the model and load a checkpoint; see `train`."""
    device = pick_device(config.train.device, "train.device") if mesh is None else mesh.device
    ranks = SingleProcess() if mesh is None else Distributed(mesh)
    with ExitStack() as stack:
        ranks.broadcast_from_main(lambda: stack.enter_context(only_writer(out, force_unlock)))
        ranks.broadcast_from_main(lambda: check_folder(out, resume))
        ranks.broadcast_from_main(lambda: check_trackers(config.log))
        tokenizer = ranks.main_first(
            lambda: open_tokenizer(config.tokenizer.path, config.data, config.init_folder, config.model.vocab_size)
        )
        rows, seed, init, mine = config.global_batch_rows, config.train.seed, config.init_folder, ranks.data_rank
        loader, validation = ranks.main_first(
            lambda: open_loaders(config.data, tokenizer, rows, seed, init, mine, ranks.data_size, out / "stream")
        )
        if isinstance(loader, Loader):
            stack.callback(loader.close)
        ends = config.train.describe_ends(loader.num_rows / config.global_batch_rows)
        config = config.with_epochs(loader.num_rows)
        display = stack.enter_context(RunDisplay(out / "train.log", config.total_steps, quiet=not ranks.main))
        if ends:
            display.log(ends)
        signals = stack.enter_context(StopSignals(ranks.size > 1, config.train.max_time if ranks.main else None))
        # Ranks on a CPU share its memory.
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        free = ranks.all_reduce_min(free_bytes(device) / sharing)
        fitted = fit_memory(
            config.model, config.lora, config.train, config.parallel, config.data.seq_len, device, display.log, free
        )
        config = config.model_copy(update={"train": fitted})
        # Unseeded, torch's generator, which checkpoints hold, starts from a number of the system's.
        torch.manual_seed(config.train.seed)
        trainer = make_trainer(config, loader, device, mesh)
        checkpoint = ranks.broadcast_from_main(
            lambda: _prepare_folder(out, resume, trainer, tokenizer, allow_data_change, display.log)
        )
        state = TrainState()
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, trainer.parameters, trainer.optimizer)
        if isinstance(loader, Loader) and state.data == fingerprint(loader):
            loader.restore(state.streams)
        state.data = fingerprint(loader)
        if trainer.guard is not None:
            trainer.guard.load(state.guard)
        for line in _opening_lines(trainer, checkpoint, state):
            display.log(line)
        peak, card = matmul_rate(device), data_sheet(device)
        tokens_per_flop = ranks.size / flops_per_token(config.model, config.data.seq_len)
        recipe = config.model_dump(mode="json")
        trackers = Trackers(out, config.log, recipe, state.step, display.log) if ranks.main else None
        run = Run(
            out,
            trainer,
            state,
            tokenizer,
            validation,
            Saver(out, config.checkpoint.keep, config.checkpoint.async_save, tokenizer.path, ranks, recipe),
            MetricsLog(out / METRICS if ranks.main else None),
            trackers,
            display,
            signals,
            Profile(out / "profile", config.log.profile_steps if ranks.main else 0, device, display.log),
            NonFinitePolicy(config.train.nonfinite, out / "nonfinite.jsonl", ranks),
            SpikeDetector(state.recent_losses),
            state.step,
            peak * tokens_per_flop if peak else None,
            card.peak_flops * tokens_per_flop if card else None,
        )
        if trackers is not None:
            stack.enter_context(trackers)
        if checkpoint is not None and checkpoint.resolve().parent != (out / "checkpoints").resolve():
            # The folder's own first checkpoint: without it, --resume auto would start over.
            run.save()
        yield run


def finish(run: Run, outer_command: bool = False) -> None:
    """Save what is not saved and close the files; publish the weights, or after a signal raise what ends the process."""
    if run.signals.stop and run.saved_step < run.state.step:
        run.save()
    run.profile.close()
    run.saver.wait()
    run.metrics.close()
    if run.signals.stop:
        step = run.state.step
        how = "run the same command again to resume" if outer_command else "resume with --resume auto"
        why = " by train.max_time" if run.signals.stop == signal.SIGALRM else ""
        run.display.log(f"stopped{why} after step {step}, saved at step {run.saved_step}; {how}")
        run.signals.leave(how)
    elif run.trainer.ranks.main:
        advice = _publish(run)
        run.display.log(f"weights in {run.out / 'weights'}{'' if outer_command else advice}")


def _publish(run: Run) -> str:
    """Write weights/ after the last step; returns how to use them."""
    config, model, out = run.trainer.config, run.trainer.model, run.out
    if run.trainer.ranks.size > 1:
        # The last checkpoint holds full tensors; each rank has only its shards.
        model = load_model(out / "checkpoints" / step_name(run.state.step), "cpu", merge=False)
    chat, base = config.data.format == "chat", config.init_folder
    template = config.prompt_template if chat else None
    publish(model, out, run.tokenizer.path, compute_dtype(config.train, run.trainer.device), base, template)
    how = "--chat" if chat else "--prompt '...'"
    return f"; try: tnllm generate --model {out} {how}"


def _prepare_folder(
    out: Path, resume: str | None, trainer: Trainer, tokenizer: Tokenizer, allow_data_change: bool, log: Log
) -> Path | None:
    """Choose the checkpoint and check that it fits; then make `out` the folder of a run that continues from there."""
    config = trainer.config
    checkpoint = choose_checkpoint(out, resume, log) if resume else None
    state, changed = TrainState(), True
    if checkpoint is not None:
        ours = checkpoint / TOKENIZER
        if ours.is_file() and Tokenizer.load(ours).sha256 != tokenizer.sha256:
            raise UserError(
                f"{tokenizer.path} is not the tokenizer this run was trained with ({ours}); a resumed run keeps its "
                "tokenizer"
            )
        check_same_model(checkpoint, trainer.model)
        state = read_state(checkpoint)
        if state.step > config.total_steps:
            raise UserError(
                f"the run ends at step {config.total_steps}, and {checkpoint} is beyond; raise train.max_steps, "
                "max_tokens or max_epochs, or give an earlier step with --resume"
            )
        done = describe(trainer.loader, state.samples)
        position = f"reading starts at global sample {state.samples}, after {done}"
        recipe = config.model_dump(mode="json")
        data = fingerprint(trainer.loader)
        changed = check_changes(checkpoint, recipe, state.data, data, allow_data_change, position, log)
    for path in sorted({*(out / "checkpoints").glob("*")} - {*list_checkpoints(out)}):
        log(f"{path} is not a checkpoint; it is left alone")
    repair_metrics(out / METRICS, log)
    roll_back(out, state.step, changed, bool(state.owed), log)
    write_environment(out, config.to_yaml(), trainer.device, state.step, fingerprint(trainer.loader))
    return checkpoint


def write_environment(out: Path, config_yaml: str, device: torch.device, step: int, data: str) -> None:
    """Write config.resolved.yaml and env.json: what runs, and on what. Another config, used until `step`, is kept.

    `data`: the fingerprint of the training data.
    """
    path = out / "config.resolved.yaml"
    if path.exists() and path.read_bytes() != config_yaml.encode():
        path.rename(free_name(out / f"config.until-{step_name(step)}.yaml"))
    write_text_atomic(path, config_yaml)
    cuda = device.type == "cuda"
    environment = {
        "tnllm": __version__,
        "command": sys.argv,
        "data": data,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text_atomic(out / "env.json", json.dumps(environment, indent=2) + "\n")


def _opening_lines(trainer: Trainer, checkpoint: Path | None, state: TrainState) -> Iterator[str]:
    """What a run says before its first step."""
    config, device, several = trainer.config, trainer.device, trainer.ranks.size > 1
    if checkpoint is not None:
        yield f"resumed from {checkpoint} after step {state.step}"
    tokens = config.total_steps * config.global_batch_rows * config.data.seq_len
    data = describe(trainer.loader, config.total_steps * config.global_batch_rows)
    size = f"{format_count(count_parameters(config.model))} parameters"
    if config.lora.rank:
        size += f", frozen, with an adapter of {format_count(lora_parameters(config.model, config.lora))}"
    yield (
        f"{config.model.kind} {size} on {device}; "
        f"{config.total_steps} steps of {format_count(config.train.global_batch_tokens)} tokens = "
        f"{format_count(tokens)} tokens, {data}"
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
