"""Decoding: latency of a token by position, tokens per second by batch, memory, beside a Transformer with its cache.

    results = bench_decode("385m", [1024, 1 << 20], [1, 64], [1024, 16384], torch.bfloat16, torch.device("cuda"))

Weights are random: a step's cost does not depend on their values. A step is timed only after its logits were checked
against the full forward pass. Timed is a chain of steps, each fed the argmax token of the one before it, all tokens
kept, as in greedy decoding; on a GPU every step is one CUDA graph (for one row with the argmax inside), and the host
runs ahead.

The limit of a step is the bytes it must move over the copy bandwidth measured in the same run: every weight once (of an
embedding that is not tied to the head only the rows looked up), and per row its state read and written and its key-value
cache read.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnllm.assets import tokenizer_model
from tnllm.bench.accuracy import relative_rms
from tnllm.bench.budget import Budget
from tnllm.bench.decode_baseline import FixedStep, cache_of, filled_cache
from tnllm.bench.lookup import bench_lookup
from tnllm.bench.timing import calls, copy_bandwidth, free_memory, measure
from tnllm.device import data_sheet, describe_device
from tnllm.errors import RunError
from tnllm.generation.captured_step import CapturedStep, can_capture
from tnllm.generation.loading import load
from tnllm.generation.slots import check_lookup
from tnllm.modeling.cache import is_cache, resized
from tnllm.modeling.config import get_preset
from tnllm.modeling.cpu_step import cpu_step, pack_weights
from tnllm.modeling.int8 import Int8Linear
from tnllm.modeling.model import LanguageModel, build_model
from tnllm.tokenizer import Tokenizer

Step = Callable[[Tensor], Tensor]
# Tokens of the correctness check; the second half of them is read one by one.
_CHECK_TOKENS = 48
# The step's error may exceed that of the full forward pass in the same dtype by this factor and constant (relative RMS
# against the wider dtype): they round at different points, so neither is always the smaller one. The constant is fp32's.
_CHECK_RATIO, _CHECK_SLACK = 1.25, 1e-4
# Steps between two readings of the clock.
_CHAIN = {"cuda": 32, "cpu": 4}
_FAR = 1 << 20
# Tokens of a text, and rounds; by whether the model is the demo, which is small.
_LOOKUP = {True: (256, 9), False: (64, 5)}


@dataclass(frozen=True)
class _Point:
    provider: str  # tnllm or transformer
    sweep: str  # position or batch
    batch: int
    position: int  # tokens before the step; the baseline's cache holds as many, the new one included

    @property
    def name(self) -> str:
        return f"{self.provider}, batch {self.batch}, position {self.position}"


def bench_decode(
    preset: str,
    positions: list[int],
    batches: list[int],
    contexts: list[int],
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float = 0.5,
    compiled: bool = True,
    log: Callable[[str], None] = lambda text: None,
    on_row: Callable[[dict[str, Any]], None] = lambda results: None,
    budget: Budget | None = None,
    softmax_every: int = 0,
    lookup: int = 0,
) -> dict[str, Any]:
    """Measure one preset: batch 1 at every position, every batch, and the baseline at every context and batch.

    `softmax_every`: of the preset, every Nth layer softmax; its caches are empty slots but for a short prompt.
    `lookup`: also decode texts with proposals of so many tokens, with the weights that ship where the preset is `demo`.
    `on_row` gets the results so far after each row, so that an interrupted run loses none. `compiled`: compile the
    baseline (GPU only). `budget`: minutes for all; what is forecast not to fit, from the bytes a step moves, is skipped.
    Returns environment, accuracy, rows, and what was skipped with its reason. Raises RunError if a step's logits differ
    from those of the full forward pass.
    """
    budget = budget or Budget(log=log)
    bandwidth = copy_bandwidth(device)
    compiled = compiled and device.type == "cuda"
    environment = {
        **describe_device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_tb_per_s": bandwidth / 1e12,
        "baseline": "compiled, one CUDA graph" if compiled else "eager",
    }
    results: dict[str, Any] = {"environment": environment, "accuracy": [], "rows": [], "skipped": []}
    kinds = ("transnormer", "transformer") if contexts else ("transnormer",)
    with budget:
        for number, kind in enumerate(kinds):
            config = get_preset(
                preset, kind=kind, **({"softmax_every": softmax_every} if kind == "transnormer" else {})
            )
            model = build_model(config, device, dtype, seed=0).eval().requires_grad_(False)
            if device.type == "cpu":
                pack_weights(model)
            if lookup and kind == "transnormer":
                check_lookup(model)
            log(f"{preset} {kind}: checking the step against the full forward pass")
            checked = _check(model, compiled)
            results["accuracy"].append(checked)
            if not checked["passed"]:
                raise RunError(
                    f"the decoding step of {preset} {kind} is wrong, so nothing is timed: "
                    f"relative error {checked['step_error']:.2g}, allowed {checked['limit']:.2g}"
                )
            budget.part(len(kinds) - number)
            points = list(_points(kind, positions, batches, contexts))
            for done, point in enumerate(points):
                row = {"preset": preset, "softmax_every": config.softmax_every, **point.__dict__}
                measured = _row(model, point, bandwidth, budget_s, compiled, budget, len(points) - done)
                if isinstance(measured, str):
                    results["skipped"].append({**row, "reason": measured})
                    continue
                results["rows"].append(row | measured)
                log(f"{point.name}: {measured['step_ms']:.3f} ms, {measured['tokens_per_s']:,.0f} tokens/s")
                on_row(results)
            if lookup and kind == "transnormer":
                ours = load(None, str(device)).model if preset == "demo" else model
                tokenizer = Tokenizer.load(tokenizer_model())
                results["lookup"] = bench_lookup(ours, tokenizer, lookup, *_LOOKUP[preset == "demo"], log)
                on_row(results)
            del model
            free_memory(device)
    return results


def _row(
    model: LanguageModel,
    point: _Point,
    bandwidth: float,
    budget_s: float,
    compiled: bool,
    budget: Budget,
    rows_left: int,
) -> dict[str, Any] | str:
    """What was measured, or why nothing was. It is repeated less where all `rows_left` would not fit otherwise."""
    needed, usable = _needed_bytes(model, point), _usable_bytes(model.device)
    reason = f"needs about {needed / 2**30:.1f} GiB, {usable / 2**30:.1f} GiB may be used"
    if needed <= usable:
        # Nothing known: eager steps of small models take a few times what their bytes do.
        work, length = _moved_bytes(model, point), _CHAIN[model.device.type]
        chain_s = budget.forecast(point.provider, work) or 4 * length * work / bandwidth
        prepare_s = budget.forecast((point.provider, "prepare"), 1.0) or chain_s
        if not budget.allows(point.name, prepare_s + calls(chain_s, budget_s) * chain_s, prepare_s + 2 * chain_s):
            return budget.refusal(prepare_s + 2 * chain_s)
        try:
            measured = _time(model, point, bandwidth, budget_s, compiled, budget.left_s / rows_left)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        else:
            budget.learn(point.provider, work, measured["step_ms"] / 1e3 * length)
            budget.learn((point.provider, "prepare"), 1.0, measured["prepare_s"])
            return measured
    budget.log(f"{point.name}: skipped, {reason}")
    return reason


def _points(kind: str, positions: list[int], batches: list[int], contexts: list[int]) -> Iterator[_Point]:
    if kind == "transnormer":
        yield from (_Point("tnllm", "position", 1, position) for position in positions)
        yield from (_Point("tnllm", "batch", batch, 1024) for batch in batches)
        return
    for context in contexts:
        yield from (_Point("transformer", "batch", batch, context) for batch in sorted({1, *batches}))


@torch.no_grad()
def _check(model: LanguageModel, compiled: bool) -> dict[str, Any]:
    """Relative RMS errors of the logits, of the full forward pass and of the timed step, against a wider dtype."""
    # Two rows, so that a row leaking into another is detected.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (2, _CHECK_TOKENS), generator=generator).to(model.device)
    wide = copy.deepcopy(model)
    # Checked is the step, not what rounding costs.
    wide.dequantize()
    wide = wide.to(torch.float64 if model.device.type == "cpu" else torch.float32)
    worst = {"forward": 0.0, "step": 0.0}
    half = _CHECK_TOKENS // 2
    linear = model.config.kind == "transnormer"
    for start in (0, _FAR) if not model.config.num_softmax else (0,):
        states = []
        for net in (wide, model):
            state = net.init_state(2)
            state.position += start
            states.append(net.hidden(tokens[:, :half], state)[1])
        exact = wide(tokens[:, half:], states[0])[0]
        forward = model(tokens[:, half:], states[1])[0]
        if linear:
            # A single row takes another code path in the step.
            stepped = torch.cat(
                [_stepped(model, states[1].select(rows), tokens[rows, half:]) for rows in ([0, 1], [0])]
            )
            exact, forward = exact[[0, 1, 0]], forward[[0, 1, 0]]
        else:
            # The baseline's step covers one position only, the last.
            state = model.hidden(tokens[:, :-1])[1]
            stepped = FixedStep(model, cache_of(state), compiled)(tokens[:, -1])[:, None]
            exact, forward = exact[:, -1:], forward[:, -1:]
        for name, logits in (("forward", forward), ("step", stepped)):
            error = relative_rms(logits, exact)
            # Written so that NaN is kept.
            worst[name] = error if not error <= worst[name] else worst[name]
    limit = _CHECK_RATIO * worst["forward"] + _CHECK_SLACK
    return {
        "provider": "tnllm" if linear else "transformer",
        "forward_error": worst["forward"],
        "step_error": worst["step"],
        "limit": limit,
        "passed": worst["step"] <= limit,
    }


def _stepped(model: LanguageModel, state: Any, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] read one by one."""
    step = _own_step(model, state, _CHECK_TOKENS)
    return torch.stack([step(column).clone() for column in tokens.unbind(1)], dim=1)


