"""Scores compared with the harness's own `hf` model on the same weights.

    results = check_against_hf({"piqa": loaded}, export, model=None, limit=100)
    results["tasks"][0]["changed"]                               # answers that differ, with their margins

The `hf` model shares no code with this package's scoring: it runs the exported Hugging Face model and tokenizer, and the
harness's splitting, padding and batching.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.task import Task

from tnllm.errors import MissingExtra
from tnllm.evaluation.harness import Progress, TransNormerLM
from tnllm.evaluation.multiple_choice import ask
from tnllm.evaluation.sharing_bench import TOLERANCE, pick
from tnllm.evaluation.tasks import Loaded

Question = tuple[Task, list[Instance]]
Answers = list[tuple[float, bool]]
WAYS = ("tnllm", "hf")


def need_transformers() -> None:
    """Raise MissingExtra if a package that the harness's `hf` model needs is not installed."""
    for package in ("transformers", "accelerate"):
        if find_spec(package) is None:
            raise MissingExtra("hf", package)


def check_against_hf(
    sets: dict[str, Loaded],
    export: Callable[[Path, Path], None],
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 1234,
    log: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda kind, done, total: None,
) -> dict[str, Any]:
    """Answer the questions of all sets both ways. `sets`: name → multiple-choice tasks with one row of results.

    `export(weights folder, new folder)` writes the Hugging Face folder. `batch_size` is the `hf` model's. Raises UserError
    for tasks that are not multiple-choice, MissingExtra without transformers.
    """
    need_transformers()
    label = "warm-up"
    lm = TransNormerLM(
        model, device, dtype, log=log, progress=lambda _, done, total: progress(f"tnllm, {label}", done, total)
    )
    questions_of = {name: list(ask(loaded, limit, seed)) for name, loaded in sets.items()}
    warm_up = next(iter(questions_of.values()))[0][1]
    runs: dict[str, list[tuple[list[Answers], int, float]]] = {}
    lm.loglikelihood(warm_up)
    for name, questions in questions_of.items():
        label = name
        runs.setdefault("tnllm", []).append(_run(lm, questions, lambda: lm.scorer.num_tokens))
    with tempfile.TemporaryDirectory(prefix="tnllm-hf-") as folder:
        export(lm.ready.folder, Path(folder, "model"))
        # The `hf` model truncates prompts longer than `max_length`, so that is set above the longest one.
        hf, counts = _open_hf(Path(folder, "model"), str(lm.device), dtype, batch_size, lm.longest + 1)
        hf.loglikelihood(warm_up, disable_tqdm=True)
        for name, questions in questions_of.items():
            counts.start(sum(len(instances) for _, instances in questions), f"hf, {name}", progress)
            runs.setdefault("hf", []).append(_run(hf, questions, lambda: counts.num_tokens))
    rows = [
        _compare(name, questions, {way: runs[way][index] for way in WAYS})
        for index, (name, questions) in enumerate(questions_of.items())
    ]
    return {
        "model": str(lm.ready.folder), "weights_sha256": lm.weights_sha256, "dtype": dtype, "batch_size": batch_size,
        "limit": limit, "lm_eval": version("lm_eval"), "transformers": version("transformers"),
        "tolerance": TOLERANCE[lm.ready.model.dtype], "tasks": rows,
    }  # fmt: skip


class _Counts(CacheHook):
    """Counts the tokens that the `hf` model computes, padding included, and reports progress as its cache hook."""

    def __init__(self) -> None:
        super().__init__(None)
        self.num_tokens = 0
        self.start(0, "", lambda kind, done, total: None)

    def start(self, total: int, label: str, progress: Progress) -> None:
        """Report the next `total` answers as `label`."""
        self._done, self._total, self._label, self._progress = 0, total, label, progress

    def add_partial(self, *answer: Any) -> None:
        """Called by the harness with each answer."""
        self._done += 1
        self._progress(self._label, self._done, self._total)


def _open_hf(folder: Path, device: str, dtype: str, batch_size: int, max_length: int) -> tuple[LM, _Counts]:
    from lm_eval.models.huggingface import HFLM

    counts = _Counts()

    class Counted(HFLM):
        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            counts.num_tokens += inps.numel()
            return super()._model_call(inps, *args, **kwargs)

    hf = Counted(
        pretrained=str(folder), backend="causal", device=device, dtype=dtype, batch_size=batch_size,
        max_length=max_length, trust_remote_code=True,
    )  # fmt: skip
    hf.set_cache_hook(counts)
    return hf, counts


def _run(lm: LM, questions: list[Question], tokens: Callable[[], int]) -> tuple[list[Answers], int, float]:
    """Return answers by question, tokens computed and seconds, encoding included."""
    before, started = tokens(), time.perf_counter()
    requests = [instance for _, instances in questions for instance in instances]
    answers = iter(lm.loglikelihood(requests, disable_tqdm=True))
    seconds = time.perf_counter() - started
    return [[next(answers) for _ in instances] for _, instances in questions], tokens() - before, seconds


def _compare(name: str, questions: list[Question], runs: dict[str, tuple[list[Answers], int, float]]) -> dict[str, Any]:
    correct: dict[str, dict[str, list[float]]] = {}
    changed = []
    gaps: list[float] = []
    for number, (task, instances) in enumerate(questions):
        document, identity = instances[0].doc, instances[0].doc_id
        answers = {way: runs[way][0][number] for way in WAYS}
        logprobs = {way: np.array([logprob for logprob, _ in answers[way]]) for way in WAYS}
        difference = np.abs(logprobs["tnllm"] - logprobs["hf"])
        gaps += difference.tolist()
        lengths = [len(choice) for choice in task.doc_to_choice(document)]
        for metric in ("acc", "acc_norm"):
            scores = {way: task.process_results(document, answers[way]).get(metric) for way in WAYS}
            if scores["hf"] is None:
                continue
            for way in WAYS:
                correct.setdefault(metric, {}).setdefault(way, []).append(float(scores[way]))
            picks = {way: _choice(logprobs[way], lengths, metric == "acc_norm") for way in WAYS}
            if picks["tnllm"][0] != picks["hf"][0]:
                changed.append(
                    {
                        "task": task.task_name, "question": identity, "metric": metric,
                        **{way: picks[way][0] for way in WAYS}, "margin": picks["hf"][1],
                        "unit": "nats per character" if metric == "acc_norm" else "nats",
                        "difference": float(difference.max()),
                    }
                )  # fmt: skip
    return {
        "task": name, "questions": len(questions), "requests": len(gaps),
        "metrics": {
            metric: {way: float(np.mean(values)) for way, values in ways.items()} for metric, ways in correct.items()
        },
        "changed": changed, "largest_difference": float(np.max(gaps)), "mean_difference": float(np.mean(gaps)),
        "tokens": {way: runs[way][1] for way in WAYS}, "seconds": {way: runs[way][2] for way in WAYS},
    }  # fmt: skip


def _choice(logprobs: Any, lengths: Sequence[int], normed: bool) -> tuple[int, float]:
    """The choice of the harness's acc, or acc_norm if `normed`, and its margin in nats (per character if `normed`)."""
    with np.errstate(divide="ignore"):
        return pick(logprobs[: len(lengths)] / (np.array(lengths, np.float64) if normed else 1.0))
