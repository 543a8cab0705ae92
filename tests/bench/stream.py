"""A million tokens in a row: does the state drift, does memory grow, where does the naive form overflow?

    python -m tests.bench.stream --tokens 65536 --json stream.json     # default: 1048576, about ten minutes on a CPU

It exits with 1 if float32 drifts from float64.

Two measurements, both against float64 with the same weights, decays and tokens.

1. The full model in float32 reads a stream of random tokens in chunks. At every power of four it is compared: the next
   token's logits, those of some decoding steps from there, and every layer's state.
2. One attention layer steps token by token through a stream of the same length, with the fastest decay of the released
   models, a middle one, and the slowest. Beside it run two other forms in float32. The naive one never decays the state
   but scales keys by λ^-t and queries by λ^t (arXiv 2307.14995, Algorithm 1): the same function in exact arithmetic, an
   overflow here. The plain one, S ← λS + kvᵀ, is stable but rounds λ once: where 1 - λ is below 2^-24, it decays at
   another rate.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm.bench.accuracy import relative_rms
from tnllm.bench.report import environment_line, print_table, write_json
from tnllm.device import describe_device
from tnllm.kernels.lightning_attention import lightning_attention_step
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import LanguageModel, build_model
from tnllm.modeling.state import State
from tnllm.progress import log as log_line

# Largest gap between float32's logits and float64's, over the logits' standard deviation, at any position. Sums of a few
# hundred terms rounded at 2^-24 through a few layers; it must not grow with the position.
GAP_LIMIT = 1e-4
_CHUNK = 2048
_STEPS = 32  # decoding steps at each compared position
# Slopes: head 0 of 32 in layer 0; head 3 of 8 in layer 0; the last head in the last layer of any size.
_LOG_DECAYS = {"fastest": -(2.0**-0.25), "middle": -(2.0**-4), "slowest": -(2.0**-8) * 1e-5}
_WIDTH = 16


def bench_stream(preset: str, num_tokens: int, log: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Stream `num_tokens` through a model of `preset` with random weights, and through one layer alone, on the CPU.

    Returns environment, `model` rows, `layer` rows, and `passed`: whether every gap is within GAP_LIMIT.
    """
    log(f"the full model reads {num_tokens} tokens, in float32 and in float64")
    model_rows = _stream_model(preset, num_tokens, log)
    log(f"one layer steps through {num_tokens} tokens")
    layer_rows = _stream_layer(num_tokens, log)
    return {
        "environment": describe_device(torch.device("cpu")),
        "preset": preset,
        "limit": GAP_LIMIT,
        "model": model_rows,
        "layer": layer_rows,
        # Written so that NaN fails.
        "passed": all(row["logits_gap"] <= GAP_LIMIT and row["steps_gap"] <= GAP_LIMIT for row in model_rows)
        and all(row["error"] <= GAP_LIMIT for row in layer_rows),
    }


def _compared_positions(num_tokens: int) -> list[int]:
    """1K, 4K, 16K ... and the end."""
    return [*(1 << power for power in range(10, 63, 2) if 1 << power < num_tokens), num_tokens]