def _own_step(model: LanguageModel, state: Any, num_steps: int) -> Step:
    """The step that `generate` runs: on a GPU a captured one, on a CPU one without modules where there is one."""
    if can_capture(model, num_steps):
        return CapturedStep(model, state)
    return cpu_step(model, state) or (lambda tokens: model.step(tokens, state))


def _next(step: Step, tokens: Tensor) -> Tensor:
    """The argmax token after `tokens`, from the step's own graph where that computes it."""
    logits = step(tokens)
    top_token = getattr(step, "top_token", None)
    return logits.argmax(dim=-1) if top_token is None else top_token


@torch.no_grad()
def _time(
    model: LanguageModel, point: _Point, bandwidth: float, budget_s: float, compiled: bool, limit_s: float
) -> dict[str, Any]:
    device = model.device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, model.config.vocab_size, (point.batch,), generator=generator).to(device)
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    state = None
    started = time.perf_counter()
    if point.provider == "tnllm":
        # The state after a short prompt, moved to `position`: a step costs the same whatever the state holds.
        prompt = torch.randint(3, model.config.vocab_size, (1, 64), generator=generator).to(device)
        state = model.hidden(prompt)[1].select([0] * point.batch)
        if state.grows:
            state.layers = [
                resized(x, point.position + _CHAIN[device.type]) if is_cache(x) else x for x in state.layers
            ]
        step = _own_step(model, state, 1 << 30)
        stored = point.batch * model.init_state(1, "meta").nbytes + _cache_bytes(model, point)
    else:
        cache = filled_cache(model, point.batch, point.position)
        step = FixedStep(model, cache, compiled)
        stored = cache.nbytes
    length = _CHAIN[device.type]
    chosen = torch.zeros(length, point.batch, dtype=torch.int64, device=device)

    def chain() -> Tensor:
        if state is not None:
            state.position.fill_(point.position)
        last = tokens
        for index in range(length):
            last = _next(step, last)
            chosen[index] = last
        return chosen

    chain()
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    prepared_s = time.perf_counter() - started
    timing = measure(chain, device, budget_s, limit_s - prepared_s)
    median, low, high = (1e-3 * ms / length for ms in (timing.median_ms, timing.low_ms, timing.high_ms))
    weights, card = _weight_bytes(model, point.batch), data_sheet(device)
    return {
        "step_ms": 1e3 * median,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "tokens_per_s": point.batch / median,
        "weight_gib": weights / 2**30,
        "state_gib": stored / 2**30,
        "bandwidth_share": _moved_bytes(model, point) / bandwidth / median,
        "sheet_share": None if card is None else _moved_bytes(model, point) / card.bandwidth / median,
        "peak_gib": None if peak is None else peak / 2**30,
        "prepare_s": prepared_s,
    }


