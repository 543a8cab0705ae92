"""Speed and memory of full training steps, TransNormerLLM beside the softmax Transformer, by length.

    cases = [Case("385m", kind, seq_len=8192, rows=4) for kind in ("transnormer", "transformer")]
    results = bench_training(cases, torch.device("cuda"), on_row=print)

It times the trainer's own step on random tokens: gather the batch, copy it to the device, forward and backward in the
trainer's precision, clip, fused AdamW. Each kind is first checked on a small model against plain fp32 on the CPU.
Compilation and warm-up are not part of a step's time.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnllm.bench.budget import Budget
from tnllm.bench.timing import cpu_times, free_memory, spread, synchronize
from tnllm.data.loader import Batch
from tnllm.device import data_sheet, describe_device
from tnllm.modeling.config import ModelConfig, get_preset
from tnllm.modeling.flops import count_parameters, flops_per_token
from tnllm.modeling.model import build_model
from tnllm.parallel.mesh import Mesh
from tnllm.training.checkpoint import TrainState
from tnllm.training.config import RunConfig
from tnllm.training.metrics import cpu_rate, matmul_rate
from tnllm.training.sections import DataSection, ParallelSection, ScheduleSection, TrainSection
from tnllm.training.signals import StopSignals
from tnllm.training.trainer import Trainer, compute_dtype, make_trainer, train_step

# Largest relative error of loss and gradients (RMS over all parameters) that is still timed, in the step's precision:
# bf16 keeps 8 bits, and the roundings of two blocks' products add up.
LIMITS = {torch.bfloat16: (2e-3, 6e-2), torch.float32: (1e-5, 1e-3)}
_CHECK_LAYERS, _CHECK_VOCAB, _CHECK_LENGTH = 2, 2048, 192


@dataclass(frozen=True)
class Case:
    """One row: `rows` rows of `seq_len` tokens in a step of the preset's model.

    `same`: what the Transformer shares with the preset: its "width" (it has no output gate, so it is about 6 % smaller), or
    its number of "parameters" (a wider channel mixer makes up for the gate).
    """

    preset: str
    kind: str
    seq_len: int
    rows: int
    activation_checkpointing: str = "none"
    packing: str = "concat"
    same: str = "width"
    weights: str = "fp32"
    softmax_every: int = 0

    @property
    def model(self) -> ModelConfig:
        """The model of this row. Raises UserError for an unknown preset."""
        own = get_preset(self.preset, softmax_every=self.softmax_every)
        if self.kind == own.kind:
            return own
        other = get_preset(self.preset, kind=self.kind)
        if self.same == "parameters":
            missing = count_parameters(own) - count_parameters(other)
            # A multiple of 64, so that matrix products stay fast.
            wider = 64 * round(missing / (64 * 3 * own.num_layers * own.model_dim))
            other = get_preset(self.preset, kind=self.kind, glu_dim=own.glu_dim + wider)
        return other


def check_model(full: ModelConfig) -> ModelConfig:
    """`full` cut to a few layers and a small vocabulary, with the same widths and heads."""
    changes = {"num_layers": min(full.num_layers, _CHECK_LAYERS), "vocab_size": min(full.vocab_size, _CHECK_VOCAB)}
    changes["softmax_every"] = min(full.softmax_every, changes["num_layers"])
    return full.model_copy(update={**changes, "pad_token_id": 0})


def run_config(
    case: Case,
    device: torch.device,
    compiled: bool,
    dtype: str = "auto",
    model: ModelConfig | None = None,
    parallel: ParallelSection | None = None,
) -> RunConfig:
    """The run whose step is timed: constant learning rate, clipping, one micro-batch; the case's rows over all ranks."""
    parallel = parallel or ParallelSection()
    return RunConfig(
        model=model or case.model,
        data=DataSection(seq_len=case.seq_len, packing=case.packing),
        schedule=ScheduleSection(kind="constant", warmup_steps=0, horizon_steps=1_000_000),
        train=TrainSection(
            max_steps=1_000_000,
            global_batch_tokens=case.rows * case.seq_len,
            micro_batch_size=case.rows // (parallel.replicate * parallel.shard),
            dtype=dtype,
            weights=case.weights,
            compile="on" if compiled else "off",
            activation_checkpointing=case.activation_checkpointing,
            device=device.type,
        ),
        parallel=parallel,
    )


