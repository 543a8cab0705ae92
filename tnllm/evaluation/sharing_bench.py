"""Shared prefixes against one request at a time: same requests, same model, one run; answers are compared first.

results = bench_sharing(model, bundle, log=print)
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tnllm.evaluation.request_file import Bundle, count_tokens
from tnllm.generation.scoring import Scorer
from tnllm.modeling.model import LanguageModel

# Allowed difference in nats between two ways to compute a log-probability; docs/numerics.md gives the reasons.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float64: 1e-9}
_WARM_UP_QUESTIONS = 64


def bench_sharing(
    model: LanguageModel,
    bundle: Bundle,
    questions: int | None = None,
    plain: bool = True,
    batch_tokens: int | None = None,
    log: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda way, done, total: None,
) -> dict[str, Any]:
    """Score the first `questions` both ways; times exclude a warm-up that compiles the kernels.

    The times are valid only if the log-probabilities agree within the tolerance, which "agreement" says.
    """
    count = len(bundle.answers) if questions is None else min(questions, len(bundle.answers))
    num_requests = sum(question < count for question in bundle.questions)
    requests, asked = bundle.requests[:num_requests], np.array(bundle.questions[:num_requests])
    warm = sum(question < min(count, _WARM_UP_QUESTIONS) for question in bundle.questions)
    results: dict[str, Any] = {"questions": count, "counts": count_tokens(requests), "ways": []}
    logprobs = {}
    for way, share in (("shared", True), ("plain", False))[: 2 if plain else 1]:
        _run(model, requests[:warm], share, batch_tokens, log, way, lambda way, done, total: None)
        logprobs[way], row = _run(model, requests, share, batch_tokens, log, way, progress)
        results["ways"].append(row)
        log(f"{way}: {row['tokens']:,} tokens in {row['seconds']:.1f} s, {row['tokens_per_s']:,.0f} tokens/s")
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
            "tolerance": TOLERANCE[model.dtype],
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
    model: LanguageModel, requests: list[Any], share: bool, batch_tokens: int | None, log: Callable[[str], None], way: str,
    progress: Callable[[str, int, int], None],
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], dict[str, Any]]:  # fmt: skip
    scorer = Scorer(model, share, batch_tokens, None, log)
    values = np.empty(len(requests), np.float64)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for score in scorer.score(requests, lambda done, total: progress(way, done, total)):
        values[score.index] = score.logprobs.sum()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else None
    return values, {
        "way": way, "tokens": scorer.num_tokens, "seconds": seconds, "tokens_per_s": scorer.num_tokens / seconds,
        "requests_per_s": len(requests) / seconds, "memory_gib": peak,
    }  # fmt: skip


def _picked(logprobs: Any, asked: Any, count: int) -> tuple[Any, Any]:
    """The most likely choice of each question and its margin over the second, in nats."""
    choices, margins = np.empty(count, np.int64), np.empty(count, np.float64)
    bounds = np.searchsorted(asked, np.arange(count + 1))
    for question in range(count):
        choices[question], margins[question] = pick(logprobs[bounds[question] : bounds[question + 1]])
    return choices, margins


def pick(values: Any) -> tuple[int, float]:
    """Return the argmax (the first of equal values) and its margin over the second."""
    best = int(np.argmax(values))
    others = np.delete(values, best)
    return best, float(values[best] - others.max()) if len(others) else float("inf")