def _weight_bytes(model: LanguageModel, batch: int) -> int:
    quantized = (part.table for part in model.modules() if isinstance(part, Int8Linear))
    total = sum(part.nbytes for part in (*model.parameters(), *quantized))
    if model.config.tie_embeddings:
        return total
    embedding = model.embed_tokens
    table = embedding.table if isinstance(embedding, Int8Linear) else embedding.weight
    return total - table.nbytes + batch * table.nbytes // model.config.vocab_size


def _moved_bytes(model: LanguageModel, point: _Point) -> int:
    """Bytes that a step must read and write: see the head of this file."""
    if point.provider == "tnllm":
        constant = 2 * point.batch * model.init_state(1, "meta").nbytes
        return _weight_bytes(model, point.batch) + constant + _cache_bytes(model, point)
    return _weight_bytes(model, point.batch) + _cache_bytes(model, point)


def _cache_bytes(model: LanguageModel, point: _Point) -> int:
    row = 2 * model.config.num_softmax * model.config.model_dim * point.position
    return point.batch * row * model.dtype.itemsize


def _needed_bytes(model: LanguageModel, point: _Point) -> int:
    """About how many bytes a measurement needs beyond the weights."""
    config = model.config
    logits = 3 * 4 * point.batch * config.vocab_size
    if point.provider == "tnllm":
        # Capturing warms up on a copy of the state.
        return logits + 2 * (point.batch * model.init_state(1, "meta").nbytes + _cache_bytes(model, point))
    return logits + _cache_bytes(model, point)


def _usable_bytes(device: torch.device) -> int:
    """Most of a GPU's free memory; a quarter of a CPU's, which other processes use too."""
    if device.type == "cuda":
        return int(0.95 * torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