class RandomLoader:
    """Random tokens through the interface of the trainer's loader; with packing "reset" every row is a document.

    A step's rows are the same on any mesh; data rank `data_rank` of `data_size` reads its shard of them.
    """

    def __init__(
        self, data: DataSection, rows: int, vocab_size: int, seed: int = 0, data_rank: int = 0, data_size: int = 1
    ) -> None:
        self._packed, self._rows = data.packing == "reset", rows
        self._rank, self._rank_rows = data_rank, rows // data_size
        generator = torch.Generator().manual_seed(seed)
        # Four batches in turn: a single one would soon be memorised, and its loss would not be a usual one.
        self._ids = torch.randint(1, vocab_size, (4, rows, data.seq_len + 1), generator=generator)

    def _batch(self, tokens: Tensor, labels: Tensor) -> Batch:
        cu_seqlens = None
        rows, length = tokens.shape
        if self._packed:
            cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
            tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
        return Batch(tokens, labels, cu_seqlens, 0, labels.numel(), length, rows)

    def rank_samples(self, first_sample: int) -> range:
        """This rank's samples of the step that begins at `first_sample`."""
        first = first_sample + self._rank * self._rank_rows
        return range(first, first + self._rank_rows)

    def batch(self, first_sample: int, num_rows: int) -> Batch:
        """`num_rows` rows from `first_sample` on; steps take the four batches in turn."""
        step, row = divmod(first_sample, self._rows)
        ids = self._ids[step % len(self._ids), row : row + num_rows]
        return self._batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class Step:
    """The trainer's step for `config`, on one device or a mesh; call it once per step."""

    def __init__(self, config: RunConfig, device: torch.device, mesh: Mesh | None = None) -> None:
        self.trainer = trainer(config, device, mesh)
        self._state, self._signals = TrainState(), StopSignals()
        # On the device, so that no step waits for the host.
        self._seen: list[Tensor] = []

    def __call__(self) -> None:
        update = train_step(self.trainer, self._state, self._signals)
        assert update is not None, "no signal is caught here"
        self._seen.append(torch.stack([update.loss, update.norm]))

    @property
    def measured(self) -> dict[str, list[float]]:
        """`loss` and gradient `norm` of every step so far; waits for the device."""
        loss, norm = torch.stack(self._seen).T.tolist()
        return {"loss": loss, "norm": norm}


def trainer(config: RunConfig, device: torch.device, mesh: Mesh | None = None) -> Trainer:
    """The trainer's own model, optimizer and loss over random tokens."""
    rank, size = (0, 1) if mesh is None else (mesh.data_rank, mesh.data_size)
    loader = RandomLoader(config.data, config.global_batch_rows, config.model.vocab_size, 0, rank, size)
    return make_trainer(config, loader, device, mesh)  # type: ignore[arg-type]


