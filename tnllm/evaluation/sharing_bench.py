"""Shared prefixes against the plain way: the same requests, the same model, one run; answers compared first.

results = bench_sharing(model, bundle, note=print)
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tnllm.evaluation.request_file import Bundle, count_tokens
from tnllm.generation.scoring import Scorer
from tnllm.modeling.model import LanguageModel

# What two ways of computing the same log-probability may differ by, in nats: see docs/numerics.md.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float64: 1e-9}
_WARM_UP = 64  # questions


def bench_sharing(
    model: LanguageModel,
    bundle: Bundle,
    questions: int | None = None,
    plain: bool = True,
    batch_tokens: int | None = None,
    note: Callable[[str], None] = lambda text: None,
    report: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> dict[str, Any]:
    """Score the first `questions` both ways; times exclude a warm-up that compiles the kernels.

    Whether the log-probabilities agree within the tolerance is in "agreement": without that, times mean nothing.
    """
    count = len(bundle.answers) if questions is None else min(questions, len(bundle.answers))
    number = sum(question < count for question in bundle.questions)
    requests, asked = bundle.requests[:number], np.array(bundle.questions[:number])
    warm = sum(question < min(count, _WARM_UP) for question in bundle.questions)
    results: dict[str, Any] = {"questions": count, "counts": count_tokens(requests), "ways": []}
    logprobs = {}
    for way, share in (("shared", True), ("plain", False))[: 2 if plain else 1]:
        _run(model, requests[:warm], share, batch_tokens, note, way, lambda kind, done, total: None)
        logprobs[way], row = _run(model, requests, share, batch_tokens, note, way, report)
        results["ways"].append(row)
        note(f"{way}: {row['tokens']:,} tokens in {row['seconds']:.1f} s, {row['tokens_per_s']:,.0f} tokens/s")
    picked = {way: _picked(values, asked, count) for way, values in logprobs.items()}
    answers = np.array(bundle.answers[:count])
    for row in results["ways"]:
        row["accuracy"] = float((picked[row["way"]][0] == answers).mean())
    if plain:
        gap = np.abs(logprobs["shared"] - logprobs["plain"])
        changed = np.flatnonzero(picked["shared"][0] != picked["plain"][0])
        margins = picked["plain"][1]
        results["agreement"] = {
            "largest_difference": float(gap.max()), "mean_difference": float(gap.mean()),
            "tolerance": TOLERANCE[model.head_weight.dtype],
            "changed": [
                {
                    "question": int(index),
                    "plain": int(picked["plain"][0][index]),
                    "shared": int(picked["shared"][0][index]),
                    "margin": float(margins[index]),
                }
                for index in changed
            ],
            "question_of_largest": int(asked[gap.argmax()]),
            "margins_within_difference": int((margins <= 2 * gap.max()).sum()),
        }  # fmt: skip
        results["token_ratio"] = results["ways"][1]["tokens"] / results["ways"][0]["tokens"]
        results["time_ratio"] = results["ways"][1]["seconds"] / results["ways"][0]["seconds"]
    return results


def _run(
    model: LanguageModel, requests: list[Any], share: bool, batch_tokens: int | None, note: Callable[[str], None], way: str,
    report: Callable[[str, int, int], None],
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], dict[str, Any]]:  # fmt: skip
    scorer = Scorer(model, share, batch_tokens, note=note)
    values = np.empty(len(requests), np.float64)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for score in scorer.score(requests, lambda done, total: report(way, done, total)):
        values[score.index] = score.logprobs.sum()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else None
    return values, {
        "way": way, "tokens": scorer.num_tokens, "seconds": seconds, "tokens_per_s": scorer.num_tokens / seconds,
        "requests_per_s": len(requests) / seconds, "memory_gib": peak,
    }  # fmt: skip


def _picked(logprobs: Any, asked: Any, count: int) -> tuple[Any, Any]:
    """The likeliest choice of each question and its lead over the second, in nats."""
    choices, margins = np.empty(count, np.int64), np.empty(count, np.float64)
    bounds = np.searchsorted(asked, np.arange(count + 1))
    for question in range(count):
        choices[question], margins[question] = pick(logprobs[bounds[question] : bounds[question + 1]])
    return choices, margins


def pick(values: Any) -> tuple[int, float]:
    """The likeliest choice, the first of equal ones, and its lead over the second."""
    best = int(np.argmax(values))
    others = np.delete(values, best)
    return best, float(values[best] - others.max()) if len(others) else float("inf")