@torch.no_grad()
def _stream_model(preset: str, num_tokens: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    single = build_model(get_preset(preset), seed=0).eval()
    double = copy.deepcopy(single).double()
    generator = torch.Generator().manual_seed(0)
    states = [single.init_state(1), double.init_state(1)]
    rows: list[dict[str, Any]] = []
    position, busy_s, since = 0, 0.0, 0
    for end in _compared_positions(num_tokens):
        while position < end:
            count = min(_CHUNK, end - position)
            tokens = torch.randint(3, single.config.vocab_size, (1, count), generator=generator)
            started = time.perf_counter()
            hidden, states[0] = single.hidden(tokens, states[0])
            busy_s += time.perf_counter() - started
            exact_hidden, states[1] = double.hidden(tokens, states[1])
            position += count
        logits, exact = single.logits(hidden[:, -1]), double.logits(exact_hidden[:, -1])
        rows.append(
            {
                "tokens": position,
                "logits_gap": _gap(logits, exact),
                "steps_gap": _steps_gap(single, double, states, exact),
                "state_error": max(relative_rms(a, b) for a, b in zip(states[0].layers, states[1].layers, strict=True)),
                "resident_mib": _resident_bytes() / 2**20,
                "tokens_per_s": (position - since) / busy_s,
            }
        )
        log(f"{position} tokens: gap {rows[-1]['logits_gap']:.1e}, {rows[-1]['resident_mib']:.0f} MiB")
        busy_s, since = 0.0, position
    return rows


def _steps_gap(single: LanguageModel, double: LanguageModel, states: list[State], logits: Tensor) -> float:
    """Largest gap over some decoding steps from copies of the states, both fed float64's argmax token."""
    a, b = (state.clone() for state in states)
    worst = 0.0
    for _ in range(_STEPS):
        token = logits.argmax(dim=-1)
        result, logits = single.step(token, a), double.step(token, b)
        gap = _gap(result, logits)
        worst = gap if not gap <= worst else worst
    return worst


def _gap(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.std())


@torch.no_grad()
def _stream_layer(num_tokens: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    log_decay = torch.tensor(list(_LOG_DECAYS.values()), dtype=torch.float32)
    heads = len(log_decay)
    generator = torch.Generator().manual_seed(0)
    state = torch.zeros(1, heads, _WIDTH, _WIDTH)
    exact = state.double()
    naive, plain, decay = _Naive(log_decay), state.clone(), log_decay.exp()[:, None, None]
    ends = _compared_positions(num_tokens)
    rows: list[dict[str, Any]] = []
    position = 0
    while position < num_tokens:
        count = min(1024, ends[0] - position)
        q, k, v = torch.randn(3, count, 1, heads, _WIDTH, generator=generator)
        wide = q.double(), k.double(), v.double()
        difference = plain_difference = size = torch.zeros(heads, dtype=torch.float64)
        for t in range(count):
            ours = lightning_attention_step(q[t], k[t], v[t], log_decay, state)
            true = lightning_attention_step(wide[0][t], wide[1][t], wide[2][t], log_decay, exact)
            difference = difference + (ours.double() - true).square().sum((0, 2))
            plain = decay * plain + k[t][..., None] * v[t][..., None, :]
            rounded = (q[t][..., None, :] @ plain).squeeze(-2)
            plain_difference = plain_difference + (rounded.double() - true).square().sum((0, 2))
            size = size + true.square().sum((0, 2))
            naive.step(q[t, 0], k[t, 0], v[t, 0])
        position += count
        if position == ends[0]:
            ends.pop(0)
            # Over the last tokens only, so that an early error that has decayed does not count.
            error, plain_error = (difference / size).sqrt(), (plain_difference / size).sqrt()
            for head, name in enumerate(_LOG_DECAYS):
                rows.append(
                    {
                        "tokens": position,
                        "decay": name,
                        "log_decay": float(log_decay[head]),
                        "error": float(error[head]),
                        "plain_error": float(plain_error[head]),
                        "naive_broken_at": naive.broken_at[head],
                    }
                )
            log(f"{position} steps: error {float(error.max()):.1e}")
    return rows


class _Naive:
    """S += (λ^-t k) vᵀ, o = Sᵀ (λ^t q), in float32."""

    def __init__(self, log_decay: Tensor) -> None:
        self._log_decay = log_decay[:, None]
        self._state = torch.zeros(len(log_decay), _WIDTH, _WIDTH)
        self._t = 0
        self.broken_at: list[int | None] = [None] * len(log_decay)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """One token; q, k, v [H, D]. Records the first position whose output is not finite."""
        self._t += 1
        self._state += (k * (-self._t * self._log_decay).exp())[..., None] * v[..., None, :]
        out = ((q * (self._t * self._log_decay).exp())[..., None, :] @ self._state).squeeze(-2)
        for head, finite in enumerate(out.isfinite().all(dim=-1).tolist()):
            if not finite and self.broken_at[head] is None:
                self.broken_at[head] = self._t


def _resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(args: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(args)
    results = bench_stream(given.preset, given.tokens, log_line)
    print(environment_line(results["environment"]))
    columns = [
        ("tokens read", "{tokens:tokens}"), ("next logits", "{logits_gap:.1e}"), ("32 steps", "{steps_gap:.1e}"),
        ("state", "{state_error:.1e}"), ("resident MiB", "{resident_mib:.0f}"), ("tokens/s", "{tokens_per_s:.0f}"),
    ]  # fmt: skip
    title = f"{given.preset}, float32 against float64: largest gap of logits over their standard deviation"
    print_table(title, columns, results["model"])
    columns = [
        ("steps", "{tokens:tokens}"), ("decay", "{decay}"), ("log decay", "{log_decay:.3g}"), ("error", "{error:.1e}"),
        ("plain form", "{plain_error:.1e}"), ("naive form", "{naive}"),
    ]  # fmt: skip
    rows = [{**row, "naive": _naive(row["naive_broken_at"])} for row in results["layer"]]
    print_table("one layer, step by step: relative error of the latest outputs", columns, rows, ("decay", "naive form"))
    if given.json is not None:
        write_json(results, given.json)
    if not results["passed"]:
        log_line(f"float32 drifts from float64 by more than {results['limit']:g}; see the table")
    return 0 if results["passed"] else 1


def _naive(broken_at: int | None) -> str:
    return "finite" if broken_at is None else f"not finite from token {broken_at}"


if __name__ == "__main__":
    raise SystemExit(main())