def fastest_softmax(device: torch.device) -> AbstractContextManager[Any]:
    """The baseline's fastest attention: on a GPU cuDNN's where it applies, else flash attention."""
    if device.type != "cuda":
        return nullcontext()
    # The last two serve fp32, which the first two do not.
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def bench_training(
    cases: list[Case],
    device: torch.device,
    dtype: str = "auto",
    compiled: bool = True,
    steps: int = 10,
    warmup: int = 3,
    log: Callable[[str], None] = lambda text: None,
    on_start: Callable[[dict[str, Any]], None] = lambda results: None,
    on_row: Callable[[dict[str, Any], dict[str, Any]], None] = lambda row, results: None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Check, then time each case. Returns {"environment", "accuracy": [...], "rows": [...]}, all plain values.

    `budget`: minutes for all cases. A step is forecast from its FLOPs; fewer are timed, or none, where they do not fit.

    `on_start` gets the results after the checks, `on_row` each row as it comes and the results so far. A row: the case;
    status "ok", "skipped" or "out of memory", and reason; parameters, tokens, step_ms (median, with low and high: the
    20th and 80th percentile), steps (timed), tokens_per_s, mfu (share of the matrix product rate measured at the start;
    null on CPU), mfu_sheet (of the data sheet's; null where unknown), peak_gib (allocated by torch in a steady step;
    null on CPU), compile_s (what the first step took beyond a steady one), and the first and last loss. A kind that
    fails its check is not timed. Raises UserError for a bad preset.
    """
    budget = budget or Budget(log=log)
    peak = matmul_rate(device)
    config = run_config(cases[0], device, compiled, dtype)
    environment = step_environment(config.train, device, peak, steps, warmup)
    results: dict[str, Any] = {"environment": environment, "accuracy": [], "rows": []}
    passed = set()
    with budget:
        for preset, kind, mode in dict.fromkeys(_form(case) for case in cases):
            first = next(case for case in cases if _form(case) == (preset, kind, mode))
            log(f"checking {preset} {kind} on a small model")
            checked = {"preset": preset, "kind": kind, "activation_checkpointing": mode}
            checked |= check(first, device, compiled, dtype)
            results["accuracy"].append(checked)
            if checked["passed"]:
                passed.add(_form(first))
            else:
                log(
                    f"not timed: {preset} {kind} is wrong (relative error of the loss {checked['loss']:.2g}, of the "
                    f"gradients {checked['gradient']:.2g}; limits {checked['loss_limit']:g}, {checked['gradient_limit']:g})"
                )
        on_start(results)
        budget.part(1)
        guess = peak or cpu_rate(512)
        timed = [case for case in cases if _form(case) in passed]
        for done, case in enumerate(timed):
            row = _row(case, device, dtype, compiled, (steps, warmup), peak, guess, budget, len(timed) - done)
            results["rows"].append(row)
            on_row(row, results)
    return results


def _row(
    case: Case,
    device: torch.device,
    dtype: str,
    compiled: bool,
    counts: tuple[int, int],
    peak: float | None,
    guess: float,
    budget: Budget,
    rows_left: int,
) -> dict[str, Any]:
    """The case's row, with as many of the timed and warm-up steps `counts` as fit."""
    name = f"{case.preset} {case.kind}, {case.rows} x {case.seq_len} tokens"
    form, work = _form(case), case.rows * case.seq_len * flops_per_token(case.model, case.seq_len)
    # Nothing known: a step reaches a third of the matrix rate. The first one also builds the model, and compiles.
    step_s = budget.forecast(form, work) or 3 * work / guess
    first_s = (budget.forecast((form, "first"), 1.0) or 0.0) + step_s
    steps, warmup = counts
    fit = int((budget.left_s / rows_left - first_s) / step_s) if budget.minutes < math.inf else steps + warmup
    steps = max(1, min(steps, fit - min(warmup, 1)))
    warmup = max(0, min(warmup, fit - steps))
    seconds = first_s + (steps + warmup) * step_s
    if not budget.allows(name, seconds, first_s + step_s):
        return _empty_row(case) | {"status": "skipped", "reason": budget.refusal(first_s + step_s)}
    row = time_case(case, device, dtype, compiled, steps, warmup, peak)
    if row["step_ms"] is not None:
        budget.learn(form, work, row["step_ms"] / 1e3)
        budget.learn((form, "first"), 1.0, row["compile_s"])
    return row


def _empty_row(case: Case) -> dict[str, Any]:
    empty = ["step_ms", "low_ms", "high_ms", "tokens_per_s", "mfu", "mfu_sheet", "peak_gib", "compile_s"]
    empty += ["first_loss", "last_loss"]
    row = {**asdict(case), "parameters": count_parameters(case.model), "tokens": case.rows * case.seq_len}
    return row | {"status": "out of memory", "reason": "", "steps": 0, **dict.fromkeys(empty)}


def step_environment(
    train: TrainSection, device: torch.device, peak: float | None, steps: int, warmup: int
) -> dict[str, Any]:
    """Device, versions and settings that a step's time depends on; `peak`: the measured matrix product rate, FLOP/s."""
    environment = {
        **describe_device(device),
        "dtype": str(compute_dtype(train, device)).removeprefix("torch."),
        "compiled": train.compile == "on",
        "matmul_tflop_per_s": None if peak is None else peak / 1e12,
        "steps": steps,
        "warmup": warmup,
    }
    if device.type == "cuda":
        environment["gpu_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return environment


def _form(case: Case) -> tuple[str, str, str]:
    """Cases that agree in these share one check."""
    return case.preset, case.kind, case.activation_checkpointing


def check(case: Case, device: torch.device, compiled: bool, dtype: str) -> dict[str, Any]:
    """Relative errors of the step's loss and gradients against the model's plain fp32 form on the CPU.

    The model is the case's, cut to a few layers and a small vocabulary; the step is the one that will be timed:
    compiled, in the same precision, with the same recomputation and packing.
    """
    small = check_model(case.model)
    short = replace(case, seq_len=_CHECK_LENGTH, rows=2)
    reset(device)
    exact = build_model(small, "cpu", torch.float32, seed=1)
    config = run_config(short, device, compiled, dtype, small)
    step = trainer(config, device)
    step.model.load_state_dict(exact.state_dict())
    # Back again: bf16 weights were rounded.
    exact.load_state_dict(step.model.state_dict())
    batch = RandomLoader(config.data, short.rows, small.vocab_size, seed=1).batch(0, short.rows)
    expected = exact.loss(batch.tokens, batch.labels, batch.cu_seqlens)
    expected.backward()
    with fastest_softmax(device):
        loss_sum = step.loss_sum(batch)
        loss_sum.backward()
    wrong = size = 0.0
    for ours, theirs in zip(step.model.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        wrong += float((ours.grad.cpu().double() - theirs.grad.double()).square().sum())
        size += float(theirs.grad.double().square().sum())
    loss_limit, gradient_limit = LIMITS[compute_dtype(config.train, device)]
    value, target = loss_sum.item(), expected.item()
    loss, gradient = abs(value - target) / target, math.sqrt(wrong / size)
    return {
        "loss": loss,
        "gradient": gradient,
        "loss_limit": loss_limit,
        "gradient_limit": gradient_limit,
        # Written so that NaN fails.
        "passed": loss <= loss_limit and gradient <= gradient_limit,
    }


def time_case(
    case: Case, device: torch.device, dtype: str, compiled: bool, steps: int, warmup: int, peak: float | None
) -> dict[str, Any]:
    """One row of results; see `bench_training`."""
    reset(device)
    config = run_config(case, device, compiled, dtype)
    row = _empty_row(case)
    try:
        with fastest_softmax(device):
            step, times = timed_step(config, device, steps, warmup)
    except torch.OutOfMemoryError:
        return row
    losses = step.measured["loss"]
    measured = {**times, "first_loss": losses[0], "last_loss": losses[-1]}
    rate = row["tokens"] / (measured["step_ms"] / 1e3)
    work = flops_per_token(config.model, case.seq_len)
    card = data_sheet(device)
    return row | {
        "status": "ok" if math.isfinite(losses[0]) and math.isfinite(losses[-1]) else "loss not finite",
        "steps": steps,
        **measured,
        "tokens_per_s": rate,
        "mfu": None if peak is None else rate * work / peak,
        "mfu_sheet": None if card is None else rate * work / card.peak_flops,
    }


def timed_step(
    config: RunConfig, device: torch.device, steps: int, warmup: int, mesh: Mesh | None = None
) -> tuple[Step, dict[str, Any]]:
    """A step, and its times: step_ms (median), low_ms, high_ms, compile_s, peak_gib; see `bench_training`."""
    started = time.perf_counter()
    step = Step(config, device, mesh)
    step()
    synchronize(device)
    first_s = time.perf_counter() - started
    for _ in range(warmup):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    median, low, high = spread(_step_times(step, device, steps))
    return step, {
        "step_ms": median,
        "low_ms": low,
        "high_ms": high,
        "compile_s": max(0.0, first_s - median / 1e3),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def _step_times(step: Callable[[], None], device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each step, the host running ahead of the device as it does in training."""
    if device.type != "cuda":
        return cpu_times(step, steps)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def reset(device: torch.device) -> None:
    """Free the previous case's memory and compiled code: a second length must not be compiled with dynamic shapes."""
    torch._dynamo.reset()
    free_memory(device)
